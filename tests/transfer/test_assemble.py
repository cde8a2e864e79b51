"""Pieces into one file: proven, journaled, resumed, never half-believed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.commands.split import split_file as split
from csm_weights.errors import CsmWeightsError, Finding, Kind, MissingInput, NoSpace, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store import block_io
from csm_weights.store.journal import PieceRecord, journal_path, parse_line, partial_path
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer.assemble import Assembly, assemble, write_text
from csm_weights.transfer.local import ChunkFiles, WholeFile
from csm_weights.transfer.source import NotAvailable, PieceWriter, Source, SourceError, first_of
from tests.support.toy import flip

#: Bytes of a piece: more than a block of hashing, and not a multiple of one.
PIECE = 300_007
COUNT = 4
SIZE = PIECE * COUNT - 54_321


def ignore(_: int) -> None:
    """Counts nothing."""


class Shop:
    """A folder with a file, its parts, and the entry that pins them."""

    def __init__(self, root: Path, size: int = SIZE, piece: int = PIECE) -> None:
        self.root = root
        self.file = root / "model.bin"
        self.file.write_bytes(random.Random(size).randbytes(size))
        self.artifact = split(self.file, root, "chunks", piece, ignore)
        self.target = root / "out" / "model.bin"
        self.partial = partial_path(self.target)
        self.journal = journal_path(self.target)

    def chunk_file(self, index: int) -> Path:
        return self.root / self.artifact.pieces[index].part

    def job(self, *sources: Source, journaled: tuple[PieceRecord, ...] = ()) -> Assembly:
        """A job from the sources, or from the parts where none is given."""
        source = first_of(*(sources or (ChunkFiles(self.root),)))
        return Assembly(self.artifact, self.target, source, journaled)

    def run(self, *sources: Source, journaled: tuple[PieceRecord, ...] = ()) -> VerifiedFile:
        return assemble([self.job(*sources, journaled=journaled)], ignore)[0]

    def is_right(self, made: VerifiedFile) -> bool:
        data = self.file.read_bytes()
        return (made.path.read_bytes(), made.sha256) == (data, hashlib.sha256(data).hexdigest())

    def journaled(self) -> tuple[PieceRecord, ...]:
        records = [parse_line(line) for line in self.journal.read_text().splitlines()]
        return tuple(record for record in records if isinstance(record, PieceRecord))


class Counting:
    """A source that hands on to another, and remembers what it was asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.asked: list[int] = []

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        self.asked.append(piece.offset)
        return self.source.deliver(artifact, piece, writer)


class Nowhere:
    """A source that has nothing."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        raise NotAvailable


class Refusing:
    """A source that has everything and gives nothing, telling why."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        raise SourceError([Finding(Kind.UNREADABLE, f"refused {piece.offset}", "bytes", "none")])


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """A fresh shop."""
    return Shop(tmp_path)


# ---- the straight way


def test_the_file_is_its_pieces(shop: Shop) -> None:
    """Bytes, digest, records and fingerprint are those of the whole file."""
    made = shop.run()
    assert shop.is_right(made)
    assert [r.source for r in made.pieces] == [p.part for p in shop.artifact.pieces]
    assert all(r.is_of(p) for r, p in zip(made.pieces, shop.artifact.pieces, strict=True))
    assert made.fingerprint == Fingerprint.of(shop.partial.stat())


def test_the_final_name_is_not_given(shop: Shop) -> None:
    """Assembling ends with the partial; nothing here knows the final name."""
    shop.run()
    assert (shop.partial.exists(), shop.target.exists()) == (True, False)


def test_the_journal_has_a_line_for_each_piece(shop: Shop) -> None:
    """What was proven is on disk before the run ends."""
    made = shop.run()
    assert sorted(shop.journaled(), key=lambda r: r.offset) == list(made.pieces)


def test_every_byte_is_counted_once(shop: Shop) -> None:
    """Ticks add up to the file's size when all goes well."""
    ticks: list[int] = []
    assemble([shop.job()], ticks.append)
    assert sum(ticks) == SIZE


def test_two_files_are_assembled_at_once(tmp_path: Path) -> None:
    """Jobs of different sizes do not mix, and results come in the order of the jobs."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    shops = [Shop(tmp_path / "x", 10_000, 3_000), Shop(tmp_path / "y", 70_000, 10_000)]
    made = assemble([s.job() for s in shops], ignore)
    assert [s.is_right(m) for s, m in zip(shops, made, strict=True)] == [True, True]


def test_a_whole_copy_is_a_source(shop: Shop) -> None:
    """Pieces can be taken out of a copy of the whole artifact."""
    made = shop.run(WholeFile(shop.file))
    assert shop.is_right(made)
    assert {r.source for r in made.pieces} == {str(shop.file)}


@pytest.mark.parametrize(("size", "piece"), [(3 << 20, 1 << 20), (11_000_001, 5_300_003)])
def test_pieces_of_many_blocks_and_whole_pages_arrive(
    tmp_path: Path, size: int, piece: int
) -> None:
    """Pieces that need several writes, or could go straight to the disk, are right."""
    shop = Shop(tmp_path, size, piece)
    assert shop.is_right(shop.run())


def test_without_direct_writes_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no direct writes, all goes through the page cache."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    shop = Shop(tmp_path, 3 << 20, 1 << 20)
    assert shop.is_right(shop.run())


def test_a_file_system_that_refuses_direct_writes_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct write that is refused is made through the page cache."""
    real = os.pwrite
    refused: list[int] = []

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    shop = Shop(tmp_path, 3 << 20, 1 << 20)
    monkeypatch.setattr(os, "pwrite", refuse)
    assert shop.is_right(shop.run())
    if not refused:
        pytest.skip("no direct writes in this folder")


@pytest.mark.parametrize("most", [1000, 5000])
def test_short_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A write that takes only some of the bytes is followed by one of the rest."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data[:most]), at))
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    shop = Shop(tmp_path, 100_000, 33_000)
    assert shop.is_right(shop.run())


def test_a_part_that_changes_while_its_blocks_are_shared_is_refused(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared blocks are hashed in the part, so a part that is touched meanwhile does not count."""
    touched = -1

    def clone(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> bool:
        os.pwrite(dst, os.pread(src, size, src_offset), dst_offset)
        if dst_offset == touched:
            os.utime(shop.chunk_file(2))
        return True

    monkeypatch.setattr(block_io, "clone_range", clone)
    assert shop.is_right(shop.run())
    touched = 2 * PIECE
    with pytest.raises(WrongContent) as caught:
        shop.run()
    found = [(f.kind, f.where) for f in caught.value.findings]
    assert found == [(Kind.CHANGED, shop.artifact.pieces[2].part)]


# ---- resuming


def test_kept_pieces_are_not_asked_for_again(shop: Shop) -> None:
    """Journaled pieces are proven where they lie; only the rest is delivered."""
    first = shop.run()
    source = Counting(ChunkFiles(shop.root))
    made = shop.run(source, journaled=first.pieces[1:3])
    assert shop.is_right(made)
    assert sorted(source.asked) == [0, 3 * PIECE]


def test_a_kept_piece_that_rotted_is_delivered_again(shop: Shop) -> None:
    """The journal's word is not believed: a piece that is wrong now is replaced."""
    first = shop.run()
    flip(shop.partial, 2 * PIECE + 5)
    source = Counting(ChunkFiles(shop.root))
    made = shop.run(source, journaled=first.pieces)
    assert shop.is_right(made)
    assert source.asked == [2 * PIECE]


@settings(max_examples=25, deadline=None)
@given(
    kept=st.sets(st.integers(0, 5)),
    rotten=st.sets(st.integers(0, 5)),
    cut=st.none() | st.integers(0, 50_000),
)
def test_any_partial_leads_to_the_right_file(
    kept: set[int], rotten: set[int], cut: int | None
) -> None:
    """Whatever is journaled, rotten or cut off, the end is the right file."""
    with tempfile.TemporaryDirectory() as name:
        shop = Shop(Path(name), 50_000, 9_000)
        first = shop.run()
        for index in rotten:
            flip(shop.partial, shop.artifact.pieces[index].offset + 7)
        if cut is not None:
            os.truncate(shop.partial, cut)
        assert shop.is_right(shop.run(journaled=tuple(first.pieces[i] for i in sorted(kept))))


# ---- bad pieces


def test_a_flipped_part_is_told_and_the_others_are_kept(shop: Shop) -> None:
    """One wrong piece is one finding; what was proven is journaled for the next run."""
    flip(shop.chunk_file(1))
    with pytest.raises(WrongContent) as caught:
        shop.run()
    assert [(f.kind, f.where) for f in caught.value.findings] == [
        (Kind.WRONG_DIGEST, shop.artifact.pieces[1].part)
    ]
    assert {r.offset for r in shop.journaled()} == {0, 2 * PIECE, 3 * PIECE}
    assert not shop.target.exists()


def test_a_missing_part_is_a_missing_input(shop: Shop) -> None:
    """A piece that no source has is told as missing, with its part's name."""
    shop.chunk_file(2).unlink()
    with pytest.raises(MissingInput) as caught:
        shop.run()
    assert [f.where for f in caught.value.findings] == [shop.artifact.pieces[2].part]


def test_wrong_outweighs_missing(shop: Shop) -> None:
    """With one part gone and one wrong, the exit code is that of wrong content."""
    shop.chunk_file(0).unlink()
    flip(shop.chunk_file(3))
    with pytest.raises(WrongContent) as caught:
        shop.run()
    assert [f.kind for f in caught.value.findings] == [Kind.MISSING, Kind.WRONG_DIGEST]


def test_a_part_of_the_wrong_size_is_told(shop: Shop) -> None:
    """A part that is too long is broken, though its first bytes are right."""
    with shop.chunk_file(0).open("ab") as file:
        file.write(b"more")
    with pytest.raises(WrongContent) as caught:
        shop.run()
    assert [f.kind for f in caught.value.findings] == [Kind.WRONG_SIZE]


def test_a_part_that_is_written_meanwhile_is_told(shop: Shop) -> None:
    """A part that changes during the read does not count, even if its digest fits."""

    class Touching(ChunkFiles):
        def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
            touching = cast(PieceWriter, _TouchingWriter(writer, shop.chunk_file(0)))
            return super().deliver(artifact, piece, touching)

    class _TouchingWriter:
        def __init__(self, writer: PieceWriter, part: Path) -> None:
            self.writer, self.part = writer, part

        def copy_from(self, fd: int, offset: int) -> None:
            self.writer.copy_from(fd, offset)
            os.utime(self.part, ns=(1, 1))

    with pytest.raises(WrongContent) as caught:
        shop.run(Touching(shop.root))
    assert Kind.CHANGED in [f.kind for f in caught.value.findings]


def test_a_part_that_is_cut_meanwhile_is_told(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that ends early during the read is its own finding, and no crash."""
    real = os.preadv

    def ending(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0 and Path(f"/proc/self/fd/{fd}").readlink() == shop.chunk_file(3):
            return 0
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", ending)
    with pytest.raises(WrongContent) as caught:
        shop.run()
    about = [(f.kind, f.where) for f in caught.value.findings]
    assert about == [(Kind.UNREADABLE, shop.artifact.pieces[3].part)]


def test_a_manifest_with_a_wrong_whole_gives_no_file(shop: Shop) -> None:
    """Right pieces that do not make up the pinned whole are wrong content."""
    shop.artifact = replace(shop.artifact, sha256="0" * 64)
    with pytest.raises(WrongContent) as caught:
        shop.run()
    assert [(f.kind, f.expected) for f in caught.value.findings] == [
        (Kind.WRONG_DIGEST, f"sha256 {'0' * 64}")
    ]


def test_the_blob_id_stands_in_for_the_whole_digest(shop: Shop) -> None:
    """Without a whole sha256, the Hub blob id is held against the assembled file."""
    shop.artifact = replace(shop.artifact, sha256=None)
    assert shop.is_right(shop.run())
    shop.artifact = replace(shop.artifact, blob_id="0" * 40)
    with pytest.raises(WrongContent, match="blob id"):
        shop.run()


# ---- more than one source


def test_the_next_source_is_asked_when_one_has_nothing(shop: Shop) -> None:
    """Absent pieces are taken from the source that has them."""
    shop.chunk_file(1).unlink()
    made = shop.run(Nowhere(), ChunkFiles(shop.root), WholeFile(shop.file))
    assert shop.is_right(made)
    assert [r.source for r in made.pieces].index(str(shop.file)) == 1


@pytest.mark.parametrize("index", range(COUNT))
def test_a_broken_piece_is_taken_from_the_next_source(shop: Shop, index: int) -> None:
    """Bytes that one source got wrong leave no trace in what the next one delivers."""
    flip(shop.chunk_file(index))
    made = shop.run(ChunkFiles(shop.root), WholeFile(shop.file))
    assert shop.is_right(made)
    assert made.pieces[index].source == str(shop.file)


def test_what_every_source_said_is_told(shop: Shop) -> None:
    """When all sources fail on a piece, each one's finding is there."""
    flip(shop.chunk_file(0))
    with pytest.raises(WrongContent) as caught:
        shop.run(Refusing(), Nowhere(), ChunkFiles(shop.root), WholeFile(shop.root / "gone"))
    about_first = [f.where for f in caught.value.findings]
    assert about_first == ["refused 0", shop.artifact.pieces[0].part]


def test_a_source_is_never_believed(shop: Shop) -> None:
    """A job's pieces are proven whatever its source is made of, even a single one."""
    flip(shop.chunk_file(1))
    artifact = replace(shop.artifact, sha256=None, blob_id=None)
    with pytest.raises(WrongContent):
        assemble([Assembly(artifact, shop.target, ChunkFiles(shop.root))], ignore)


# ---- the disk


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_system_that_takes_no_more_is_exit_7(shop: Shop) -> None:
    """When the file cannot be as large as it must, the error says so and names it."""
    with file_size_limit(SIZE // 2), pytest.raises(NoSpace) as caught:
        shop.run()
    assert [(f.kind, f.where) for f in caught.value.findings] == [
        (Kind.NO_SPACE, str(shop.partial))
    ]


def test_a_disk_that_fills_up_midway_is_exit_7_and_loses_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space in the middle ends the run; a later one goes on from there."""
    real = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset >= 3 * PIECE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(NoSpace):
            shop.run()
    assert shop.is_right(shop.run(journaled=shop.journaled()))


@pytest.mark.parametrize("name", ["partial", "journal"])
def test_a_link_in_place_of_our_files_is_not_followed(shop: Shop, name: str) -> None:
    """A link planted under the partial's or journal's name never has its target written."""
    precious = shop.root / "precious"
    precious.write_text("precious")
    planted = shop.partial if name == "partial" else shop.journal
    planted.parent.mkdir()
    planted.symlink_to(precious)
    with pytest.raises(CsmWeightsError):
        shop.run()
    assert precious.read_text() == "precious"


def test_a_folder_that_is_a_file_is_told(shop: Shop) -> None:
    """When the staging folder's name is taken by a file, the error is ours and names it."""
    shop.target.parent.write_text("not a folder")
    with pytest.raises(CsmWeightsError) as caught:
        shop.run()
    assert str(shop.target.parent) in str(caught.value)


def test_no_file_is_left_open(shop: Shop) -> None:
    """Every descriptor is closed again, after success and after failure."""
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no /proc here")
    before = len(list(fds.iterdir()))
    shop.run()
    flip(shop.chunk_file(0))
    with pytest.raises(WrongContent):
        shop.run()
    assert len(list(fds.iterdir())) == before


# ---- known texts


def test_a_known_text_is_written_whole(tmp_path: Path) -> None:
    """The partial holds just the text in UTF-8, with its digest and fingerprint."""
    made = write_text(tmp_path / "new" / "note.txt", "été\n")
    content = "été\n".encode()
    assert made.path.read_bytes() == content
    assert made.sha256 == hashlib.sha256(content).hexdigest()
    assert made.fingerprint == Fingerprint.of(made.path.stat())
    assert (made.pieces, made.path.name) == ((), "note.txt.partial")


def test_a_longer_leftover_is_cut(tmp_path: Path) -> None:
    """What an earlier run left under the partial's name does not stick out."""
    partial_path(tmp_path / "note.txt").write_text("a much longer leftover")
    assert write_text(tmp_path / "note.txt", "short").path.read_text() == "short"

"""Pieces into one file: verified, journaled, resumed, never half-believed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import resource
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights import hashing
from csm_weights.byte_ranges import ByteRange
from csm_weights.commands.split import split_file as split
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    NetworkFailed,
    NoSpace,
    WrongContent,
)
from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Edition, Piece
from csm_weights.store import block_io
from csm_weights.store.journal import (
    Arrival,
    PieceRecord,
    journal_path,
    parse_line,
    partial_path,
)
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer import assemble as assembling
from csm_weights.transfer.assemble import Assembly, assemble, write_text
from csm_weights.transfer.local import ChunkFiles, WholeFile
from csm_weights.transfer.policy import LazySource
from csm_weights.transfer.source import FirstOf, NotAvailable, PieceWriter, Source, SourceError
from tests.support.toy import flip

#: Bytes of a piece: more than a block of hashing, and not a multiple of one.
PIECE = 300_007
COUNT = 4
SIZE = PIECE * COUNT - 54_321


def ignore(_: int) -> None:
    """Counts nothing."""


class Sample:
    """A folder with a file, its chunk files, and the entry that pins them."""

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
        """A job from the sources, or from the chunk files where none is given."""
        source = FirstOf(*(sources or (ChunkFiles(self.root),)))
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


class Streaming:
    """A source that gives what is wanted of `data` in buffers, and remembers those ranges."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.given: list[tuple[int, int]] = []

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        for start, end in writer.wanted():
            buffer, size = writer.acquire_buffer(), end - start
            buffer[:size] = self.data[start:end]
            writer.advance(size)
            writer.write(buffer, start, size)
            self.given.append((start, end))
        return "stream"


class Changing(Streaming):
    """A server that gives other wrong bytes each time, up to the one when they are right."""

    is_remote = True

    def __init__(self, data: bytes, right_at: int) -> None:
        super().__init__(data)
        self.right, self.right_at = data, right_at

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        times = len(self.given) + 1
        self.data = self.right if times == self.right_at else bytes([times]) * len(self.right)
        return super().deliver(artifact, piece, writer)


class BreakingOff:
    """A source that gives a wrong first byte, and then an error."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        writer.write(writer.acquire_buffer(), piece.offset, 1)
        return Refusing().deliver(artifact, piece, writer)


class Refusing:
    """A source that has everything and gives nothing, telling why."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        raise SourceError([Finding(Kind.UNREADABLE, f"refused {piece.offset}", "bytes", "none")])


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """A fresh sample."""
    return Sample(tmp_path)


# ---- the straight way


def test_the_file_is_its_pieces(sample: Sample) -> None:
    """Bytes, digest, records and fingerprint are those of the whole file."""
    made = sample.run()
    assert sample.is_right(made)
    assert [r.source for r in made.pieces] == [p.part for p in sample.artifact.pieces]
    assert all(r.is_of(p) for r, p in zip(made.pieces, sample.artifact.pieces, strict=True))
    assert made.fingerprint == Fingerprint.of(sample.partial.stat())


def test_the_final_name_is_not_given(sample: Sample) -> None:
    """Assembling ends with the partial; nothing here knows the final name."""
    sample.run()
    assert (sample.partial.exists(), sample.target.exists()) == (True, False)


def test_the_journal_has_a_line_for_each_piece(sample: Sample) -> None:
    """What was verified is on disk before the run ends."""
    made = sample.run()
    assert sorted(sample.journaled(), key=lambda r: r.offset) == list(made.pieces)


def test_every_byte_is_counted_once(sample: Sample) -> None:
    """Ticks add up to the file's size when all goes well."""
    ticks: list[int] = []
    assemble([sample.job()], ticks.append)
    assert sum(ticks) == SIZE


def test_bytes_that_must_come_again_are_taken_back(sample: Sample) -> None:
    """Those of a wrong chunk file are counted once, though another source gives them, too."""
    flip(sample.chunk_file(1))
    ticks: list[int] = []
    assemble([sample.job(ChunkFiles(sample.root), WholeFile(sample.file))], ticks.append)
    assert [tick for tick in ticks if tick < 0] == [-PIECE]
    assert sum(ticks) == SIZE


def test_two_files_are_assembled_at_once(tmp_path: Path) -> None:
    """Jobs of different sizes do not mix, and results come in the order of the jobs."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    shops = [Sample(tmp_path / "x", 10_000, 3_000), Sample(tmp_path / "y", 70_000, 10_000)]
    made = assemble([s.job() for s in shops], ignore)
    assert [s.is_right(m) for s, m in zip(shops, made, strict=True)] == [True, True]


def test_more_files_than_may_be_open_are_assembled_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is right, and they come in the order of the jobs."""
    monkeypatch.setattr(assembling, "OPEN_FILES", 2)
    samples = []
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        samples.append(Sample(tmp_path / str(number), 1000 + number, 600))
    made = assemble([sample.job() for sample in samples], ignore)
    assert [s.is_right(m) for s, m in zip(samples, made, strict=True)] == [True] * 5


def test_digests_of_blocks_are_taken_where_they_are_asked_for(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece has its own blocks, also one that was kept; the last may be shorter."""
    monkeypatch.setattr(hashing, "DIGEST_BLOCK", 100_000)
    made = sample.run()
    assert made.blocks == ()
    data, job = sample.file.read_bytes(), sample.job(journaled=made.pieces[1:2])
    spans = [
        (start, min(start + 100_000, piece.end))
        for piece in sample.artifact.pieces
        for start in range(piece.offset, piece.end, 100_000)
    ]
    (made,) = assemble([replace(job, blocks=True)], ignore)
    assert made.blocks == tuple(
        ByteRange(a, b - a, hashlib.sha256(data[a:b]).hexdigest()) for a, b in spans
    )


def test_a_piece_whose_turn_it_is_goes_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one is read again for the digest of the whole, so it stays in the cache."""
    sample, second_is_there = Sample(tmp_path, 20_000, 10_000), threading.Event()
    written: list[tuple[int, bool]] = []
    real = block_io.OutputFile.write

    class SecondFirst(ChunkFiles):
        def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
            if piece.offset == 0:
                second_is_there.wait(60)
            place = super().deliver(artifact, piece, writer)
            second_is_there.set()
            return place

    def noted(self: block_io.OutputFile, data: memoryview, offset: int, direct: bool) -> None:
        written.append((offset, direct))
        real(self, data, offset, direct)

    monkeypatch.setattr(block_io, "clone_range", lambda *_: False)
    monkeypatch.setattr(block_io.OutputFile, "write", noted)
    # A remote piece has a thread of its own, also where there is one core.
    job = replace(sample.job(SecondFirst(sample.root)), remote=frozenset({0}))
    assert sample.is_right(assemble([job], ignore)[0])
    assert written == [(10_000, False), (0, True)]


def test_a_whole_copy_is_a_source(sample: Sample) -> None:
    """Pieces can be taken out of a copy of the whole artifact."""
    made = sample.run(WholeFile(sample.file))
    assert sample.is_right(made)
    assert {r.source for r in made.pieces} == {str(sample.file)}


@pytest.mark.parametrize(("size", "piece"), [(3 << 20, 1 << 20), (11_000_001, 5_300_003)])
def test_pieces_of_many_blocks_and_whole_pages_arrive(
    tmp_path: Path, size: int, piece: int
) -> None:
    """Pieces that need several writes, or could go straight to the disk, are right."""
    sample = Sample(tmp_path, size, piece)
    assert sample.is_right(sample.run())


def test_whole_pages_go_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aligned part of a block is written directly, and the rest of it is not."""
    direct, written = set[int](), list[tuple[bool, int, int]]()
    real_open, real_write = os.open, os.pwrite

    def opened(path: Path, flags: int, *rest: Any, **named: Any) -> int:
        fd = real_open(path, flags & ~os.O_DIRECT, *rest, **named)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def noted(fd: int, data: memoryview, offset: int) -> int:
        written.append((fd in direct, offset, len(data)))
        return real_write(fd, data, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", noted)
    with contextlib.closing(block_io.OutputFile(tmp_path / "file")) as target:
        target.write(memoryview(bytes(3 * 4096 + 100)), 4096, direct=True)
    assert written == [(True, 4096, 3 * 4096), (False, 4 * 4096, 100)]


def test_without_direct_writes_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no direct writes, all goes through the page cache."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    sample = Sample(tmp_path, 3 << 20, 1 << 20)
    assert sample.is_right(sample.run())


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

    sample = Sample(tmp_path, 3 << 20, 1 << 20)
    monkeypatch.setattr(os, "pwrite", refuse)
    assert sample.is_right(sample.run())
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
    sample = Sample(tmp_path, 100_000, 33_000)
    assert sample.is_right(sample.run())


def test_a_chunk_file_that_changes_while_its_blocks_are_shared_is_refused(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared blocks are hashed in the chunk file, so a touched one does not count."""
    touched = -1

    def clone(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> bool:
        os.pwrite(dst, os.pread(src, size, src_offset), dst_offset)
        if dst_offset == touched:
            os.utime(sample.chunk_file(2))
        return True

    monkeypatch.setattr(block_io, "clone_range", clone)
    assert sample.is_right(sample.run())
    touched = 2 * PIECE
    with pytest.raises(WrongContent) as caught:
        sample.run()
    found = [(f.kind, f.where) for f in caught.value.findings]
    assert found == [(Kind.CHANGED, sample.artifact.pieces[2].part)]


# ---- resuming


def test_other_systems_share_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is Linux's: elsewhere the bytes are copied."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not block_io.clone_range(0, 0, 1, 0, 4096)


def test_kept_pieces_are_not_asked_for_again(sample: Sample) -> None:
    """Journaled pieces are verified where they lie; only the rest is delivered."""
    first = sample.run()
    source = Counting(ChunkFiles(sample.root))
    made = sample.run(source, journaled=first.pieces[1:3])
    assert sample.is_right(made)
    assert sorted(source.asked) == [0, 3 * PIECE]


def test_a_kept_piece_that_rotted_is_delivered_again(sample: Sample) -> None:
    """The journal's word is not believed: a piece that is wrong now is replaced."""
    first = sample.run()
    flip(sample.partial, 2 * PIECE + 5)
    source = Counting(ChunkFiles(sample.root))
    made = sample.run(source, journaled=first.pieces)
    assert sample.is_right(made)
    assert source.asked == [2 * PIECE]


def test_what_has_arrived_counts_for_the_piece_that_it_begins_in(sample: Sample) -> None:
    """From the first byte of a piece to its last; only the rest is asked for."""
    data = sample.file.read_bytes()
    spans = [(0, 1000), (PIECE - 1, PIECE), (PIECE, PIECE + 10), (2 * PIECE, 3 * PIECE)]
    sample.target.parent.mkdir()
    with sample.partial.open("wb") as file:
        for start, end in spans:
            file.seek(start)
            file.write(data[start:end])
    source, ticks = Streaming(data), list[int]()
    arrived = tuple(Arrival(start, end - start, "5" * 64) for start, end in spans)
    (made,) = assemble([replace(sample.job(source), arrived=arrived)], ticks.append)
    assert sample.is_right(made)
    assert sum(ticks) == SIZE
    assert sorted(source.given) == [(1000, PIECE - 1), (PIECE + 10, 2 * PIECE), (3 * PIECE, SIZE)]


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
        sample = Sample(Path(name), 50_000, 9_000)
        first = sample.run()
        for index in rotten:
            flip(sample.partial, sample.artifact.pieces[index].offset + 7)
        if cut is not None:
            os.truncate(sample.partial, cut)
        assert sample.is_right(sample.run(journaled=tuple(first.pieces[i] for i in sorted(kept))))


# ---- bad pieces


def test_a_flipped_chunk_file_is_reported_and_the_others_are_kept(sample: Sample) -> None:
    """One wrong piece is one finding; what was verified is journaled for the next run."""
    flip(sample.chunk_file(1))
    with pytest.raises(WrongContent) as caught:
        sample.run()
    assert [(f.kind, f.where) for f in caught.value.findings] == [
        (Kind.WRONG_DIGEST, sample.artifact.pieces[1].part)
    ]
    assert {r.offset for r in sample.journaled()} == {0, 2 * PIECE, 3 * PIECE}
    assert not sample.target.exists()


def test_a_missing_chunk_file_is_a_missing_input(sample: Sample) -> None:
    """A piece that no source has is reported as missing, with its chunk file's name."""
    sample.chunk_file(2).unlink()
    with pytest.raises(MissingInput) as caught:
        sample.run()
    assert [f.where for f in caught.value.findings] == [sample.artifact.pieces[2].part]


def test_wrong_outweighs_missing(sample: Sample) -> None:
    """With one chunk file gone and one wrong, the exit code is that of wrong content."""
    sample.chunk_file(0).unlink()
    flip(sample.chunk_file(3))
    with pytest.raises(WrongContent) as caught:
        sample.run()
    assert [f.kind for f in caught.value.findings] == [Kind.MISSING, Kind.WRONG_DIGEST]


def test_a_chunk_file_of_the_wrong_size_is_reported(sample: Sample) -> None:
    """A chunk file that is too long is broken, though its first bytes are right."""
    with sample.chunk_file(0).open("ab") as file:
        file.write(b"more")
    with pytest.raises(WrongContent) as caught:
        sample.run()
    assert [f.kind for f in caught.value.findings] == [Kind.WRONG_SIZE]


def test_a_folder_in_place_of_a_chunk_file_is_reported(sample: Sample) -> None:
    """What cannot be read is here all the same, and broken."""
    sample.chunk_file(1).unlink()
    sample.chunk_file(1).mkdir()
    with pytest.raises(WrongContent) as caught:
        sample.run()
    about = [(f.kind, f.where) for f in caught.value.findings]
    assert about == [(Kind.UNREADABLE, sample.artifact.pieces[1].part)]


def test_a_chunk_file_that_is_written_meanwhile_is_reported(sample: Sample) -> None:
    """A chunk file that changes during the read does not count, even if its digest fits."""

    class Touching(ChunkFiles):
        def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
            touching = cast(PieceWriter, _TouchingWriter(writer, sample.chunk_file(0)))
            return super().deliver(artifact, piece, touching)

    class _TouchingWriter:
        def __init__(self, writer: PieceWriter, part: Path) -> None:
            self.writer, self.part = writer, part

        def copy_from(self, fd: int, offset: int) -> None:
            self.writer.copy_from(fd, offset)
            os.utime(self.part, ns=(1, 1))

    with pytest.raises(WrongContent) as caught:
        sample.run(Touching(sample.root))
    assert Kind.CHANGED in [f.kind for f in caught.value.findings]


def test_a_chunk_file_that_is_cut_meanwhile_is_reported(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk file that ends early during the read is its own finding, and no crash."""
    real = os.preadv

    def ending(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0 and Path(f"/proc/self/fd/{fd}").readlink() == sample.chunk_file(3):
            return 0
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", ending)
    with pytest.raises(WrongContent) as caught:
        sample.run()
    about = [(f.kind, f.where) for f in caught.value.findings]
    assert about == [(Kind.UNREADABLE, sample.artifact.pieces[3].part)]


def test_a_manifest_with_a_wrong_whole_gives_no_file(sample: Sample) -> None:
    """Right pieces that do not make up the pinned whole are wrong content."""
    sample.artifact = replace(sample.artifact, sha256="0" * 64)
    with pytest.raises(WrongContent) as caught:
        sample.run()
    assert [(f.kind, f.expected) for f in caught.value.findings] == [
        (Kind.WRONG_DIGEST, f"sha256 {'0' * 64}")
    ]


def test_other_editions_are_not_held_against_the_file(sample: Sample) -> None:
    """The bytes must be those of the first edition, which has the pieces."""
    other = Edition(SIZE, "0" * 64, None)
    sample.artifact = replace(sample.artifact, alternatives=(other,))
    assert sample.is_right(sample.run())


@pytest.mark.parametrize("digit", ["0", "f"])
@pytest.mark.parametrize("by_git", [False, True])
def test_a_piece_with_another_digest_is_refused(sample: Sample, digit: str, by_git: bool) -> None:
    """The finding has both digests: sha256, or the git blob id where nothing else is pinned."""
    first, *rest = sample.artifact.pieces
    data = sample.file.read_bytes()
    if by_git:
        right = hashing.git_sha1(SIZE, data).hexdigest()
        sample.artifact = Artifact("x", "x", "opaque", SIZE, git_sha1=right)
        made = sample.run(WholeFile(sample.file))
        assert sample.is_right(made) and made.git_sha1 == right
        sample.artifact = replace(sample.artifact, git_sha1=digit * 40)
        words = f"git blob id {digit * 40}", f"git blob id {right}"
    else:
        sample.artifact = replace(
            sample.artifact, pieces=(replace(first, sha256=digit * 64), *rest)
        )
        words = f"sha256 {digit * 64}", f"sha256 {first.sha256}"
    with pytest.raises(WrongContent) as caught:
        sample.run(WholeFile(sample.file))
    found = [(f.kind, f.where, f.expected, f.found) for f in caught.value.findings]
    assert found == [(Kind.WRONG_DIGEST, str(sample.file), *words)]


def test_the_blob_id_stands_in_for_the_whole_digest(sample: Sample) -> None:
    """Without a whole sha256, the Hub blob id is held against the assembled file."""
    sample.artifact = replace(sample.artifact, sha256=None)
    assert sample.is_right(sample.run())
    sample.artifact = replace(sample.artifact, blob_id="0" * 40)
    with pytest.raises(WrongContent, match="blob id"):
        sample.run()


# ---- more than one source


def test_the_next_source_is_asked_when_one_has_nothing(sample: Sample) -> None:
    """Absent pieces are taken from the source that has them."""
    sample.chunk_file(1).unlink()
    made = sample.run(Nowhere(), ChunkFiles(sample.root), WholeFile(sample.file))
    assert sample.is_right(made)
    assert [r.source for r in made.pieces].index(str(sample.file)) == 1


@pytest.mark.parametrize("index", range(COUNT))
def test_a_broken_piece_is_taken_from_the_next_source(sample: Sample, index: int) -> None:
    """Bytes that one source got wrong leave no trace in what the next one delivers."""
    flip(sample.chunk_file(index))
    made = sample.run(ChunkFiles(sample.root), WholeFile(sample.file))
    assert sample.is_right(made)
    assert made.pieces[index].source == str(sample.file)


def test_a_local_source_is_not_asked_again_for_wrong_bytes(tmp_path: Path) -> None:
    """They would be the same."""
    sample = Sample(tmp_path, 10_000, 10_000)
    source = Streaming(bytes(10_000))
    with pytest.raises(WrongContent):
        sample.run(source)
    assert source.given == [(0, 10_000)]


def test_a_remote_source_is_asked_three_times_for_a_piece(tmp_path: Path) -> None:
    """The same wrong bytes are its content; others each time were damaged on the way."""
    sample = Sample(tmp_path, 10_000, 10_000)
    data = sample.file.read_bytes()
    outlasting, failing = Changing(data, right_at=3), Changing(data, right_at=4)
    made = sample.run(LazySource("opened when it is asked", lambda: outlasting))
    assert sample.is_right(made)
    sample.partial.unlink()
    with pytest.raises(NetworkFailed) as caught:
        sample.run(failing)
    assert (len(outlasting.given), len(failing.given)) == (3, 3)
    found = [(f.kind, f.where, f.found) for f in (*made.notes, *caught.value.findings)]
    assert found == [
        (Kind.DAMAGED, "stream", f"other wrong bytes each of {times} times") for times in (2, 3)
    ]


def test_a_source_is_not_blamed_for_the_bytes_of_another(tmp_path: Path) -> None:
    """Where what a source left is wrong, the next one is asked for the whole piece."""
    sample = Sample(tmp_path, 10_000, 10_000)
    source = Streaming(sample.file.read_bytes())
    made = sample.run(BreakingOff(), source)
    assert sample.is_right(made)
    assert source.given == [(1, 10_000), (0, 10_000)]
    assert [note.where for note in made.notes] == ["refused 0"]


def test_what_every_source_said_is_reported(sample: Sample) -> None:
    """When all sources fail on a piece, each one's finding is there."""
    flip(sample.chunk_file(0))
    with pytest.raises(WrongContent) as caught:
        sample.run(Refusing(), Nowhere(), ChunkFiles(sample.root), WholeFile(sample.root / "gone"))
    about_first = [f.where for f in caught.value.findings]
    assert about_first == ["refused 0", sample.artifact.pieces[0].part]


def test_a_source_is_never_believed(sample: Sample) -> None:
    """A job's pieces are verified whatever its source is made of, even a single one."""
    flip(sample.chunk_file(1))
    artifact = replace(sample.artifact, sha256=None, blob_id=None)
    with pytest.raises(WrongContent):
        assemble([Assembly(artifact, sample.target, ChunkFiles(sample.root))], ignore)


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


def test_a_file_system_that_takes_no_more_is_exit_7(sample: Sample) -> None:
    """When the file cannot be as large as it must, the error says so and names it."""
    with file_size_limit(SIZE // 2), pytest.raises(NoSpace) as caught:
        sample.run()
    assert [(f.kind, f.where) for f in caught.value.findings] == [
        (Kind.NO_SPACE, str(sample.partial))
    ]


def test_a_disk_that_fills_up_midway_is_exit_7_and_loses_nothing(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
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
            sample.run()
    assert sample.is_right(sample.run(journaled=sample.journaled()))


@pytest.mark.parametrize("name", ["partial", "journal"])
def test_a_link_in_place_of_our_files_is_not_followed(sample: Sample, name: str) -> None:
    """A link planted under the partial's or journal's name never has its target written."""
    precious = sample.root / "precious"
    precious.write_text("precious")
    planted = sample.partial if name == "partial" else sample.journal
    planted.parent.mkdir()
    planted.symlink_to(precious)
    with pytest.raises(CsmWeightsError):
        sample.run()
    assert precious.read_text() == "precious"


def test_a_folder_that_is_a_file_is_reported(sample: Sample) -> None:
    """When the staging folder's name is taken by a file, the error is ours and names it."""
    sample.target.parent.write_text("not a folder")
    with pytest.raises(CsmWeightsError) as caught:
        sample.run()
    assert str(sample.target.parent) in str(caught.value)


def test_no_file_is_left_open(sample: Sample) -> None:
    """Every descriptor is closed again, after success and after failure."""
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no /proc here")
    before = len(list(fds.iterdir()))
    sample.run()
    flip(sample.chunk_file(0))
    with pytest.raises(WrongContent):
        sample.run()
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

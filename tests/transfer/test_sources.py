"""One suite that every source passes: right bytes, or an honest word about why not."""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from csm_weights.commands.split import split_file as split
from csm_weights.errors import Finding, Kind, MissingInput, NetworkFailed, WrongContent
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.journal import Arrival, PieceRecord, parse_line
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer.assemble import Assembly, assemble, write_text
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.http.client import Timeouts
from csm_weights.transfer.http.lines import SPAN
from csm_weights.transfer.http.ranges import RangeDownloader
from csm_weights.transfer.hub import Hub
from csm_weights.transfer.local import ChunkFiles, WholeFile
from csm_weights.transfer.mirror import Mirror
from csm_weights.transfer.policy import Candidate, PieceSource
from csm_weights.transfer.source import FirstOf, PieceWriter, Source, SourceError
from tests.support.hub import HubServer
from tests.support.servers import serving
from tests.support.toy import flip

#: Bytes of a piece: more than a span of the wire, and no multiple of anything.
PIECE = SPAN + 300_007
SIZE = 2 * PIECE - 54_321
DATA = random.Random(3).randbytes(SIZE)
NAME = "folder/model file.bin"
SECOND = PIECE  # the first byte of the second piece

#: What the Hub says of a file that it does not have.
GONE = {"X-Error-Code": "EntryNotFound"}

#: Patience that ends within a test.
HASTY = Timeouts(connect=2, read=2, patience=0.5, backoff=0.05)


def ignore(_: int) -> None:
    """Counts nothing."""


@dataclass
class Case:
    """A place where a source has the file, with ways to spoil it, and a source for it.

    `take_away` makes the file vanish, `damage` changes a byte of the second
    piece, `shorten` cuts the file. `fetched` are the bytes a server has sent.
    """

    artifact: Artifact
    source: Source
    take_away: Callable[[], object]
    damage: Callable[[], object]
    shorten: Callable[[], object]
    fetched: Callable[[], int] | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def _published(root: Path) -> tuple[Artifact, Path]:
    """The entry of the file in two pieces, its chunk files below `root`, and the file."""
    file = root / "whole" / NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(DATA)
    artifact = split(file, root, "chunks", PIECE, ignore)
    return replace(artifact, path=NAME), file


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _local(root: Path, kind: str) -> Case:
    artifact, file = _published(root)
    second = root / artifact.pieces[1].part
    if kind == "parts":
        return Case(
            artifact, ChunkFiles(root), second.unlink, lambda: flip(second), lambda: _cut(second)
        )
    source: Source = WholeFile(file)
    if kind == "damaged file":
        pieces = dict.fromkeys((piece.offset for piece in artifact.pieces), str(file))
        source = Candidate(PieceSource.SALVAGED, pieces, WholeFile(file, SIZE))
    return Case(
        artifact, source, file.unlink, lambda: flip(file, SECOND + 1000), lambda: _cut(file)
    )


@contextlib.contextmanager
def _mirror(root: Path, ranges: bool, parts: bool) -> Iterator[Case]:
    artifact, file = _published(root)
    second = root / artifact.pieces[1].part
    spoilt, offset = (second, 1000) if parts else (file, SECOND + 1000)
    with (
        serving(root if parts else root / "whole", ranges) as server,
        RangeDownloader(threading.Event(), timeouts=HASTY) as wire,
    ):
        yield Case(
            artifact,
            Mirror(wire, server.url),
            spoilt.unlink,
            lambda: flip(spoilt, offset),
            lambda: _cut(spoilt),
        )


@contextlib.contextmanager
def _hub(root: Path, resolve_cache: bool, lfs: bool) -> Iterator[Case]:
    artifact, _ = _published(root)
    with HubServer() as hub, RangeDownloader(threading.Event(), timeouts=HASTY) as wire:
        hub.resolve_cache = resolve_cache
        hub.add_token("hf_good")
        commit = hub.add_repo("org/name", {NAME: DATA}, gated=True, lfs=lambda *_: lfs)
        host: Literal["hub", "storage"] = "storage" if lfs else "hub"
        yield Case(
            artifact,
            Hub(wire, HubCredentials(hub.endpoint, "hf_good"), "org/name", commit),
            lambda: hub.fault("status", match=NAME, code=404, headers=GONE),
            lambda: hub.fault("flip", match=NAME, offset=SECOND + 1000),
            lambda: hub.fault("content-range", match=NAME, host=host, total=-1),
            lambda: hub.bytes_sent(host),
        )


CASES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Case]]] = {
    "parts": lambda root: contextlib.nullcontext(_local(root, "parts")),
    "whole file": lambda root: contextlib.nullcontext(_local(root, "whole file")),
    "damaged file": lambda root: contextlib.nullcontext(_local(root, "damaged file")),
    "mirror of files": lambda root: _mirror(root, ranges=True, parts=False),
    "mirror of files without ranges": lambda root: _mirror(root, ranges=False, parts=False),
    "mirror of parts": lambda root: _mirror(root, ranges=True, parts=True),
    "mirror of parts without ranges": lambda root: _mirror(root, ranges=False, parts=True),
    "Hub": lambda root: _hub(root, resolve_cache=False, lfs=True),
    "Hub, file in git": lambda root: _hub(root, resolve_cache=False, lfs=False),
    "Hub, file in git behind its cache": lambda root: _hub(root, resolve_cache=True, lfs=False),
}


#: Those that know pieces and nothing else.
IN_PIECES = ("parts", "damaged file", "mirror of parts", "mirror of parts without ranges")


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    """Each source with the file in two pieces."""
    with CASES[request.param](tmp_path) as case:
        yield case


def run(case: Case, out: Path, *others: Source, whole: bool = False) -> VerifiedFile:
    """Assembles the file from the source, then from others; as a whole with one digest if asked."""
    artifact = replace(case.artifact, pieces=()) if whole else case.artifact
    return assemble([job(artifact, out, FirstOf(case.source, *others))], ignore, case.stop)[0]


def job(
    artifact: Artifact, out: Path, source: Source, arrived: tuple[Arrival, ...] = ()
) -> Assembly:
    far = frozenset(piece.offset for piece in artifact.tiles)
    return Assembly(artifact, out / "file", source, arrived=arrived, remote=far)


def test_the_bytes_are_the_files(case: Case, tmp_path: Path) -> None:
    """Every byte is delivered and verified."""
    made = run(case, tmp_path / "out")
    assert made.path.read_bytes() == DATA
    assert made.sha256 == case.artifact.sha256
    assert made.notes == ()


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PIECES])
def test_one_digest_for_the_whole_file_will_do(name: str, tmp_path: Path) -> None:
    """Where no pieces are pinned the file is verified as a whole."""
    with CASES[name](tmp_path) as case:
        made = run(case, tmp_path / "out", whole=True)
        assert (made.path.read_bytes(), made.sha256) == (DATA, case.artifact.sha256)
        assert made.pieces == ()


def test_what_is_not_there_is_missing(case: Case, tmp_path: Path) -> None:
    """A file that is not there ends in missing input, whoever lacks it."""
    case.take_away()
    with pytest.raises(MissingInput):
        run(case, tmp_path / "out")


def test_wrong_bytes_are_refused_and_named(case: Case, tmp_path: Path) -> None:
    """One byte of the second piece is wrong: the source is named, the first piece is kept."""
    case.damage()
    with pytest.raises(WrongContent) as caught:
        run(case, tmp_path / "out")
    assert [f.kind for f in caught.value.findings] == [Kind.WRONG_DIGEST]
    assert caught.value.findings[0].where != ""
    lines = (tmp_path / "out" / "file.partial.journal").read_text().splitlines()
    records = [r for r in map(parse_line, lines) if isinstance(r, PieceRecord)]
    assert [record.offset for record in records] == [0]


def test_a_file_that_is_too_short_is_refused(case: Case, tmp_path: Path) -> None:
    """A byte less than pinned is noticed, and nothing is assembled."""
    case.shorten()
    with pytest.raises(WrongContent):
        run(case, tmp_path / "out")
    assert not (tmp_path / "out" / "file").exists()


def test_another_source_steps_in_and_the_first_is_named(case: Case, tmp_path: Path) -> None:
    """A source that delivered wrong bytes is in the notes, and the next one gives that piece."""
    good, _ = _published(tmp_path / "good")
    case.damage()
    made = run(case, tmp_path / "out", WholeFile(tmp_path / "good" / "whole" / NAME))
    assert made.path.read_bytes() == DATA
    assert [note.kind for note in made.notes] == [Kind.WRONG_DIGEST]
    assert made.pieces[1].source == str(tmp_path / "good" / "whole" / NAME)
    assert made.pieces[0].source != made.pieces[1].source
    assert good.pieces[0].sha256 == made.pieces[0].sha256


def test_installs_tell_no_secrets(case: Case, tmp_path: Path) -> None:
    """What is recorded of where a piece came from has no token and no signature in it."""
    made = run(case, tmp_path / "out")
    text = " ".join(record.source for record in made.pieces)
    assert "hf_good" not in text
    assert "?" not in text and "@" not in text


@pytest.mark.parametrize("whole", [False, True])
def test_what_has_arrived_is_not_asked_for_again(tmp_path: Path, whole: bool) -> None:
    """Ranges that an earlier run has written are hashed, not fetched."""
    with CASES["Hub"](tmp_path) as case:
        artifact = replace(case.artifact, pieces=()) if whole else case.artifact
        partial = tmp_path / "out" / "file.partial"
        partial.parent.mkdir()
        here = (100_000, 2_000_001)
        partial.write_bytes(bytes(here[0]) + DATA[here[0] : here[1]])
        arrival = Arrival(here[0], here[1] - here[0], artifact.tiles[0].sha256)
        made = assemble([job(artifact, tmp_path / "out", case.source, (arrival,))], ignore)[0]
        assert made.path.read_bytes() == DATA
        assert case.fetched and case.fetched() == SIZE - (here[1] - here[0])


def test_what_was_journaled_and_is_not_so_is_fetched_again(tmp_path: Path) -> None:
    """Ranges that a power cut has lost cost the piece once more, and blame nobody."""
    with CASES["Hub"](tmp_path) as case:
        arrival = Arrival(0, 2_000_000, case.artifact.pieces[0].sha256)
        again = job(case.artifact, tmp_path / "out", FirstOf(case.source), (arrival,))
        made = assemble([again], ignore)[0]
        assert (made.path.read_bytes(), made.notes) == (DATA, ())


def test_every_block_that_arrives_is_journaled(tmp_path: Path) -> None:
    """When a server fails midway, what came until then is in the journal, and is right."""
    with HubServer() as hub, RangeDownloader(threading.Event(), timeouts=HASTY) as wire:
        commit = hub.add_repo("org/name", {NAME: DATA})
        artifact, _ = _published(tmp_path)
        hub.fault("status", host="storage", code=500, after=2)
        source = FirstOf(Hub(wire, HubCredentials(hub.endpoint), "org/name", commit))
        with pytest.raises(NetworkFailed):
            assemble([job(artifact, tmp_path / "out", source)], ignore)
        lines = (tmp_path / "out" / "file.partial.journal").read_text().splitlines()
        arrivals = [a for a in map(parse_line, lines) if isinstance(a, Arrival)]
        written = (tmp_path / "out" / "file.partial").read_bytes()
        assert arrivals
        for a in arrivals:
            end = a.offset + a.size
            assert written[a.offset : end] == DATA[a.offset : end]


class BreakingOff:
    """A disk that gives the first bytes of a chunk file, and then an error."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 100_000)
            try:
                writer.copy_from(file.fileno(), 0)
            except EOFError:
                wrong = Finding(Kind.UNREADABLE, "part", "bytes", "an error", "check the disk")
                raise SourceError([wrong]) from None
        return "part"


class Short:
    """A source that takes itself to be done a byte before the end."""

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        buffer = writer.acquire_buffer()
        writer.write(buffer, piece.offset, piece.size - 1)
        writer.verify("the short source")
        return "short"


def test_a_piece_that_did_not_come_whole_is_not_verified(tmp_path: Path) -> None:
    """Its size is what is wrong, whatever the digest of the bytes that came."""
    digest = hashlib.sha256(bytes(99_999)).hexdigest()
    artifact = Artifact("x", "x", "opaque", 100_000, digest)
    with pytest.raises(WrongContent) as caught:
        assemble([job(artifact, tmp_path, FirstOf(Short()))], ignore)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.WRONG_SIZE, "the short source")
    assert finding.expected == "100,000 bytes of the piece at byte 0"


@pytest.mark.parametrize("name", ["Hub", "mirror of parts", "mirror of files without ranges"])
def test_a_server_goes_on_where_a_disk_breaks_off(name: str, tmp_path: Path) -> None:
    """A chunk file that ends in a read error is repaired by a server, which is not blamed."""
    with CASES[name](tmp_path) as case:
        source = FirstOf(BreakingOff(), case.source)
        made = assemble([job(case.artifact, tmp_path / "out", source)], ignore)[0]
        assert made.path.read_bytes() == DATA
        assert {note.kind for note in made.notes} == {Kind.UNREADABLE}


def test_a_partial_that_is_the_caches_blob_is_not_written_to(tmp_path: Path) -> None:
    """A run killed after linking a blob leaves it linked; the next one lets go of it first."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"another model")
    partial = tmp_path / "out" / "file.partial"
    partial.parent.mkdir()
    partial.hardlink_to(blob)
    with CASES["parts"](tmp_path) as case:
        made = run(case, tmp_path / "out")
    assert (made.path.read_bytes(), blob.read_bytes()) == (DATA, b"another model")
    partial.unlink()
    partial.hardlink_to(blob)
    write_text(tmp_path / "out" / "file", "a text")
    assert (partial.read_text(), blob.read_bytes()) == ("a text", b"another model")

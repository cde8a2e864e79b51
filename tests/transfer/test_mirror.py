"""A mirror: what it may say of a file that it does not have, and where it may send us."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_weights.commands.split import split_file as split
from csm_weights.errors import CsmWeightsError, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.assemble import Assembly, assemble
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.ranges import RangeDownloader
from csm_weights.transfer.mirror import Mirror
from csm_weights.transfer.source import FirstOf, NotAvailable, SourceError
from tests.support.network import HASTY, Answering
from tests.support.servers import FileServer, serving


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The whole file, which the mirror has beside its chunk files."""
    (tmp_path / "x.bin").write_bytes(bytes(1000))
    return tmp_path / "x.bin"


@pytest.fixture
def artifact(file: Path) -> Artifact:
    """The file, split into three chunk files."""
    return split(file, file.parent, "chunks", 400, lambda _: None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """A mirror of the file and its chunk files."""
    with serving(tmp_path, ranges=True) as running:
        yield running


@pytest.fixture
def downloader() -> Iterator[RangeDownloader]:
    """A downloader that is soon out of patience."""
    with RangeDownloader(threading.Event(), timeouts=HASTY) as running:
        yield running


@pytest.mark.parametrize("status", [404, 410, 403])
def test_chunk_files_are_asked_for_where_the_whole_file_is_absent(
    server: FileServer, downloader: RangeDownloader, artifact: Artifact, file: Path, status: int
) -> None:
    """Not found, gone, and what S3 says of files that it does not have."""
    file.unlink()
    server.absent = status
    source = FirstOf(Mirror(downloader, server.url))
    made = assemble([Assembly(artifact, file.parent / "out" / "x.bin", source)], lambda _: None)[0]
    assert made.path.read_bytes() == bytes(1000)


def test_a_mirror_is_asked_with_the_credentials_that_it_was_made_with(
    server: FileServer,
    downloader: RangeDownloader,
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source on top of a mirror brings its own, and those in the environment stay unsent."""
    monkeypatch.setenv("CSM_MIRROR_HEADERS", "X-Key: of another mirror")
    auth = OriginAuth(server.url, {"X-Key": "own"})
    source = FirstOf(Mirror(downloader, server.url, auth))
    assemble([Assembly(artifact, tmp_path / "out" / "x.bin", source)], lambda _: None)
    assert {request.headers["x-key"] for request in server.log} == {"own"}


def test_a_mirror_that_wants_credentials_is_asked_once(
    server: FileServer, downloader: RangeDownloader, artifact: Artifact, file: Path
) -> None:
    """401 holds for all that it has: no other name is tried, and the way to give them is told."""
    file.unlink()
    server.absent = 401
    with pytest.raises(SourceError) as caught:
        Mirror(downloader, server.url).find(artifact, artifact.pieces[0])
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.FORBIDDEN, server.url)
    assert finding.found.startswith("401 ") and "CSM_MIRROR_HEADERS" in finding.help
    assert [(request.method, request.path) for request in server.log] == [("HEAD", "/x.bin")]


@pytest.mark.parametrize(
    ("status", "kind", "help_text"),
    [
        (404, Kind.NOT_THERE, "check the URL"),
        (410, Kind.NOT_THERE, "check the URL"),
        (403, Kind.FORBIDDEN, "credentials"),
        (418, Kind.WRONG_ANSWER, "credentials"),
    ],
)
def test_a_file_that_goes_once_it_was_found_is_told(
    server: FileServer,
    downloader: RangeDownloader,
    artifact: Artifact,
    file: Path,
    status: int,
    kind: Kind,
    help_text: str,
) -> None:
    """What a GET is answered, where a HEAD said that the file is there, has its own finding."""
    mirror = Mirror(downloader, server.url)
    mirror.find(artifact, artifact.pieces[0])
    file.unlink()
    server.absent = status
    job = Assembly(artifact, file.parent / "out" / "x.bin", FirstOf(mirror))
    with pytest.raises(CsmWeightsError) as caught:
        assemble([job], lambda _: None)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (kind, f"{server.url}/x.bin")
    assert finding.found.startswith(f"{status} ") and help_text in finding.help


# ---- what a status means

PLACES = ["whole.bin", "chunks/a%20b.part"]
PIECE = Piece("chunks/a b.part", 400, 600, "5" * 64)
LARGE = Artifact("whole.bin", "x", "opaque", 1000, pieces=(PIECE,))
SERVER = "http://127.0.0.1:9/folder"


@pytest.mark.parametrize("status", [200, 206, 400, 402, 405, 409, 411, 501])
def test_only_a_refusal_says_that_a_file_is_not_there(status: int) -> None:
    """Whatever else a HEAD is answered, the GET will tell; the file is asked for once."""
    answering = Answering(status)
    mirror = Mirror(answering, f"{SERVER}/")
    file = mirror.find(LARGE, PIECE)
    assert (file.resolve(), file.size, file.offset) == (f"{SERVER}/whole.bin", 1000, 0)
    assert mirror.find(LARGE, PIECE) is file
    assert answering.asked == [("HEAD", f"{SERVER}/whole.bin")]
    assert mirror.reached == {f"{SERVER}/whole.bin"}


@pytest.mark.parametrize(
    ("status", "error"), [(404, NotAvailable), (410, NotAvailable), (403, SourceError)]
)
def test_what_a_mirror_does_not_have_is_asked_for_once(status: int, error: type[Exception]) -> None:
    """Under the name of the whole file and of the chunk file; one refusal is told for both."""
    answering = Answering(status)
    mirror = Mirror(answering, f"{SERVER}/")
    for _ in range(2):
        with pytest.raises(error) as caught:
            mirror.find(LARGE, PIECE)
    if isinstance(caught.value, SourceError):
        (finding,) = caught.value.findings
        assert (finding.kind, finding.found) == (Kind.FORBIDDEN, "403 Why")
    assert answering.asked == [("HEAD", f"{SERVER}/{place}") for place in PLACES]
    assert mirror.reached == set()


def test_a_file_without_pieces_is_asked_for_as_a_whole() -> None:
    """It has no chunk files."""
    answering = Answering(404)
    whole = Artifact("whole.bin", "x", "opaque", 1000, "5" * 64)
    with pytest.raises(NotAvailable):
        Mirror(answering, SERVER).find(whole, whole.tiles[0])
    assert answering.asked == [("HEAD", f"{SERVER}/whole.bin")]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, Kind.WRONG_ANSWER) for status in (400, 402, 405, 409, 411, 500)),
        *((status, Kind.FORBIDDEN) for status in (401, 403)),
        *((status, Kind.NOT_THERE) for status in (404, 410)),
    ],
)
def test_a_refused_get_has_its_kind(status: int, kind: Kind) -> None:
    """A file that a HEAD has found may be gone, or need credentials."""
    file = Mirror(Answering(200), SERVER).find(LARGE, PIECE)
    response, _ = Answering(status).ask("GET", file.resolve())
    finding = file.refusal(response)
    assert (finding.kind, finding.found) == (kind, f"{status} Why")
    assert ("CSM_MIRROR_HEADERS" in finding.help) is (kind is not Kind.NOT_THERE)

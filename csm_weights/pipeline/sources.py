"""From the words of a plan to the sources themselves: which are asked, in which order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from csm_weights.config import mirror_headers
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.pipeline.plan import HUB, Step
from csm_weights.pipeline.session import Session
from csm_weights.store import block_io
from csm_weights.store.inspect import FileState
from csm_weights.store.receipts import partial_path
from csm_weights.transfer.consume import Subject
from csm_weights.transfer.local import Chunks, Salvage, WholeFile
from csm_weights.transfer.source import PieceWriter, Source, first_of

if TYPE_CHECKING:
    from csm_weights.transfer.http.ranges import RangeDownloader


class _Later:
    """A source that is made when it is first asked: most runs never ask a server."""

    def __init__(self, make: Callable[[], Source]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._source: Source | None = None

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
        with self._lock:
            self._source = self._source or self._make()
        return self._source.deliver(artifact, piece, sink)


def near(run: Session, step: Step) -> list[Source]:
    """The sources on this machine for one file, in the order of the plan."""
    item, sourcing = step.state, run.sourcing
    sources: list[Source] = [
        Salvage(look.path, look.size or 0, look.good)
        for look in (item.installed, item.staged)
        if look.good
    ]
    if sourcing.parts and item.artifact.pieces:
        sources.append(Chunks(run.paths.root))
    if sourcing.cache and (cached := item.cached):
        if cached.state is FileState.UNVERIFIED:
            sources.append(WholeFile(cached.path))
        else:
            sources.append(Salvage(cached.path, cached.size or 0, cached.good))
    return sources


@contextmanager
def far(
    run: Session, cancel: threading.Event, log: Callable[[str], None]
) -> Iterator[list[Source]]:
    """The servers of a run, in the order of the plan; they hang up at the end.

    `cancel` is set when the run is given up; `log` gets a line for each wait.
    """
    with ExitStack() as opened:
        wires = _Wires(opened, cancel, log)
        yield [_Later(_maker(run, name, wires)) for name in run.sourcing.far]


class _Wires:
    """The one wire of a run, made when the first server is asked."""

    def __init__(self, opened: ExitStack, cancel: threading.Event, log: Callable[[str], None]):
        self._opened = opened
        self._stop = cancel
        self._say = log
        self._lock = threading.Lock()
        self._wire: RangeDownloader | None = None

    def get(self) -> RangeDownloader:
        """The wire."""
        from csm_weights.transfer.http.ranges import RangeDownloader

        with self._lock:
            self._wire = self._wire or self._opened.enter_context(
                RangeDownloader(self._stop, self._say)
            )
            return self._wire


def _maker(run: Session, name: str, wires: _Wires) -> Callable[[], Source]:
    def make() -> Source:
        from csm_weights.transfer.hub import Hub, HubCredentials
        from csm_weights.transfer.mirror import Mirror

        manifest = run.manifest
        if name != HUB:
            return Mirror(wires.get(), name, mirror_headers())
        assert manifest.repo and manifest.revision, "the Hub is planned only where it is named"
        return Hub(wires.get(), HubCredentials.from_environment(), manifest.repo, manifest.revision)

    return make


def sources_for(run: Session, step: Step, servers: Sequence[Source]) -> Source:
    """All that may hold the pieces of one file."""
    return first_of(*near(run, step), *servers)


def subject(run: Session, step: Step) -> Subject:
    """What is to be consumed for one file, and how much of it may be in the partial already."""
    item = step.state
    kept = {record.offset: record.size for record in item.partial}
    gone = {record.offset: record.consumed for record in item.consumed}
    moved = {
        offset: tuple(dict.fromkeys((kept.get(offset, 0), gone.get(offset, 0), 0)))
        for offset in step.consumes
    }
    known = {o: sorted(some, reverse=True) for o, some in moved.items()}
    return Subject(
        item.artifact,
        partial_path(item.staged.path),
        run.paths.root,
        {offset: tuple(some) for offset, some in known.items()},
    )


def require_punching(subjects: Sequence[Subject]) -> None:
    """Raises NoSpace where a folder of parts is on a file system that gives nothing back."""
    folders = {
        (subject.root / piece.part).parent
        for subject in subjects
        for piece in subject.artifact.pieces
        if piece.offset in subject.moved
    }
    findings = [
        Finding(
            Kind.NOT_CONSUMABLE,
            str(folder),
            "a file system that frees parts of a file",
            "one that does not",
            "leave --consume out, and have room for the whole file",
        )
        for folder in sorted(folders)
        if folder.is_dir() and not block_io.can_punch(folder)
    ]
    if findings:
        raise error_for("the parts cannot be consumed; none was touched", findings)

"""Source policy: where each piece of a file comes from, decided in one place.

The plan shows the order of `SourcePolicy.candidates`, and the transfer asks in
it. A further remote source is a module of this package with `open_source`, and
the scheme of its URLs in `REMOTE`.
"""

from __future__ import annotations

import enum
import importlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from csm_weights.errors import Finding
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.progress import took
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus
from csm_weights.transfer.local import ChunkFiles, Shelf, WholeFile
from csm_weights.transfer.source import FirstOf, NotAvailable, PieceWriter, Source

if TYPE_CHECKING:
    from csm_weights.transfer.http.ranges import RangeDownloader

#: The Hub's name among the remote sources of a `SourcePolicy`; the others are named by their URL.
HUB = "the Hub"

#: The module of each kind of remote source, by the scheme of its URL; imported when it is asked.
REMOTE = {HUB: "hub", "http": "mirror", "https": "mirror"}


class PieceSource(enum.StrEnum):
    """The kinds of places that a piece comes from."""

    KEPT = "kept"
    CONSUMED = "consumed"
    SALVAGED = "salvaged"
    CHUNK = "chunk"
    CACHED = "cached"
    SHELF = "shelf"
    REMOTE = "remote"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class PieceOrigin:
    """Where a piece comes from; `where` is a path, a remote source, or why there is none."""

    piece: Piece
    source: PieceSource
    where: str


@dataclass(frozen=True)
class Candidate:
    """A place on this machine that has pieces: `pieces` names it by the offset of each.

    `source` reads them; it is None for what lies in the unfinished file already.
    """

    kind: PieceSource
    pieces: dict[int, str]
    source: Source | None = None

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`: only the pieces that it is known to have are taken from it."""
        if self.source is None or piece.offset not in self.pieces:
            raise NotAvailable
        place = self.source.deliver(artifact, piece, writer)
        took(self.kind, piece.size)
        return place


@dataclass(frozen=True)
class SourcePolicy:
    """Which sources there are besides installed and staged files.

    `remote` are asked in this order, after everything on this machine;
    `problems` say why others are not among them. `shelves` is True where the user
    named folders of this machine. `remote_first` prefers a
    remote file to one whose text the manifest has. `consume` allows chunk
    files to go as their file grows, where that makes room.
    """

    chunks: bool = True
    cache: bool = True
    shelves: bool = False
    remote: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()
    remote_first: bool = False
    consume: bool = False

    def candidates(self, item: ArtifactState, root: Path) -> list[Candidate]:
        """Return the places on this machine with pieces of an artifact, in the order of asking.

        `root` is the folder that the paths of chunk files are relative to.
        """
        kept = dict.fromkeys((r.offset for r in item.journal.pieces), str(item.staged.path))
        consumed, here = (
            {p.offset: p.part for p, part in _chunk_files(item) if part.state is state}
            for state in (FileState.CONSUMED, FileState.UNVERIFIED)
        )
        chunks = Candidate(PieceSource.CHUNK, here if self.chunks else {}, ChunkFiles(root))
        damaged = [_of_copy(PieceSource.SALVAGED, f, f.good) for f in (item.installed, item.staged)]
        found = [
            Candidate(PieceSource.KEPT, kept),
            Candidate(PieceSource.CONSUMED, consumed),
            # A chunk file that may go makes room; a damaged file is copied from as it is.
            *([chunks, *damaged] if self.consume else [*damaged, chunks]),
        ]
        if self.cache and (cached := item.cached):
            is_whole = cached.state is FileState.UNVERIFIED
            offsets = (tile.offset for tile in item.artifact.tiles) if is_whole else cached.good
            found.append(_of_copy(PieceSource.CACHED, cached, offsets))
        for places in item.shelved:
            names = {offset: str(place.path) for offset, place in places.items()}
            found.append(Candidate(PieceSource.SHELF, names, Shelf(places)))
        return found

    def origins(self, item: ArtifactState, root: Path) -> tuple[PieceOrigin, ...]:
        """Return where each piece of an artifact comes from: the first candidate that has it."""
        candidates, origins = self.candidates(item, root), []
        known = {p.offset: f.finding for p, f in _chunk_files(item) if self.chunks}
        for piece in item.artifact.tiles:
            kind, where = PieceSource.NOWHERE, "no source has it"
            if first := next((c for c in candidates if piece.offset in c.pieces), None):
                kind, where = first.kind, first.pieces[piece.offset]
            elif self.remote:
                kind, where = PieceSource.REMOTE, self.remote[0]
            elif finding := known.get(piece.offset):
                where = f"{piece.part}: {finding.kind}"
            origins.append(PieceOrigin(piece, kind, where))
        return tuple(origins)

    def source(self, item: ArtifactState, root: Path, remote: Sequence[Source]) -> Source:
        """Return the source that asks all candidates and then `remote`, in order.

        Where none has a piece, it raises what is known to be wrong with the chunk file.
        """
        invalid = [(p, f) for p, f in _chunk_files(item) if f.state is FileState.INVALID]
        known = {p.offset: f.finding for p, f in invalid if f.finding and self.chunks}
        return FirstOf(*self.candidates(item, root), *remote, known=known)


#: What is on this machine, and nothing else.
LOCAL = SourcePolicy()


def _chunk_files(item: ArtifactState) -> list[tuple[Piece, FileStatus]]:
    return list(zip(item.artifact.pieces, item.chunks, strict=True))


def _of_copy(kind: PieceSource, file: FileStatus, offsets: Iterable[int]) -> Candidate:
    pieces = dict.fromkeys(offsets, str(file.path))
    return Candidate(kind, pieces, WholeFile(file.path, file.size))


@dataclass
class RemoteSources:
    """The remote sources of a run, which share one downloader; each is opened when first asked.

    `cancel` is set when the run is given up; `log` gets a line for each outage,
    which may last `patience` seconds. `limit_rate` is how many bytes a second they may
    give together. `limits` are other limits of the client than the usual ones, by their
    names in `Timeouts`.
    """

    names: Iterable[str]
    manifest: Manifest
    cancel: threading.Event
    log: Callable[[str], None]
    patience: float | None = None
    limit_rate: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def __enter__(self) -> Sequence[LazySource]:
        self._closing, self._lock, self._opened = ExitStack(), threading.Lock(), dict[str, Source]()
        return [LazySource(name, bind(self._open, name)) for name in self.names]

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @cached_property
    def _downloader(self) -> RangeDownloader:
        from csm_weights.transfer.http.client import Timeouts
        from csm_weights.transfer.http.lines import Lines
        from csm_weights.transfer.http.ranges import RangeDownloader

        timeouts = replace(Timeouts.with_patience(self.patience), **self.limits)
        lines = Lines(self.limit_rate)
        return self._closing.enter_context(RangeDownloader(self.cancel, self.log, timeouts, lines))

    def _open(self, name: str) -> Source:
        with self._lock:
            if name not in self._opened:
                kind = REMOTE[HUB if name == HUB else urlsplit(name).scheme]
                module = importlib.import_module(f"csm_weights.transfer.{kind}")
                self._opened[name] = module.open_source(name, self.manifest, self._downloader)
            return self._opened[name]


@dataclass(frozen=True)
class LazySource:
    """A source that is opened when it is first asked: most runs ask no server."""

    name: str
    open: Callable[[], Source]
    is_remote: ClassVar[bool] = True

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`."""
        return self.open().deliver(artifact, piece, writer)

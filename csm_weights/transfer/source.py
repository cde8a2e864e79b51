"""Where the bytes of a piece may come from: one narrow interface for all.

A source puts a piece's bytes into a `PieceWriter` and says who it is; it never
judges them. The sink knows the digest, so a source cannot vouch for itself.
Which source is asked next is composition: `first_of(chunks, hub, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from csm_weights.errors import Finding
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.reorder import Buffer


class NotAvailable(Exception):
    """The source does not have this piece; another one may."""


class SourceError(Exception):
    """The source has the piece, but not the right bytes, or cannot give them."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f.line() for f in findings))
        self.findings = tuple(findings)


class PieceWriter(Protocol):
    """Takes the bytes of one piece and proves them.

    They come as a local file (`take_file`), or in blocks in any order and
    from several threads (`wanted`, `lend`, `put`). What was put stays when a
    source breaks off: the next one is asked for the rest.
    """

    def begin(self) -> None:
        """Forgets what was taken."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was taken yet, in this run or in one before."""

    def take_file(self, fd: int, offset: int) -> None:
        """Takes the piece from the local file `fd`, where it begins at byte `offset`.

        The caller makes sure that the file did not change meanwhile.

        Raises OSError or EOFError when the file cannot be read that far.
        """

    def wanted(self) -> list[tuple[int, int]]:
        """The half-open ranges of the artifact's bytes that are still to be put, in order."""

    def lend(self) -> Buffer:
        """An empty block to be filled; it goes back by `put`."""

    def put(self, block: Buffer, offset: int, size: int) -> None:
        """Takes the first `size` bytes of a block, which belong at byte `offset`."""

    def prove(self, where: str) -> None:
        """Raises Broken, naming `where`, unless the bytes taken have the digest."""

    def note(self, findings: Sequence[Finding]) -> None:
        """Remembers what was wrong with sources, though another one delivered."""


class Source(Protocol):
    """One place that may hold pieces."""

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
        """Puts the piece into `sink` and returns the place it came from.

        Raises Absent when it is not here, Broken when it is and cannot be used.
        """


class _FirstOf:
    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
        findings: list[Finding] = []
        for source in self._sources:
            try:
                place = _proven(source, artifact, piece, sink)
            except NotAvailable:
                continue
            except SourceError as broken:
                findings += broken.findings
            else:
                sink.note(findings)
                return place
        if findings:
            raise SourceError(findings)
        raise NotAvailable


def _proven(source: Source, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
    """What one source delivers, proven; a source is blamed only for bytes that are all its own."""
    is_its_own = sink.is_empty
    place = source.deliver(artifact, piece, sink)
    try:
        sink.prove(place)
    except SourceError:
        sink.begin()
        if is_its_own:
            raise
        return _proven(source, artifact, piece, sink)
    return place


def first_of(*sources: Source) -> Source:
    """A source that asks each in turn until one delivers proven bytes.

    Raises Broken with every source's finding, or Absent when none has it.
    """
    return _FirstOf(sources)

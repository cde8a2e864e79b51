"""Sources: the narrow protocol by which the bytes of a piece are delivered.

A source writes a piece's bytes into a `PieceWriter` and returns where they came
from; the writer verifies them, so no source vouches for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.reorder import Buffer


class NotAvailable(Exception):
    """A source does not have a piece; another one may."""


class SourceError(Exception):
    """A source has a piece, but with wrong bytes, or cannot deliver it."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f.line() for f in findings))
        self.findings = tuple(findings)


class PieceWriter(Protocol):
    """The unfinished file, as the source of one piece sees it.

    Bytes come from a local file (`copy_from`), or in buffers, in any order and
    from several threads (`wanted`, `acquire_buffer`, `write`). What was written
    stays when a source fails: the next one is asked for the rest.
    """

    def reset(self) -> None:
        """Forget what was written."""

    @property
    def is_empty(self) -> bool:
        """True where nothing was written yet, in this run or in one before."""

    def copy_from(self, fd: int, offset: int) -> None:
        """Copy the piece from the local file `fd`, where it begins at byte `offset`.

        The caller makes sure that the file did not change meanwhile. Raises
        OSError or EOFError where it cannot be read that far.
        """

    def wanted(self) -> list[tuple[int, int]]:
        """Return the half-open ranges of the artifact's bytes that are still to be written."""

    def acquire_buffer(self) -> Buffer:
        """Return an empty buffer; it goes back by `write`."""

    def write(self, buffer: Buffer, offset: int, size: int) -> None:
        """Write the first `size` bytes of a buffer to byte `offset` of the artifact."""

    def verify(self, where: str) -> None:
        """Raise SourceError, naming `where`, unless the bytes written have the digest."""

    def add_notes(self, findings: Sequence[Finding]) -> None:
        """Keep what was wrong with sources for which another one stepped in."""


class Source(Protocol):
    """One place that may have pieces.

    A source with an attribute `is_remote` that is true may deliver the right
    bytes the next time.
    """

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """Write the piece, and return the place it came from: a path or URL without secrets.

        Raises NotAvailable where it is not here, SourceError where it is and
        cannot be used.
        """


class FirstOf:
    """A source that asks each in turn until one delivers the right bytes.

    It raises SourceError with every source's finding, or NotAvailable where none
    has the piece.
    """

    def __init__(self, *sources: Source) -> None:
        self._sources = sources

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`."""
        findings: list[Finding] = []
        sources = list(self._sources)
        for source in sources:
            try:
                place = _deliver_verified(source, artifact, piece, writer)
            except NotAvailable:
                continue
            except SourceError as error:
                findings += error.findings
                is_wrong = error.findings[0].kind is Kind.WRONG_DIGEST
                if is_wrong and getattr(source, "is_remote", False) and sources.count(source) == 1:
                    # Once all others were asked, it gets a second chance.
                    sources.append(source)
            else:
                writer.add_notes(findings)
                return place
        if findings:
            raise SourceError(findings)
        raise NotAvailable


def _deliver_verified(source: Source, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
    """Deliver a piece and verify it; wrong bytes that are not all the source's get a second try."""
    is_its_own = writer.is_empty
    place = source.deliver(artifact, piece, writer)
    try:
        writer.verify(place)
    except SourceError:
        writer.reset()
        if is_its_own:
            raise
        return _deliver_verified(source, artifact, piece, writer)
    return place

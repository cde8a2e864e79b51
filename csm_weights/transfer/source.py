"""Sources: the narrow protocol by which the bytes of a piece are delivered.

A source writes a piece's bytes into a `PieceWriter` and returns where they came
from; the writer verifies them, so no source vouches for itself.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Protocol

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Piece

#: What helps where some pieces of a file are here and others in no source.
NEXT_SOURCE = "insert the next disk, or add a --url that has it, and run the same command again"


#: Times that a remote source is asked for a piece while it gives wrong bytes.
ASKED = 3


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
    from several threads (`wanted`, `acquire_buffer`, `advance`, `write`). What was
    written stays when a source fails: the next one is asked for the rest. `notes`
    are what was wrong with sources for which another one stepped in.
    """

    notes: list[Finding]

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

    def acquire_buffer(self) -> memoryview:
        """Return an empty buffer; it goes back by `write`."""

    def advance(self, count: int) -> None:
        """Count bytes that have come into a buffer, before they are written."""

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        """Write the first `size` bytes of a buffer to byte `offset` of the artifact."""

    def verify(self, where: str) -> None:
        """Raise SourceError, naming `where`, unless the bytes written have the digest."""


class Source(Protocol):
    """One place that may have pieces.

    A source with an attribute `is_remote` that is true may deliver the right
    bytes the next time. It is asked once more for a piece that it has just
    delivered only if those bytes were wrong, and then begins afresh.
    """

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """Write the piece, and return the place it came from: a path or URL without secrets.

        Raises NotAvailable where it is not here, SourceError where it is and
        cannot be used.
        """


class FirstOf:
    """A source that asks each in turn until one delivers the right bytes.

    A remote one that gives wrong bytes is asked again after all others, `ASKED`
    times in all. The same wrong bytes each time are its content; others each time
    were damaged on the way, which may pass. Raises SourceError with every source's
    finding, and with what is `known` of a piece at its offset; NotAvailable where
    none has the piece.
    """

    def __init__(self, *sources: Source, known: Mapping[int, Finding] | None = None) -> None:
        self._sources = sources
        self._known = known or {}

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`."""
        found: dict[int, Sequence[Finding]] = {}
        queue, wrong = deque(self._sources), defaultdict[int, list[Finding]](list)
        while queue:
            source, is_its_own = queue.popleft(), writer.is_empty
            try:
                place = source.deliver(artifact, piece, writer)
            except NotAvailable:
                continue
            except SourceError as error:
                found[id(source)] = error.findings
                continue
            try:
                writer.verify(place)
            except SourceError as error:
                writer.reset()
                if not is_its_own:
                    # Some of the bytes are an earlier run's or another source's.
                    queue.appendleft(source)
                    continue
                tries = wrong[id(source)]
                tries += error.findings
                distinct = {*tries}
                found[id(source)] = [_damaged(tries)] if len(distinct) > 1 else [*distinct]
                if getattr(source, "is_remote", False) and len(tries) < ASKED:
                    queue.append(source)
                continue
            writer.notes += chain.from_iterable(found.values())
            return place
        findings = [*chain.from_iterable(found.values())]
        if piece.offset in self._known:
            findings.append(self._known[piece.offset])
        if findings:
            raise SourceError(findings)
        raise NotAvailable


def _damaged(tries: Sequence[Finding]) -> Finding:
    """Return the finding for bytes of one source that were wrong in another way each time."""
    found = f"other wrong bytes each of {len(tries)} times"
    mend = "run the same command again; where that does not help, use another network or proxy"
    return replace(tries[0], kind=Kind.DAMAGED, found=found, help=mend)

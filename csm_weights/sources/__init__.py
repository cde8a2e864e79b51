"""Where the bytes of a piece may come from: one narrow interface for all.

A source puts a piece's bytes into a `Sink` and says who it is; it never
judges them. The sink knows the digest, so a source cannot vouch for itself.
Which source is asked next is composition: `first_of(chunks, hub, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from csm_weights.errors import Finding
from csm_weights.manifest import Artifact, Piece


class Absent(Exception):
    """The source does not have this piece; another one may."""


class Broken(Exception):
    """The source has the piece, but not the right bytes, or cannot give them."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f.line() for f in findings))
        self.findings = tuple(findings)


class Sink(Protocol):
    """Takes the bytes of one piece and proves them."""

    def begin(self) -> None:
        """Forgets what was taken: a source starts from the piece's first byte."""

    def take_file(self, fd: int, offset: int) -> None:
        """Takes the piece from the local file `fd`, where it begins at byte `offset`.

        The caller makes sure that the file did not change meanwhile.

        Raises OSError or EOFError when the file cannot be read that far.
        """

    def prove(self, where: str) -> None:
        """Raises Broken, naming `where`, unless the bytes taken have the digest."""


class Source(Protocol):
    """One place that may hold pieces."""

    def deliver(self, artifact: Artifact, piece: Piece, sink: Sink) -> str:
        """Puts the piece into `sink` and returns the place it came from.

        Raises Absent when it is not here, Broken when it is and cannot be used.
        """


class _FirstOf:
    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def deliver(self, artifact: Artifact, piece: Piece, sink: Sink) -> str:
        findings: list[Finding] = []
        for source in self._sources:
            sink.begin()
            try:
                place = source.deliver(artifact, piece, sink)
                sink.prove(place)
            except Absent:
                continue
            except Broken as broken:
                findings += broken.findings
            else:
                return place
        if findings:
            raise Broken(findings)
        raise Absent


def first_of(*sources: Source) -> Source:
    """A source that asks each in turn until one delivers proven bytes.

    Raises Broken with every source's finding, or Absent when none has it.
    """
    return _FirstOf(sources)

"""Half-open byte ranges of a file: one range, and sets of them."""

from collections.abc import Sequence
from dataclasses import dataclass


class Ranges:
    """A set of bytes as half-open ranges, merged and in order."""

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add the bytes `[start, end)`; raises ValueError where there are none."""
        if start >= end:
            raise ValueError(f"[{start}, {end}) is not a range")
        before = [r for r in self._ranges if r[1] < start]
        after = [r for r in self._ranges if r[0] > end]
        touching = self._ranges[len(before) : len(self._ranges) - len(after)]
        if touching:
            start, end = min(start, touching[0][0]), max(end, touching[-1][1])
        self._ranges = [*before, (start, end), *after]

    def end_of(self, start: int) -> int:
        """Return the end of the range that holds byte `start`, or `start` where none does."""
        return next((e for s, e in self._ranges if s <= start < e), start)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of `[start, end)` that are not in the set."""
        gaps = []
        for s, e in self._ranges:
            if s > start:
                gaps.append((start, min(s, end)))
            start = max(start, e)
        gaps.append((start, end))
        return [(s, e) for s, e in gaps if s < e]

    def __bool__(self) -> bool:
        return bool(self._ranges)


@dataclass(frozen=True)
class ByteRange:
    """The half-open byte range `[offset, offset + size)`, read in order by one thread.

    It must hash to the hex `sha256` where that is given.
    """

    offset: int
    size: int
    sha256: str | None = None

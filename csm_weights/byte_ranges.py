"""Half-open byte ranges of a file: one range, and sets of them."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

_start, _end = itemgetter(0), itemgetter(1)


class Ranges:
    """A set of bytes as half-open ranges, merged and in order."""

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add the bytes `[start, end)`; raises ValueError where there are none."""
        if start >= end:
            raise ValueError(f"[{start}, {end}) is not a range")
        first = bisect_left(self._ranges, start, key=_end)
        last = bisect_right(self._ranges, end, key=_start)
        if touching := self._ranges[first:last]:
            start, end = min(start, touching[0][0]), max(end, touching[-1][1])
        self._ranges[first:last] = [(start, end)]

    def end_of(self, start: int) -> int:
        """Return the end of the range that holds byte `start`, or `start` where none does."""
        at = bisect_right(self._ranges, start, key=_end)
        holds = at < len(self._ranges) and self._ranges[at][0] <= start
        return self._ranges[at][1] if holds else start

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges of `[start, end)` that are not in the set."""
        gaps = []
        first = bisect_right(self._ranges, start, key=_end)
        for s, e in self._ranges[first : bisect_left(self._ranges, end, key=_start)]:
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

"""Counts: what was done, how often, and how it ended."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """One row: `what` was done `tries` times; `out` counts the ends, `wrong` the failures."""

    group: str
    what: str
    tries: int = 0
    out: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, wrong: list[str], where: str) -> None:
        """Count one try; `where` says how to repeat it."""
        self.tries += 1
        self.out[outcome] += 1
        self.wrong += [f"{self.what}: {where}: {text}" for text in wrong]

    def cells(self) -> tuple[str, str, str]:
        """Return the row of a table: what was done, how often, the outcome."""
        outcome = ", ".join(f"{text} {count}" for text, count in self.out.most_common())
        verdict = f"**{len(self.wrong)} wrong**: {self.wrong[0]}" if self.wrong else "all well"
        return self.what, str(self.tries), f"{verdict} ({outcome})"


@dataclass(frozen=True)
class TimeBox:
    """A limit on time; `ends` is in seconds of the monotonic clock."""

    ends: float

    @classmethod
    def of(cls, seconds: float) -> TimeBox:
        """Return a box that ends in so many seconds."""
        return cls(time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() >= self.ends

    def share(self, part: float) -> TimeBox:
        """Return a box for a part of the time that is left."""
        return TimeBox.of(max(0.0, self.ends - time.monotonic()) * part)

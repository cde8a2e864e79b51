"""What was done, how often, and what came out."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """One row: `what` was done `tries` times; `out` counts how it ended, `wrong` has the rest."""

    group: str
    what: str
    tries: int = 0
    out: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, came: str, wrong: list[str], where: str) -> None:
        """Counts one try; `where` says how to do it again."""
        self.tries += 1
        self.out[came] += 1
        self.wrong += [f"{self.what}: {where}: {text}" for text in wrong]

    def cells(self) -> tuple[str, str, str]:
        """The row of a table: what was done, how often, what came out."""
        came = ", ".join(f"{text} {count}" for text, count in self.out.most_common())
        verdict = f"**{len(self.wrong)} wrong**: {self.wrong[0]}" if self.wrong else "all well"
        return self.what, str(self.tries), f"{verdict} ({came})"


@dataclass(frozen=True)
class Clock:
    """A time box; `ends` is in seconds of the monotonic clock."""

    ends: float

    @classmethod
    def of(cls, seconds: float) -> Clock:
        """A box of so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.ends

    def share(self, part: float) -> Clock:
        """A box of a part of what is left."""
        return Clock.of(max(0.0, self.ends - time.monotonic()) * part)

"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing on stdout."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

from csm_weights.errors import printable

#: Off a terminal there is a line every so many seconds, or percent if that is
#: later than the least time between two lines.
LINE_SECONDS = 10.0
LINE_PERCENT = 10
LEAST_SECONDS = 1.0

#: Work below this many bytes is over before anyone could read a line about it.
WORTH_SHOWING = 32 << 20


class Progress:
    """Counts bytes towards `total` and shows how it goes, safely from any thread."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._done = 0
        self._started = self._shown_at = time.monotonic()
        self._shown_percent = 0
        self._bar: Any = self._open_bar() if total >= WORTH_SHOWING else None
        self._plain = total >= WORTH_SHOWING and self._bar is None

    def _open_bar(self) -> Any:
        if not self._stream.isatty() or os.environ.get("TQDM_DISABLE"):
            return None
        from tqdm import tqdm

        return tqdm(
            total=self._total,
            desc=self._label,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=self._stream,
            leave=False,
            colour=None,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if (self._bar is not None or self._plain) and kind is None:
            self.log(f"{self._done:,} bytes in {time.monotonic() - self._started:.1f} s")

    def advance(self, count: int) -> None:
        """Counts `count` more bytes."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif self._plain:
                self._maybe_line()

    def _maybe_line(self) -> None:
        now = time.monotonic()
        percent = min(100, self._done * 100 // self._total)
        quiet = now - self._shown_at
        further = percent >= self._shown_percent + LINE_PERCENT
        if quiet >= LINE_SECONDS or (further and quiet >= LEAST_SECONDS):
            self._shown_at, self._shown_percent = now, percent
            rate = self._done / max(now - self._started, 1e-9)
            left = max(0, self._total - self._done) / max(rate, 1)
            speed = f"{rate / 2**20:,.0f} MiB/s, {left:.0f} s left"
            self.log(f"{percent} % of {self._total:,} bytes, {speed}")

    def log(self, text: str) -> None:
        """Prints a line under this label at once."""
        print(printable(f"{self._label}: {text}"), file=self._stream, flush=True)

"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, TextIO

from csm_weights.errors import printable

#: Off a terminal there is a line every so many seconds, or percent after the least time.
LINE_SECONDS = 10.0
LINE_PERCENT = 10
LEAST_SECONDS = 1.0

#: Work below this many bytes is most often over before anyone could read a line about it.
WORTH_SHOWING = 32 << 20

#: Seconds until work that is too small to be shown, or has no bytes, is named all the same;
#: and until a rate is steady enough to be shown, and a time left with it.
NAMED_AFTER = 2.0


def format_size(count: float) -> str:
    """Return a number of bytes in words, such as "5.8 GiB": one unit family for all screens."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:,.1f} {units[0]}"


def label_for(verb: str, paths: Iterable[str]) -> str:
    """Return a label for work on files: with the file's name, or how many there are."""
    names = list(paths)
    return f"{verb} {names[0] if len(names) == 1 else f'{len(names):,} files'}"


def _pace(done: int, total: int, seconds: float) -> str:
    """Return how much is done, and once the rate is steady how fast, and how long it will take."""
    text = f"{format_size(done)} of {format_size(total)}"
    if seconds < NAMED_AFTER or not done:
        return text
    left = max(0, total - done) * seconds / done
    time_left = f"{left:.0f} s" if left < 120 else f"{left // 60:.0f} min"
    if left >= 3600:
        time_left = f"{left // 3600:.0f} h {left // 60 % 60:.0f} min"
    return f"{text}, {format_size(done / seconds)}/s, {time_left} left"


class Progress:
    """A count of bytes towards `total` that shows how it goes, safe to use from any thread."""

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
        self._name = threading.Timer(NAMED_AFTER, self._print, [f"{label} ..."])
        self._name.daemon = True

    def _open_bar(self) -> Any:
        if not (self._stream and self._stream.isatty()) or os.environ.get("TQDM_DISABLE"):
            return None
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]
            @property
            def format_dict(self) -> Any:
                """Return what the bar shows, in our units."""
                shown: Any = super().format_dict
                return shown | {"pace": _pace(shown["n"], shown["total"], shown["elapsed"])}

        return Bar(
            total=self._total,
            desc=printable(self._label),
            file=self._stream,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {pace}",
        )

    def __enter__(self) -> Progress:
        if self._plain:
            self.log(format_size(self._total))
        elif self._bar is None:
            self._name.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._name.cancel()
        if self._bar is not None:
            self._bar.close()
        if kind is None and (self._bar is not None or self._plain):
            seconds = time.monotonic() - self._started
            self.log(f"{format_size(self._done)} in {seconds:.1f} s")

    def advance(self, count: int) -> None:
        """Count `count` more bytes."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif self._plain:
                now, percent = time.monotonic(), min(100, self._done * 100 // self._total)
                further = percent >= self._shown_percent + LINE_PERCENT
                if now - self._shown_at >= (LEAST_SECONDS if further else LINE_SECONDS):
                    self._shown_at, self._shown_percent = now, percent
                    self.log(f"{percent} %, {_pace(self._done, self._total, now - self._started)}")

    def log(self, text: str) -> None:
        """Print a line under this label at once."""
        self._print(f"{self._label}: {text}")

    def _print(self, line: str) -> None:
        if not self._stream:
            return
        write = self._bar.write if self._bar is not None else print
        # That nobody can read it stops no work.
        with contextlib.suppress(OSError):
            write(printable(line), file=self._stream)
            self._stream.flush()

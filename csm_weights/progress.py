"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing on stdout.

For programs there are lines of JSON. Whoever wants more adds a function to `listeners`.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, Self, TextIO

from csm_weights.errors import CsmWeightsError, columns, printable

#: Off a terminal there is a line every so many seconds, or percent after the least time.
LINE_SECONDS = 10.0
LINE_PERCENT = 10
LEAST_SECONDS = 1.0

#: Work below this many bytes is most often over before anyone could read a line about it.
WORTH_SHOWING = 32 << 20

#: Seconds until work that is too small to be shown, or has no bytes, is named all the same.
NAMED_AFTER = 1.5

#: Seconds until a rate is steady enough to be shown, and a time left with it.
STEADY_AFTER = 2.0

#: Columns of a bar that its percentage and pace may take, and that its label gets at least.
PACE, MIN_LABEL = 50, 28

#: Seconds without a byte after which that is shown; and between two looks whether it is so.
QUIET_SECONDS = 4.0
LOOK_SECONDS = 0.5

#: Seconds between two events of one work at least, but for its first and its last.
EVENT_SECONDS = 0.2


class Happening(enum.StrEnum):
    """The kinds of events."""

    BEGIN = "begin"
    PROGRESS = "progress"
    LOG = "log"
    END = "end"
    FAILED = "failed"


class Event(NamedTuple):
    """The bytes of a work that are done; times are of the monotonic clock, in seconds.

    `total` is 0 for a work without bytes. `number` tells works of one label apart, `message`
    is what a log says.
    """

    label: str
    started: float
    now: float
    done: int
    total: int
    number: int = 0
    what: Happening = Happening.PROGRESS
    message: str = ""


#: Functions that get the events of all works, from any thread; they must not wait.
listeners: list[Callable[[Event], None]] = []

#: Bytes that were taken from each source since this was cleared: from a host, or from a kind of
#: folder on this machine.
taken: Counter[str] = Counter()
_taking = threading.Lock()


def took(source: str, count: int) -> None:
    """Count bytes that were taken from a source, whether they turn out to be right or not."""
    with _taking:
        taken[source] += count


def format_size(count: float) -> str:
    """Return a number of bytes in words, such as "5.8 GiB": one unit family for all screens."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:,.1f} {units[0]}"


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def label_for(verb: str, paths: Iterable[str]) -> str:
    """Return a label for work on files: with the file's name, or how many there are."""
    names = list(paths)
    return f"{verb} {names[0] if len(names) == 1 else f'{len(names):,} files'}"


def shortened(text: str, room: int) -> str:
    """Return a text in at most so many columns, without its middle where it takes more."""
    if columns(text) <= room:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while columns(f"{head}...{tail}") > room:
        head, tail = (head[:-1], tail) if columns(head) > columns(tail) else (head, tail[1:])
    return f"{head}...{tail}"


def _pace(done: int, total: int, seconds: float, quiet: float = 0.0) -> str:
    """Return how much is done, and once the rate is steady how fast, and how long it will take.

    Or, where nothing has come for so many `quiet` seconds, that.
    """
    text = f"{format_size(done)} of {format_size(total)}"
    if quiet >= QUIET_SECONDS:
        return f"{text}, {'finishing' if done >= total else f'nothing for {quiet:.0f} s'}"
    if seconds < STEADY_AFTER or not done:
        return text
    left = max(0, total - done) * seconds / done
    time_left = f"{left:.0f} s" if left < 120 else f"{left // 60:.0f} min"
    if left >= 3600:
        time_left = f"{left // 3600:.0f} h {left // 60 % 60:.0f} min"
    return f"{text}, {format_size(done / seconds)}/s, {time_left} left"


class Progress:
    """A count of bytes towards `total` that shows how it goes, safe to use from any thread.

    A thread of its own tells what is being done where that takes long and nothing
    moves. Of works in one another it is the innermost that is told. While `is_quiet`
    only listeners are told. A `total` of 0 is that of work without a number of bytes.
    """

    is_quiet: ClassVar[bool] = False
    _running: ClassVar[list[Progress]] = []
    _numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, label: str, total: int = 0, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._done = 0
        self._started = self._shown_at = self._moved_at = self._told_at = time.monotonic()
        self._shown_percent = 0
        self._number = next(Progress._numbers)
        self._bar: Any = self._open_bar() if total >= WORTH_SHOWING else None
        self._plain = total >= WORTH_SHOWING and self._bar is None and not self.is_quiet
        self._is_over = threading.Event()

    def _open_bar(self) -> Any:
        is_hidden = self.is_quiet or os.environ.get("TQDM_DISABLE")
        if is_hidden or not (self._stream and self._stream.isatty()):
            return None
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[type-arg]
            @property
            def format_dict(bar) -> Any:
                """Return what the bar shows, in our units."""
                shown: Any = super().format_dict
                room = max(MIN_LABEL, (shown["ncols"] or 80) - PACE)
                own = {"prefix": shortened(shown["prefix"], room)}
                return shown | own | {"pace": self._words(shown["elapsed"])}

        return Bar(
            total=self._total,
            desc=printable(self._label),
            file=self._stream,
            leave=False,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {pace}",
        )

    def _words(self, seconds: float) -> str:
        return _pace(self._done, self._total, seconds, time.monotonic() - self._moved_at)

    def __enter__(self) -> Progress:
        Progress._running.append(self)
        self._tell(self._started, Happening.BEGIN)
        if self._plain:
            self._line(format_size(self._total))
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._is_over.set()
            Progress._running.remove(self)
            self._tell(time.monotonic(), Happening.FAILED if kind else Happening.END)
            if self._bar is not None:
                self._bar.close()
        if kind is None and (self._bar is not None or self._plain):
            seconds = time.monotonic() - self._started
            self._line(f"{format_size(self._done)} in {seconds:.1f} s")

    def _watch(self) -> None:
        is_named = self._plain
        while not self._is_over.wait(LOOK_SECONDS):
            with self._lock:
                if self._is_over.is_set():
                    return
                now = time.monotonic()
                seconds = now - self._started
                is_due = now - self._shown_at >= (LINE_SECONDS if is_named else NAMED_AFTER)
                # A stall is told as soon as it is one.
                is_due |= self._plain and self._shown_at < self._moved_at + QUIET_SECONDS <= now
                if now - self._told_at >= LINE_SECONDS:
                    self._tell(now)
                if self._bar is not None:
                    self._bar.refresh()
                elif Progress._running[-1:] != [self]:
                    self._shown_at, is_named = now, False
                elif is_due:
                    self._shown_at = now
                    going = self._words(seconds) if self._plain else f"{seconds:.0f} s so far"
                    self._line(going) if is_named else self._print(f"{self._label} ...")
                    is_named = True

    def advance(self, count: int) -> None:
        """Count `count` more bytes."""
        with self._lock:
            self._done += count
            self._moved_at = now = time.monotonic()
            if now - self._told_at >= EVENT_SECONDS:
                self._tell(now)
            if self._bar is not None:
                self._bar.update(count)
            elif self._plain:
                percent = min(100, self._done * 100 // self._total)
                further = percent >= self._shown_percent + LINE_PERCENT
                if now - self._shown_at >= (LEAST_SECONDS if further else LINE_SECONDS):
                    self._shown_at, self._shown_percent = now, percent
                    self._line(f"{percent} %, {self._words(now - self._started)}")

    def _tell(self, now: float, what: Happening = Happening.PROGRESS, message: str = "") -> None:
        self._told_at = now
        figures = (self._label, self._started, now, self._done, self._total)
        for listener in listeners:
            listener(Event(*figures, self._number, what, message))

    def rename(self, label: str) -> None:
        """Show another label from now on."""
        with self._lock:
            self._label = label
            if self._bar is not None:
                self._bar.set_description_str(printable(label), refresh=False)

    def log(self, text: str) -> None:
        """Print a line under this label at once."""
        self._tell(time.monotonic(), Happening.LOG, text)
        self._line(text)

    def _line(self, text: str) -> None:
        self._print(f"{self._label}: {text}")

    def _print(self, line: str) -> None:
        if not self._stream or self.is_quiet:
            return
        write = self._bar.write if self._bar is not None else print
        # That nobody can read it stops no work.
        with contextlib.suppress(OSError):
            write(printable(line), file=self._stream)
            self._stream.flush()


#: The version of docs/json-schema/progress-v1.json: keys are added to it; one that goes or changes
#: makes a new version.
SCHEMA = 1


class JsonLines:
    """While the block runs, all progress goes to stderr as JSON, and bars and lines do not."""

    def __init__(self, command: str, stream: TextIO | None = None) -> None:
        self._command = command
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        Progress.is_quiet = True
        listeners.append(self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        listeners.remove(self._tell)
        Progress.is_quiet = False

    def end(self, error: CsmWeightsError | None) -> None:
        """Write the last object: how the task has ended."""
        self._write(
            event="result",
            command=self._command,
            ok=error is None,
            exit_code=error.exit_code if error else 0,
            message=error.message if error else "",
            findings=[asdict(finding) for finding in error.findings] if error else [],
            advice=error.advice if error else "",
            taken=dict(taken),
        )

    def _tell(self, event: Event) -> None:
        seconds = event.now - event.started
        own: dict[str, Any] = {"message": event.message} if event.what is Happening.LOG else {}
        self._write(
            event=event.what,
            work=event.number,
            label=event.label,
            seconds=round(seconds, 3),
            done=event.done,
            total=event.total or None,
            rate=round(event.done / seconds) if event.done and seconds > 0 else None,
            **own,
        )

    def _write(self, **values: object) -> None:
        line = json.dumps({"schema": SCHEMA, "time": round(time.time(), 3), **values})
        # That nobody can read it stops no work.
        with self._lock, contextlib.suppress(OSError, AttributeError):
            self._stream.write(f"{line}\n")
            self._stream.flush()

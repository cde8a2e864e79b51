"""Progress: on stderr only, a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from csm_weights import progress
from csm_weights.errors import columns
from csm_weights.progress import (
    LINE_PERCENT,
    LINE_SECONDS,
    WORTH_SHOWING,
    Progress,
    format_size,
    label_for,
)

#: Bytes of a piece of work that is worth showing.
TOTAL = 100 * WORTH_SHOWING


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that progress reads."""
    own = Clock()
    monkeypatch.setattr(time, "monotonic", own.monotonic)
    return own


def test_work_is_named_within_two_seconds() -> None:
    """However small it is: so long nothing may be silent."""
    assert progress.NAMED_AFTER + progress.LOOK_SECONDS <= 2


def run(clock: Clock, seconds: float, steps: int = 100, total: int = TOTAL) -> list[str]:
    """The lines of work that takes `seconds` in equal steps, off a terminal."""
    stream = io.StringIO()
    with Progress("hashing", total, stream) as shown:
        for _ in range(steps):
            clock.now += seconds / steps
            shown.advance(total // steps)
    return stream.getvalue().splitlines()


def test_off_a_terminal_there_are_plain_lines(clock: Clock) -> None:
    """A line has the label, percent, bytes, rate and time left, and no control character."""
    first, *lines, last = run(clock, 50)
    assert len(lines) > 2
    for line in lines:
        assert re.fullmatch(
            r"hashing: \d+ %, [\d.]+ [KMG]iB of 3.1 GiB, [\d.]+ MiB/s, \d+ s left", line
        )
    assert (first, last) == ("hashing: 3.1 GiB", "hashing: 3.1 GiB in 50.0 s")


def test_no_time_left_is_told_before_there_is_a_rate(clock: Clock) -> None:
    """In the first two seconds a line has percent and bytes alone."""
    lines = run(clock, 15)
    assert lines[1] == "hashing: 10 %, 320.0 MiB of 3.1 GiB"
    assert lines[2].endswith(" s left")


def test_there_is_a_line_every_ten_percent(clock: Clock) -> None:
    """Work of some seconds has a line each ten percent."""
    percents = [int(line.split()[1]) for line in run(clock, 50)[1:-1]]
    assert percents == list(range(LINE_PERCENT, 101, LINE_PERCENT))


def test_slow_work_has_a_line_every_ten_seconds(clock: Clock) -> None:
    """Work of many minutes has a line each ten seconds, however little was done."""
    lines = run(clock, 1000, steps=1000)
    assert len(lines) == 1000 / LINE_SECONDS + 2


def test_quick_work_has_two_lines(clock: Clock) -> None:
    """Work of less than a second says only that it begins and that it is over."""
    assert len(run(clock, 0.9)) == 2


def test_small_work_is_not_talked_about(clock: Clock) -> None:
    """Work that is over before one could read about it leaves no line."""
    assert run(clock, 100, total=WORTH_SHOWING - 1) == []


def test_work_of_no_bytes_is_fine(clock: Clock) -> None:
    """A total of zero divides nothing."""
    assert run(clock, 1, total=0) == []


def test_the_rate_and_the_time_left_are_right(clock: Clock) -> None:
    """Half of the bytes in 50 seconds leave 50 more."""
    stream = io.StringIO()
    with Progress("hashing", TOTAL, stream) as shown:
        clock.now += 50
        shown.advance(TOTAL // 2)
        line = "hashing: 50 %, 1.6 GiB of 3.1 GiB, 32.0 MiB/s, 50 s left\n"
        assert stream.getvalue().endswith(line)


def test_more_than_all_is_a_hundred_percent(clock: Clock) -> None:
    """Bytes that are hashed again do not lead beyond 100 %."""
    stream = io.StringIO()
    with Progress("hashing", TOTAL, stream) as shown:
        clock.now += 50
        shown.advance(2 * TOTAL)
    assert "\nhashing: 100 %, 6.2 GiB of " in stream.getvalue()
    assert ", 0 s left\n" in stream.getvalue()


def test_failed_work_does_not_say_that_it_is_over(clock: Clock) -> None:
    """After an error there is no closing line."""
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("hashing", TOTAL, stream):
        clock.now += 5
        raise KeyError
    assert stream.getvalue() == "hashing: 3.1 GiB\n"


def test_it_talks_to_stderr_and_never_to_stdout(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a stream, lines go to stderr; stdout stays for results."""
    with Progress("hashing", TOTAL) as shown:
        clock.now += 20
        shown.advance(TOTAL)
        shown.log("a word")
    out, err = capsys.readouterr()
    assert out == ""
    assert "hashing: a word\n" in err
    assert err.count("\n") == 4


def test_a_given_stream_is_the_only_one(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """With a stream, neither stdout nor stderr has a word."""
    assert run(clock, 20)
    assert capsys.readouterr() == ("", "")


def test_say_tells_at_once_however_small_the_work(clock: Clock) -> None:
    """A message is printed under the label even when there is nothing to count."""
    stream = io.StringIO()
    with Progress("waiting", 0, stream) as shown:
        clock.now += 1
        shown.log("another run holds the lock")
    assert stream.getvalue() == "waiting: another run holds the lock\n"


def test_ticks_from_many_threads_are_all_counted() -> None:
    """No byte is lost when workers tick at once."""
    stream = io.StringIO()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Progress("hashing", 1 << 40, stream) as shown:

            def work() -> None:
                for _ in range(5000):
                    shown.advance(1)

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert stream.getvalue().splitlines()[-1].startswith("hashing: 39.1 KiB in ")


class SlowStream(io.StringIO):
    """A stream on which writes of two threads would mix."""

    def write(self, text: str) -> int:
        for letter in text:
            super().write(letter)
            time.sleep(0)
        return len(text)


def test_lines_of_many_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that tick at once each get a whole line."""
    seconds = itertools.count(0, 100)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    stream = SlowStream()
    shown = Progress("hashing", TOTAL, stream)
    work = [threading.Thread(target=shown.advance, args=(1,)) for _ in range(40)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 40
    assert [line for line in lines if not re.fullmatch(r"hashing: 0 %, .*", line)] == []


def test_small_work_that_takes_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds work of few bytes, or of none, says what it is, once."""
    monkeypatch.setattr("csm_weights.progress.NAMED_AFTER", 0.05)
    monkeypatch.setattr("csm_weights.progress.LOOK_SECONDS", 0.02)
    stream = io.StringIO()
    with Progress("loading ckpt.pt", 0, stream):
        time.sleep(0.3)
    assert stream.getvalue() == "loading ckpt.pt ...\n"


class BrokenStream(io.StringIO):
    """A stream that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(text)


@pytest.mark.parametrize("stream", [None, BrokenStream()])
def test_a_closed_stderr_stops_no_work(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without stderr, or with one that nobody reads, work goes on in silence."""
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("hashing", TOTAL) as shown:
        shown.advance(TOTAL)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (6211186784, "5.8 GiB"),
        (3 << 50, "3,072.0 TiB"),
    ],
)
def test_sizes_have_one_unit_family(count: int, words: str) -> None:
    """Sizes are shown in units of 1024, with one digit after the point."""
    assert format_size(count) == words


def test_a_label_has_the_name_of_the_file() -> None:
    """One file is named, several are counted."""
    assert label_for("verifying", ["a.bin"]) == "verifying a.bin"
    assert label_for("verifying", ["a", "b"]) == "verifying 2 files"


# ---- on a terminal


@pytest.fixture
def terminal() -> Callable[..., tuple[str, str]]:
    """Runs some work whose stderr is a terminal; returns its stdout and what was shown."""
    code = f"""
import sys, time
from csm_weights.progress import Progress
with Progress(sys.argv[2], {TOTAL}) as shown:
    for _ in range(5):
        time.sleep(float(sys.argv[1]) / 5)
        shown.advance({TOTAL} // 5)
"""

    def show(
        environment: dict[str, str], seconds: float, label: str = "hashing"
    ) -> tuple[str, str]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        clean = {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", "NO_COLOR")}
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(seconds), label],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**clean, "TERM": "xterm", **environment},
        )
        os.close(theirs)
        shown = _read_all(ours)
        os.close(ours)
        out, _ = process.communicate()
        assert process.returncode == 0
        return out.decode(), shown

    return show


def _read_all(fd: int) -> str:
    shown = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            block = os.read(fd, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    return shown.decode(errors="replace")


Terminal = Callable[..., tuple[str, str]]


def test_on_a_terminal_there_is_a_bar(terminal: Terminal) -> None:
    """A terminal has one bar with bytes, rate and percent, redrawn in place; stdout is empty."""
    out, shown = terminal({}, 0.6)
    assert out == ""
    assert re.search(r"hashing: +\d+%\|.*\| [\d.]+ [KMG]iB of 3\.1 GiB", shown)
    assert "\r" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("letter", ["x", "\u30e2"])
def test_a_long_name_leaves_room_for_the_bar(terminal: Terminal, letter: str) -> None:
    """Of a label that would fill the line the middle is left out; the last line has all of it."""
    label = f"hashing {letter * 90}.bin"
    _, shown = terminal({"PYTHONUTF8": "1"}, 0.6, label)
    bars = [line for line in re.split("[\r\n]+", shown) if "%|" in line]
    assert bars and all(re.search(r"hashing .*\.\.\..*\.bin: +\d+%\|.*\| .* of 3", b) for b in bars)
    assert max(map(columns, bars)) <= 100
    assert f"{label}: " in shown


def test_a_bar_has_no_colour(terminal: Terminal) -> None:
    """With NO_COLOR the bar is there and nothing is coloured."""
    _, shown = terminal({"NO_COLOR": "1"}, 0.6)
    assert ("%|" in shown, "\x1b[3" in shown) == (True, False)


def test_tqdm_disable_leaves_plain_lines(terminal: Terminal) -> None:
    """TQDM_DISABLE takes the bar away, on a terminal too."""
    out, shown = terminal({"TQDM_DISABLE": "1"}, 1.4)
    assert out == ""
    assert "%|" not in shown
    *lines, last = shown.splitlines()
    assert last.startswith("hashing: 3.1 GiB in ")
    assert len(lines) > 1
    assert all(re.fullmatch(r"hashing: (\d+ %, .* of )?3.1 GiB", line) for line in lines)


def test_a_dumb_stream_needs_no_tqdm() -> None:
    """Off a terminal the bar's library is not even loaded."""
    code = f"""
import sys
from csm_weights.progress import Progress
with Progress("hashing", {TOTAL}) as shown:
    shown.advance(1)
print("tqdm" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- where nothing moves


class Screen(io.StringIO):
    """A stream that takes a bar."""

    def isatty(self) -> bool:
        return True


def waiting(total: int, seconds: float, done: int = 0, stream: Any = None) -> str:
    """What is shown of work that brings `done` bytes at once and then none for some seconds."""
    stream = stream or io.StringIO()
    with Progress("fetching", total, stream) as shown:
        shown.advance(done)
        time.sleep(seconds)
    text: str = stream.getvalue()
    return text


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds pass ten times as fast for those who wait for a word."""
    for name in ("LINE_SECONDS", "NAMED_AFTER", "QUIET_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(progress, name, getattr(progress, name) / 10)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("total", [0, WORTH_SHOWING - 1])
def test_long_work_is_named_and_then_told_to_go_on(total: int) -> None:
    """Work without a bar is named after two seconds, and every ten that it takes."""
    lines = waiting(total, 2.5).splitlines()
    assert lines[0] == "fetching ..."
    assert len(lines) == 3
    assert all(re.fullmatch(r"fetching: \d+ s so far", line) for line in lines[1:])


@pytest.mark.usefixtures("hasty")
def test_a_stall_is_told_off_a_terminal() -> None:
    """Where no byte comes, a line says so after four seconds, and every ten."""
    first, *lines, last = waiting(TOTAL, 2.0, done=TOTAL // 2).splitlines()
    assert (first, last) == ("fetching: 3.1 GiB", "fetching: 1.6 GiB in 2.0 s")
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"fetching: 1.6 GiB of 3.1 GiB, nothing for \d s", line)


@pytest.mark.usefixtures("hasty")
def test_a_stall_shows_in_the_bar() -> None:
    """The bar is drawn again where no byte comes, and tells it."""
    stream = Screen()
    assert "nothing for 1 s" in waiting(TOTAL, 1.5, done=TOTAL // 2, stream=stream)


@pytest.mark.usefixtures("hasty")
def test_the_end_of_work_is_no_stall() -> None:
    """Once all bytes are counted, what still takes time is called finishing."""
    assert "3.1 GiB of 3.1 GiB, finishing" in waiting(TOTAL, 1.5, done=TOTAL)


@pytest.mark.usefixtures("hasty")
def test_of_works_in_one_another_the_innermost_is_told() -> None:
    """The outer one is named only once nothing else is going on."""
    stream = io.StringIO()
    with Progress("installing", 0, stream):
        with Progress("fetching", 0, stream):
            time.sleep(0.5)
        assert stream.getvalue() == "fetching ...\n"
        time.sleep(0.5)
    assert stream.getvalue() == "fetching ...\ninstalling ...\n"


def test_no_line_comes_after_the_end() -> None:
    """The thread that looks ends with the work."""
    before = threading.active_count()
    assert waiting(0, 0.0) == ""
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before

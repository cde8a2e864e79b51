"""Lines to servers: their number follows what it brings, and a limit holds for all together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import groupby

import pytest

from csm_weights.concurrency import Cancelled
from csm_weights.transfer.http.lines import (
    FIRST,
    LEAST,
    MOST,
    SECONDS,
    SLACK,
    Climb,
    Lines,
    TokenBucket,
)

MIB = 1 << 20

#: What a server gives in all, in bytes a second, to so many lines.
Server = Callable[[int], float]


def throttling(above: int) -> Server:
    """A server whose lines have 4 MiB/s each; with too many, all get half of what it has."""
    return lambda lines: 4 * MIB * (lines if lines <= above else above / 2)


def busy(lines: int) -> float:
    """A server, or a machine, that gives the same to any number of lines above two."""
    return 100 * MIB * min(1.0, lines / 3)


def crowded(lines: int) -> float:
    """A server that is the slower the more lines there are."""
    return 60 * MIB / (1 + abs(lines - 7))


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def brought(server: Server, seconds: float) -> float:
    """The bytes a second that the lines of a run of some seconds bring."""
    clock = Clock()
    lines, came = Lines(clock=clock), 0
    for _ in range(int(seconds * 20)):
        clock.now += 0.05
        count = int(server(lines.climb.lines) * 0.05)
        lines.came(count)
        came += count
    return came / seconds


@pytest.mark.parametrize("seconds", [20, 60, 600])
@pytest.mark.parametrize("server", [throttling(8), throttling(12), throttling(6), busy])
def test_no_fixed_number_of_lines_is_much_better(server: Server, seconds: float) -> None:
    """From 20 seconds on it is at least 90 % of what the best fixed number would bring."""
    assert brought(server, seconds) >= 0.9 * max(map(server, range(1, MOST + 1)))


@pytest.mark.parametrize("server", [crowded, lambda lines: MIB * lines])
def test_other_servers_take_longer_to_find_out_about(server: Server) -> None:
    """From a minute on it is as much."""
    assert brought(server, 60) >= 0.9 * max(map(server, range(1, MOST + 1)))


@pytest.mark.parametrize("above", range(1, 5))
def test_a_server_with_a_low_limit_gets_fewer_lines(above: int) -> None:
    """Below the number that a run begins with it is found in time, too."""
    server = throttling(above)
    assert brought(server, 600) >= 0.9 * server(above)


def test_where_nothing_is_better_the_number_stays() -> None:
    """On a line that is full, tries become rare and are taken back."""
    climb, numbers = Climb(), []
    for _ in range(1000):
        numbers.append(climb.lines)
        climb.measured(100 * MIB)
    assert numbers.count(FIRST) >= 0.95 * len(numbers)
    assert set(numbers) <= {FIRST, FIRST + 1, FIRST - 1, FIRST // 2, 1}


def test_others_are_tried_less_and_less_often_where_nothing_is_better() -> None:
    """One more, one fewer, half as many and one, with 7, 13, 25, 49 and 49 measurements between."""
    climb, used = Climb(), list[int]()
    for _ in range(149):
        used.append(climb.lines)
        climb.measured(1.0)
    runs = [(lines, len(list(same))) for lines, same in groupby(used)]
    others = [(6, 1), (4, 1), (2, 1), (1, 1), (6, 1)]
    rests = [(FIRST, count) for count in (1, 7, 13, 25, 49, 49)]
    assert runs == [one for pair in zip(rests, others, strict=False) for one in pair] + rests[5:]


@pytest.mark.parametrize(
    ("first", "server", "runs"),
    [
        (5, lambda n: 100 / n, "5 6 5*7 4 3 2 1*2 2 1*7 2 1"),
        (5, lambda n: n, "5 6 8 11 12*2 11 12*7 6 12*13 1 12"),
        (5, lambda n: min(n, 8), "5 6 8 11 8 9 8*7 7 8*13 4 8*25 1 8"),
        (5, lambda n: 10 - abs(n - 7), "5 6 8 6 7 9 7 8 7*7 6 7*13 3 7*25 1 7"),
        (5, lambda n: 10 if n == 1 else 1, "5 6 5*7 4 5*13 2 5*25 1*2 2 1*7 2"),
        (8, lambda n: 10 if n <= 4 else 1, "8 9 8*7 7 8*13 4 3 4*7 5 4*13 3 4*25 2 4"),
        (1, lambda _: 1, "1 2 1*7 2 1*13 2 1*25 2 1*49 2 1*49 2"),
        (2, lambda _: 1, "2 3 2*7 1 2*13 1 2*25 1 2*49 3 2"),
        (3, lambda _: 1, "3 4 3*7 2 3*13 1 3*25 1 3*49 4 3"),
        (12, lambda _: 1, "12 11 12*7 6 12*13 1 12*25 11 12"),
    ],
)
def test_numbers_are_tried_in_turn(first: int, server: Server, runs: str) -> None:
    """What is better is kept: after a step up a longer one, after one down another one down."""
    climb, used = Climb(first), list[str]()
    for _ in range(200):
        used.append(f"{climb.lines}")
        climb.measured(server(climb.lines))
    counts = ((lines, len(list(same))) for lines, same in groupby(used))
    found = " ".join(lines if count == 1 else f"{lines}*{count}" for lines, count in counts)
    assert found.startswith(runs)


@pytest.mark.parametrize(("rate", "lines"), [(95, 5), (105, 5), (105.1, 8), (200, 8)])
def test_more_lines_have_to_bring_five_percent_more(rate: float, lines: int) -> None:
    """As much would be chance."""
    climb = Climb()
    climb.measured(100)
    assert climb.lines == 6
    climb.measured(rate)
    assert climb.lines == lines


@pytest.mark.parametrize(
    ("count", "seconds", "is_worse"),
    [
        (0, 0.2, True),
        (0, 0.19, False),
        (2 * MIB - 1, 0.25, True),
        (2 * MIB, 0.25, False),
        (8 * MIB - 1, 1, True),
        (8 * MIB, 1, False),
        (20 * MIB, 1, False),
    ],
)
def test_a_try_that_brings_much_less_is_cut_short(
    count: int, seconds: float, is_worse: bool
) -> None:
    """Less than 80 % of what was to come, where that is 2 MiB at least; the usual number is not."""
    climb = Climb()
    assert not climb.is_much_worse(0, 1)
    climb.measured(10 * MIB)
    assert climb.is_much_worse(count, seconds) is is_worse
    climb.measured(0)
    assert not climb.is_much_worse(count, seconds)


def test_noise_is_no_reason_for_many_lines_or_none() -> None:
    """The number stays between one and the most, whatever is measured."""
    climb, rate = Climb(), 1.0
    for step in range(1000):
        rate = rate * 7919 % 104729
        climb.measured(rate)
        assert 1 <= climb.lines <= MOST, step


def test_a_limit_holds_over_any_five_seconds() -> None:
    """Readers that wait as they are told, some of them late, stay within 3 % of the limit."""
    limit, now, read = 20.0 * MIB, 0.0, 64 << 10
    bucket, log = TokenBucket(limit), list[tuple[float, int]]()
    for turn in range(10_000):
        log.append((now, read))
        late = 0.02 * (turn % 7 == 0)
        now += 0.0001 + bucket.pause(read, now) + late
    times = [when for when, _ in log]
    for start in range(0, len(times), 97):
        if times[start] + 5 > times[-1]:
            break
        window = sum(count for when, count in log[start:] if when < times[start] + 5)
        assert 0.97 <= window / (5 * limit) <= 1.03


def test_time_in_which_nothing_was_read_is_not_saved_up() -> None:
    """After a pause of the server only a moment is caught up on."""
    bucket = TokenBucket(1000)
    bucket.pause(1000, 0.0)
    assert bucket.pause(1000, 100.0) == pytest.approx(1 - SLACK)


@pytest.mark.parametrize(
    ("limit", "first", "span"),
    [
        (None, 5, 4 * MIB),
        (1024, 1, 16 << 10),
        (819199, 1, 16 << 10),
        (819200, 1, 32 << 10),
        (20.0 * MIB, 1, 51 * 16 << 10),
        (105 * MIB, 1, 4 * MIB),
        (1 << 30, 1, 4 * MIB),
    ],
)
def test_a_request_under_a_limit_asks_for_little(
    limit: float | None, first: int, span: int
) -> None:
    """For what one line brings in 0.04 seconds, in multiples of 16 KiB; a line is enough."""
    lines = Lines(limit)
    assert (lines.climb.lines, lines.span) == (first, span)
    climb = Climb()
    assert Lines(limit, climb).climb is climb


class Noted(Climb):
    """A climb that notes the rates that it is told, and then wants so many more lines."""

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.rates = list[float]()
        self.more = more

    def measured(self, rate: float) -> None:
        """Note a rate."""
        self.rates.append(rate)
        self.lines += self.more


def measured(*came: tuple[float, int], limit: float | None = None, more: int = 0) -> list[float]:
    """Return the rates that are measured where bytes come after so many seconds each."""
    clock, climb = Clock(), Noted(more)
    lines = Lines(limit, climb, clock)
    for seconds, count in came:
        clock.now += seconds
        assert (lines.came(count) > 0) is bool(limit and count)
    return climb.rates


def test_a_measurement_has_half_a_second_and_2_mib_at_least() -> None:
    """It is the bytes by the seconds, and the next one begins with it."""
    assert measured((0.5, 2 * MIB)) == [4 * MIB]
    assert measured((0.4375, 9 * MIB)) == []
    assert measured((0.5, 2 * MIB - 1)) == []
    assert measured((0.5, 2 * MIB - 1), (0.5, 1)) == [2 * MIB]
    assert measured((0.25, MIB), (0.25, MIB), (1, 3 * MIB)) == [4 * MIB, 3 * MIB]


def test_what_comes_while_the_number_of_lines_changes_is_not_counted() -> None:
    """For a quarter of a second."""
    first = (0.5, 2 * MIB)
    assert measured(first, (0.125, MIB), (0.125, 3 * MIB), (0.5, 0), more=1) == [4 * MIB, 6 * MIB]
    assert measured(first, (0.25, 3 * MIB), (0.25, 0), more=1) == [4 * MIB]
    assert measured(first, (0.125, MIB), (0.375, 3 * MIB)) == [4 * MIB, 8 * MIB]


def test_a_try_that_is_cut_short_is_measured_by_what_it_brought() -> None:
    """After a quarter of a second, and not before."""
    for seconds, lines in ((0.25, 5), (0.2265625, 6)):
        clock = Clock()
        of_run = Lines(clock=clock)
        clock.now += 0.5
        of_run.came(8 * MIB)
        assert of_run.climb.lines == 6
        clock.now += 0.25 + seconds
        of_run.came(MIB)
        assert of_run.climb.lines == lines


def test_at_the_limit_nothing_is_measured() -> None:
    """No number of lines brings more than there may be; 5 % below it, one more might."""
    limit = 105 << 16
    assert measured((1, 100 << 16), limit=limit) == []
    assert measured((1, (100 << 16) - 1), limit=limit) == [(100 << 16) - 1]
    assert measured((1, 100 << 16)) == [100 << 16]


def test_a_limit_is_waited_for_by_whoever_has_read() -> None:
    """What was read takes its time, less a moment's worth that is caught up on."""
    clock = Clock()
    lines = Lines(1000.0, clock=clock)
    assert lines.came(100) == pytest.approx(0.1 - 0.07)
    assert lines.came(100) == pytest.approx(0.2 - 0.07)
    clock.now += 0.13
    assert lines.came(0) == 0
    clock.now += 0.02
    assert lines.came(100) == pytest.approx(0.1 - 0.02)
    clock.now += 9
    assert lines.came(100) == pytest.approx(0.1 - 0.07)
    assert Lines(clock=clock).came(100) == 0


def test_lines_wait_for_their_turn_in_order() -> None:
    """One gets its place when another is closed, before later ones; the measurement goes on."""
    clock, climb = Clock(), Noted()
    lines = Lines(climb=climb, clock=clock)
    climb.lines = 1
    opened, turns = contextlib.ExitStack(), 0

    def is_over() -> bool:
        nonlocal turns
        turns += 1
        if turns == 2:
            opened.close()
            with pytest.raises(Cancelled):
                lines.enter(last, lambda: True)
        return False

    first = opened.enter_context(lines.line())
    lines.enter(first, lambda: True)
    lines.enter(first, lambda: True)
    clock.now += 0.25
    lines.came(MIB)
    with lines.line() as middle, lines.line() as last:
        lines.enter(middle, is_over)
        assert turns == 2
        clock.now += 0.25
        lines.came(MIB)
        assert climb.rates == [4 * MIB]


@pytest.mark.parametrize("fewer", [0, 1])
def test_a_line_that_is_no_longer_wanted_does_not_wait(fewer: int) -> None:
    """It ends with Cancelled, also where more lines are open than there may be now."""
    climb = Climb(first=2)
    lines = Lines(climb=climb)
    with lines.line() as first, lines.line() as second, lines.line() as third:
        lines.enter(first, lambda: True)
        lines.enter(second, lambda: True)
        climb.lines -= fewer
        with pytest.raises(Cancelled):
            lines.enter(third, lambda: True)
        climb.lines = 3
        lines.enter(third, lambda: True)


def test_the_newest_line_gives_way() -> None:
    """When one fewer is wanted, the line that began last loses its place, once."""
    climb = Climb(first=3)
    lines = Lines(climb=climb)
    with lines.line() as first, lines.line() as second, lines.line() as third:
        for number in (first, second, third):
            lines.enter(number, lambda: False)
        climb.lines = 4
        assert not any(lines.is_surplus(n) for n in (first, second, third))
        climb.lines = 2
        assert [lines.is_surplus(n) for n in (first, second, third)] == [False, False, True]
        assert not any(lines.is_surplus(n) for n in (first, second, third))


def test_a_measurement_begins_anew_where_too_few_lines_are_busy() -> None:
    """At the end of a piece there are fewer spans than lines, and their rate says nothing."""
    clock, climb = Clock(), Climb()
    lines = Lines(climb=climb, clock=clock)
    for _ in range(100):
        with lines.line() as number:
            lines.enter(number, lambda: False)
            clock.now += SECONDS / 2
            lines.came(LEAST)
    assert climb.lines == FIRST


def test_too_few_bytes_are_no_measurement() -> None:
    """On a slow network a measurement takes as long as a block needs."""
    clock = Clock()
    lines = Lines(clock=clock)
    for _ in range(100):
        clock.now += 0.5
        lines.came(LEAST // 200)
    assert lines.climb.lines == FIRST

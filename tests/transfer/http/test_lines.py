"""Lines to servers: their number follows what it brings, and a limit holds for all together."""

from __future__ import annotations

import threading
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
    SPAN,
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


def test_after_one_line_fewer_was_better_another_one_fewer_is_tried() -> None:
    """The way down has steps of one; a step up that was better is followed by a longer one."""
    climb = Climb(first=5)
    used = list[int]()
    for _ in range(12):
        used.append(climb.lines)
        climb.measured(100 / climb.lines)
    assert used == [5, 6, 5, 5, 5, 5, 5, 5, 5, 4, 3, 2]


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


@pytest.mark.parametrize("limit", [1024, 100 << 10, MIB, 20 * MIB, 1 << 30])
def test_a_request_under_a_limit_asks_for_little(limit: int) -> None:
    """What one line has on its way is at most 1 % of five seconds, or 16 KiB; a line is enough."""
    lines = Lines(limit)
    assert lines.climb.lines == 1
    assert 16 << 10 <= lines.span <= max(16 << 10, limit * 5 // 100)
    assert lines.span <= SPAN == Lines().span


def test_a_line_waits_until_there_is_room_for_it() -> None:
    """One more than there may be gets its place when another one is closed."""
    lines, in_turn = Lines(climb=Climb(first=1)), threading.Event()
    with lines.line() as first:
        lines.enter(first, lambda: False)

        def second() -> None:
            with lines.line() as number:
                lines.enter(number, lambda: False)
                in_turn.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert not in_turn.wait(0.2)
    thread.join(10)
    assert in_turn.is_set()


def test_a_line_that_is_no_longer_wanted_does_not_wait() -> None:
    """It ends with Cancelled."""
    lines = Lines(climb=Climb(first=1))
    with lines.line() as first, lines.line() as second:
        lines.enter(first, lambda: False)
        with pytest.raises(Cancelled):
            lines.enter(second, lambda: True)


def test_the_newest_line_gives_way() -> None:
    """When one fewer is wanted, the line that began last loses its place, once."""
    climb = Climb(first=3)
    lines = Lines(climb=climb)
    with lines.line() as first, lines.line() as second, lines.line() as third:
        for number in (first, second, third):
            lines.enter(number, lambda: False)
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

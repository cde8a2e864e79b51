"""Lines to servers: how many at a time, and how many bytes a second all of them together.

More lines bring more until the network, this machine or a server's limit is reached, and some
servers give less to those who come with many. So their number follows the rate that is
measured. A limit that the user sets is one token bucket for all lines.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from csm_weights.concurrency import Cancelled
from csm_weights.transfer.reorder import BLOCK, MOMENT

#: Lines that a run begins with, and has at most.
FIRST, MOST = 5, 12

#: Bytes that one request asks for. A kill loses at most half of this a line.
SPAN = 2 * BLOCK

#: The rate that other lines must bring, as a multiple, to be kept; and to be tried to the end.
BETTER, MUCH_WORSE = 1.05, 0.8

#: Measurements between two tries of another number: the first time, and at most.
REST, LONGEST_REST = 6, 48

#: A measurement: seconds and bytes at least, and seconds left out after the number has changed.
SECONDS, LEAST, SETTLE = 0.5, BLOCK, 0.25

#: Seconds of a rate limit that may be caught up on, and that one request asks for.
SLACK, AHEAD = 0.07, 0.04

#: Bytes of a request at least, and what its size is a multiple of.
SMALLEST = 16 << 10


class Climb:
    """Hill climbing: the number of `lines` to use next, from what others have brought.

    It tries one more, one fewer, half as many, and a single one. What is clearly better is
    kept, and the next step up is longer. After a try that was not, others are tried less often.
    """

    def __init__(self, first: int = FIRST, most: int = MOST) -> None:
        self.lines = self._best = first
        self._most = most
        self._rate = 0.0
        self._tries = self._rest = 0
        self._pause = REST

    def measured(self, rate: float) -> None:
        """Take the rate that the present number of lines has brought."""
        step = self.lines - self._best
        if step == 0:
            self._rate = rate
            self._rest -= 1
            if self._rest < 0:
                self.lines = self._next()
        elif rate > self._rate * BETTER:
            self._best, self._rate = self.lines, rate
            self._tries, self._rest, self._pause = 0, 0, REST
            further = self.lines + (step + 1 if step > 0 else -1)
            self.lines = min(self._most, max(1, further))
        else:
            self.lines = self._best
            # After a long step up that was too long, a short one follows.
            if step < 2:
                self._rest, self._pause = self._pause, min(2 * self._pause, LONGEST_REST)

    def is_much_worse(self, count: int, seconds: float) -> bool:
        """Return whether a try that has brought so many bytes need not be measured any longer."""
        expected = self._rate * seconds
        return self.lines != self._best and expected >= LEAST and count < MUCH_WORSE * expected

    def _next(self) -> int:
        """Return the number to try next, one after the other of those that may be."""
        numbers = (self._best + 1, self._best - 1, self._best // 2, 1)
        while True:
            number = numbers[self._tries % len(numbers)]
            self._tries += 1
            if 1 <= number <= self._most and number != self._best:
                return number


class TokenBucket:
    """A limit in bytes a second; bytes are counted once they have been read."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._paid_until = float("-inf")

    def pause(self, count: int, now: float) -> float:
        """Return the seconds to wait after `count` bytes that were read just now."""
        # What a late reader missed is caught up on, for a moment's worth.
        self._paid_until = max(self._paid_until, now - SLACK) + count / self.rate
        return max(0.0, self._paid_until - now)


class Lines:
    """The lines of one run, in the order in which they were asked for; safe from any thread.

    `limit` is in bytes a second. `span` is how many bytes one request asks for: little enough
    under a limit that what is on its way does not count.
    """

    def __init__(
        self,
        limit: float | None = None,
        climb: Climb | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.climb = climb or Climb(1 if limit else FIRST)
        self.span = SPAN
        if limit:
            self.span = min(SPAN, max(1, int(limit * AHEAD) // SMALLEST) * SMALLEST)
        self._bucket = TokenBucket(limit) if limit else None
        self._clock = clock
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self._waiting: set[int] = set()
        self._since, self._bytes = clock(), 0

    @contextmanager
    def line(self) -> Iterator[int]:
        """Yield the number of a further line, which is closed in the end; smaller ones go first."""
        number = next(self._numbers)
        try:
            yield number
        finally:
            self._close(number)

    def enter(self, number: int, is_over: Callable[[], bool]) -> None:
        """Wait for the turn of a line, unless it is open; raise Cancelled once `is_over`."""
        with self._changed:
            if number in self._open:
                return
            self._waiting.add(number)
            try:
                while len(self._open) >= self.climb.lines or number > min(self._waiting):
                    self._changed.wait(MOMENT)
                    if is_over():
                        raise Cancelled
                self._open.add(number)
            finally:
                self._waiting.discard(number)
                self._changed.notify_all()

    def _close(self, number: int) -> None:
        with self._changed:
            self._open.discard(number)
            if not self._waiting:
                # With fewer lines than there could be, nothing is measured.
                self._begin(self._clock())
            self._changed.notify_all()

    def is_surplus(self, number: int) -> bool:
        """Return whether an open line is one too many; then it has lost its place."""
        with self._changed:
            is_surplus = len(self._open) > self.climb.lines and number == max(self._open)
            if is_surplus:
                self._open.discard(number)
            return is_surplus

    def came(self, count: int) -> float:
        """Count bytes that a line has read; return the seconds to wait before it reads more."""
        with self._changed:
            now, before = self._clock(), self.climb.lines
            seconds = now - self._since
            self._bytes += count if seconds >= 0 else 0
            is_long = seconds >= SECONDS and self._bytes >= LEAST
            if is_long or (seconds >= SETTLE and self.climb.is_much_worse(self._bytes, seconds)):
                rate = self._bytes / seconds
                # At the limit no number of lines is better.
                if not self._bucket or rate < self._bucket.rate / BETTER:
                    self.climb.measured(rate)
                self._begin(now + SETTLE * (self.climb.lines != before))
                self._changed.notify_all()
            return self._bucket.pause(count, now) if self._bucket else 0.0

    def _begin(self, since: float) -> None:
        self._since, self._bytes = since, 0

"""When a request is tried again: how soon, for how long, and what ends it for all streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.client import HttpClient, RetryPolicy, Timeouts, TransientError
from csm_weights.transfer.source import SourceError
from tests.support.network import Clock

URL = "http://hub.example/x"
TROUBLE = Finding(Kind.SERVER_TROUBLE, "hub.example", "an answer", "503 Busy", "try again later")


@dataclass
class Host:
    """A host that always fails, asked by a client on whose clock only its waits count."""

    clock: Clock
    client: HttpClient
    log: list[str] = field(default_factory=list)

    def fails(self, policy: RetryPolicy | None = None, tries: int = 99, **what: Any) -> list[float]:
        """Try so many times, or to the end; return the seconds since the beginning of each try."""
        policy = policy or RetryPolicy(self.client, URL)
        began, times = self.clock.now, list[float]()
        for _ in range(tries):
            times.append(round(self.clock.now - began, 6))
            try:
                policy.wait(TransientError(TROUBLE, **what), self.clock.now)
            except SourceError as error:
                assert error.findings == (TROUBLE,)
                break
        return times


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Host]:
    """A maker of hosts, whose client has these limits."""

    def make(**limits: float) -> Host:
        clock, log = Clock(monkeypatch), list[str]()
        client = HttpClient(clock, log.append, Timeouts(**limits))
        client.watchdog.close()
        return Host(clock, client, log)

    return make


def waits(times: list[float]) -> list[float]:
    """Return the seconds between tries."""
    return [round(later - earlier, 6) for earlier, later in pairwise(times)]


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (2, [2, 4, 8, 16, 30, 30]),
        (0.25, [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]),
        (0.001, [0.001 * 2**n for n in range(11)] + [1.024, 1.024]),
    ],
)
def test_each_wait_is_twice_the_one_before(
    host: Callable[..., Host], backoff: float, expected: list[float]
) -> None:
    """But for what chance adds or takes away: up to 30 seconds, and ten times at most."""
    times = host(backoff=backoff, patience=600).fails(tries=len(expected) + 1)
    assert waits(times) == expected


@pytest.mark.parametrize(("chosen", "seconds"), [(min, 3), (max, 9)])
def test_chance_takes_away_or_adds_a_half(
    host: Callable[..., Host],
    chosen: Callable[..., float],
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that streams that failed together do not come back together."""
    far = host(backoff=6, patience=600)
    monkeypatch.setattr("random.uniform", chosen)
    assert far.fails(tries=2) == [0, seconds]


def test_a_host_is_tried_until_the_patience_is_over(host: Callable[..., Host]) -> None:
    """The last wait is cut so that the last try comes just then."""
    assert host(backoff=1, patience=10).fails() == [0, 1, 3, 7, 10]
    assert host(backoff=1, patience=7).fails() == [0, 1, 3, 7]


def test_the_usual_limits_are_those_of_the_docs(host: Callable[..., Host]) -> None:
    """Half a second doubled, for a minute; six seconds for a name; five minutes if asked for."""
    assert host().fails() == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 60]
    assert host().fails(is_unknown_name=True) == [0, 0.5, 1.5, 3.5, 6]
    assert host().fails(seconds=60) == [0, 60, 120, 180, 240]
    assert Timeouts.with_patience(None) == Timeouts()
    longer = Timeouts.with_patience(301)
    assert (longer.patience, longer.longest_wait) == (301, 301)
    shorter = Timeouts.with_patience(2)
    assert (shorter.patience, shorter.longest_wait) == (2, 300)


def test_the_patience_begins_with_the_request_that_failed(host: Callable[..., Host]) -> None:
    """But not before anything has come from the host, to whichever request."""
    slow = host(backoff=1, patience=10)
    began = slow.clock.now
    slow.clock.now += 4
    policy = RetryPolicy(slow.client, URL)
    policy.wait(TransientError(TROUBLE), began)
    assert slow.fails(policy) == [0, 2, 5]
    other = host(backoff=1, patience=10)
    began = other.clock.now
    other.clock.now += 4
    RetryPolicy(other.client, URL).progressed()
    other.clock.now += 4
    policy = RetryPolicy(other.client, URL)
    policy.wait(TransientError(TROUBLE), began)
    assert other.fails(policy) == [0, 2, 5]


def test_what_comes_makes_the_next_failure_the_first_again(host: Callable[..., Host]) -> None:
    """The waits, the patience and the tries of a doubtful answer begin anew."""
    far = host(backoff=1, patience=10)
    policy = RetryPolicy(far.client, URL)
    assert far.fails(policy, tries=3) == [0, 1, 3]
    policy.progressed()
    assert far.fails(policy) == [0, 1, 3, 7, 10]
    policy = RetryPolicy(far.client, URL.replace("hub", "other"))
    assert len(far.fails(policy, tries=2, is_doubtful=True)) == 2
    policy.progressed()
    assert far.fails(policy, is_doubtful=True) == [0, 1, 3]


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (30, [0, 30, 60, 90]),
        (50, [0, 50]),
        (99, [0, 99]),
        (100, [0]),
        (0.25, [0, 1, 3, 7, 15, 31, 61, 91, 121]),
        (0, [0, 0, 2, 6, 10]),
    ],
)
def test_a_host_may_ask_for_waits_within_a_limit(
    host: Callable[..., Host], seconds: float, times: list[float]
) -> None:
    """Of 100 seconds here; a wait of none is granted once, and says nothing of an end."""
    asking = host(backoff=1, patience=10, longest_wait=100)
    assert asking.fails(seconds=seconds) == times


def test_after_a_wait_that_was_asked_for_the_patience_begins(host: Callable[..., Host]) -> None:
    """A host that fails in another way then has that much time, and no less than it had."""
    far = host(backoff=1, patience=10, longest_wait=100)
    policy = RetryPolicy(far.client, URL)
    assert far.fails(policy, tries=1, seconds=20) == [0]
    assert far.fails(policy) == [0, 2, 6, 10]


def test_another_way_to_fail_is_the_same_outage(host: Callable[..., Host]) -> None:
    """The end stays where the first failure has set it, for a name that is unknown it is sooner."""
    far = host(backoff=1, patience=40)
    policy = RetryPolicy(far.client, URL)
    assert far.fails(policy, tries=3, is_unknown_name=True) == [0, 1, 3]
    assert far.fails(policy) == [0, 8, 24, 36]


def test_an_outage_is_told_once_where_a_wait_is_a_second_or_longer(
    host: Callable[..., Host],
) -> None:
    """The line says what failed and how long it will be tried; after an answer it is news again."""
    quick = host(backoff=0.25, patience=2)
    quick.fails(tries=2)
    assert quick.log == []
    far = host(backoff=1, patience=10)
    policy = RetryPolicy(far.client, URL)
    far.fails(policy, tries=3)
    told = "hub.example: server error (503 Busy); trying again"
    assert far.log == [f"{told} for up to 10 s"]
    policy.progressed()
    far.fails(policy, tries=1)
    assert far.log == [f"{told} for up to 10 s"] * 2
    later = host(backoff=0.75, patience=10)
    later.fails(tries=3)
    assert later.log == [f"{told} for up to 9 s"]
    asking = host(backoff=1, patience=10)
    asking.fails(tries=2, seconds=7)
    assert asking.log == [f"{told} in 7 s"]


def test_the_first_verdict_on_a_host_is_that_of_all_requests(host: Callable[..., Host]) -> None:
    """For bodies it is another one than for answers about files, and for another host, too."""
    far = host(backoff=1, patience=10)
    far.fails()
    other = Finding(Kind.NO_NETWORK, "hub.example", "an answer", "none", "")
    with pytest.raises(SourceError) as caught:
        RetryPolicy(far.client, f"{URL}/y").wait(TransientError(other), far.clock.now)
    assert caught.value.findings == (TROUBLE,)
    body = RetryPolicy(far.client, URL, threading.Event())
    elsewhere = RetryPolicy(far.client, URL.replace("hub", "other"))
    for policy in (body, elsewhere):
        assert far.fails(policy) == [0, 1, 3, 7, 10]
    RetryPolicy(far.client, URL).progressed()
    assert far.fails() == [0, 1, 3, 7, 10]


def test_a_wait_ends_when_the_body_is_not_wanted_or_the_run_is_stopped(
    host: Callable[..., Host],
) -> None:
    """Within a moment, and before the next try."""
    far = host(backoff=5)
    over = threading.Event()
    policy = RetryPolicy(far.client, URL, over)
    began = far.clock.now
    policy.wait(TransientError(TROUBLE), began)
    assert far.clock.now == pytest.approx(began + 5)
    over.set()
    with pytest.raises(Cancelled):
        policy.wait(TransientError(TROUBLE), began)
    assert far.clock.now <= began + 5.2
    far.client.pause(1)
    far.client.pause(0, over)
    far.client.pause(-1)
    far.clock.set()
    for seconds in (1.0, 0.0, -1.0):
        with pytest.raises(Cancelled):
            far.client.pause(seconds)


def test_a_new_beginning_waits_twice_as_long_each_time(host: Callable[..., Host]) -> None:
    """From the usual first wait on."""
    far, times = host(backoff=0.5), list[float]()
    for number in (1, 2, 3):
        before = far.clock.now
        far.client.begin_afresh(number)
        times.append(round(far.clock.now - before, 6))
    assert times == [0.5, 1, 2]

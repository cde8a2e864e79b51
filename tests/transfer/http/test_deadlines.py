"""Deadlines: what ends a wait, and what is not ended."""

from __future__ import annotations

import threading

from csm_weights.transfer.http.deadlines import Watchdog


def test_a_wait_ends_late_or_when_it_is_not_wanted_any_more() -> None:
    """Each by its own time and event; a stop ends all; what cannot be ended does no harm."""
    stop, over = threading.Event(), threading.Event()
    watchdog = Watchdog(stop)
    late, unwanted, other, failed = (threading.Event() for _ in range(4))

    def fail() -> None:
        failed.set()
        raise OSError("it has ended meanwhile")

    over.set()
    with (
        watchdog.watching(fail, 0) as first,
        watchdog.watching(late.set, 0) as second,
        watchdog.watching(unwanted.set, 60, over) as third,
        watchdog.watching(other.set, 60, threading.Event()) as last,
    ):
        for event in (failed, late, unwanted):
            assert event.wait(10)
        assert not other.is_set()
        assert [w.is_late for w in (first, second, third, last)] == [True, True, False, False]
        stop.set()
        assert other.wait(10)
        assert not last.is_late
    late.clear()
    with watchdog.watching(unwanted.set, 60):
        unwanted.clear()
        assert unwanted.wait(10)
    assert not late.is_set()
    watchdog.close()

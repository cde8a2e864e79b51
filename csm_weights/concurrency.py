"""Run tasks on all cores, and cancel them together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

#: Seconds between two looks at whether a task has failed.
POLL_SECONDS = 0.2

T = TypeVar("T")

#: Called with the number of bytes that were worked on, from any thread.
OnProgress = Callable[[int], None]


class Cancelled(Exception):
    """The end of a worker after another one failed or the run was interrupted."""


def workers() -> int:
    """Return how many threads hash: one for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run_all(tasks: Iterable[Callable[[], T]], cancel: threading.Event, waiting: int = 0) -> list[T]:
    """Run tasks on all cores and return their results in order.

    `waiting` of them are more likely to wait for a network than to use a
    core, and get threads of their own. The first failure, or an interrupt in
    the calling thread, sets `cancel` so that the others end at their next
    block; then it is raised.
    """
    pool = ThreadPoolExecutor(workers() + waiting)
    try:
        futures = [pool.submit(task) for task in tasks]
        # An interrupt that comes just before a wait begins is seen when it ends, so none is long.
        done, unfinished = wait(futures, timeout=0)
        while unfinished and not any(f.exception() for f in done):
            done, unfinished = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
        if unfinished:
            cancel.set()
            for future in unfinished:
                future.cancel()
            wait(futures)
    except BaseException:
        cancel.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled() and (error := future.exception()):
            if isinstance(error, Cancelled):
                continue
            raise error
    return [future.result() for future in futures]

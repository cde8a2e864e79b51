"""Run tasks on all cores, and cancel them together."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

#: Called with the number of bytes that were worked on, from any thread; a negative one takes
#: bytes back that must be worked on again.
OnProgress = Callable[[int], None]


class Cancelled(Exception):
    """The end of a worker after another one failed or the run was interrupted."""


def workers() -> int:
    """Return how many threads hash: one for each core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def run_all(
    tasks: Iterable[Callable[[], T]],
    cancel: threading.Event,
    waiting: int = 0,
    pool: ThreadPoolExecutor | None = None,
) -> list[T]:
    """Run tasks on all cores, or in the threads of `pool`, and return their results in order.

    `waiting` of them are more likely to wait for a network than to use a
    core, and get threads of their own. The first failure, or an interrupt in
    the calling thread, sets `cancel` so that the others end at their next
    block; then it is raised.
    """
    if pool is None:
        with ThreadPoolExecutor(workers() + waiting) as pool:
            return run_all(tasks, cancel, pool=pool)
    with deferred_interrupts() as raise_pending:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, unfinished = wait(futures, timeout=0)
            while unfinished and not any(f.exception() for f in done):
                raise_pending()
                done, unfinished = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
        finally:
            if not all(future.done() for future in futures):
                cancel.set()
                for future in futures:
                    future.cancel()
                wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()):
            if isinstance(error, Cancelled):
                continue
            raise error
    return [future.result() for future in futures]


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM; yield a function that raises what has come meanwhile.

    An exception in the middle of a wait can leave a lock held that a worker
    needs, and then both wait for ever. In threads other than the main one,
    which get no signals, it does nothing.
    """
    pending: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}

    def raise_pending() -> None:
        while pending:
            number = pending.pop()
            handlers[number](number, None)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, _: pending.append(number))
    try:
        yield raise_pending
    finally:
        for held_back, before in handlers.items():
            signal.signal(held_back, before)
    raise_pending()

"""Everything that hashes: byte ranges, whole files, many at once.

SHA-256 is a chain, so a whole-file digest is sequential; piece digests are
independent and run on all cores. `hashlib` releases the GIL, so threads do.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from csm_weights.errors import WrongContent

#: Bytes read at a time: small enough that a block is hashed out of the L2
#: cache it was read into, large enough that Python's share is below 1 %.
BLOCK = 1 << 20

#: Bytes that the disk is asked for ahead of the hashing. Left to itself the
#: kernel reads 128 KiB ahead, and a core that hashes waits for most disks.
AHEAD = 8 << 20

#: Seconds after which the thread that waits for the others looks up.
PATIENCE = 0.2

T = TypeVar("T")
Tick = Callable[[int], None]


class Hasher(Protocol):
    """What `hashlib` returns, as far as it is used here."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Hasher: ...


class Stopped(Exception):
    """Raised inside a worker when another one failed or the run was interrupted."""


class ShortRead(WrongContent):
    """A file ended before the range that was asked of it."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"a file ended early, at byte {offset:,}: was it cut while being read?")


@dataclass(frozen=True)
class Measure:
    """What to hash of one file: byte ranges `(offset, size)`, the whole, or both.

    The whole is the half-open range `[0, size)`. `git` asks for its git blob
    SHA-1 as well.
    """

    path: Path
    size: int
    ranges: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    git: bool = False


@dataclass(frozen=True)
class Measured:
    """The hex sha256 of each range, and of the whole where it was asked for; its git SHA-1."""

    ranges: tuple[str, ...]
    whole: str | None
    git_sha1: str | None = None


def workers() -> int:
    """How many threads hash: one for each core this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def sha256() -> Hasher:
    """A fresh SHA-256."""
    return hashlib.sha256()


def git_sha1(size: int) -> Hasher:
    """The git blob SHA-1 of a content of `size` bytes, to be fed with just that content."""
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def blob_id(sha256_hex: str, size: int) -> str:
    """The Hub blob id of a large file: the git blob SHA-1 of its LFS pointer.

    Source: the pointer text of the git-lfs specification, version 1, hashed
    as git hashes a blob.
    """
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_hex}\nsize {size}\n"
    digest = git_sha1(len(pointer))
    digest.update(memoryview(pointer.encode()))
    return digest.hexdigest()


def feed(
    fd: int,
    offset: int,
    size: int,
    sinks: Sequence[Hasher],
    tick: Tick,
    stop: threading.Event | None = None,
) -> None:
    """Reads the bytes `[offset, offset + size)` of `fd` once, into every sink.

    `tick` gets the number of bytes of each block. Raises ShortRead where the
    file ends early, Stopped when `stop` is set.
    """
    buffer = memoryview(bytearray(min(BLOCK, size)))
    end = offset + size
    asked = offset
    while offset < end:
        if stop is not None and stop.is_set():
            raise Stopped
        if offset + AHEAD > asked:
            asked = ask_ahead(fd, asked, end)
        count = os.preadv(fd, [buffer[: min(BLOCK, end - offset)]], offset)
        if count == 0:
            raise ShortRead(offset)
        for sink in sinks:
            sink.update(buffer[:count])
        offset += count
        tick(count)


def ask_ahead(fd: int, offset: int, end: int) -> int:
    """Has the disk fetch the next `AHEAD` bytes meanwhile; returns where they end."""
    size = min(AHEAD, end - offset)
    if size > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    return offset + AHEAD


def measure(jobs: Sequence[Measure], tick: Tick) -> list[Measured]:
    """Hashes what each job asks for, ranges in parallel, each byte read once.

    A job that wants ranges and the whole runs in file order on one core.
    Raises ShortRead or OSError of the first job that fails.
    """
    stop = threading.Event()
    results: list[list[str]] = [[""] * len(job.ranges) for job in jobs]
    wholes: list[tuple[str | None, str | None]] = [(None, None)] * len(jobs)

    def hash_one(number: int, index: int) -> None:
        offset, size = jobs[number].ranges[index]
        results[number][index] = _hash_range(jobs[number].path, offset, size, tick, stop)

    def hash_in_order(number: int) -> None:
        results[number], wholes[number] = _hash_in_order(jobs[number], tick, stop)

    tasks: list[tuple[int, Callable[[], None]]] = []
    for number, job in enumerate(jobs):
        if job.whole:
            tasks.append((job.size, partial(hash_in_order, number)))
        else:
            tasks += [(r[1], partial(hash_one, number, i)) for i, r in enumerate(job.ranges)]
    tasks.sort(key=lambda task: -task[0])
    run_all([task for _, task in tasks], stop)
    return [Measured(tuple(r), *w) for r, w in zip(results, wholes, strict=True)]


def sha256_of(path: Path) -> str:
    """The hex sha256 of a whole file, on one core; for small ones."""
    size = path.stat().st_size
    return measure([Measure(path, size, (), whole=True)], lambda _: None)[0].whole or ""


def _hash_range(path: Path, offset: int, size: int, tick: Tick, stop: threading.Event) -> str:
    sink = sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        feed(fd, offset, size, [sink], tick, stop)
    finally:
        os.close(fd)
    return sink.hexdigest()


def _hash_in_order(
    job: Measure, tick: Tick, stop: threading.Event
) -> tuple[list[str], tuple[str, str | None]]:
    """Ranges and whole in one read; the ranges must tile `[0, size)` if there are any."""
    whole = sha256()
    wholes = [whole, git_sha1(job.size)] if job.git else [whole]
    digests: list[str] = []
    fd = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, size in job.ranges:
            part = sha256()
            feed(fd, offset, size, [part, *wholes], tick, stop)
            digests.append(part.hexdigest())
        if not job.ranges:
            feed(fd, 0, job.size, wholes, tick, stop)
    finally:
        os.close(fd)
    return digests, (whole.hexdigest(), wholes[-1].hexdigest() if job.git else None)


def run_all(tasks: Iterable[Callable[[], T]], stop: threading.Event, waiting: int = 0) -> list[T]:
    """Runs tasks on all cores and returns their results in order.

    `waiting` of them are more likely to wait for a network than to use a
    core, and get threads of their own. The first failure, or an interrupt in
    the calling thread, sets `stop` so that the others end at their next
    block; then it is raised.
    """
    pool = ThreadPoolExecutor(workers() + waiting)
    try:
        futures = [pool.submit(task) for task in tasks]
        # An interrupt that comes just before a wait begins is seen when it ends, so none is long.
        done, unfinished = wait(futures, timeout=0)
        while unfinished and not any(f.exception() for f in done):
            done, unfinished = wait(futures, timeout=PATIENCE, return_when=FIRST_EXCEPTION)
        if unfinished:
            stop.set()
            for future in unfinished:
                future.cancel()
            wait(futures)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled() and (error := future.exception()):
            if isinstance(error, Stopped):
                continue
            raise error
    return [future.result() for future in futures]


class Chain:
    """A whole-file digest that grows in file order while pieces finish in any.

    `starts` are the first bytes of the pieces and, last, the file's size. A
    worker that begins just the piece the chain waits for may `claim` it and
    feed both digests from one read; pieces that finish ahead of the chain
    are read again (from the page cache, as a rule) when their turn comes.
    """

    def __init__(self, fd: int, starts: Sequence[int], stop: threading.Event) -> None:
        self._fd = fd
        self._starts = starts
        self.stop = stop
        self._lock = threading.Lock()
        self._next = 0
        self._state = sha256()
        self._busy = False
        self._finished: set[int] = set()

    def claim(self, index: int) -> Hasher | None:
        """The digest to feed with piece `index`, if it is that piece's turn."""
        with self._lock:
            if self._busy or index != self._next:
                return None
            self._busy = True
            return self._state.copy()

    def finish(self, index: int, claimed: Hasher | None, proven: bool) -> None:
        """Reports piece `index` done; a claimed digest counts only if it was proven."""
        with self._lock:
            if claimed is not None:
                self._busy = False
                if proven:
                    self._state, self._next = claimed, index + 1
            elif proven:
                self._finished.add(index)
        self._catch_up()

    def _catch_up(self) -> None:
        """Reads what finished ahead of the chain; one worker at a time does so."""
        while True:
            with self._lock:
                if self._busy or self._next not in self._finished:
                    return
                self._busy = True
            start, end = self._starts[self._next], self._starts[self._next + 1]
            feed(self._fd, start, end - start, [self._state], lambda _: None, self.stop)
            with self._lock:
                self._next += 1
                self._busy = False

    def hexdigest(self) -> str | None:
        """The digest of the whole, or None while a piece is unproven."""
        return self._state.hexdigest() if self._next == len(self._starts) - 1 else None

"""Everything that hashes: byte ranges, whole files, many at once.

SHA-256 is a chain, so a whole-file digest is sequential; piece digests are
independent and run on all cores. `hashlib` releases the GIL, so threads do.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from csm_weights.concurrency import Cancelled, OnProgress, run_all
from csm_weights.errors import WrongContent

#: Bytes read at a time: small enough that a block is hashed out of the L2
#: cache it was read into, large enough that Python's share is below 1 %.
BLOCK = 1 << 20

#: Bytes that the disk is asked for ahead of the hashing. Left to itself the
#: kernel reads 128 KiB ahead, and a core that hashes waits for most disks.
AHEAD = 8 << 20


class Hasher(Protocol):
    """What `hashlib` returns, as far as it is used here."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Hasher: ...


class ShortRead(WrongContent):
    """A file ended before the range that was asked of it."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"a file ended early, at byte {offset:,}: was it cut while being read?")


@dataclass(frozen=True)
class HashJob:
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
class Digests:
    """The hex sha256 of each range, and of the whole where it was asked for; its git SHA-1."""

    ranges: tuple[str, ...]
    whole: str | None
    git_sha1: str | None = None


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
    on_progress: OnProgress,
    cancel: threading.Event | None = None,
) -> None:
    """Reads the bytes `[offset, offset + size)` of `fd` once, into every sink.

    `on_progress` gets the number of bytes of each block. Raises ShortRead where the
    file ends early, Stopped when `cancel` is set.
    """
    buffer = memoryview(bytearray(min(BLOCK, size)))
    end = offset + size
    asked = offset
    while offset < end:
        if cancel is not None and cancel.is_set():
            raise Cancelled
        if offset + AHEAD > asked:
            asked = ask_ahead(fd, asked, end)
        count = os.preadv(fd, [buffer[: min(BLOCK, end - offset)]], offset)
        if count == 0:
            raise ShortRead(offset)
        for sink in sinks:
            sink.update(buffer[:count])
        offset += count
        on_progress(count)


def ask_ahead(fd: int, offset: int, end: int) -> int:
    """Has the disk fetch the next `AHEAD` bytes meanwhile; returns where they end."""
    size = min(AHEAD, end - offset)
    if size > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
    return offset + AHEAD


def measure(jobs: Sequence[HashJob], on_progress: OnProgress) -> list[Digests]:
    """Hashes what each job asks for, ranges in parallel, each byte read once.

    A job that wants ranges and the whole runs in file order on one core.
    Raises ShortRead or OSError of the first job that fails.
    """
    cancel = threading.Event()
    results: list[list[str]] = [[""] * len(job.ranges) for job in jobs]
    wholes: list[tuple[str | None, str | None]] = [(None, None)] * len(jobs)

    def hash_one(number: int, index: int) -> None:
        offset, size = jobs[number].ranges[index]
        results[number][index] = _hash_range(jobs[number].path, offset, size, on_progress, cancel)

    def hash_in_order(number: int) -> None:
        results[number], wholes[number] = _hash_in_order(jobs[number], on_progress, cancel)

    tasks: list[tuple[int, Callable[[], None]]] = []
    for number, job in enumerate(jobs):
        if job.whole:
            tasks.append((job.size, partial(hash_in_order, number)))
        else:
            tasks += [(r[1], partial(hash_one, number, i)) for i, r in enumerate(job.ranges)]
    tasks.sort(key=lambda task: -task[0])
    run_all([task for _, task in tasks], cancel)
    return [Digests(tuple(r), *w) for r, w in zip(results, wholes, strict=True)]


def sha256_of(path: Path) -> str:
    """The hex sha256 of a whole file, on one core; for small ones."""
    size = path.stat().st_size
    return measure([HashJob(path, size, (), whole=True)], lambda _: None)[0].whole or ""


def _hash_range(
    path: Path, offset: int, size: int, on_progress: OnProgress, cancel: threading.Event
) -> str:
    sink = sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        feed(fd, offset, size, [sink], on_progress, cancel)
    finally:
        os.close(fd)
    return sink.hexdigest()


def _hash_in_order(
    job: HashJob, on_progress: OnProgress, cancel: threading.Event
) -> tuple[list[str], tuple[str, str | None]]:
    """Ranges and whole in one read; the ranges must tile `[0, size)` if there are any."""
    whole = sha256()
    wholes = [whole, git_sha1(job.size)] if job.git else [whole]
    digests: list[str] = []
    fd = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, size in job.ranges:
            part = sha256()
            feed(fd, offset, size, [part, *wholes], on_progress, cancel)
            digests.append(part.hexdigest())
        if not job.ranges:
            feed(fd, 0, job.size, wholes, on_progress, cancel)
    finally:
        os.close(fd)
    return digests, (whole.hexdigest(), wholes[-1].hexdigest() if job.git else None)

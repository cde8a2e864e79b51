"""Hash byte ranges and whole files, many at once.

SHA-256 is a chain, so a whole-file digest is sequential; piece digests are
independent and run on all cores, in threads, as `hashlib` releases the GIL.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import Cancelled, OnProgress, run_all
from csm_weights.errors import WrongContent
from csm_weights.files import opened

#: Bytes read at a time: a block stays in the L2 cache, and Python's share is below 1 %.
BLOCK = 1 << 20

#: Bytes to read ahead of the hashing; by itself the kernel reads only 128 KiB ahead.
AHEAD = 8 << 20

#: Bytes of a block that may have a digest of its own beside its piece's: few enough that every
#: core has blocks to hash, and a receipt has some ten kilobytes of them for each GiB.
DIGEST_BLOCK = 8 << 20

#: Digests in hex as they are written here; a commit is one of SHA-1.
SHA1_HEX, SHA256_HEX = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class Sink(Protocol):
    """An object that is fed with bytes in their order."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes."""


class Hasher(Sink, Protocol):
    """An object of `hashlib`, as far as it is used here."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, in hex."""

    def copy(self) -> Hasher:
        """Return a hasher that has seen the same bytes."""


class BlockHasher:
    """Sink that takes the sha256 of each block of `DIGEST_BLOCK` bytes; the last may be shorter.

    Its first byte is byte `offset` of a file.
    """

    def __init__(self, offset: int) -> None:
        self._offset, self._size, self._digest = offset, 0, sha256()
        self._blocks: list[ByteRange] = []

    def update(self, data: memoryview, /) -> None:
        """See `Sink`."""
        while data:
            part = data[: DIGEST_BLOCK - self._size]
            self._digest.update(part)
            self._size += len(part)
            if self._size == DIGEST_BLOCK:
                self._end()
            data = data[len(part) :]

    def blocks(self) -> tuple[ByteRange, ...]:
        """Return the blocks with their digests, once all bytes were taken."""
        if self._size:
            self._end()
        return tuple(self._blocks)

    def _end(self) -> None:
        self._blocks.append(ByteRange(self._offset, self._size, self._digest.hexdigest()))
        self._offset, self._size, self._digest = self._offset + self._size, 0, sha256()


class ShortRead(WrongContent):
    """A file ended before the range that was asked of it."""

    def __init__(self, offset: int) -> None:
        super().__init__(
            f"a file ended early, at byte {offset:,}; was it truncated while it was read?"
        )


@dataclass(frozen=True)
class HashJob:
    """One file to hash: byte ranges `(offset, size)` of it, the whole, or both.

    The whole is the half-open range `[0, size)`, and the ranges tile it where
    both are asked for. `git` asks for the whole's git blob SHA-1 as well, and
    `blocks` for the digests of the blocks that tile each range, or the whole.
    """

    path: Path
    size: int
    ranges: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    git: bool = False
    blocks: bool = False


@dataclass(frozen=True)
class Digests:
    """The hex digests of each range, and of the whole and of blocks where they were asked for."""

    ranges: tuple[str, ...]
    whole: str | None = None
    git_sha1: str | None = None
    blocks: tuple[ByteRange, ...] = ()


def sha256() -> Hasher:
    """Return a fresh SHA-256."""
    return hashlib.sha256()


def git_sha1(size: int, content: bytes = b"") -> Hasher:
    """Return the git blob SHA-1 of `size` bytes, to be fed with those that follow `content`."""
    return hashlib.sha1(f"blob {size}\0".encode() + content, usedforsecurity=False)


def blob_id(sha256_hex: str, size: int) -> str:
    """Return the Hub blob id of a large file: the git blob SHA-1 of its LFS pointer.

    Source: the pointer text of the git-lfs specification, version 1.
    """
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_hex}\nsize {size}\n"
    return git_sha1(len(pointer), pointer.encode()).hexdigest()


def feed(
    fd: int,
    offset: int,
    size: int,
    sinks: Sequence[Sink],
    on_progress: OnProgress,
    cancel: threading.Event | None = None,
) -> None:
    """Read the bytes `[offset, offset + size)` of `fd` once, into every sink.

    `on_progress` gets the number of bytes of each block. Raises ShortRead where the
    file ends early, Cancelled when `cancel` is set.
    """
    buffer = memoryview(bytearray(min(BLOCK, size)))
    end = offset + size
    asked = offset
    while offset < end:
        if cancel is not None and cancel.is_set():
            raise Cancelled
        if offset + AHEAD > asked < end and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, asked, min(AHEAD, end - asked), os.POSIX_FADV_WILLNEED)
            asked += AHEAD
        count = os.preadv(fd, [buffer[: min(BLOCK, end - offset)]], offset)
        if count == 0:
            raise ShortRead(offset)
        for sink in sinks:
            sink.update(buffer[:count])
        offset += count
        on_progress(count)


def measure(jobs: Sequence[HashJob], on_progress: OnProgress) -> list[Digests]:
    """Hash what each job asks for, ranges in parallel, each byte read once.

    A job that wants the whole runs in file order on one core. Raises ShortRead
    or OSError of the first job that fails.
    """
    cancel = threading.Event()
    parts = [
        (number, part)
        for number, job in enumerate(jobs)
        for part in ([job] if job.whole else [replace(job, ranges=(r,)) for r in job.ranges])
    ]
    sizes = [job.size if job.whole else job.ranges[0][1] for _, job in parts]
    largest_first = sorted(range(len(parts)), key=lambda i: -sizes[i])
    tasks = [partial(_hash, parts[i][1], on_progress, cancel) for i in largest_first]
    found = dict(zip(largest_first, run_all(tasks, cancel), strict=True))
    results = [Digests(())] * len(jobs)
    for i, (number, _) in enumerate(parts):
        before, one = results[number], found[i]
        ranges, blocks = before.ranges + one.ranges, before.blocks + one.blocks
        results[number] = replace(one, ranges=ranges, blocks=blocks)
    return results


def _hash(job: HashJob, on_progress: OnProgress, cancel: threading.Event) -> Digests:
    whole = [sha256()] if job.whole else []
    if job.whole and job.git:
        whole.append(git_sha1(job.size))
    digests, blocks = list[str](), list[ByteRange]()
    with opened(job.path) as fd:
        for offset, size in job.ranges or [(0, job.size)]:
            digest, within = sha256(), BlockHasher(offset)
            sinks: list[Sink] = [digest] * bool(job.ranges) + [within] * job.blocks
            feed(fd, offset, size, [*sinks, *whole], on_progress, cancel)
            digests += [digest.hexdigest()] * bool(job.ranges)
            blocks += within.blocks()
    git = whole[1].hexdigest() if whole[1:] else None
    return Digests(tuple(digests), whole[0].hexdigest() if whole else None, git, tuple(blocks))


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a whole file, hashed on one core; for small ones."""
    size = path.stat().st_size
    return measure([HashJob(path, size, (), whole=True)], lambda _: None)[0].whole or ""

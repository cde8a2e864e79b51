"""Stream a file, or its chunk files, block by block to consumers, on several threads.

A thread reads a block into a buffer of its consumer, hashes it where a digest
is pinned, and hands on that same buffer: what is hashed is what is used.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import Cancelled, run_all, workers
from csm_weights.errors import Finding, WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.hashing import sha256


class BlockConsumer(Protocol):
    """Receiver of the blocks of one thread; used by that thread alone."""

    def buffer(self) -> memoryview:
        """Return the buffer for the next block, once its last content is no longer needed."""

    def consume(self, offset: int, size: int) -> None:
        """Use the first `size` bytes of that buffer: those from byte `offset` of the file on."""

    def finish(self) -> None:
        """Wait until every block is where it belongs."""


def page_buffer(size: int) -> memoryview:
    """Allocate `size` bytes that begin at a page."""
    return memoryview(mmap.mmap(-1, size))


def blocks(size: int, block: int) -> list[ByteRange]:
    """Tile `[0, size)` with ranges of `block` bytes; the last may be shorter."""
    return [ByteRange(start, min(block, size - start)) for start in range(0, size, block)]


def stream(
    source: MultipartFile,
    ranges: Sequence[ByteRange],
    open_consumer: Callable[[], BlockConsumer],
    threads: int | None = None,
) -> None:
    """Send every range of `source` through consumers, one a thread, a buffer's size at a time.

    `threads` defaults to one a core. Raises WrongContent where a range has
    another digest, where the source ends early, or where it changes meanwhile.
    What was consumed by then may be wrong and must not be used.
    """
    cancel = threading.Event()
    waiting, lock = iter(ranges), threading.Lock()

    def claim() -> ByteRange | None:
        with lock:
            return next(waiting, None)

    def work() -> None:
        consumer = open_consumer()
        try:
            while claimed := claim():
                _send(source, claimed, consumer, cancel)
        finally:
            # after a failure too: copies under way write to memory of the caller
            consumer.finish()

    count = max(1, min(threads or workers(), len(ranges)))
    run_all([work] * count, cancel, waiting=max(0, count - workers()))
    if changes := source.changes():
        raise WrongContent("the weights changed while they were read", changes)


def _send(
    source: MultipartFile, claimed: ByteRange, consumer: BlockConsumer, cancel: threading.Event
) -> None:
    digest = sha256() if claimed.sha256 else None
    offset, end = claimed.offset, claimed.offset + claimed.size
    while offset < end:
        if cancel.is_set():
            raise Cancelled
        buffer = consumer.buffer()
        with buffer[: min(len(buffer), end - offset)] as block:
            size = len(block)
            source.read_into(block, offset)
            if digest:
                digest.update(block)
        consumer.consume(offset, size)
        offset += size
    if digest and (found := digest.hexdigest()) != claimed.sha256:
        where = f"{source.where}: bytes {claimed.offset:,} to {end - 1:,}"
        finding = Finding.wrong_digest(where, claimed.sha256 or "", found, "inv weights")
        raise WrongContent("the weights are not those that are pinned", [finding])

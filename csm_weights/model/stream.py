"""Streams a file, or its parts, block by block to where the bytes are wanted, on several threads.

A thread reads a block into a slot of its lane, hashes it where a digest is
pinned, and hands it on from that same slot: what is hashed is what is used.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import Cancelled, run_all, workers
from csm_weights.errors import Finding, WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.hashing import sha256


class BlockConsumer(Protocol):
    """Where the blocks of one thread go; used by that thread alone."""

    def slot(self) -> memoryview:
        """Room for the next block, as soon as nobody needs what was in it."""

    def take(self, offset: int, size: int) -> None:
        """Uses the first `size` bytes of that room: those from byte `offset` of the file on."""

    def finish(self) -> None:
        """Waits until everything that was taken is where it belongs."""


def room(size: int) -> memoryview:
    """Memory for a slot of `size` bytes, aligned to pages."""
    return memoryview(mmap.mmap(-1, size))


def blocks(size: int, block: int) -> list[ByteRange]:
    """Spans of `block` bytes that tile `[0, size)`; the last may be shorter."""
    return [ByteRange(start, min(block, size - start)) for start in range(0, size, block)]


def stream(
    source: MultipartFile,
    spans: Sequence[ByteRange],
    open_lane: Callable[[], BlockConsumer],
    threads: int | None = None,
) -> None:
    """Sends every span of `source` through lanes, one a thread, a slot's size at a time.

    `threads` defaults to one a core. Raises WrongContent where a span has
    another digest, where the source ends early, or where it changes meanwhile.
    What was taken by then may be wrong and must not be used.
    """
    cancel = threading.Event()
    claims = _Claims(spans)

    def work() -> None:
        lane = open_lane()
        for span in claims:
            _send(source, span, lane, cancel)
        lane.finish()

    count = max(1, min(threads or workers(), len(spans)))
    try:
        run_all([work] * count, cancel, waiting=max(0, count - workers()))
    except EOFError as error:
        finding = Finding.changed(source.where, str(error))
        raise WrongContent("the weights ended early", [finding]) from None
    if changes := source.changes():
        raise WrongContent("the weights changed while they were read", changes)


def _send(
    source: MultipartFile, span: ByteRange, lane: BlockConsumer, cancel: threading.Event
) -> None:
    digest = sha256() if span.sha256 else None
    offset, end = span.offset, span.offset + span.size
    while offset < end:
        if cancel.is_set():
            raise Cancelled
        slot = lane.slot()
        with slot[: min(len(slot), end - offset)] as block:
            size = len(block)
            source.read_into(block, offset)
            if digest:
                digest.update(block)
        lane.take(offset, size)
        offset += size
    if digest and (found := digest.hexdigest()) != span.sha256:
        where = f"{source.where}: bytes [{span.offset:,}, {end:,})"
        finding = Finding.wrong_digest(where, span.sha256 or "", found, "inv weights")
        raise WrongContent("the weights are not those that are pinned", [finding])


class _Claims:
    """Spans in order, each given to one of the threads that ask."""

    def __init__(self, spans: Sequence[ByteRange]) -> None:
        self._spans = iter(spans)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[ByteRange]:
        while True:
            with self._lock:
                span = next(self._spans, None)
            if span is None:
                return
            yield span

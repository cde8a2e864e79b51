"""Reorder buffer: write blocks as they arrive, hash them in file order."""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass

from csm_weights.byte_ranges import Ranges
from csm_weights.concurrency import Cancelled
from csm_weights.hashing import Hasher, Sink, feed, sha256
from csm_weights.store.block_io import OutputFile


class InOrderDigest:
    """A whole-file digest that grows in file order while pieces finish in any order.

    `starts` are the first bytes of the pieces and, last, the file's size. A
    worker that begins the piece whose turn it is may `claim` the digest and
    feed it and its own from one read; pieces that finish earlier are read again
    (from the page cache, as a rule) when their turn comes.
    """

    def __init__(self, fd: int, starts: Sequence[int], cancel: threading.Event) -> None:
        self._fd = fd
        self._starts = starts
        self.cancel = cancel
        self._lock = threading.Lock()
        self._next = 0
        self._state = sha256()
        self._is_reading = False
        self._finished: set[int] = set()

    def claim(self, index: int) -> Hasher | None:
        """Return the digest to feed with piece `index`, if it is that piece's turn."""
        with self._lock:
            return self._state.copy() if index == self._next else None

    def finish(self, index: int, claimed: Hasher | None, verified: bool) -> None:
        """Report piece `index` done; a claimed digest counts only if the piece was verified."""
        if not verified:
            return
        with self._lock:
            if claimed:
                self._state, self._next = claimed, index + 1
            else:
                self._finished.add(index)
        # Finished pieces whose turn has come are read again, by one worker at a time.
        while True:
            with self._lock:
                if self._is_reading or self._next not in self._finished:
                    return
                self._is_reading = True
            start, end = self._starts[self._next], self._starts[self._next + 1]
            feed(self._fd, start, end - start, [self._state], lambda _: None, self.cancel)
            with self._lock:
                self._next += 1
                self._is_reading = False

    def hexdigest(self) -> str:
        """Return the digest of the whole; it is empty while a piece is not verified."""
        return self._state.hexdigest() if self._next == len(self._starts) - 1 else ""


#: Bytes of a buffer: what each stream loses when a run is killed.
BLOCK = 2 << 20

#: Bytes read back at a time, before the hashing checks whether it was closed.
READ_BACK = 8 * BLOCK

#: Seconds after which a thread that waits checks whether the run was cancelled.
MOMENT = 0.1


class BufferPool:
    """Buffers of `BLOCK` bytes, used again and again; at most `held` of them wait in memory.

    That is 48 MiB over all files. They are aligned to pages, as direct writes need it.
    """

    def __init__(self, held: int = 24) -> None:
        self._free: list[memoryview] = []
        self._lock = threading.Lock()
        self._room = held

    def acquire(self) -> memoryview:
        """Return a buffer; there are as many as there are streams, and those that wait."""
        with self._lock:
            return self._free.pop() if self._free else memoryview(mmap.mmap(-1, BLOCK))

    def reserve(self, always: bool = False) -> bool:
        """Return whether one more buffer may wait in memory, past the limit if `always`."""
        with self._lock:
            may_wait = always or self._room > 0
            self._room -= may_wait
            return may_wait

    def release(self, buffer: memoryview, reserved: bool = False) -> None:
        """Take back a buffer, and the room that was `reserved` for it."""
        with self._lock:
            self._room += reserved
            self._free.append(buffer)


@dataclass
class ReorderBuffer:
    """The half-open range `[start, end)` of a file whose blocks arrive in any order.

    `sinks` are fed with its bytes in order. `arrived` are ranges that an
    earlier run has written; they are read back. `record(offset, size)` is
    called for each block once it is written.
    """

    target: OutputFile
    start: int
    end: int
    sinks: Sequence[Sink]
    buffers: BufferPool
    arrived: InitVar[Sequence[tuple[int, int]]]
    record: Callable[[int, int], None]
    cancel: threading.Event

    def __post_init__(self, arrived: Sequence[tuple[int, int]]) -> None:
        self._next, self._arrived = self.start, Ranges(arrived)
        self._waiting: dict[int, tuple[memoryview, int]] = {}
        self._changed = threading.Condition()
        self._starved_since = math.inf
        self._is_over = self._is_closed = False
        # One thread follows the order of the file; the sinks hash a block at the same time.
        self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(len(self.sinks))
        self._hashed = self._threads[0].submit(self._hash_all)

    def wanted(self) -> list[tuple[int, int]]:
        """Return the ranges that have not arrived."""
        with self._changed:
            return self._arrived.missing(self.start, self.end)

    @property
    def is_empty(self) -> bool:
        """True where nothing has arrived."""
        with self._changed:
            return not self._arrived

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        """Write a buffer's first `size` bytes to byte `offset`, and leave it to be hashed.

        While the hashing goes on, a stream waits for room in memory rather than
        run further ahead. It does not where the hashing has waited a moment for
        another stream: then the block is read back when its turn comes.

        Raises Cancelled, or ValueError where bytes of it have arrived already.
        """
        if self.cancel.is_set():
            raise Cancelled
        if not size:
            self.buffers.release(buffer)
            return
        if self._hashed.done():
            self._hashed.result()  # raises what ended the hashing
        with self._changed:
            if self._arrived.missing(offset, offset + size) != [(offset, offset + size)]:
                raise ValueError(f"bytes [{offset}, {offset + size}) have arrived already")
        with buffer[:size] as data:
            self.target.write(data, offset, direct=True)
        self.record(offset, size)
        # The block whose turn it is always waits.
        while not (is_held := self.buffers.reserve(always=offset == self._next)):
            with self._changed:
                if time.monotonic() - self._starved_since > MOMENT or self._hashed.done():
                    break
                self._changed.wait(MOMENT)
            if self.cancel.is_set():
                raise Cancelled
        with self._changed:
            if is_held:
                self._waiting[offset] = buffer, size
            else:
                self.buffers.release(buffer)
            self._arrived.add(offset, offset + size)
            self._changed.notify_all()

    def finish(self) -> bool:
        """Wait until what arrived is hashed, once nothing more comes; return whether it is all."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._hashed.result()
        return self._next == self.end

    def close(self) -> None:
        """End the hashing where it is, and release the buffers that wait."""
        with self._changed:
            self._is_over = self._is_closed = True
            self._changed.notify_all()
        for threads in self._threads:
            threads.shutdown()
        for buffer, _ in self._waiting.values():
            self.buffers.release(buffer, reserved=True)
        self._waiting.clear()

    def _hash_all(self) -> None:
        while not self._is_closed:
            with self._changed:
                here = self._waiting.pop(self._next, None)
                # A block further on that waits in memory need not be read back.
                ends = self._arrived.end_of(self._next), self._next + READ_BACK
                end = min(*ends, *self._waiting)
                if here is None and end == self._next:
                    if self._is_over:
                        return
                    self._starved_since = min(self._starved_since, time.monotonic())
                    self._changed.wait(MOMENT)
                    if self.cancel.is_set():
                        raise Cancelled
                    continue
                self._starved_since = math.inf
            if here is None:
                fd, size = self.target.fd, end - self._next
                feed(fd, self._next, size, self.sinks, lambda _: None, self.cancel)
            else:
                buffer, size = here
                try:
                    with buffer[:size] as data:
                        list(self._threads[1].map(lambda sink: sink.update(data), self.sinks))
                finally:
                    self.buffers.release(buffer, reserved=True)
            with self._changed:
                self._next += size
                self._changed.notify_all()

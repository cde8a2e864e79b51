"""Reorder buffer: write blocks as they arrive, hash them in file order."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from csm_weights.byte_ranges import Ranges
from csm_weights.concurrency import Cancelled, OnProgress
from csm_weights.hashing import Hasher, feed, sha256
from csm_weights.store.block_io import OutputFile


class Chain:
    """A whole-file digest that grows in file order while pieces finish in any.

    `starts` are the first bytes of the pieces and, last, the file's size. A
    worker that begins just the piece the chain waits for may `claim` it and
    feed both digests from one read; pieces that finish ahead of the chain
    are read again (from the page cache, as a rule) when their turn comes.
    """

    def __init__(self, fd: int, starts: Sequence[int], cancel: threading.Event) -> None:
        self._fd = fd
        self._starts = starts
        self.cancel = cancel
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
            feed(self._fd, start, end - start, [self._state], lambda _: None, self.cancel)
            with self._lock:
                self._next += 1
                self._busy = False

    def hexdigest(self) -> str | None:
        """The digest of the whole, or None while a piece is unproven."""
        return self._state.hexdigest() if self._next == len(self._starts) - 1 else None


#: Bytes of a block: what is lost of each line when a run is killed.
BLOCK = 2 << 20

#: Blocks that may wait in memory for their turn, over all files: 48 MiB.
HELD = 24

#: Bytes read back at a time, before the hashing looks whether it is still wanted.
READ_BACK = 8 * BLOCK

#: Seconds after which a thread that waits looks whether the run was stopped.
MOMENT = 0.1


class Buffer:
    """Memory for `BLOCK` bytes, aligned to pages as direct writes need it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BLOCK)
        self.view = memoryview(self._memory)


class BufferPool:
    """The blocks of a run, used again and again; at most `held` of them wait in memory."""

    def __init__(self, held: int = HELD) -> None:
        self._free: list[Buffer] = []
        self._lock = threading.Lock()
        self._may_hold = held

    def lend(self) -> Buffer:
        """A block; there are as many as there are lines, and those that wait."""
        with self._lock:
            return self._free.pop() if self._free else Buffer()

    def hold(self, always: bool = False) -> bool:
        """Whether one more block waits in memory, past the limit if `always`; see `release`."""
        with self._lock:
            if self._may_hold <= 0 and not always:
                return False
            self._may_hold -= 1
            return True

    def release(self, block: Buffer) -> None:
        """Takes back a block that waited."""
        with self._lock:
            self._may_hold += 1
            self._free.append(block)

    def give_back(self, block: Buffer) -> None:
        """Takes back a block that did not wait."""
        with self._lock:
            self._free.append(block)


class ReorderBuffer:
    """The half-open range `[start, end)` of a file whose blocks arrive in any order.

    `sinks` are fed with its bytes in order. `arrived` are ranges that an
    earlier run has written; they are read back. `record(offset, size)` is
    called for each block once it is written; `on_progress` gets bytes as they
    arrive, those of an earlier run at once.
    """

    def __init__(
        self,
        target: OutputFile,
        start: int,
        end: int,
        sinks: Sequence[Hasher],
        blocks: BufferPool,
        arrived: Sequence[tuple[int, int]],
        record: Callable[[int, int], None],
        on_progress: OnProgress,
        cancel: threading.Event,
    ) -> None:
        self._target = target
        self._next, self._start, self._end = start, start, end
        self._sinks = sinks
        self._blocks = blocks
        self._record = record
        self._tick = on_progress
        self._stop = cancel
        self._arrived = Ranges(arrived)
        self._waiting: dict[int, tuple[Buffer, int]] = {}
        self._changed = threading.Condition()
        self._starved_since: float | None = None
        self._is_over = self._is_closed = False
        if arrived:
            on_progress(sum(end - start for start, end in arrived))
        self._hasher = ThreadPoolExecutor(1)
        self._others = ThreadPoolExecutor(max(1, len(sinks) - 1))
        self._hashed = self._hasher.submit(self._hash_all)

    def wanted(self) -> list[tuple[int, int]]:
        """The ranges that have not arrived."""
        with self._changed:
            return self._arrived.missing(self._start, self._end)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has arrived."""
        with self._changed:
            return not self._arrived

    def put(self, block: Buffer, offset: int, size: int) -> None:
        """Writes a block's first `size` bytes to byte `offset`, and leaves it to be hashed."""
        if self._stop.is_set():
            raise Cancelled
        if not size:
            self._blocks.give_back(block)
            return
        if self._hashed.done():
            self._hashed.result()  # raises what the hashing died of
        with self._changed:
            if self._arrived.missing(offset, offset + size) != [(offset, offset + size)]:
                raise ValueError(f"bytes [{offset}, {offset + size}) have arrived already")
        with block.view[:size] as data:
            self._target.write(data, offset, direct=True)
        self._record(offset, size)
        self._tick(size)
        may_wait = self._may_wait(offset)
        with self._changed:
            if may_wait:
                self._waiting[offset] = block, size
            else:
                self._blocks.give_back(block)
            self._arrived.add(offset, offset + size)
            self._changed.notify_all()

    def _may_wait(self, offset: int) -> bool:
        """Whether a block waits in memory; the one whose turn it is always does.

        While the hashing goes on, a line waits for room rather than running
        further ahead; when the hashing has waited a moment for another line,
        it does not.
        """
        while not self._blocks.hold(always=offset == self._next):
            with self._changed:
                since = self._starved_since
                is_starved = since is not None and time.monotonic() - since > MOMENT
                if is_starved or self._hashed.done():
                    return False
                self._changed.wait(MOMENT)
            if self._stop.is_set():
                raise Cancelled
        return True

    def finish(self) -> bool:
        """Waits until what arrived is hashed, once nothing more is put; whether that is all."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._hashed.result()
        return self._next == self._end

    def close(self) -> None:
        """Ends the hashing where it is, and lets go of the blocks that wait."""
        with self._changed:
            self._is_over = self._is_closed = True
            self._changed.notify_all()
        self._hasher.shutdown()
        self._others.shutdown()
        for block, _ in self._waiting.values():
            self._blocks.release(block)
        self._waiting.clear()

    def _hash_all(self) -> None:
        while self._next < self._end and not self._is_closed:
            with self._changed:
                here = self._waiting.pop(self._next, None)
                # A block further on that waits in memory need not be read back.
                ahead = [offset for offset in self._waiting if offset > self._next]
                end = min([self._arrived.end_of(self._next), self._next + READ_BACK, *ahead])
                if here is None and end == self._next:
                    if self._is_over:
                        return
                    self._starved_since = self._starved_since or time.monotonic()
                    self._changed.wait(MOMENT)
                    if self._stop.is_set():
                        raise Cancelled
                    continue
                self._starved_since = None
            if here is not None:
                self._hash_block(*here)
            else:
                fd, size = self._target.fd, end - self._next
                feed(fd, self._next, size, self._sinks, lambda _: None, self._stop)
                self._next = end

    def _hash_block(self, block: Buffer, size: int) -> None:
        try:
            with block.view[:size] as data:
                others = [self._others.submit(sink.update, data) for sink in self._sinks[1:]]
                self._sinks[0].update(data)
                for other in others:
                    other.result()
        finally:
            self._blocks.release(block)
        with self._changed:
            self._next += size
            self._changed.notify_all()

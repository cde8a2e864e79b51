"""Reorder buffer: any order in, one order hashed, memory bounded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights import hashing
from csm_weights.byte_ranges import Ranges
from csm_weights.concurrency import Cancelled
from csm_weights.hashing import Hasher, sha256
from csm_weights.store.block_io import OutputFile
from csm_weights.store.journal import Arrival, parse_line
from csm_weights.transfer import reorder
from csm_weights.transfer.reorder import BLOCK, BufferPool, InOrderDigest, ReorderBuffer
from csm_weights.untrusted import dump_record

START = 4096
COUNT = 6
SIZE = BLOCK * COUNT - 12_345
DATA = random.Random(1).randbytes(SIZE)


def ignore(*_: int) -> None:
    """Counts nothing."""


class SixBlocks:
    """A reorder buffer of six blocks, from byte 4096 on, and what it recorded."""

    def __init__(self, folder: Path, held: int = COUNT, sinks: int = 1) -> None:
        self.target = OutputFile(folder / "strip")
        self.sinks: list[Hasher] = [sha256() for _ in range(sinks)]
        self.blocks = BufferPool(held)
        self.recorded: list[tuple[int, int]] = []
        self.stop = threading.Event()
        self.reorder = self.begin()

    def begin(
        self, arrived: Sequence[tuple[int, int]] = (), end: int = START + SIZE
    ) -> ReorderBuffer:
        return ReorderBuffer(
            self.target,
            START,
            end,
            self.sinks,
            self.blocks,
            arrived,
            lambda offset, size: self.recorded.append((offset, size)),
            self.stop,
        )

    def put(self, index: int) -> None:
        """Puts one of the six blocks."""
        data = DATA[index * BLOCK : (index + 1) * BLOCK]
        block = self.blocks.acquire()
        block[: len(data)] = data
        self.reorder.write(block, START + index * BLOCK, len(data))

    def digests(self) -> set[str]:
        return {sink.hexdigest() for sink in self.sinks}

    def written(self) -> bytes:
        return (self.target.path).read_bytes()[START:]


RIGHT = {hashlib.sha256(DATA).hexdigest()}


@pytest.fixture
def six(tmp_path: Path) -> Iterator[SixBlocks]:
    """A strip on which nothing has landed."""
    six = SixBlocks(tmp_path)
    yield six
    six.reorder.close()
    six.target.close()


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The offset and size of each range that is read back."""
    ranges: list[tuple[int, int]] = []
    feed = hashing.feed

    def noted(fd: int, offset: int, size: int, *rest: Any) -> None:
        ranges.append((offset, size))
        feed(fd, offset, size, *rest)

    monkeypatch.setattr(reorder, "feed", noted)
    return ranges


@pytest.mark.parametrize("held", [0, 1, COUNT])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_blocks_in_any_order_are_hashed_in_one(tmp_path: Path, order: list[int], held: int) -> None:
    """Whatever order the blocks have and however few may wait, both digests are the data's."""
    six = SixBlocks(tmp_path, held, sinks=2)
    for index in order:
        six.put(index)
    assert six.reorder.finish()
    assert (six.digests(), six.written()) == (RIGHT, DATA)
    six.reorder.close()


def test_many_threads_may_put(six: SixBlocks) -> None:
    """Blocks from six threads at once make the same file."""
    with ThreadPoolExecutor(COUNT) as pool:
        list(pool.map(six.put, random.Random(2).sample(range(COUNT), COUNT)))
    assert six.reorder.finish()
    assert (six.digests(), six.written()) == (RIGHT, DATA)


def test_blocks_go_past_the_page_cache(six: SixBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were hashed from memory, so that the cache is left to others."""
    written: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        six.target, "write", lambda _, offset, *, direct: written.append((offset, direct))
    )
    six.put(0)
    six.put(1)
    assert written == [(START, True), (START + BLOCK, True)]


def test_every_block_is_recorded_once_it_is_written(six: SixBlocks) -> None:
    """The record of a block says where it lies, and not before it does."""
    six.put(2)
    assert six.recorded == [(START + 2 * BLOCK, BLOCK)]
    assert six.written()[2 * BLOCK :] == DATA[2 * BLOCK : 3 * BLOCK]


def test_what_is_missing_is_wanted(six: SixBlocks) -> None:
    """What has not arrived is reported in ranges, and the reorder buffer is not complete."""
    six.put(0)
    six.put(2)
    gaps = [(START + BLOCK, START + 2 * BLOCK), (START + 3 * BLOCK, START + SIZE)]
    assert six.reorder.wanted() == gaps
    assert not six.reorder.finish()


def test_what_an_earlier_run_wrote_is_read_back(six: SixBlocks) -> None:
    """Ranges that arrived earlier are hashed from the file, in their turn."""
    six.target.write(memoryview(DATA[: 2 * BLOCK + 5]), START, direct=False)
    six.reorder.close()
    six.reorder = six.begin([(START, START + 2 * BLOCK + 5)])
    block = six.blocks.acquire()
    rest = DATA[2 * BLOCK + 5 : 3 * BLOCK]
    block[: len(rest)] = rest
    for index in (5, 4, 3):
        six.put(index)
    six.reorder.write(block, START + 2 * BLOCK + 5, len(rest))
    assert six.reorder.finish()
    assert six.digests() == RIGHT


def test_blocks_are_used_again(six: SixBlocks) -> None:
    """In order, six blocks need no more memory than two."""
    lent = set()
    for index in range(COUNT):
        block = six.blocks.acquire()
        lent.add(id(block))
        six.blocks.release(block)
        six.put(index)
        while six.reorder._next < START + index * BLOCK:
            pass
    assert len(lent) <= 2


@pytest.mark.parametrize(("held", "count"), [(2, COUNT), (0, 1)])
def test_a_line_ahead_waits_while_the_hashing_goes_on(
    tmp_path: Path, read_back: list[tuple[int, int]], held: int, count: int
) -> None:
    """With no room to wait, a block in its turn is hashed from memory, not read back."""
    six = SixBlocks(tmp_path, held)
    for index in range(count):
        six.put(index)
    assert six.reorder.finish() is (count == COUNT)
    assert six.digests() == {hashlib.sha256(DATA[: count * BLOCK]).hexdigest()}
    assert read_back == []
    six.reorder.close()


class Held:
    """A sink that hashes once it is let."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def update(self, _: memoryview) -> None:
        self.begun.set()
        self.go_on.wait()


def test_a_stop_ends_who_waits_for_room(tmp_path: Path) -> None:
    """While the hashing goes on, a block that is not its turn waits; a stop ends that."""
    six, sink = SixBlocks(tmp_path, held=0), Held()
    six.reorder.close()
    six.sinks = [sink]  # type: ignore[list-item]
    six.reorder = six.begin()
    six.put(0)
    sink.begun.wait()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(six.put, 2)
        while len(six.recorded) < 2:  # it is written, and now waits for room
            time.sleep(0.001)
        assert not waiting.done()
        six.stop.set()
        with pytest.raises(Cancelled):
            waiting.result()
    sink.go_on.set()
    six.reorder.close()
    assert six.reorder.wanted()[0] == (START + BLOCK, START + SIZE)


def test_it_is_empty_until_the_first_block_comes(six: SixBlocks) -> None:
    """Blocks that an earlier run has written count, too."""
    assert six.reorder.is_empty
    six.put(5)
    assert not six.reorder.is_empty
    six.reorder.close()
    six.reorder = six.begin([(START, START + 1)])
    assert not six.reorder.is_empty


def test_a_stop_ends_those_who_put_and_those_who_wait(six: SixBlocks) -> None:
    """After a stop nothing lands, and waiting for the end ends."""
    six.put(3)
    six.stop.set()
    with pytest.raises(Cancelled):
        six.put(4)
    with pytest.raises(Cancelled):
        six.reorder.finish()


def test_a_file_that_cannot_be_read_back_is_reported(tmp_path: Path) -> None:
    """An error while reading back comes out of finish, not out of a thread nobody hears."""
    six = SixBlocks(tmp_path, held=0)
    six.reorder.close()
    six.reorder = six.begin([(START, START + SIZE)])  # the file is empty
    with pytest.raises(hashing.ShortRead):
        six.reorder.finish()
    six.reorder.close()


# ---- ranges

pairs = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1]))


def members(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {n for start, end in ranges for n in range(start, end)}


@settings(max_examples=200, deadline=None)
@given(added=st.lists(pairs, max_size=12), window=pairs)
def test_ranges_are_the_sets_they_stand_for(
    added: list[tuple[int, int]], window: tuple[int, int]
) -> None:
    """What is missing, and how remote it reaches, are as with sets of numbers."""
    ranges, start = Ranges(added), window[0]
    missing = ranges.missing(*window)
    assert members(missing) == members([window]) - members(added)
    assert missing == sorted(missing)
    end = ranges.end_of(start)
    assert members([(start, end)]) <= members(added)
    assert end not in members(added)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (8, -8), (-1, 5), (5, -1)])
def test_a_journal_line_about_no_bytes_counts_as_absent(offset: int, size: int) -> None:
    """A line with a size below one, or before the file, is not understood."""
    line = dump_record(Arrival(0, 1, "5" * 64))
    assert parse_line(line) == Arrival(0, 1, "5" * 64)
    assert parse_line(json.dumps(json.loads(line) | {"offset": offset, "size": size})) is None


@pytest.mark.parametrize(
    ("offset", "size"), [(100, 100), (120, 10), (90, 20), (190, 20), (50, 300), (199, 1)]
)
def test_bytes_that_have_arrived_are_not_written_over(
    six: SixBlocks, offset: int, size: int
) -> None:
    """A block over any byte of [100, 200) is refused: the digest may have passed it."""
    six.target.write(memoryview(DATA[:200]), START, direct=False)
    six.reorder.close()
    six.reorder = six.begin([(START + 100, START + 200)])
    with pytest.raises(ValueError) as caught:
        six.reorder.write(six.blocks.acquire(), START + offset, size)
    span = f"[{START + offset}, {START + offset + size})"
    assert str(caught.value) == f"bytes {span} have arrived already"
    assert (six.written(), six.recorded) == (DATA[:200], [])
    for beside in (0, 200):
        six.reorder.write(six.blocks.acquire(), START + beside, 100)
    assert six.reorder.wanted() == [(START + 300, START + SIZE)]


def test_a_buffer_without_bytes_goes_back(six: SixBlocks) -> None:
    """A stream that got nothing gives its buffer back by writing nothing."""
    block = six.blocks.acquire()
    six.reorder.write(block, START, 0)
    assert (six.recorded, six.reorder.wanted()) == ([], [(START, START + SIZE)])
    assert six.blocks.acquire() is block


@pytest.mark.parametrize("indices", [(2, 3, 4), range(COUNT)])
def test_blocks_go_back_in_the_end(tmp_path: Path, indices: Sequence[int]) -> None:
    """After a reorder buffer, given up or finished, as many blocks may wait as before."""
    before = set(threading.enumerate())
    six = SixBlocks(tmp_path, held=3)
    for index in indices:
        six.put(index)
    threads = set(threading.enumerate()) - before
    assert threads
    six.reorder.finish()
    six.reorder.close()
    assert [six.blocks.reserve() for _ in range(4)] == [True, True, True, False]
    assert not any(thread.is_alive() for thread in threads)


def test_so_many_buffers_wait_in_memory() -> None:
    """48 MiB if nothing else is said; one that must wait takes the room of the next one."""
    pool = BufferPool()
    buffer = pool.acquire()
    assert sum(pool.reserve() for _ in range(100)) * len(buffer) == 48 << 20
    pool = BufferPool(1)
    assert [pool.reserve(), pool.reserve(), pool.reserve(always=True)] == [True, False, True]
    pool.release(buffer, reserved=True)
    assert pool.acquire() is buffer
    assert not pool.reserve()
    pool.release(buffer)
    assert not pool.reserve()
    pool.release(buffer, reserved=True)
    assert [pool.reserve(), pool.reserve()] == [True, False]


def test_much_is_read_back_in_steps(six: SixBlocks, read_back: list[tuple[int, int]]) -> None:
    """16 MiB at a time, so that it ends soon after it is closed, and up to a block that waits."""
    six.reorder.close()
    step, last = 16 << 20, START + (40 << 20)
    os.truncate(six.target.path, last + BLOCK)
    six.reorder = six.begin([(START, last)], last + BLOCK)
    six.reorder.write(six.blocks.acquire(), last, BLOCK)
    assert six.reorder.finish()
    assert read_back == [(START, step), (START + step, step), (START + 2 * step, step // 2)]


def test_who_puts_hears_that_the_hashing_has_died(tmp_path: Path) -> None:
    """With the hashing dead, a line does not go on fetching the rest."""
    six = SixBlocks(tmp_path, held=0)
    six.reorder.close()
    six.reorder = six.begin([(START, START + BLOCK)])  # the file is empty
    with pytest.raises(hashing.ShortRead):
        for index in range(1, COUNT):
            six.put(index)
            time.sleep(0.05)
    six.reorder.close()


# ---- the digest of the whole


PIECES = random.Random(5).randbytes(1000)
STARTS = [0, 400, 700, 1000]
WHOLE = hashlib.sha256(PIECES).hexdigest()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of three pieces."""
    (tmp_path / "pieces").write_bytes(PIECES)
    fd = os.open(tmp_path / "pieces", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("events", "claimed", "is_whole"),
    [
        ("+0 -0 +1 -1 +2 -2", "012", True),
        ("+0 +1 +2 -2 -1 -0", "0", True),
        ("+2 +1 -1 -2 +0 -0", "0", True),
        ("+1 +0 -0 -1 +2 -2", "02", True),
        ("+0 +2 -0 +1 -2 -1", "01", True),
        ("+0 +2 -0 -2 +1 -1", "01", True),
        ("+0 x0 +0 -0 +1 -1 +2 -2", "0012", True),
        ("+0 x0 +1 -1 +2 -2", "0", False),
        ("+0 +1 -0 x1 +2 -2", "0", False),
        ("+0 +1 +2 -1 -0 x2", "0", False),
    ],
)
def test_the_whole_digest_grows_in_file_order(
    fd: int, events: str, claimed: str, is_whole: bool
) -> None:
    """Pieces begin (+), are verified (-) or not (x); those whose turn it is feed the digest."""
    whole, feeding = InOrderDigest(fd, STARTS, threading.Event()), dict[int, Hasher | None]()
    had = ""
    for event in events.split():
        assert whole.hexdigest() == ""
        index = int(event[1])
        if event[0] == "+":
            feeding[index] = digest = whole.claim(index)
            if digest:
                digest.update(memoryview(PIECES)[STARTS[index] : STARTS[index + 1]])
                had += str(index)
        else:
            whole.finish(index, feeding[index], verified=event[0] == "-")
    assert (had, whole.hexdigest()) == (claimed, WHOLE if is_whole else "")


def test_a_file_of_many_pieces_is_fed_in_one_read(fd: int) -> None:
    """Where each piece begins when the one before is done, each is given the digest."""
    whole = InOrderDigest(fd, range(len(PIECES) + 1), threading.Event())
    for index, byte in enumerate(PIECES):
        digest = whole.claim(index)
        assert digest is not None
        digest.update(memoryview(bytes([byte])))
        whole.finish(index, digest, verified=True)
    assert whole.hexdigest() == WHOLE


def test_one_worker_at_a_time_reads_again(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that finishes meanwhile is left to the worker that reads already."""
    whole = InOrderDigest(fd, STARTS, threading.Event())
    waiting, feed = [2, 1], hashing.feed

    def meanwhile(*arguments: Any) -> None:
        if waiting:
            whole.finish(waiting.pop(), None, verified=True)
        feed(*arguments)

    monkeypatch.setattr(reorder, "feed", meanwhile)
    whole.finish(0, None, verified=True)
    assert whole.hexdigest() == WHOLE

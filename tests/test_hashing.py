"""Hashing: equal to hashlib, in any order, on all cores."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights import concurrency, hashing
from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import Cancelled, run_all
from csm_weights.errors import WrongContent
from csm_weights.files import opened
from csm_weights.hashing import (
    BLOCK,
    BlockHasher,
    HashJob,
    ShortRead,
    blob_id,
    feed,
    measure,
    sha256,
)
from csm_weights.store import block_io
from csm_weights.transfer.reorder import InOrderDigest

#: Bytes of the file that ranges are taken from: three blocks, and not whole.
SIZE = 2 * BLOCK + 12_345

#: Seconds after which a test that should have been stopped gives up.
PATIENCE = 10.0

DATA = random.Random("digest").randbytes(SIZE)


def ignore(_: int) -> None:
    """Counts nothing."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that holds DATA."""
    path = tmp_path_factory.mktemp("digest") / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def fd(file: Path) -> Iterator[int]:
    """The same file, open."""
    number = os.open(file, os.O_RDONLY)
    yield number
    os.close(number)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    offset = draw(st.integers(0, SIZE))
    return offset, draw(st.integers(0, SIZE - offset))


@st.composite
def cuts(draw: st.DrawFn, most: int = 6) -> list[tuple[int, int]]:
    """A tiling of [0, SIZE) in pieces of any size."""
    inner = draw(st.lists(st.integers(1, SIZE - 1), max_size=most - 1, unique=True))
    starts = [0, *sorted(inner), SIZE]
    return [(a, b - a) for a, b in itertools.pairwise(starts)]


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(ranges(), max_size=5))
def test_ranges_hash_as_hashlib_does(file: Path, wanted: list[tuple[int, int]]) -> None:
    """Any ranges, overlapping or empty, have the digests that hashlib gives, in order."""
    (measured,) = measure([HashJob(file, SIZE, tuple(wanted))], ignore)
    assert list(measured.ranges) == [digest(DATA[o : o + n]) for o, n in wanted]
    assert measured.whole is None


@settings(max_examples=20, deadline=None)
@given(tiles=cuts())
def test_ranges_and_whole_come_from_one_read(file: Path, tiles: list[tuple[int, int]]) -> None:
    """Pieces and whole together are right, and each byte is counted once."""
    ticks: list[int] = []
    (measured,) = measure([HashJob(file, SIZE, tuple(tiles), whole=True)], ticks.append)
    assert list(measured.ranges) == [digest(DATA[o : o + n]) for o, n in tiles]
    assert (measured.whole, sum(ticks)) == (digest(DATA), SIZE)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, SIZE))
def test_the_whole_is_just_the_given_size(file: Path, size: int) -> None:
    """A whole of `size` bytes ends there, even in a longer file."""
    assert measure([HashJob(file, size, (), True)], ignore)[0].whole == digest(DATA[:size])


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    """Results come in the order of the jobs, whatever their sizes."""
    contents = [DATA[:n] for n in (0, 5, SIZE, 1, BLOCK, BLOCK + 1)]
    jobs = []
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(content)
        tile = ((0, len(content)),)
        jobs.append(HashJob(path, len(content), tile, whole=bool(number % 2)))
    expected = [(digest(c),) for c in contents]
    assert [m.ranges for m in measure(jobs, ignore)] == expected


def test_nothing_to_measure_is_fine() -> None:
    """No jobs give no results."""
    assert measure([], ignore) == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_ends_early_is_a_short_read(file: Path, whole: bool) -> None:
    """A range beyond the end is wrong content, with the byte where the file ended."""
    job = HashJob(file, SIZE + 1, ((0, SIZE + 1),), whole)
    with pytest.raises(ShortRead, match=f"{SIZE:,}") as caught:
        measure([job], ignore)
    assert isinstance(caught.value, WrongContent)


def test_a_missing_file_is_an_os_error(file: Path) -> None:
    """A file that went away is reported as the system tells it, among good ones."""
    jobs = [HashJob(file, SIZE, (), True), HashJob(file.with_name("gone"), 1, (), True)]
    with pytest.raises(FileNotFoundError):
        measure(jobs, ignore)


def test_feed_counts_every_byte_once(fd: int) -> None:
    """Ticks are the bytes read, in blocks no larger than BLOCK."""
    ticks: list[int] = []
    feed(fd, 7, SIZE - 7, [sha256()], ticks.append)
    assert (sum(ticks), max(ticks)) == (SIZE - 7, BLOCK)


def test_feed_stops_at_the_next_block(fd: int) -> None:
    """Once `stop` is set, reading ends within a block."""
    stop = threading.Event()
    ticks: list[int] = []

    def on_progress(count: int) -> None:
        ticks.append(count)
        stop.set()

    with pytest.raises(Cancelled):
        feed(fd, 0, SIZE, [sha256()], on_progress, stop)
    assert ticks == [BLOCK]


# ---- run_all


def test_results_come_in_the_order_of_the_tasks() -> None:
    """Whichever task ends first, the results are in order."""
    tasks = [partial(pow, 2, n) for n in range(50)]
    assert run_all(tasks, threading.Event()) == [2**n for n in range(50)]


def wait_until(stop: threading.Event) -> None:
    """A worker that ends when it is asked to, as `feed` does."""
    if not stop.wait(PATIENCE):
        raise AssertionError("nobody set stop")
    raise Cancelled


def test_a_failure_stops_the_others_and_is_raised() -> None:
    """The failing task's error arrives, and the tasks beside it are asked to stop."""
    stop = threading.Event()

    def fail() -> None:
        raise LookupError("the first failure")

    tasks: list[Callable[[], None]] = [fail, *[partial(wait_until, stop)] * 20]
    with pytest.raises(LookupError, match="the first failure"):
        run_all(tasks, stop)
    assert stop.is_set()


def test_an_interrupt_stops_the_tasks() -> None:
    """Ctrl-C in the calling thread ends the workers before it is raised."""
    stop = threading.Event()
    asked: list[bool] = []
    caller = threading.get_ident()

    def work() -> None:
        time.sleep(0.05)  # until the caller waits, as it does all but a moment of a run
        signal.pthread_kill(caller, signal.SIGINT)
        asked.append(stop.wait(PATIENCE))

    with pytest.raises(KeyboardInterrupt):
        run_all([work], stop)
    assert asked == [True]


def test_an_interrupt_in_the_middle_of_a_wait_leaves_no_lock_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt is raised after the wait, so that no worker waits for its lock for ever."""
    lock, waits = threading.Lock(), threading.Event()
    acquired: list[bool] = []

    def wait_with_a_lock(futures: Any, **options: Any) -> Any:
        if not waits.is_set():
            lock.acquire()  # as a wait does inside, where an exception would leave it held
            waits.set()
            signal.raise_signal(signal.SIGINT)
            lock.release()
        return wait(futures, **options)

    monkeypatch.setattr(concurrency, "wait", wait_with_a_lock)

    def work() -> None:
        waits.wait(PATIENCE)
        acquired.append(lock.acquire(timeout=PATIENCE))

    with pytest.raises(KeyboardInterrupt):
        run_all([work], threading.Event())
    assert acquired == [True]


def test_an_interrupt_while_copying_is_raised_between_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the thread that writes is not left in its middle; nothing more is copied."""
    monkeypatch.setattr(block_io, "clone_range", lambda *_: False)
    (tmp_path / "a").write_bytes(bytes(3 * block_io.STEP))
    seen: list[int] = []

    class Sink:
        def update(self, data: memoryview) -> None:
            signal.raise_signal(signal.SIGINT)
            seen.append(len(data))

    target = block_io.OutputFile(tmp_path / "b")
    with opened(tmp_path / "a") as fd, pytest.raises(KeyboardInterrupt):
        extent, sinks = block_io.Extent(fd, 0, 3 * block_io.STEP), cast("Any", [Sink()])
        block_io.copy_hashed(extent, target, 0, sinks, False, seen.append, threading.Event())
    target.close()
    assert seen == [block_io.STEP, block_io.STEP]


# ---- InOrderDigest


def starts_of(tiles: list[tuple[int, int]]) -> list[int]:
    return [offset for offset, _ in tiles] + [SIZE]


class Worker:
    """One piece's worker, in the two steps that may interleave with others."""

    def __init__(self, chain: InOrderDigest, fd: int, index: int, tile: tuple[int, int]) -> None:
        self.chain, self.fd, self.index, self.tile = chain, fd, index, tile
        self.began = False

    def step(self, verified: bool = True) -> None:
        """Begins, and the second time finishes."""
        if not self.began:
            self.claimed = self.chain.claim(self.index)
            self.began = True
            return
        if self.claimed:
            feed(self.fd, *self.tile, [self.claimed], ignore)
        self.chain.finish(self.index, self.claimed, verified)


@settings(max_examples=80, deadline=None)
@given(tiles=cuts(), data=st.data())
def test_chain_is_the_whole_digest_in_any_order(
    fd: int, tiles: list[tuple[int, int]], data: st.DataObject
) -> None:
    """However the beginnings and ends of pieces interleave, the whole digest is right."""
    chain = InOrderDigest(fd, starts_of(tiles), threading.Event())
    workers = [Worker(chain, fd, i, tile) for i, tile in enumerate(tiles)]
    for index in data.draw(st.permutations([*range(len(tiles))] * 2)):
        assert chain.hexdigest() == ""
        workers[index].step()
    assert chain.hexdigest() == digest(DATA)


@settings(max_examples=40, deadline=None)
@given(tiles=cuts(), data=st.data())
def test_chain_has_no_digest_while_a_piece_is_unproven(
    fd: int, tiles: list[tuple[int, int]], data: st.DataObject
) -> None:
    """One piece that was not verified leaves the whole without a digest."""
    chain = InOrderDigest(fd, starts_of(tiles), threading.Event())
    workers = [Worker(chain, fd, i, tile) for i, tile in enumerate(tiles)]
    bad = data.draw(st.integers(0, len(tiles) - 1))
    for index in data.draw(st.permutations([*range(len(tiles))] * 2)):
        workers[index].step(verified=index != bad)
    assert chain.hexdigest() == ""


@settings(max_examples=15, deadline=None)
@given(tiles=cuts(12), order=st.randoms(use_true_random=False))
def test_chain_is_right_under_threads(
    fd: int, tiles: list[tuple[int, int]], order: random.Random
) -> None:
    """Real threads that take pieces in any order end with the whole digest."""
    stop = threading.Event()
    chain = InOrderDigest(fd, starts_of(tiles), stop)

    def work(index: int) -> None:
        claimed = chain.claim(index)
        if claimed:
            feed(fd, *tiles[index], [claimed], ignore, stop)
        chain.finish(index, claimed, verified=True)

    indices = list(range(len(tiles)))
    order.shuffle(indices)
    run_all([partial(work, index) for index in indices], stop)
    assert chain.hexdigest() == digest(DATA)


def test_pieces_in_order_are_claimed(fd: int) -> None:
    """Pieces that come in file order feed the chain themselves, so nothing is read twice."""
    chain = InOrderDigest(fd, [0, 10, 20, SIZE], threading.Event())
    for index, tile in enumerate([(0, 10), (10, 10), (20, SIZE - 20)]):
        claimed = chain.claim(index)
        assert claimed is not None
        feed(fd, *tile, [claimed], ignore)
        chain.finish(index, claimed, verified=True)
    assert chain.hexdigest() == digest(DATA)


# ---- blob_id


def test_blob_id_of_the_published_safetensors() -> None:
    """The public sha256 and size of model.safetensors give its public blob id."""
    sha = "2e7721144afe38b906d4f1048671da639fe142423f4a26283606ecebe894f4bf"
    assert blob_id(sha, 6_211_186_784) == "67a4748fc437cb9a2fdeb90e6bec9dedb0ad9f86"


def test_blob_id_depends_on_size_and_digest() -> None:
    """Another size or another digest is another blob."""
    ids = {blob_id("0" * 64, 10), blob_id("0" * 64, 11), blob_id("1" * 64, 10)}
    assert len(ids) == 3


def blocks_of(start: int, end: int, block: int) -> list[ByteRange]:
    """Blocks that tile [start, end) of DATA, by hashlib."""
    cuts = [*range(start, end, block), end]
    return [ByteRange(a, b - a, digest(DATA[a:b])) for a, b in itertools.pairwise(cuts)]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), block=st.integers(1, 500))
def test_blocks_are_hashed_however_their_bytes_arrive(data: st.DataObject, block: int) -> None:
    """Fed in parts of any size, a hasher of blocks gives hashlib's digest of each block."""
    hasher, size, at = BlockHasher(7), data.draw(st.integers(0, 2000)), 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "DIGEST_BLOCK", block)
        while at < 7 + size:
            part = data.draw(st.integers(1, 7 + size - at))
            hasher.update(memoryview(DATA)[at : at + part])
            at += part
    assert list(hasher.blocks()) == (blocks_of(7, 7 + size, block) if size else [])


@pytest.mark.parametrize(
    ("whole", "cuts"),
    [(True, ()), (True, (999_999, SIZE)), (False, (SIZE,)), (False, (999_999, SIZE))],
)
def test_blocks_are_taken_in_the_same_pass(
    file: Path, monkeypatch: pytest.MonkeyPatch, whole: bool, cuts: tuple[int, ...]
) -> None:
    """Digests of ranges, or of the whole, come with those of their blocks; bytes are read once."""
    monkeypatch.setattr(hashing, "DIGEST_BLOCK", 100_000)
    starts, read = (0, *cuts[:-1]), list[int]()
    ranges = tuple((a, b - a) for a, b in zip(starts, cuts, strict=False))
    job = HashJob(file, SIZE, ranges, whole=whole, blocks=True)
    (found,) = measure([job], read.append)

    spans = [(o, o + n) for o, n in ranges] or [(0, SIZE)]
    assert list(found.blocks) == [b for a, e in spans for b in blocks_of(a, e, 100_000)]
    assert found.ranges == tuple(digest(DATA[o : o + n]) for o, n in ranges)
    assert found.whole == (digest(DATA) if whole else None)
    assert sum(read) == SIZE

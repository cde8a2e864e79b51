"""Holds two sides of weights against each other, name by name, bit by bit, streaming."""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from csm_weights.concurrency import Cancelled, OnProgress, run_all, workers
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements
from csm_weights.formats.tensor_index import MAX_FINDINGS
from csm_weights.formats.transformers_layout import (
    AUDIO,
    TIED,
    Files,
    Side,
    SideTensor,
    SideView,
    Value,
    read_side,
)
from csm_weights.formats.weights_file import open_weights
from csm_weights.untrusted import show

#: Bytes of each side that one thread holds against each other at a time: both fit a core's
#: L2 cache, and this is much more than a call costs.
BLOCK = 512 << 10

#: The same for tensors that do not lie in row-major order: of those longer runs are read.
VIEW_BLOCK = 1 << 20

#: Most threads: each needs up to 5 MiB, and the whole process must stay below 100.
MAX_THREADS = 8


class What(enum.StrEnum):
    """In what a tensor differs; the value is the word a person reads."""

    MISSING = "missing"
    UNKNOWN = "unknown name"
    DTYPE = "dtype"
    SHAPE = "shape"
    ELEMENTS = "elements"


@dataclass(frozen=True)
class Difference:
    """One tensor that differs, what each side has of it, and for elements where first.

    `index` counts from 0 along each dimension of our shape.
    """

    name: str
    what: What
    first: str
    second: str
    index: tuple[int, ...] | None = None
    values: tuple[Value, Value] | None = None

    @property
    def where(self) -> str:
        """The tensor, and the element, on one line."""
        return show(self.name) + (str(list(self.index)) if self.index is not None else "")


@dataclass(frozen=True)
class Comparison:
    """What two sides have in common, and in what they differ, by name.

    `equal` tensors have the same dtype, shape and bits; `nbytes` is their size.
    """

    first: SideView
    second: SideView
    equal: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def error(self) -> WrongContent | None:
        """The error that the differences are, None where there are tensors and all are equal."""
        if not self.differences:
            return None if self.equal else WrongContent("neither side has a tensor to compare")
        findings = [self._finding(d) for d in self.differences[:MAX_FINDINGS]]
        if rest := len(self.differences) - len(findings):
            more = f"{rest} more tensors that differ"
            findings.append(Finding(Kind.DIFFERENT, self.second.where, "no other", more))
        count = len(self.differences)
        words = f"{count} tensors differ" if count > 1 else "1 tensor differs"
        first = self.differences[0].where
        return WrongContent(f"{words}, the first at {first}; {self.equal} are equal", findings)

    def _finding(self, difference: Difference) -> Finding:
        return Finding(Kind.DIFFERENT, difference.where, difference.first, difference.second)


@dataclass(frozen=True)
class _Pair:
    name: str
    first: SideTensor | None
    second: SideTensor | None
    is_unknown: bool = False

    def difference(self) -> Difference | None:
        """In what they differ by what their headers say."""
        first, second = self.first, self.second
        words = [t.signature if t else "no such tensor" for t in (first, second)]
        if self.is_unknown:
            what = What.UNKNOWN
        elif not (first and second):
            what = What.MISSING
        elif first.info.dtype != second.info.dtype:
            what = What.DTYPE
        elif first.shape != second.shape:
            what = What.SHAPE
        else:
            return None
        return Difference(self.name, what, words[0], words[1])


# ---- reading where the tensors lie


class Sides:
    """Two sides whose headers have been read; `nbytes` is what `compare` will read of both."""

    def __init__(self, first: Side, second: Side, sources: Sequence[MultipartFile]) -> None:
        self._first, self._second, self._sources = first, second, sources
        self._pairs = sorted(_pairs(first, second), key=lambda pair: pair.name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that have to be read, on both sides together."""
        return sum(2 * size for size, _ in self._jobs())

    def _jobs(self) -> list[tuple[int, int]]:
        """Bytes and number of each pair whose elements are to be compared, large ones first."""
        sizes = [
            (pair.first.info.nbytes, number)
            for number, pair in enumerate(self._pairs)
            if pair.first and not pair.difference()
        ]
        return sorted(sizes, key=lambda job: (-job[0], job[1]))

    def compare(self, on_progress: OnProgress) -> Comparison:
        """Reads both sides and holds them against each other; `on_progress` gets the bytes read.

        Raises WrongContent when a file was written to meanwhile.
        """
        differences = {n: d for n, pair in enumerate(self._pairs) if (d := pair.difference())}
        jobs = self._jobs()
        try:
            found = _search([self._pairs[number] for _, number in jobs], on_progress)
        except EOFError as error:
            raise _changed([Finding.changed(error, "one that was cut")]) from None
        if changes := [finding for source in self._sources for finding in source.changes()]:
            raise _changed(changes)
        differences |= {n: d for (_, n), d in zip(jobs, found, strict=True) if d}
        equal = [size for size, number in jobs if number not in differences]
        ordered = tuple(differences[number] for number in sorted(differences))
        return Comparison(self._first.view, self._second.view, len(equal), sum(equal), ordered)


def _changed(findings: Sequence[Finding]) -> WrongContent:
    return WrongContent("a file changed while it was compared; compare again", findings)


@contextmanager
def opened(first: Files, second: Files) -> Iterator[Sides]:
    """Opens two sides and reads their headers. Raises MissingInput, WrongContent."""
    with ExitStack() as stack:
        checkpoints = [
            [stack.enter_context(open_weights(paths)) for paths in files]
            for files in (first, second)
        ]
        folders = [files[0][0].parent for files in (first, second)]
        sides = read_side(checkpoints[0], folders), read_side(checkpoints[1], folders[::-1])
        yield Sides(*sides, [c.source for some in checkpoints for c in some])


# ---- holding them against each other


def _pairs(first: Side, second: Side) -> Iterator[_Pair]:
    for name in {**first.tensors, **second.tensors}:
        yield _Pair(name, first.tensors.get(name), second.tensors.get(name))
    if first.tied:
        yield _Pair(TIED, first.tied, second.tensors.get(AUDIO))
    if second.tied:
        yield _Pair(TIED, first.tensors.get(AUDIO), second.tied)
    unknown = [{t.name: t for t in side.unknown} for side in (first, second)]
    for name in {**unknown[0], **unknown[1]}:
        yield _Pair(name, unknown[0].get(name), unknown[1].get(name), is_unknown=True)


def _search(pairs: Sequence[_Pair], on_progress: OnProgress) -> list[Difference | None]:
    """What each pair differs in, on several threads, in the pairs' order."""
    cancel = threading.Event()
    found: list[Difference | None] = [None] * len(pairs)
    waiting = iter(range(len(pairs)))
    lock = threading.Lock()

    def take() -> int | None:
        with lock:
            return next(waiting, None)

    def work() -> None:
        while (number := take()) is not None:
            found[number] = _difference(pairs[number], on_progress, cancel)

    run_all([work] * min(workers(), MAX_THREADS), cancel)
    return found


def _difference(pair: _Pair, on_progress: OnProgress, cancel: threading.Event) -> Difference | None:
    first, second = pair.first, pair.second
    assert first and second, "both have it, for their headers agree"
    number = _first_different(first, second, on_progress, cancel)
    if number is None:
        return None
    values = first.value(number), second.value(number)
    words = [str(value) for value in values]
    index = _index(number, first.shape)
    return Difference(pair.name, What.ELEMENTS, words[0], words[1], index, values)


def _first_different(
    first: SideTensor, second: SideTensor, on_progress: OnProgress, cancel: threading.Event
) -> int | None:
    """The number, in row-major order, of the first element whose bits differ."""
    item, total = first.info.itemsize, math.prod(first.shape)
    step = _step(first, second)
    rooms = bytearray(), bytearray()
    for start in range(0, total, step):
        if cancel.is_set():
            raise Cancelled
        size = min(step, total - start) * item
        if len(rooms[0]) != size:
            rooms = bytearray(size), bytearray(size)
        for tensor, room in zip((first, second), rooms, strict=True):
            read_elements(tensor.source, tensor.info, start, room)
        if rooms[0] != rooms[1]:
            return start + _bisected(*rooms, item)
        on_progress(2 * size)
    return None


def _step(first: SideTensor, second: SideTensor) -> int:
    """Elements of a block: whole rows, since parts of them are slow to read from a view."""
    are_plain = first.info.contiguous and second.info.contiguous
    most = (BLOCK if are_plain else VIEW_BLOCK) // first.info.itemsize
    row = first.shape[-1] if first.shape else 1
    return most - most % row if 0 < row <= most else most


def _bisected(first: bytearray, second: bytearray, item: int) -> int:
    """The number of the first element in which two blocks differ that do."""
    begin, end = 0, len(first) // item
    while end - begin > 1:
        middle = (begin + end) // 2
        half = slice(begin * item, middle * item)
        begin, end = (begin, middle) if first[half] != second[half] else (middle, end)
    return begin


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        number, at = divmod(number, size)
        index.append(at)
    return tuple(reversed(index))

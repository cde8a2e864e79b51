"""Compare two models' weights name by name and bit by bit, streaming."""

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
from csm_weights.formats.shards import Files
from csm_weights.formats.strided import read_elements
from csm_weights.formats.tensor_index import MAX_FINDINGS
from csm_weights.formats.transformers_layout import (
    AUDIO,
    TIED,
    NamedTensor,
    NamedTensors,
    Summary,
    Value,
    name_tensors,
)
from csm_weights.formats.weights_file import open_weights
from csm_weights.untrusted import show

#: Bytes of each file that one thread compares at a time: two such blocks fit a core's L2
#: cache. Tensors that are not in row-major order are read in longer runs.
BLOCK = 512 << 10
VIEW_BLOCK = 1 << 20

#: Most threads: each needs up to 5 MiB, and the process must stay below 100 MiB.
MAX_THREADS = 8


class What(enum.StrEnum):
    """Kinds of differences; the value is the word a person reads."""

    MISSING = "missing"
    UNKNOWN = "unknown name"
    DTYPE = "dtype"
    SHAPE = "shape"
    ELEMENTS = "elements"


@dataclass(frozen=True)
class Difference:
    """One tensor that differs, and what each model has of it.

    Where elements differ, `index` is the first that does, from 0 along each
    dimension of our shape, and `values` are the two elements.
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
    """The tensors in which two models differ, sorted by name.

    `equal` tensors have the same dtype, shape and bits; `nbytes` is their size.
    """

    first: Summary
    second: Summary
    equal: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def error(self) -> WrongContent | None:
        """The error for the differences; None where there are tensors and all are equal."""
        if not self.differences:
            return None if self.equal else WrongContent("neither file has a tensor to compare")
        findings = [
            Finding(Kind.DIFFERENT, one.where, one.first, one.second)
            for one in self.differences[:MAX_FINDINGS]
        ]
        if rest := len(self.differences) - len(findings):
            more = f"{rest} more tensors that differ"
            findings.append(Finding(Kind.DIFFERENT, self.second.where, "no other", more))
        count = len(self.differences)
        words = f"{count} tensors differ" if count > 1 else "1 tensor differs"
        first = self.differences[0].where
        return WrongContent(f"{words}, the first at {first}; {self.equal} are equal", findings)


@dataclass(frozen=True)
class _Pair:
    name: str
    first: NamedTensor | None
    second: NamedTensor | None
    is_unknown: bool = False

    def difference(self) -> Difference | None:
        """Compare what the headers say of both."""
        first, second = self.first, self.second
        words = [t.signature if t else "no such tensor" for t in (first, second)]
        if self.is_unknown:
            what = What.UNKNOWN
        elif not (first and second):
            what = What.MISSING
        elif first.dtype != second.dtype:
            what = What.DTYPE
        elif first.shape != second.shape:
            what = What.SHAPE
        else:
            return None
        return Difference(self.name, what, words[0], words[1])


class WeightsPair:
    """Two models whose headers have been read, open for comparing."""

    def __init__(
        self, first: NamedTensors, second: NamedTensors, sources: Sequence[MultipartFile]
    ) -> None:
        self._first, self._second, self._sources = first, second, sources
        self._pairs = sorted(_pairs(first, second), key=lambda pair: pair.name)
        self._differences = {n: d for n, pair in enumerate(self._pairs) if (d := pair.difference())}
        #: Bytes and number of each pair whose elements are to be compared, large ones first.
        self._jobs = sorted(
            (-pair.first.info.nbytes, number)
            for number, pair in enumerate(self._pairs)
            if pair.first and number not in self._differences
        )

    @property
    def nbytes(self) -> int:
        """Bytes that `compare` will read of both models together."""
        return sum(-2 * size for size, _ in self._jobs)

    def compare(self, on_progress: OnProgress) -> Comparison:
        """Read and compare the elements; `on_progress` gets the bytes read.

        Raises WrongContent when a file was written to meanwhile.
        """
        try:
            found = _search([self._pairs[number] for _, number in self._jobs], on_progress)
        except EOFError as error:
            raise _changed([Finding.changed(error, "one that was cut")]) from None
        if changes := [finding for source in self._sources for finding in source.changes()]:
            raise _changed(changes)
        differences = dict(self._differences)
        differences |= {n: d for (_, n), d in zip(self._jobs, found, strict=True) if d}
        equal = [-size for size, number in self._jobs if number not in differences]
        ordered = tuple(differences[number] for number in sorted(differences))
        return Comparison(
            self._first.summary, self._second.summary, len(equal), sum(equal), ordered
        )


def _changed(findings: Sequence[Finding]) -> WrongContent:
    return WrongContent("a file changed while it was compared; compare again", findings)


@contextmanager
def open_pair(first: Files, second: Files) -> Iterator[WeightsPair]:
    """Open two models' files and read their headers; raises MissingInput, WrongContent."""
    with ExitStack() as stack:
        opened = [
            [stack.enter_context(open_weights(paths)) for paths in files]
            for files in (first, second)
        ]
        folders = [files[0][0].parent for files in (first, second)]
        named = name_tensors(opened[0], folders), name_tensors(opened[1], folders[::-1])
        yield WeightsPair(*named, [file.source for files in opened for file in files])


def _pairs(first: NamedTensors, second: NamedTensors) -> Iterator[_Pair]:
    for name in {**first.tensors, **second.tensors}:
        yield _Pair(name, first.tensors.get(name), second.tensors.get(name))
    if first.tied:
        yield _Pair(TIED, first.tied, second.tensors.get(AUDIO))
    if second.tied:
        yield _Pair(TIED, first.tensors.get(AUDIO), second.tied)
    unknown = [{t.name: t for t in named.unknown} for named in (first, second)]
    for name in {**unknown[0], **unknown[1]}:
        yield _Pair(name, unknown[0].get(name), unknown[1].get(name), is_unknown=True)


def _search(pairs: Sequence[_Pair], on_progress: OnProgress) -> list[Difference | None]:
    """Compare the elements of each pair on several threads; results are in the pairs' order."""
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
    """Find the first element, in row-major order, whose bits differ."""
    first, second = pair.first, pair.second
    assert first and second, "both have it, for their headers agree"
    item, total = first.info.itemsize, math.prod(first.info.shape)
    step = _step(first, second)
    buffers = bytearray(), bytearray()
    for start in range(0, total, step):
        if cancel.is_set():
            raise Cancelled
        size = min(step, total - start) * item
        if len(buffers[0]) != size:
            buffers = bytearray(size), bytearray(size)
        for tensor, buffer in zip((first, second), buffers, strict=True):
            read_elements(tensor.source, tensor.info, start, buffer)
        if buffers[0] != buffers[1]:
            bits = int.from_bytes(buffers[0], "little") ^ int.from_bytes(buffers[1], "little")
            number = start + ((bits & -bits).bit_length() - 1) // (8 * item)
            values = first.value(number), second.value(number)
            # packed elements are counted by their bytes
            is_packed = math.prod(first.shape) != total
            index = _index(number, (total,) if is_packed else first.shape)
            words = str(values[0]), str(values[1])
            return Difference(pair.name, What.ELEMENTS, *words, index, values)
        on_progress(2 * size)
    return None


def _step(first: NamedTensor, second: NamedTensor) -> int:
    """Return the elements of a block: whole rows, for parts of rows are slow to read of a view."""
    are_plain = first.info.contiguous and second.info.contiguous
    most = (BLOCK if are_plain else VIEW_BLOCK) // first.info.itemsize
    row = first.shape[-1] if first.shape else 1
    return most - most % row if 0 < row <= most else most


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        number, at = divmod(number, size)
        index.append(at)
    return tuple(reversed(index))

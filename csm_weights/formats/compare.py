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
from csm_weights.formats.dtypes import FLOATS, converted
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements
from csm_weights.formats.tensor_index import MAX_FINDINGS, row_major
from csm_weights.formats.transformers_layout import (
    AUDIO,
    TIED,
    NamedTensor,
    NamedTensors,
    Summary,
    Value,
    name_tensors,
)
from csm_weights.formats.weights_file import Files, open_weights
from csm_weights.untrusted import show

#: Bytes of each file that one thread compares at a time: two such blocks fit a core's L2
#: cache. Tensors that are not in row-major order are read in longer runs.
BLOCK = 512 << 10
VIEW_BLOCK = 1 << 20


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
            nothing = WrongContent("there are no tensors to compare in either file")
            return None if self.equal else nothing
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


class WeightsPair:
    """Two models whose headers have been read, open for comparing.

    With `rounded` a tensor of a wider dtype is rounded to that of the other first.
    """

    def __init__(
        self,
        first: NamedTensors,
        second: NamedTensors,
        sources: Sequence[MultipartFile],
        rounded: bool = False,
    ) -> None:
        self._first, self._second, self._sources = first, second, sources
        self._differences: list[Difference] = []
        self._alike: list[tuple[str, NamedTensor, NamedTensor]] = []
        names = {**first.tensors, **second.tensors}
        pairs = [(name, first.tensors.get(name), second.tensors.get(name)) for name in names]
        # a copy of the audio embeddings is held against the other's embeddings
        if first.tied:
            pairs.append((TIED, first.tied, second.tensors.get(AUDIO)))
        if second.tied:
            pairs.append((TIED, first.tensors.get(AUDIO), second.tied))
        for name, one, other in pairs:
            what = What.SHAPE
            if not (one and other):
                what = What.MISSING
            elif one.dtype != other.dtype and not (
                rounded and {one.dtype, other.dtype} <= {*FLOATS.values()}
            ):
                what = What.DTYPE
            elif one.shape == other.shape:
                self._alike.append((name, one, other))
                continue
            self._differences.append(Difference(name, what, _words(one), _words(other)))
        more, others = ({t.name: t for t in named.unknown} for named in (first, second))
        for name in {**more, **others}:
            words = _words(more.get(name)), _words(others.get(name))
            self._differences.append(Difference(name, What.UNKNOWN, *words))
        self._alike.sort(key=lambda pair: -pair[1].info.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that `compare` will read of both models together."""
        return sum(one.info.nbytes + other.info.nbytes for _, one, other in self._alike)

    def compare(self, on_progress: OnProgress) -> Comparison:
        """Read and compare the elements; `on_progress` gets the bytes read.

        Raises WrongContent when a file was written to meanwhile.
        """
        cancel = threading.Event()
        found: list[tuple[int, Difference | None]] = []
        waiting = iter(self._alike)  # shared by the threads, large tensors first

        def work() -> None:
            for name, one, other in waiting:
                difference = first_difference(name, one, other, on_progress, cancel)
                found.append((one.info.nbytes, difference))

        # A thread needs up to 5 MiB, and the process must stay below 100 MiB.
        run_all([work] * min(workers(), 8), cancel)
        if changes := [finding for source in self._sources for finding in source.changes()]:
            raise WrongContent("a file changed while it was compared; compare again", changes)
        equal = [size for size, difference in found if difference is None]
        differences = [*self._differences, *(d for _, d in found if d)]
        differences.sort(key=lambda difference: difference.name)
        return Comparison(
            self._first.summary, self._second.summary, len(equal), sum(equal), tuple(differences)
        )


@contextmanager
def open_pair(first: Files, second: Files, *, rounded: bool = False) -> Iterator[WeightsPair]:
    """Open two models' files and read their headers; raises MissingInput, WrongContent."""
    with ExitStack() as stack:
        opened = [
            [stack.enter_context(open_weights(paths)) for paths in files]
            for files in (first, second)
        ]
        folders = [files[0][0].parent for files in (first, second)]
        named = name_tensors(opened[0], folders), name_tensors(opened[1], folders[::-1])
        yield WeightsPair(*named, [file.source for files in opened for file in files], rounded)


def tied_findings(named: NamedTensors) -> list[Finding]:
    """Compare the two tensors that transformers ties, where both were saved; reads them whole."""
    audio, tied = named.tensors.get(AUDIO), named.tied
    if not (audio and tied):
        return []
    at = ""
    if (audio.dtype, audio.shape) == (tied.dtype, tied.shape):
        difference = first_difference(TIED, audio, tied, lambda _: None, threading.Event())
        if difference is None:
            return []
        at = f", other elements from {list(difference.index or ())} on"
    words = (f"what {audio.name} has", f"{tied.signature}{at}")
    return [Finding(Kind.DIFFERENT, f"{named.summary.where}: {tied.name}", *words)]


def _words(tensor: NamedTensor | None) -> str:
    return tensor.signature if tensor else "no such tensor"


def first_difference(
    name: str,
    first: NamedTensor,
    second: NamedTensor,
    on_progress: OnProgress,
    cancel: threading.Event,
) -> Difference | None:
    """Find the first element, in row-major order, whose bits differ."""
    total = math.prod(first.info.shape)
    narrow = min(first, second, key=lambda tensor: tensor.info.itemsize).dtype
    are_plain = first.info.contiguous and second.info.contiguous
    step = first.block_elements(BLOCK if are_plain else VIEW_BLOCK)
    for start in range(0, total, step):
        if cancel.is_set():
            raise Cancelled
        count = min(step, total - start)
        blocks = []
        for tensor in (first, second):
            block = bytearray(count * tensor.info.itemsize)
            read_elements(tensor.source, tensor.info, start, block)
            on_progress(len(block))
            blocks.append(converted(block, tensor.dtype, narrow))
        if blocks[0] != blocks[1]:
            bits = int.from_bytes(blocks[0], "little") ^ int.from_bytes(blocks[1], "little")
            width = 8 * len(blocks[0]) // count
            number = start + ((bits & -bits).bit_length() - 1) // width
            values = first.value(number), second.value(number)
            # packed elements are counted by their bytes
            shape = first.shape if math.prod(first.shape) == total else (total,)
            dimensions = zip(shape, row_major(shape), strict=True)
            index = tuple(number // apart % size for size, apart in dimensions)
            return Difference(name, What.ELEMENTS, str(values[0]), str(values[1]), index, values)
    return None

"""Read the elements of a tensor in row-major order, whatever its strides in the file.

Besides its result a read needs memory of that result's size at most.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.tensor_index import TensorInfo, row_major

#: Bytes that cost no more to read than a second call would, and how many may be read for
#: each byte wanted beyond those.
_FLOOR = 16 << 10
_DENSITY = 2

#: memoryview's formats for moving elements, by their bytes.
_MOVED: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

#: struct's formats of the dtypes it knows.
_STRUCT = {"BOOL": "B", "U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i"}
_STRUCT |= {"U64": "Q", "I64": "q", "F16": "e", "F32": "f", "F64": "d", "F4_X2": "B"}
_COMPLEX = {"C32": "2e", "C64": "2f", "C128": "2d"}

#: Small floats: bits of the mantissa, the exponent's bias, and the bits of the NaN, sign aside.
_SMALL = {"F8_E4M3": (3, 7, 0x7F), "F8_E4M3FNUZ": (3, 8, None), "F8_E5M2FNUZ": (2, 16, None)}


class _Axis(NamedTuple):
    """One dimension: its size, and the distance of neighbours in the file and in the result.

    All in elements.
    """

    size: int
    step: int
    out_step: int


class _Box(NamedTuple):
    """A rectangular part: its axes, and its first element in the file and in the result."""

    axes: tuple[_Axis, ...]
    begin: int
    out: int


def read_elements(source: MultipartFile, info: TensorInfo, start: int, buffer: bytearray) -> None:
    """Fill a buffer with elements of a tensor, from number `start` of its row-major order on.

    The elements are little-endian. The buffer's size must be a multiple of
    theirs. Raises EOFError where the file ends before them.
    """
    count = len(buffer) // info.itemsize
    if not 0 <= start <= start + count <= math.prod(info.shape):
        raise ValueError(f"elements [{start}, {start + count}) of {list(info.shape)}")
    if info.flip:
        read_elements(source, replace(info, flip=0), start, buffer)
        mask = int.from_bytes(info.flip.to_bytes(info.itemsize, "little") * count, "little")
        buffer[:] = (int.from_bytes(buffer, "little") ^ mask).to_bytes(len(buffer), "little")
        return
    if info.itemsize == 16:  # moved as two halves
        shape, stride = (*info.shape, 2), (*(2 * step for step in info.stride), 1)
        info, start, count = (
            replace(info, dtype="U64", shape=shape, stride=stride),
            2 * start,
            2 * count,
        )
    with memoryview(buffer) as view, view.cast(_MOVED[info.itemsize]) as target:
        reader = _Reader(source, info, view, target)
        for box in _boxes(_merged(info), start, start + count):
            reader.read(box)


class _Reader:
    def __init__(
        self, source: MultipartFile, info: TensorInfo, buffer: memoryview, target: memoryview
    ) -> None:
        self._source, self._start, self._item = source, info.offset, info.itemsize
        self._buffer, self._target = buffer, target
        self._format = _MOVED[info.itemsize]

    def read(self, box: _Box) -> None:
        """Read a box in one go if its elements lie densely enough, else in parts."""
        reach = 1 + sum((axis.size - 1) * axis.step for axis in box.axes)
        wanted = math.prod(axis.size for axis in box.axes)
        if reach * self._item <= max(_FLOOR, _DENSITY * wanted * self._item):
            self._take(box, reach)
            return
        if len(box.axes) == 2:
            run, apart = sorted(box.axes, key=lambda axis: axis.step)
            if run.step == 1 and apart.step * self._item > _FLOOR:
                self._take_runs(box, run, apart)
                return
        reaches = [(axis.size - 1) * axis.step for axis in box.axes]
        for part in _split(box, reaches.index(max(reaches)), self._item):
            self.read(part)

    def _take_runs(self, box: _Box, run: _Axis, apart: _Axis) -> None:
        """Read each run alone, without the overhead of `read`."""
        buffer = memoryview(bytearray(run.size * self._item))
        elements = buffer.cast(self._format)
        offset, end = self._start + box.begin * self._item, (run.size - 1) * run.out_step + 1
        for at in range(box.out, box.out + apart.size * apart.out_step, apart.out_step):
            self._source.read_into(buffer, offset)
            self._target[at : at + end : run.out_step] = elements
            offset += apart.step * self._item

    def _take(self, box: _Box, reach: int) -> None:
        offset = self._start + box.begin * self._item
        if all(axis.step == axis.out_step == 1 for axis in box.axes):
            begin = box.out * self._item
            with self._buffer[begin : begin + reach * self._item] as part:
                self._source.read_into(part, offset)
            return
        span = memoryview(bytearray(reach * self._item))
        self._source.read_into(span, offset)
        self._scatter(box, span.cast(self._format))

    def _scatter(self, box: _Box, span: memoryview) -> None:
        """Move the elements to their places, a run along the longest axis at a time."""
        *others, (size, step, place) = sorted(box.axes, key=lambda axis: axis.size)
        ranges = [range(axis.size) for axis in others]
        for index in itertools.product(*ranges):
            begin, at = 0, box.out
            for number, axis in zip(index, others, strict=True):
                begin += number * axis.step
                at += number * axis.out_step
            if step:
                run = span[begin : begin + (size - 1) * step + 1 : step]
            else:  # no slice repeats one element
                run = memoryview(span[begin : begin + 1].tobytes() * size).cast(self._format)
            self._target[at : at + (size - 1) * place + 1 : place] = run


def _split(box: _Box, number: int, item: int) -> Iterator[_Box]:
    """Halve a box along one axis, or cut it into steps where no two can be read together."""
    size, step, place = box.axes[number]
    part = 1 if step * item > _FLOOR else (size + 1) // 2
    before, after = box.axes[:number], box.axes[number + 1 :]
    for index in range(0, size, part):
        count = min(part, size - index)
        own = (_Axis(count, step, place),) if count > 1 else ()
        yield _Box((*before, *own, *after), box.begin + index * step, box.out + index * place)


def _merged(info: TensorInfo) -> list[tuple[int, int]]:
    """Merge dimensions into as few sizes and strides as will do, outermost first."""
    merged: list[tuple[int, int]] = []
    for size, step in zip(info.shape, info.stride, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged


def _boxes(
    dims: Sequence[tuple[int, int]], start: int, stop: int, begin: int = 0, at: int = 0
) -> Iterator[_Box]:
    """Cut the elements `[start, stop)` of the row-major order into boxes, in that order."""
    if start >= stop:
        return
    if not dims:
        yield _Box((), begin, at)
        return
    (_, step), *rest = dims
    inner = math.prod(size for size, _ in rest)
    first, head = divmod(start, inner)
    if head:
        end = min(stop, (first + 1) * inner)
        yield from _boxes(rest, head, end - first * inner, begin + first * step, at)
        at += end - start
        first += 1
    last, tail = divmod(stop, inner)
    if last > first:
        sizes, steps = zip((last - first, step), *rest, strict=True)
        axes = zip(sizes, steps, row_major(sizes), strict=True)
        kept = tuple(_Axis(*axis) for axis in axes if axis[0] > 1)
        yield _Box(kept, begin + first * step, at)
        at += (last - first) * inner
    if tail and last >= first:
        yield from _boxes(rest, 0, tail, begin + last * step, at)


def to_number(dtype: str, element: bytes) -> int | float | complex:
    """Return the value of one little-endian element; `dtype` is safetensors' word."""
    if dtype in _STRUCT:
        number: int | float = struct.unpack(f"<{_STRUCT[dtype]}", element)[0]
        return number
    if dtype == "BF16":
        return to_number("F32", b"\0\0" + element)
    if dtype == "F8_E5M2":
        return to_number("F16", b"\0" + element)
    if dtype in _COMPLEX:
        return complex(*struct.unpack(f"<{_COMPLEX[dtype]}", element))
    bits = element[0]
    if dtype == "F8_E8M0":
        return math.nan if bits == 0xFF else math.ldexp(1.0, bits - 127)
    width, bias, nan = _SMALL[dtype]
    if bits == 0x80 if nan is None else bits & 0x7F == nan:
        return math.nan
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = (bits & 0x7F) >> width, bits & (1 << width) - 1
    whole = mantissa + (1 << width if exponent else 0)
    return sign * math.ldexp(whole, max(1, exponent) - bias - width)

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
    """One dimension: size, distance of neighbours in the file and in the result, in elements."""

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
    theirs. Raises WrongContent where the file ends before them.
    """
    count = len(buffer) // info.itemsize
    if not 0 <= start <= start + count <= math.prod(info.shape):
        raise ValueError(f"elements [{start}, {start + count}) of {list(info.shape)}")
    if info.itemsize == 16:  # moved as two halves
        shape, stride = (*info.shape, 2), (*(2 * step for step in info.stride), 1)
        info = replace(info, dtype="U64", shape=shape, stride=stride)
        start, count = 2 * start, 2 * count
    # as few dimensions as will do, outermost first
    dims: list[tuple[int, int]] = []
    for size, step in zip(info.shape, info.stride, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * step:
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    with memoryview(buffer) as view, view.cast(_MOVED[info.itemsize]) as target:
        for box in _boxes(dims, start, start + count):
            _read(box, source, info, view, target)


def _read(
    box: _Box, source: MultipartFile, info: TensorInfo, buffer: memoryview, target: memoryview
) -> None:
    """Read a box in one go if its elements lie densely enough, else in parts.

    `target` is the buffer as elements.
    """
    item = info.itemsize
    reaches = [(axis.size - 1) * axis.step for axis in box.axes]
    reach = 1 + sum(reaches)
    wanted = math.prod(axis.size for axis in box.axes)
    if reach * item > max(_FLOOR, _DENSITY * wanted * item):
        # halve the longest axis, or cut it into steps where no two can be read together
        number = reaches.index(max(reaches))
        size, step, place = box.axes[number]
        part = 1 if step * item > _FLOOR else (size + 1) // 2
        for index in range(0, size, part):
            count = min(part, size - index)
            own = (_Axis(count, step, place),) if count > 1 else ()
            axes = (*box.axes[:number], *own, *box.axes[number + 1 :])
            inner = _Box(axes, box.begin + index * step, box.out + index * place)
            _read(inner, source, info, buffer, target)
        return
    offset = info.offset + box.begin * item
    if all(axis.step == axis.out_step == 1 for axis in box.axes):
        with buffer[box.out * item : (box.out + reach) * item] as piece:
            source.read_into(piece, offset)
        return
    raw = memoryview(bytearray(reach * item))
    source.read_into(raw, offset)
    span = raw.cast(_MOVED[item])
    # move the elements to their places, a run along the longest axis at a time
    *others, (size, step, place) = sorted(box.axes, key=lambda axis: axis.size)
    for position in itertools.product(*(range(axis.size) for axis in others)):
        begin, at = 0, box.out
        for number, axis in zip(position, others, strict=True):
            begin += number * axis.step
            at += number * axis.out_step
        if step:
            run = span[begin : begin + (size - 1) * step + 1 : step]
        else:  # no slice repeats one element
            run = memoryview(span[begin : begin + 1].tobytes() * size).cast(_MOVED[item])
        target[at : at + (size - 1) * place + 1 : place] = run


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

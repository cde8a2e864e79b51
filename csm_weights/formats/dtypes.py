"""Convert blocks of floating-point elements between dtypes, as torch does, without it."""

from __future__ import annotations

import functools
import math
import struct

#: The dtypes that weights are converted between, by safetensors' words; and people's.
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

#: Bytes that are rounded at once: integers that stay in the core's cache.
_SLICE = 32 << 10


def converted(raw: bytearray, source: str, target: str) -> bytearray:
    """Return little-endian elements of one of `FLOATS` as another.

    A narrower dtype gets the nearest value, ties to even. What is too large
    becomes infinite, and a NaN stays one.
    """
    if source == target:
        return raw
    if source == "F16":
        count = len(raw) // 2
        wide = bytearray(struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", raw)))
    elif source == "BF16":
        # a BF16 is the upper half of an F32
        wide = bytearray(2 * len(raw))
        memoryview(wide).cast("H")[1::2] = memoryview(raw).cast("H")
    else:
        wide = raw
    if target == "F16":
        count = len(wide) // 4
        numbers = struct.unpack(f"<{count}f", wide)
        try:
            return bytearray(struct.pack(f"<{count}e", *numbers))
        except OverflowError:
            # from 65,520 on a magnitude rounds to infinity
            fits = (n if abs(n) < 65520.0 else n * math.inf for n in numbers)
            return bytearray(struct.pack(f"<{count}e", *fits))
    return _upper_halves(wide) if target == "BF16" else wide


def _upper_halves(raw: bytearray) -> bytearray:
    """Round F32 elements to BF16: those of a slice at once, as one large integer."""
    narrow = bytearray(len(raw) // 2)
    target = memoryview(narrow).cast("H")
    for start in range(0, len(raw), _SLICE):
        part = raw[start : start + _SLICE]
        ones, magnitudes, mantissas, half = _masks(len(part) // 4)
        bits = int.from_bytes(part, "little")
        # a carry into bit 31 tells a NaN, which rounding could carry into the next element
        if nans := ((bits & magnitudes) + mantissas) >> 31 & ones:
            bits = bits & ~(nans * 0xFFFFFFFF) | nans * 0x7FC00000
        bits += half + (bits >> 16 & ones)
        halves = memoryview(bits.to_bytes(len(part), "little")).cast("H")
        target[start // 4 : (start + len(part)) // 4] = halves[1::2]
    return narrow


@functools.lru_cache(maxsize=4)
def _masks(count: int) -> list[int]:
    ones = int.from_bytes(b"\1\0\0\0" * count, "little")
    return [ones * mask for mask in (1, 0x7FFFFFFF, 0x7FFFFF, 0x7FFF)]

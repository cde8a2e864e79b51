"""Opcodes of pickles, as functions that push one value."""

from __future__ import annotations

import struct
from collections.abc import Sequence

HOOKS = b"ccollections\nOrderedDict\n)R"

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"

FLOAT = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    """Return opcodes that push text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Return opcodes that push a whole number of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    short = len(raw) < 256
    return (b"\x8a" if short else b"\x8b") + struct.pack("<B" if short else "<I", len(raw)) + raw


def numbers(values: Sequence[int]) -> bytes:
    """Return opcodes that push a tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", elements: int = 6, kind: bytes = FLOAT) -> bytes:
    """Return opcodes that push a storage."""
    parts = (text("storage"), kind, text(key), text("cpu"), number(elements))
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    offset: int = 0,
    shape: Sequence[int] = (2, 3),
    stride: Sequence[int] = (3, 1),
    of: bytes = storage(),
    tail: bytes = b"\x89" + HOOKS,
) -> bytes:
    """Return opcodes that push a tensor, by default all six elements of storage 0."""
    return REBUILD + b"(" + of + number(offset) + numbers(shape) + numbers(stride) + tail + b"tR"


def state_dict(*items: bytes, after: bytes = b"") -> bytes:
    """Return a pickle of a dict made by the opcodes of names and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u" + after + b"."

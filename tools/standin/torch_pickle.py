"""data.pkl of a ckpt.pt: the very bytes that torch.save writes, without torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from tools.standin.values import HEAD


def pickle_state_dict(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return the pickle of a plain state dict, the very bytes that torch.save writes.

    Storages are numbered in the order of the names.
    """
    writer = _PickleWriter()
    writer.emit(b"\x80\x02}")
    writer.memorize()
    items = list(shapes.items())
    for start in range(0, len(items), 1000):  # a pickler's batch
        batch = items[start : start + 1000]
        if len(batch) > 1:
            writer.emit(b"(")
        for index, (name, shape) in enumerate(batch, start):
            writer.text(name)
            writer.tensor(str(index), shape, spare=int(name == HEAD))
        writer.emit(b"u" if len(batch) > 1 else b"s")
    writer.emit(b".")
    return bytes(writer.code)


class _PickleWriter:
    """Protocol-2 opcodes under way; objects are numbered for the memo as a pickler does."""

    def __init__(self) -> None:
        self.code = bytearray()
        self.count = 0
        self.known: dict[bytes, int] = {}

    def emit(self, code: bytes) -> None:
        self.code += code

    def memorize(self) -> None:
        layout, code = ("<cB", b"q") if self.count < 256 else ("<cI", b"r")
        self.emit(struct.pack(layout, code, self.count))
        self.count += 1

    def text(self, value: str) -> None:
        self.emit(b"X" + struct.pack("<I", len(value)) + value.encode())
        self.memorize()

    def once(self, code: bytes) -> None:
        """Emit an object that is one and the same each time it occurs."""
        if code in self.known:
            self.emit(b"h" + bytes([self.known[code]]))
        else:
            self.known[code] = self.count
            self.emit(code)
            self.memorize()

    def number(self, value: int) -> None:
        if value < 1 << 8:
            self.emit(b"K" + bytes([value]))
        elif value < 1 << 16:
            self.emit(b"M" + struct.pack("<H", value))
        elif value < 1 << 31:
            self.emit(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.emit(b"\x8a" + bytes([len(raw)]) + raw)

    def sizes(self, values: tuple[int, ...]) -> None:
        """Emit a tuple of one to three numbers."""
        for value in values:
            self.number(value)
        self.emit((b"\x85", b"\x86", b"\x87")[len(values) - 1])
        self.memorize()

    def tensor(self, key: str, shape: tuple[int, ...], spare: int) -> None:
        """Emit a contiguous tensor that leaves the first `spare` slices of its storage free."""
        strides = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
        self.once(b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.emit(b"((")
        self.once(b"X\7\0\0\0storage")
        self.once(b"ctorch\nFloatStorage\n")
        self.text(key)
        self.once(b"X\3\0\0\0cpu")
        self.number((shape[0] + spare) * strides[0])
        self.emit(b"t")
        self.memorize()
        self.emit(b"Q")
        self.number(spare * strides[0])
        self.sizes(shape)
        self.sizes(strides)
        self.emit(b"\x89")
        self.once(b"ccollections\nOrderedDict\n")
        self.emit(b")R")
        self.memorize()
        self.emit(b"t")
        self.memorize()
        self.emit(b"R")
        self.memorize()

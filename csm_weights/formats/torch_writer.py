"""Write what torch.save writes of a plain state dict, byte for byte, without torch."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from csm_weights.formats import torch_zip
from csm_weights.formats.tensor_index import ITEM_BITS, row_major
from csm_weights.formats.torch_pickle import STORAGE_NAMES
from csm_weights.formats.torch_zip import FULL16, FULL32

#: Data begin at multiples of this many bytes.
ALIGNMENT = 64

#: Records beside the tensors that torch 2.4 and 2.5 write; it takes any 40 digits as the last.
CONTENTS = {"byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"0" * 40}


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor to be written: it begins at element `offset` of its storage.

    `elements` are those of the storage, 0 where it holds nothing but the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    elements: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return (self.elements or math.prod(self.shape)) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class ArchiveRecord:
    """A record of the archive: its header begins at byte `header`, its data at byte `data`."""

    name: str
    size: int
    header: int
    data: int
    local: bytes

    @classmethod
    def at(cls, name: str, size: int, header: int) -> ArchiveRecord:
        """Return a record whose header begins at byte `header`, padded so that its data align."""
        # torch leaves the second of a wide record's sizes 0
        wide = [size, 0] if size >= FULL32 else []
        zip64 = _zip64([*wide, header] if header >= FULL32 else wide)
        start = header + torch_zip.LOCAL.size + len(name) + len(zip64) + 4
        pad = -start % ALIGNMENT
        extra = zip64 + struct.pack("<2H", torch_zip.PADDING, pad) + b"Z" * pad
        flags, lengths = torch_zip.torch_flags(size), (len(name), len(extra))
        local = torch_zip.LOCAL.pack(torch_zip.LOCAL_SIGN, 0, flags, *[0] * 6, *lengths)
        return cls(name, size, header, start + pad, local + name.encode() + extra)

    @property
    def end(self) -> int:
        """First byte of the next record."""
        return self.data + self.size + len(self.descriptor(0))

    def descriptor(self, crc: int) -> bytes:
        """Return what follows the data; torch widens it with the header's zip64 field."""
        if not self.size:
            return b""
        numbers = "2Q" if max(self.size, self.header) >= FULL32 else "2I"
        return struct.pack(f"<4sI{numbers}", torch_zip.DESCRIPTOR_SIGN, crc, self.size, self.size)

    def central(self, crc: int) -> bytes:
        """Return the record's entry in the directory."""
        wide = [number for number in (self.size, self.size, self.header) if number >= FULL32]
        extra, name = _zip64(wide), self.name.encode()
        size, header = min(self.size, FULL32), min(self.header, FULL32)
        flags = torch_zip.torch_flags(self.size)
        fields = (torch_zip.CENTRAL_SIGN, 0, 0, flags, 0, 0, 0, crc, size, size)
        lengths = (len(name), len(extra), 0)
        return torch_zip.CENTRAL.pack(*fields, *lengths, 0, 0, 0, header) + name + extra


def layout_records(folder: str, sizes: Mapping[str, int]) -> dict[str, ArchiveRecord]:
    """Return records of these sizes, by their name in the archive's folder, in file order."""
    records: dict[str, ArchiveRecord] = {}
    at = 0
    for name, size in sizes.items():
        records[name] = ArchiveRecord.at(f"{folder}/{name}", size, at)
        at = records[name].end
    return records


def directory(records: Iterable[tuple[ArchiveRecord, int]]) -> bytes:
    """Return the directory of records with their CRCs, and all three records at the end."""
    start, entries = 0, []
    for record, crc in records:
        start = max(start, record.end)
        entries.append(record.central(crc))
    count, length = len(entries), sum(map(len, entries))
    end64 = torch_zip.END64.pack(
        torch_zip.END64_SIGN, 44, 0x031E, 45, 0, 0, count, count, length, start
    )
    locator = torch_zip.LOCATOR.pack(torch_zip.LOCATOR_SIGN, 0, start + length, 1)
    few = min(count, FULL16)
    ends = min(length, FULL32), min(start, FULL32)
    end = torch_zip.END.pack(torch_zip.END_SIGN, 0, 0, few, few, *ends, 0)
    return b"".join(entries) + end64 + locator + end


def _zip64(numbers: list[int]) -> bytes:
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", torch_zip.ZIP64, 8 * len(numbers), *numbers)


def archive(
    folder: str, contents: Mapping[str, tuple[int, Iterable[bytes | bytearray]]]
) -> tuple[int, Iterator[bytes | bytearray]]:
    """Return the size of an archive, and its bytes; `contents` are sizes and blocks by name."""
    records = layout_records(folder, {name: size for name, (size, _) in contents.items()})
    size = max(r.end for r in records.values()) + len(directory((r, 0) for r in records.values()))

    def blocks() -> Iterator[bytes | bytearray]:
        crcs = dict.fromkeys(records, 0)
        for name, record in records.items():
            yield record.local
            for block in contents[name][1]:
                crcs[name] = zlib.crc32(block, crcs[name])
                yield block
            yield record.descriptor(crcs[name])
        yield directory((record, crcs[name]) for name, record in records.items())

    return size, blocks()


def pickle_state_dict(tensors: Mapping[str, Stored]) -> bytes:
    """Return the pickle of a plain state dict, the very bytes that torch.save writes.

    Storages are numbered in the order of the names.
    """
    writer = _PickleWriter()
    writer.emit(b"\x80\x02}")
    writer.memorize()
    items = list(tensors.items())
    for start in range(0, len(items), 1000):  # a pickler's batch
        batch = items[start : start + 1000]
        if len(batch) > 1:
            writer.emit(b"(")
        for index, (name, tensor) in enumerate(batch, start):
            writer.text(name)
            writer.tensor(str(index), tensor)
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
        self.emit(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
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
        """Emit a tuple of numbers; pickle has opcodes of their own for up to three."""
        if not values:
            self.emit(b")")
            return
        self.emit(b"(" if len(values) > 3 else b"")
        for value in values:
            self.number(value)
        self.emit((b"\x85", b"\x86", b"\x87")[len(values) - 1] if len(values) <= 3 else b"t")
        self.memorize()

    def tensor(self, key: str, tensor: Stored) -> None:
        self.once(b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.emit(b"((")
        self.once(b"X\7\0\0\0storage")
        self.once(f"ctorch\n{STORAGE_NAMES[tensor.dtype]}\n".encode())
        self.text(key)
        self.once(b"X\3\0\0\0cpu")
        self.number(tensor.elements or math.prod(tensor.shape))
        self.emit(b"t")
        self.memorize()
        self.emit(b"Q")
        self.number(tensor.offset)
        self.sizes(tensor.shape)
        self.sizes(row_major(tensor.shape))
        self.emit(b"\x89")
        self.once(b"ccollections\nOrderedDict\n")
        self.emit(b")R")
        self.memorize()
        self.emit(b"t")
        self.memorize()
        self.emit(b"R")
        self.memorize()

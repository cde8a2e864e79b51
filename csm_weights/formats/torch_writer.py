"""Write what torch.save writes of a plain state dict, byte for byte, without torch."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from csm_weights.formats import torch_zip
from csm_weights.formats.tensor_index import ITEM_BITS, row_major
from csm_weights.formats.torch_names import STORAGE_NAMES
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


def directory(records: Sequence[tuple[ArchiveRecord, int]]) -> bytes:
    """Return the directory of records with their CRCs, and all three records at the end."""
    start = max(record.end for record, _ in records)
    entries = [record.central(crc) for record, crc in records]
    count, length = len(entries), sum(map(len, entries))
    figures = (44, 0x031E, 45, 0, 0, count, count, length, start)
    end64 = torch_zip.END64.pack(torch_zip.END64_SIGN, *figures)
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
    last = directory([(record, 0) for record in records.values()])
    size = max(record.end for record in records.values()) + len(last)

    def blocks() -> Iterator[bytes | bytearray]:
        crcs = dict.fromkeys(records, 0)
        for name, record in records.items():
            yield record.local
            for block in contents[name][1]:
                crcs[name] = zlib.crc32(block, crcs[name])
                yield block
            yield record.descriptor(crcs[name])
        yield directory([(record, crcs[name]) for name, record in records.items()])

    return size, blocks()


def pickle_state_dict(tensors: Mapping[str, Stored]) -> bytes:
    """Return the pickle of a plain state dict, the very bytes that torch.save writes.

    Storages are numbered in the order of the names.
    """
    stream = io.BytesIO()
    items = enumerate(tensors.items())
    made = {name: _Tensor(str(n), tensor) for n, (name, tensor) in items}
    _Pickler(stream, protocol=2).dump(made)
    return stream.getvalue()


class _Global:
    """A name of torch, which is written and never called."""

    def __init__(self, module: str, name: str) -> None:
        self.text = f"c{module}\n{name}\n".encode()

    def __call__(self) -> None:
        """Be callable, as a pickler wants it."""

    def __reduce_ex__(self, _: object) -> str:
        return "a global"


_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")
_STORAGES = {dtype: _Global("torch", name) for dtype, name in STORAGE_NAMES.items()}


class _Storage(NamedTuple):
    """What stands for a storage: torch reads its bytes by the key."""

    key: str
    tensor: Stored


class _Tensor:
    """A tensor as torch pickles it: its storage, and how it lies there."""

    def __init__(self, key: str, tensor: Stored) -> None:
        self.key, self.tensor = key, tensor

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        storage, shape = _Storage(self.key, self.tensor), self.tensor.shape
        # a tuple of its own: one that is shared would be written as such
        sizes = self.tensor.offset, (*shape,), row_major(shape)
        return _REBUILD, (storage, *sizes, False, OrderedDict())


class _Pickler(pickle._Pickler):
    """A pickler that writes names of torch without importing it."""

    write: Callable[[bytes], object]
    memoize: Callable[[object], None]

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        elements = tensor.elements or math.prod(tensor.shape)
        return "storage", _STORAGES[tensor.dtype], obj.key, "cpu", elements

    def save_global(self, obj: Any, *_: object) -> None:
        # all names but this one are torch's
        self.write(b"ccollections\nOrderedDict\n" if obj is OrderedDict else obj.text)
        self.memoize(obj)

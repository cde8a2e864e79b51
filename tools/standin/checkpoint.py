"""ckpt.pt of a stand-in: the archive as torch 2.4 and 2.5 wrote it, without torch."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from hashlib import shake_128
from typing import BinaryIO

from csm_weights.formats import torch_zip
from csm_weights.formats.architecture import CsmConfig
from csm_weights.formats.torch_zip import FULL16, FULL32
from tools.standin.torch_pickle import pickle_state_dict
from tools.standin.values import HEAD, ITEM, SPARE

#: The folder inside the archive: torch takes the stem of the path saved to. Five
#: characters give the published size.
FOLDER = "model"
#: Data begin at multiples of this many bytes.
ALIGNMENT = 64

#: The order of a module's state dict, which numbers the storages.
_PARTS = (
    "backbone.layers",
    "backbone.norm",
    "decoder.layers",
    "decoder.norm",
    "text_embeddings",
    "audio_embeddings",
    "projection",
    "codebook0_head",
    "audio_head",
)
_LAYER_PARTS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.output_proj",
    "mlp.w1",
    "mlp.w2",
    "mlp.w3",
    "sa_norm",
    "mlp_norm",
)


def _module_order(name: str) -> tuple[int, int, int]:
    """Return a sort key that puts tensor names in the order of `_PARTS`."""
    part = next(index for index, start in enumerate(_PARTS) if name.startswith(start))
    layer, _, rest = name.partition(".layers.")[2].partition(".")
    within = (index for index, start in enumerate(_LAYER_PARTS) if rest.startswith(start))
    return part, int(layer or 0), next(within, 0)


@dataclass(frozen=True)
class _Record:
    """A record of the archive: its header begins at byte `header`, its data at byte `data`."""

    name: str
    size: int
    header: int
    data: int
    local: bytes

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


def _record(name: str, size: int, header: int) -> _Record:
    """Return a record whose header begins at byte `header`, padded so that its data are aligned."""
    # torch leaves the second of a wide record's sizes 0
    wide = [size, 0] if size >= FULL32 else []
    zip64 = _zip64([*wide, header] if header >= FULL32 else wide)
    start = header + torch_zip.LOCAL.size + len(name) + len(zip64) + 4
    pad = -start % ALIGNMENT
    extra = zip64 + struct.pack("<2H", torch_zip.PADDING, pad) + b"Z" * pad
    flags = torch_zip.torch_flags(size)
    local = torch_zip.LOCAL.pack(
        torch_zip.LOCAL_SIGN, 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)
    )
    return _Record(name, size, header, start + pad, local + name.encode() + extra)


def _zip64(numbers: list[int]) -> bytes:
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", torch_zip.ZIP64, 8 * len(numbers), *numbers)


def _archive_end(count: int, length: int, start: int) -> bytes:
    """Return all three end records, of a directory of `length` bytes at byte `start`."""
    end64 = torch_zip.END64.pack(
        torch_zip.END64_SIGN, 44, 0x031E, 45, 0, 0, count, count, length, start
    )
    locator = torch_zip.LOCATOR.pack(torch_zip.LOCATOR_SIGN, 0, start + length, 1)
    few = min(count, FULL16)
    end = torch_zip.END.pack(
        torch_zip.END_SIGN, 0, 0, few, few, min(length, FULL32), min(start, FULL32), 0
    )
    return end64 + locator + end


@dataclass(frozen=True)
class CheckpointLayout:
    """All records in file order, the bytes of the small ones, and where each tensor goes.

    `tensors` maps a tensor, or the spare codebook, to its record and its byte
    offset in there.
    """

    records: dict[str, _Record]
    contents: dict[str, bytes]
    tensors: dict[str, tuple[str, int]]

    @property
    def directory(self) -> int:
        """First byte of the directory."""
        return max(record.end for record in self.records.values())

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        length = sum(len(record.central(0)) for record in self.records.values())
        return self.directory + length + len(_archive_end(0, 0, 0))


def checkpoint_layout(config: CsmConfig, seed: int) -> CheckpointLayout:
    """Return the layout of torch 2.4 and 2.5 in March 2025, which gives the published size.

    They sorted the storages by their number as text (0, 1, 10, 100, ...), and
    knew neither `.format_version` nor `.storage_alignment`.
    """
    shapes = config.tensor_shapes()
    names = sorted(shapes, key=_module_order)
    storages = {f"data/{index}": name for index, name in enumerate(names)}
    # torch identifies the content here; any 40 digits do
    identity = int.from_bytes(shake_128(f"{seed}".encode()).digest(16), "big")
    contents = {
        "data.pkl": pickle_state_dict({name: shapes[name] for name in names}),
        "byteorder": b"little",
        "version": b"3\n",
        ".data/serialization_id": f"{identity:040d}".encode(),
    }
    spare = math.prod(shapes[HEAD][1:]) * ITEM
    record_sizes = {name: len(content) for name, content in contents.items()}
    record_sizes |= {key: math.prod(shapes[name]) * ITEM for key, name in storages.items()}
    record_sizes[f"data/{names.index(HEAD)}"] += spare
    order = ["data.pkl", "byteorder", *sorted(storages), "version", ".data/serialization_id"]
    records: dict[str, _Record] = {}
    at = 0
    for name in order:
        records[name] = _record(f"{FOLDER}/{name}", record_sizes[name], at)
        at = records[name].end
    tensors = {name: (key, spare if name == HEAD else 0) for key, name in storages.items()}
    tensors[SPARE] = (tensors[HEAD][0], 0)
    return CheckpointLayout(records, contents, tensors)


class CheckpointWriter:
    """A ckpt.pt under way: blocks in any order, then headers and the directory."""

    def __init__(self, file: BinaryIO, config: CsmConfig, seed: int) -> None:
        self.layout = checkpoint_layout(config, seed)
        self.file = file
        self.crcs = dict.fromkeys(self.layout.records, 0)

    def write(self, name: str, at: int, block: memoryview) -> int:
        record, offset = self.layout.tensors[name]
        self.crcs[record] = zlib.crc32(block, self.crcs[record])
        self.file.seek(self.layout.records[record].data + offset + at)
        return self.file.write(block)

    def finish(self) -> None:
        for name, content in self.layout.contents.items():
            self.crcs[name] = zlib.crc32(content)
        for name, record in self.layout.records.items():
            self.file.seek(record.header)
            self.file.write(record.local + self.layout.contents.get(name, b""))
            self.file.seek(record.data + record.size)
            self.file.write(record.descriptor(self.crcs[name]))
        start = self.layout.directory
        entries = [r.central(self.crcs[name]) for name, r in self.layout.records.items()]
        directory = b"".join(entries)
        self.file.seek(start)
        self.file.write(directory + _archive_end(len(entries), len(directory), start))

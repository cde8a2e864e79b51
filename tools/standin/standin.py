"""Stand-in weights: files of the published layout and size, full of made-up numbers.

The real weights are gated, so tests and benchmarks run on these. For CSM-1B
they are 6,211,186,784 and 6,219,618,714 bytes, as published. Each number
depends on the seed, the tensor's name and the position alone, on every machine
and for ever, and has the scale of freshly initialized weights, so that a model
runs on them.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import shake_128
from pathlib import Path
from typing import BinaryIO, Protocol

from csm_weights.errors import UsageError
from csm_weights.formats import torch_zip
from csm_weights.formats.architecture import CsmConfig
from csm_weights.formats.torch_zip import FULL16, FULL32

#: The files that can be written, by the name of their format.
FILE_NAMES = {"safetensors": "model.safetensors", "ckpt": "ckpt.pt"}

#: In the published ckpt.pt, `audio_head` is a view of a storage with one more
#: codebook. Here the spare codebook comes first, so that a reader that ignores
#: the offset of the view gets wrong numbers.
HEAD, SPARE = "audio_head", "audio_head (spare)"

#: Bytes made and written at a time, and blocks that may wait to be written.
BLOCK, QUEUE = 1 << 18, 8
#: Blocks of a tensor that share one half of their noise.
GROUP = 16
ITEM = 4  # bytes of an F32


def sizes(config: CsmConfig) -> dict[str, int]:
    """Bytes of both stand-in files by file name, without writing them."""
    _, _, safetensors = _safetensors_layout(config)
    layout = _checkpoint_layout(config, 0)
    return {FILE_NAMES["safetensors"]: safetensors, FILE_NAMES["ckpt"]: layout.size}


def write_standin(
    config: CsmConfig,
    seed: int,
    directory: Path,
    formats: Collection[str] = ("safetensors", "ckpt"),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes `model.safetensors` and `ckpt.pt`, which hold equal tensors, into the directory.

    `formats` chooses among "safetensors" and "ckpt". `progress` is called with
    the bytes written since its last call. A file gets its final name only when
    it is complete. Takes some 20 MiB of memory, whatever the size. Raises
    UsageError for an unknown format, and OSError when the disk refuses.
    """
    unknown = sorted(set(formats) - FILE_NAMES.keys())
    if unknown:
        raise UsageError(f"no format {', '.join(unknown)}; known are {', '.join(FILE_NAMES)}")
    with ExitStack() as stack:
        writers = []
        for format_ in formats:
            file = stack.enter_context(_named_when_complete(directory / FILE_NAMES[format_]))
            writers.append(_WRITERS[format_](file, config, seed))
        _fill(writers, config, seed, progress or (lambda _: None))


@contextmanager
def _named_when_complete(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Writer(Protocol):
    """A file under way, that takes blocks of tensors."""

    def write(self, name: str, at: int, block: memoryview) -> int:
        """Writes a block at byte `at` of the tensor; returns the bytes written."""

    def finish(self) -> None:
        """Writes what follows once all tensors are there."""


def _fill(
    writers: list[_Writer],
    config: CsmConfig,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    """Makes blocks here, and writes them in a second thread: writing frees the GIL."""
    noise = _Noise(seed)
    pending: deque[Future[int]] = deque()

    def write(name: str, at: int, block: memoryview) -> int:
        return sum(writer.write(name, at, block) for writer in writers)

    with ThreadPoolExecutor(max_workers=1) as pool:
        for name, shape in _streams(config).items():
            for at, block in noise.blocks(name, shape):
                pending.append(pool.submit(write, name, at, block))
                if len(pending) > QUEUE:
                    progress(pending.popleft().result())
        while pending:
            progress(pending.popleft().result())
    for writer in writers:
        writer.finish()


def _streams(config: CsmConfig) -> dict[str, tuple[int, ...]]:
    """The tensors to make, in the order to make them, with the spare codebook before the head."""
    shapes = config.tensor_shapes()
    return {SPARE: shapes[HEAD][1:], **shapes}


# --- the numbers


class _Noise:
    """Makes the blocks of a tensor.

    A hash of its own for every block would take most of the time. So a block is
    the XOR of one of 16 blocks that all tensors share, and of one that belongs
    to 16 consecutive blocks of its tensor: no two blocks are the same.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.shared = [self._hash("shared", index) for index in range(GROUP)]

    def _hash(self, name: str, index: int) -> int:
        key = f"csm-weights stand-in, seed {self.seed}, {name}, block {index}"
        return int.from_bytes(shake_128(key.encode()).digest(BLOCK), "little")

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, memoryview]]:
        """The tensor's bytes as pairs of an offset in the tensor and a block."""
        free, fixed = (_repeated(word) for word in _words(name, shape))
        size = math.prod(shape) * ITEM
        for index, at in enumerate(range(0, size, BLOCK)):
            if index % GROUP == 0:
                own = self._hash(name, index // GROUP)
            number = (own ^ self.shared[index % GROUP]) & free | fixed
            yield at, memoryview(number.to_bytes(BLOCK, "little"))[: size - at]


def _repeated(word: int) -> int:
    return int.from_bytes(word.to_bytes(ITEM, "little") * (BLOCK // ITEM), "little")


def _words(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The bits of an F32 of this tensor that are random, and those that are always set."""
    one = 127
    if len(shape) == 1:  # a norm's scale: from 1 to 1.125
        return 0x000FFFFF, one << 23
    # sign and mantissa are random: the magnitude is even in [1, 2) times the
    # power of two, and its root mean square is the square root of 7/3 times it
    fan_in = shape[-2] if name in (HEAD, SPARE) else shape[-1]
    scale = 1.0 if "embeddings" in name else fan_in**-0.5
    return 0x807FFFFF, (one + round(math.log2(scale / math.sqrt(7 / 3)))) << 23


# --- model.safetensors


def _safetensors_layout(config: CsmConfig) -> tuple[bytes, dict[str, int], int]:
    """The header, the byte offset of each tensor, and the size of the file."""
    header, places = {}, {}
    end = 0
    for name, shape in config.tensor_shapes().items():
        begin, end = end, end + math.prod(shape) * ITEM
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
        places[name] = begin
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in places.items()}
    return struct.pack("<Q", len(text)) + text, offsets, start + end


class _SafetensorsWriter:
    def __init__(self, file: BinaryIO, config: CsmConfig, _seed: int) -> None:
        header, self.offsets, _ = _safetensors_layout(config)
        self.file = file
        self.file.write(header)

    def write(self, name: str, at: int, block: memoryview) -> int:
        if name == SPARE:
            return 0
        self.file.seek(self.offsets[name] + at)
        return self.file.write(block)

    def finish(self) -> None:
        pass


# --- ckpt.pt

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
    """A sort key that puts tensor names in the order of `_PARTS`."""
    part = next(index for index, start in enumerate(_PARTS) if name.startswith(start))
    layer, _, rest = name.partition(".layers.")[2].partition(".")
    within = (index for index, start in enumerate(_LAYER_PARTS) if rest.startswith(start))
    return part, int(layer or 0), next(within, 0)


@dataclass(frozen=True)
class _Place:
    """A record of the archive: its header begins at byte `header`, its data at byte `data`."""

    name: str
    size: int
    header: int
    data: int
    local: bytes

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.data + self.size + len(self.descriptor(0))

    def descriptor(self, crc: int) -> bytes:
        """What follows the data; torch widens it with the header's zip64 field."""
        if not self.size:
            return b""
        numbers = "2Q" if max(self.size, self.header) >= FULL32 else "2I"
        return struct.pack(f"<4sI{numbers}", torch_zip.DESCRIPTOR_SIGN, crc, self.size, self.size)

    def central(self, crc: int) -> bytes:
        """The record's entry in the directory."""
        wide = [number for number in (self.size, self.size, self.header) if number >= FULL32]
        extra, name = _zip64(wide), self.name.encode()
        size, header = min(self.size, FULL32), min(self.header, FULL32)
        flags = torch_zip.torch_flags(self.size)
        fields = (torch_zip.CENTRAL_SIGN, 0, 0, flags, 0, 0, 0, crc, size, size)
        lengths = (len(name), len(extra), 0)
        return torch_zip.CENTRAL.pack(*fields, *lengths, 0, 0, 0, header) + name + extra


def _place(name: str, size: int, header: int) -> _Place:
    """A record whose header begins at byte `header`, padded so that its data are aligned."""
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
    return _Place(name, size, header, start + pad, local + name.encode() + extra)


def _zip64(numbers: list[int]) -> bytes:
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", torch_zip.ZIP64, 8 * len(numbers), *numbers)


def _archive_end(count: int, length: int, start: int) -> bytes:
    """The end records of a directory of `length` bytes at byte `start`; torch writes all three."""
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
class _CheckpointLayout:
    """All records in file order, the bytes of the small ones, and where each tensor goes.

    `tensors` maps a tensor, or the spare codebook, to its record and its byte
    offset in there.
    """

    places: dict[str, _Place]
    contents: dict[str, bytes]
    tensors: dict[str, tuple[str, int]]

    @property
    def directory(self) -> int:
        """Where the directory begins, in bytes."""
        return max(place.end for place in self.places.values())

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        length = sum(len(place.central(0)) for place in self.places.values())
        return self.directory + length + len(_archive_end(0, 0, 0))


def _checkpoint_layout(config: CsmConfig, seed: int) -> _CheckpointLayout:
    """As torch 2.4 and 2.5 wrote it in March 2025, which gives the published size.

    They sorted the storages by their number as text (0, 1, 10, 100, ...), and
    knew neither `.format_version` nor `.storage_alignment`.
    """
    shapes = config.tensor_shapes()
    names = sorted(shapes, key=_module_order)
    storages = {f"data/{index}": name for index, name in enumerate(names)}
    # torch identifies the content here; any 40 digits do
    identity = int.from_bytes(shake_128(f"{seed}".encode()).digest(16), "big")
    contents = {
        "data.pkl": _pickle({name: shapes[name] for name in names}),
        "byteorder": b"little",
        "version": b"3\n",
        ".data/serialization_id": f"{identity:040d}".encode(),
    }
    spare = math.prod(shapes[HEAD][1:]) * ITEM
    record_sizes = {name: len(content) for name, content in contents.items()}
    record_sizes |= {key: math.prod(shapes[name]) * ITEM for key, name in storages.items()}
    record_sizes[f"data/{names.index(HEAD)}"] += spare
    order = ["data.pkl", "byteorder", *sorted(storages), "version", ".data/serialization_id"]
    places: dict[str, _Place] = {}
    at = 0
    for record in order:
        places[record] = _place(f"{FOLDER}/{record}", record_sizes[record], at)
        at = places[record].end
    tensors = {name: (key, spare if name == HEAD else 0) for key, name in storages.items()}
    tensors[SPARE] = (tensors[HEAD][0], 0)
    return _CheckpointLayout(places, contents, tensors)


class _CheckpointWriter:
    def __init__(self, file: BinaryIO, config: CsmConfig, seed: int) -> None:
        self.layout = _checkpoint_layout(config, seed)
        self.file = file
        self.crcs = dict.fromkeys(self.layout.places, 0)

    def write(self, name: str, at: int, block: memoryview) -> int:
        record, offset = self.layout.tensors[name]
        self.crcs[record] = zlib.crc32(block, self.crcs[record])
        self.file.seek(self.layout.places[record].data + offset + at)
        return self.file.write(block)

    def finish(self) -> None:
        for record, content in self.layout.contents.items():
            self.crcs[record] = zlib.crc32(content)
        for record, place in self.layout.places.items():
            self.file.seek(place.header)
            self.file.write(place.local + self.layout.contents.get(record, b""))
            self.file.seek(place.data + place.size)
            self.file.write(place.descriptor(self.crcs[record]))
        start = self.layout.directory
        entries = [place.central(self.crcs[name]) for name, place in self.layout.places.items()]
        directory = b"".join(entries)
        self.file.seek(start)
        self.file.write(directory + _archive_end(len(entries), len(directory), start))


_WRITERS: Mapping[str, Callable[[BinaryIO, CsmConfig, int], _Writer]] = {
    "safetensors": _SafetensorsWriter,
    "ckpt": _CheckpointWriter,
}


# --- data.pkl


def _pickle(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The pickle of a plain state dict, the very bytes that torch.save writes.

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
    """Emits protocol-2 opcodes, and numbers objects for the memo as a pickler does."""

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
        """An object that is one and the same each time it occurs."""
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
        """A tuple of one to three numbers."""
        for value in values:
            self.number(value)
        self.emit((b"\x85", b"\x86", b"\x87")[len(values) - 1])
        self.memorize()

    def tensor(self, key: str, shape: tuple[int, ...], spare: int) -> None:
        """A contiguous tensor that leaves the first `spare` slices of its storage free."""
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

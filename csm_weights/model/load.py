"""A file of weights, or its parts, to tensors on a device; each byte is read once.

On the CPU a file whose tensors need no conversion is mapped. Otherwise all
tensors lie in one flat buffer of the wanted dtype, and the file streams into
it: on the CPU through a small slot a thread, to a GPU through pinned slots,
from which copies run while the next blocks are read. Converting is the
device's work. Neither format is unpickled.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import workers
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.tensor_index import TensorInfo
from csm_weights.formats.weights_file import WeightsFile
from csm_weights.model.stream import BlockConsumer, blocks, room, stream

#: torch's dtype for the dtype words of a TensorTable; CSM's files are all F32.
DTYPES = {"F32": torch.float32}

#: Where a tensor begins in the flat buffer, in bytes: what GPU kernels like best.
ALIGNMENT = 256

#: Bytes that stay free on a GPU beside the weights: caches, work space, graphs.
RESERVE = 512 << 20

#: Bytes that a thread claims at a time: few enough that all threads end together.
CLAIM = 16 << 20

#: The advice of linux/mman.h to make pages ready for writing, and the call that takes it.
_POPULATE_WRITE = 23
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class StagingBuffers:
    """The slots that a file streams through: `block` bytes each, `slots` a thread."""

    block: int
    slots: int
    threads: int

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.block * self.slots * self.threads


def host_buffers() -> StagingBuffers:
    """Slots on the way to the CPU's own memory: they stay in the cores' caches."""
    return StagingBuffers(2 << 20, 1, workers())


def pinned_buffers() -> StagingBuffers:
    """Slots on the way to a GPU: 128 MiB of pinned memory at most."""
    return StagingBuffers(8 << 20, 2, min(8, workers()))


def load_tensors(
    checkpoint: WeightsFile,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    together: Sequence[Sequence[str]] = (),
    digests: Sequence[ByteRange] = (),
    ring: StagingBuffers | None = None,
) -> dict[str, Tensor]:
    """All tensors of a checkpoint on `device`, by name, contiguous.

    `dtype` None keeps the file's. The tensors of each group of `together` lie
    one after the other, where the file is not mapped. With `digests`, spans
    that must hold all that is loaded, every byte is proven as it passes.

    Raises WrongContent where a digest is another or the file changes, and
    torch.OutOfMemoryError where a GPU has too little memory.
    """
    if digests:
        _check_tiling(checkpoint.source, digests)
    if device.type == "cpu" and not digests and (mapped := _map(checkpoint, dtype)):
        return mapped
    flat = _Flat(checkpoint, device, dtype, together)
    ring = ring or (host_buffers() if device.type == "cpu" else pinned_buffers())
    spans = digests or _needed(flat.places, max(ring.block, CLAIM))
    threads = torch.get_num_threads()
    try:
        stream(checkpoint.source, spans, _lanes(flat, device, ring), ring.threads)
    finally:
        torch.set_num_threads(threads)
    return flat.finished()


def _check_tiling(source: MultipartFile, spans: Sequence[ByteRange]) -> None:
    """Digests of another file's spans would leave bytes unproven, or tensors unread."""
    ends = [0, *(span.offset + span.size for span in spans)]
    if [span.offset for span in spans] != ends[:-1] or ends[-1] != source.size:
        words = (f"{ends[-1]:,} bytes", f"{source.size:,} bytes", "inv weights")
        finding = Finding(Kind.WRONG_SIZE, source.where, *words)
        raise WrongContent("the weights are not those that are pinned", [finding])


def _map(checkpoint: WeightsFile, dtype: torch.dtype | None) -> dict[str, Tensor] | None:
    """The tensors in a private map of the file; None where they do not lie there as wanted."""
    infos = checkpoint.index.tensors.values()
    if not all(
        info.contiguous and info.offset % info.itemsize == 0 and dtype in (None, _dtype(info))
        for info in infos
    ):
        return None
    memory = checkpoint.source.map()
    if memory is None:
        return None
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {
        info.name: whole[info.offset : info.offset + info.nbytes]
        .view(_dtype(info))
        .view(info.shape)
        for info in infos
    }


def _dtype(info: TensorInfo) -> torch.dtype:
    return DTYPES[info.dtype]


@dataclass(frozen=True)
class _Place:
    """Where the bytes `[offset, end)` of the file go: to `target`, flat, element by element.

    `dtype` is the file's; copying to `target` converts.
    """

    offset: int
    end: int
    dtype: torch.dtype
    target: Tensor


class _Flat:
    """The flat buffer with a view for each tensor, and how to fill it from blocks of the file."""

    def __init__(
        self,
        checkpoint: WeightsFile,
        device: torch.device,
        dtype: torch.dtype | None,
        together: Sequence[Sequence[str]],
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._strided: list[tuple[TensorInfo, Tensor]] = []
        self._fragments: dict[tuple[int, int], bytearray] = {}
        self._lock = threading.Lock()
        table = checkpoint.index.tensors
        starts, size = _arranged(table.values(), dtype, together)
        memory = _allocate(size, device)
        places = []
        for name, start in starts.items():
            info = table[name]
            wanted = dtype or _dtype(info)
            nbytes = info.nbytes // info.itemsize * wanted.itemsize
            flat = memory[start : start + nbytes].view(wanted)
            self._tensors[name] = flat.view(info.shape)
            places.append(self._place(info, flat))
        self.places = sorted(places, key=lambda place: place.offset)
        # tensors may share bytes: the first place that may reach byte n is found by the ends so far
        self._ends = list(itertools.accumulate((p.end for p in self.places), max))

    def _place(self, info: TensorInfo, flat: Tensor) -> _Place:
        """Where a tensor's bytes go: into the buffer, or first beside it if they lie scattered."""
        size = info.nbytes
        if not info.contiguous:
            steps = zip(info.shape, info.stride, strict=True)
            elements = 1 + sum((n - 1) * step for n, step in steps) if size else 0
            size = elements * info.itemsize
            flat = torch.empty(elements, dtype=_dtype(info), device=flat.device)
            self._strided.append((info, flat))
        return _Place(info.offset, info.offset + size, _dtype(info), flat)

    def put(self, offset: int, host: memoryview, block: Tensor) -> None:
        """Copies what is wanted of a block, whose first byte is byte `offset` of the file.

        `host` and `block` (uint8, on the device) hold the same bytes.
        """
        end = offset + len(host)
        for index in range(bisect.bisect_right(self._ends, offset), len(self.places)):
            place = self.places[index]
            if place.offset >= end:
                return
            start, stop = max(offset, place.offset), min(end, place.end)
            if start < stop:
                self._put(index, start - offset, stop - offset, start - place.offset, host, block)

    def _put(
        self, index: int, start: int, stop: int, within: int, host: memoryview, block: Tensor
    ) -> None:
        """Copies bytes `[start, stop)` of a block; they are at byte `within` of a place."""
        place = self.places[index]
        item = place.dtype.itemsize
        head = min(-within % item, stop - start)
        tail = (stop - start - head) % item
        if head:
            self._keep(index, within, host[start : start + head])
        first, last = start + head, stop - tail
        if first < last:
            piece = block[first:last]
            if first % item:
                piece = piece.clone()
            element = (within + head) // item
            target = place.target[element : element + (last - first) // item]
            _populate(target)
            target.copy_(piece.view(place.dtype), non_blocking=True)
        if tail:
            self._keep(index, within + last - start, host[last:stop])

    def _keep(self, index: int, within: int, part: memoryview) -> None:
        """Keeps bytes of an element that two blocks share."""
        item = self.places[index].dtype.itemsize
        element, start = divmod(within, item)
        with self._lock:
            whole = self._fragments.setdefault((index, element), bytearray(item))
            whole[start : start + len(part)] = part

    def finished(self) -> dict[str, Tensor]:
        """The tensors, once all blocks were put."""
        for (index, element), whole in self._fragments.items():
            place = self.places[index]
            place.target[element] = torch.frombuffer(whole, dtype=place.dtype)[0]
        for info, span in self._strided:
            self._tensors[info.name].copy_(span.as_strided(info.shape, info.stride))
        return self._tensors


def _arranged(
    infos: Iterable[TensorInfo], dtype: torch.dtype | None, together: Sequence[Sequence[str]]
) -> tuple[dict[str, int], int]:
    """The byte at which each tensor starts in the flat buffer, and the buffer's size in bytes."""
    table = {info.name: info for info in infos}
    grouped = {name for group in together for name in group}
    starts: dict[str, int] = {}
    end = 0
    for group in (*together, *((name,) for name in table if name not in grouped)):
        end += -end % ALIGNMENT
        for name in group:
            starts[name] = end
            item = (dtype or _dtype(table[name])).itemsize
            end += table[name].nbytes // table[name].itemsize * item
    return starts, end


def _allocate(size: int, device: torch.device) -> Tensor:
    """Memory of `size` bytes on a device."""
    if device.type == "cuda":
        # what torch keeps of tensors that are gone would count as taken
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < size + RESERVE:
            name = torch.cuda.get_device_name(device)
            raise torch.OutOfMemoryError(
                f"too little memory on {device} ({name}): the weights take {size:,} bytes and "
                f"{RESERVE:,} must stay free, {free:,} bytes are free"
            )
    return torch.empty(size, dtype=torch.uint8, device=device)


def _populate(target: Tensor) -> None:
    """Asks the kernel for the pages of a tensor on the CPU at once.

    It then clears them while they are in the core's cache anyway, without a
    trap for each: a quarter less time for CSM-1B in bfloat16, as measured.
    """
    if target.device.type != "cpu" or _MADVISE is None:
        return
    start = target.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    # refused by kernels before 5.14, on which the pages come one by one
    _MADVISE(start, target.data_ptr() + target.nbytes - start, _POPULATE_WRITE)


def _needed(places: Sequence[_Place], most: int) -> list[ByteRange]:
    """Spans of at most so many bytes that hold all places, and nothing where no place is."""
    return [
        ByteRange(start + part.offset, part.size)
        for start, end in _runs(places)
        for part in blocks(end - start, most)
    ]


def _runs(places: Sequence[_Place]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the file that places cover, with gaps below a page filled."""
    start = end = None
    for place in places:
        if start is None or end is None or place.offset > end + mmap.PAGESIZE:
            if start is not None and end is not None:
                yield start, end
            start, end = place.offset, place.end
        else:
            end = max(end, place.end)
    if start is not None and end is not None:
        yield start, end


def _lanes(flat: _Flat, device: torch.device, ring: StagingBuffers) -> Callable[[], BlockConsumer]:
    """What opens a lane to a device in the thread that will use it."""
    if device.type != "cuda":
        return lambda: _HostLane(flat, ring.block, device)
    before = torch.cuda.current_stream(device)
    return lambda: _CudaLane(flat, ring, device, before)


class _HostLane:
    """One slot, from which bytes are converted into the CPU's memory, or sent to a device."""

    def __init__(self, flat: _Flat, block: int, device: torch.device) -> None:
        # each lane has its thread already; torch's own would only be in each other's way
        torch.set_num_threads(1)
        self._flat = flat
        self._room = room(block)
        self._tensor = torch.frombuffer(self._room, dtype=torch.uint8)
        self._device = device

    def slot(self) -> memoryview:
        """See `BlockConsumer`."""
        return self._room

    def take(self, offset: int, size: int) -> None:
        """See `BlockConsumer`."""
        with self._room[:size] as host:
            self._flat.put(offset, host, self._tensor[:size].to(self._device))

    def finish(self) -> None:
        """See `BlockConsumer`."""


class _CudaLane:
    """Pinned slots, copied to the device on a stream of their own while others are filled."""

    def __init__(
        self, flat: _Flat, ring: StagingBuffers, device: torch.device, before: torch.cuda.Stream
    ) -> None:
        self._flat = flat
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # the flat buffer may reuse memory that work on the caller's stream still needs
        self._stream.wait_stream(before)
        shape = (ring.slots, ring.block)
        with torch.cuda.stream(self._stream):
            self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            self._blocks = torch.empty(shape, dtype=torch.uint8, device=device)
        self._rooms = [_memory_of(slot) for slot in self._host]
        self._taken = [_new_event() for _ in self._rooms]
        self._turn = 0

    def slot(self) -> memoryview:
        """See `BlockConsumer`: the slot whose copy is the oldest."""
        self._turn = (self._turn + 1) % len(self._rooms)
        self._taken[self._turn].synchronize()
        return self._rooms[self._turn]

    def take(self, offset: int, size: int) -> None:
        """See `BlockConsumer`: nothing here waits for the device."""
        turn = self._turn
        with torch.cuda.stream(self._stream), self._rooms[turn][:size] as host:
            block = self._blocks[turn, :size]
            block.copy_(self._host[turn, :size], non_blocking=True)
            self._flat.put(offset, host, block)
            self._taken[turn].record(self._stream)

    def finish(self) -> None:
        """See `BlockConsumer`."""
        self._stream.synchronize()


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in the CPU's memory, to read files into."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")

"""Load a file of weights to tensors on a device, reading each byte once.

On the CPU a file whose tensors need no conversion is mapped. Otherwise all
tensors lie in one flat buffer of the wanted dtype, and the file streams into
it: on the CPU through a small buffer a thread, to a GPU through pinned
buffers, from which copies run while the next blocks are read. The device
converts the dtype. Nothing is unpickled.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import workers
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats.tensor_index import TensorInfo
from csm_weights.formats.weights_file import WeightsFile
from csm_weights.model.stream import BlockConsumer, blocks, page_buffer, stream

#: torch's dtypes for those of a TensorIndex; CSM's files are all F32.
DTYPES = {"F32": torch.float32}

#: Alignment of tensors in the flat buffer, bytes: the best for GPU kernels.
ALIGNMENT = 256

#: Bytes that stay free on a GPU beside the weights: caches, work space, graphs.
RESERVE = 512 << 20

#: Bytes that a thread claims at a time: few enough that all threads end together.
CLAIM = 16 << 20

#: linux/mman.h's advice to make pages ready for writing, and the call that takes it.
_POPULATE_WRITE = 23
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class StagingBuffers:
    """Sizes of the buffers that a file streams through: `count` of `block` bytes a thread."""

    block: int
    count: int
    threads: int


def staging_buffers(device: torch.device) -> StagingBuffers:
    """Return the buffers on the way to a device."""
    if device.type == "cpu":
        return StagingBuffers(2 << 20, 1, workers())  # these stay in the cores' caches
    return StagingBuffers(8 << 20, 2, min(8, workers()))  # 128 MiB of pinned memory at most


def load_tensors(
    weights: WeightsFile,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    together: Sequence[Sequence[str]] = (),
    digests: Sequence[ByteRange] = (),
    buffers: StagingBuffers | None = None,
) -> dict[str, Tensor]:
    """Load all tensors of a file to `device`: contiguous, by name.

    `dtype` None keeps the file's. The tensors of each group of `together` lie
    one after the other, where the file is not mapped. `digests` are ranges
    that must tile the file; each is verified as its bytes pass.

    Raises WrongContent where a digest is another or the file changes,
    torch.OutOfMemoryError where a GPU has too little memory, and MemoryError
    where no buffers can be pinned.
    """
    # ranges that do not tile the file would leave bytes unverified
    ends = [0, *(one.offset + one.size for one in digests)]
    tiles = [one.offset for one in digests] == ends[:-1] and ends[-1] == weights.source.size
    if digests and not tiles:
        words = (f"{ends[-1]:,} bytes", f"{weights.source.size:,} bytes", "inv weights")
        finding = Finding(Kind.WRONG_SIZE, weights.source.where, *words)
        raise WrongContent("the weights are not those that are pinned", [finding])
    if device.type == "cpu" and not digests and (mapped := _map(weights, dtype)):
        return mapped
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # a thread has its own
    flat = _FlatBuffer(weights, device, dtype, together)
    buffers = buffers or staging_buffers(device)
    ranges = digests or _needed(flat.targets, max(buffers.block, CLAIM))
    if device.type == "cuda":
        before = torch.cuda.current_stream(device)

    def open_consumer() -> BlockConsumer:
        if device.type == "cuda":
            return _CudaConsumer(flat, buffers, device, before)
        return _HostConsumer(flat, buffers.block, device)

    threads = torch.get_num_threads()
    try:
        stream(weights.source, ranges, open_consumer, buffers.threads)
    finally:
        torch.set_num_threads(threads)
    return flat.finished()


def _map(weights: WeightsFile, dtype: torch.dtype | None) -> dict[str, Tensor] | None:
    """Map the file privately; None where its tensors do not lie there as wanted."""
    infos = weights.index.tensors.values()
    if not all(
        info.contiguous and info.offset % info.itemsize == 0 and dtype in (None, DTYPES[info.dtype])
        for info in infos
    ):
        return None
    memory = weights.source.map()
    if memory is None:
        return None
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {
        info.name: whole[info.offset : info.offset + info.nbytes]
        .view(DTYPES[info.dtype])
        .view(info.shape)
        for info in infos
    }


@dataclass(frozen=True)
class _Target:
    """The flat tensor for the bytes `[offset, end)` of the file.

    `dtype` is the file's; copying to `tensor` converts.
    """

    offset: int
    end: int
    dtype: torch.dtype
    tensor: Tensor


class _FlatBuffer:
    """One buffer on the device with a view for each tensor, filled from blocks of the file."""

    def __init__(
        self,
        weights: WeightsFile,
        device: torch.device,
        dtype: torch.dtype | None,
        together: Sequence[Sequence[str]],
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._strided: list[tuple[TensorInfo, Tensor]] = []
        self._fragments: dict[tuple[int, int], bytearray] = {}
        self._lock = threading.Lock()
        infos = weights.index.tensors
        # each tensor, or group of tensors, starts at an aligned byte of the buffer
        grouped = {name for group in together for name in group}
        spans: dict[str, tuple[int, int, torch.dtype]] = {}
        end = 0
        for group in (*together, *((name,) for name in infos if name not in grouped)):
            end += -end % ALIGNMENT
            for name in group:
                wanted = dtype or DTYPES[infos[name].dtype]
                start, end = end, end + infos[name].nbytes // infos[name].itemsize * wanted.itemsize
                spans[name] = start, end, wanted
        memory = _allocate(end, device)
        targets = []
        for name, (start, end, wanted) in spans.items():
            flat = memory[start:end].view(wanted)
            self._tensors[name] = flat.view(infos[name].shape)
            targets.append(self._target(infos[name], flat))
        self.targets = sorted(targets, key=lambda target: target.offset)
        # tensors may share bytes: the first that may reach byte n is found by the ends so far
        self._ends = list(itertools.accumulate((t.end for t in self.targets), max))

    def _target(self, info: TensorInfo, flat: Tensor) -> _Target:
        """Choose where a tensor's bytes go; those of a strided one first go beside the buffer."""
        size = info.nbytes
        if not info.contiguous:
            steps = zip(info.shape, info.stride, strict=True)
            elements = 1 + sum((n - 1) * step for n, step in steps) if size else 0
            size = elements * info.itemsize
            flat = torch.empty(elements, dtype=DTYPES[info.dtype], device=flat.device)
            self._strided.append((info, flat))
        return _Target(info.offset, info.offset + size, DTYPES[info.dtype], flat)

    def put(self, offset: int, host: memoryview, block: Tensor) -> None:
        """Copy what is wanted of a block, whose first byte is byte `offset` of the file.

        `host` and `block` (uint8, on the device) hold the same bytes.
        """
        end = offset + len(host)
        for index in range(bisect.bisect_right(self._ends, offset), len(self.targets)):
            target = self.targets[index]
            if target.offset >= end:
                return
            start, stop = max(offset, target.offset), min(end, target.end)
            if start < stop:
                self._put(index, start - offset, stop - offset, start - target.offset, host, block)

    def _put(
        self, index: int, start: int, stop: int, within: int, host: memoryview, block: Tensor
    ) -> None:
        """Copy bytes `[start, stop)` of a block; they are at byte `within` of a target."""
        target = self.targets[index]
        item = target.dtype.itemsize
        head = min(-within % item, stop - start)
        tail = (stop - start - head) % item
        if head:
            self._keep(index, within, host[start : start + head])
        first, last = start + head, stop - tail
        if first < last:
            whole = block[first:last]
            if first % item:
                whole = whole.clone()
            element = (within + head) // item
            elements = target.tensor[element : element + (last - first) // item]
            _populate(elements)
            elements.copy_(whole.view(target.dtype), non_blocking=True)
        if tail:
            self._keep(index, within + last - start, host[last:stop])

    def _keep(self, index: int, within: int, part: memoryview) -> None:
        """Keep the bytes of an element that two blocks share."""
        item = self.targets[index].dtype.itemsize
        element, start = divmod(within, item)
        with self._lock:
            whole = self._fragments.setdefault((index, element), bytearray(item))
            whole[start : start + len(part)] = part

    def finished(self) -> dict[str, Tensor]:
        """Return the tensors, once all blocks were put."""
        for (index, element), whole in self._fragments.items():
            target = self.targets[index]
            target.tensor[element] = torch.frombuffer(whole, dtype=target.dtype)[0]
        for info, flat in self._strided:
            self._tensors[info.name].copy_(flat.as_strided(info.shape, info.stride))
        return self._tensors


def _allocate(size: int, device: torch.device) -> Tensor:
    """Allocate `size` bytes on a device; raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        # memory that torch keeps for later would count as taken
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < size + RESERVE:
            name = torch.cuda.get_device_name(device)
            raise torch.OutOfMemoryError(
                f"too little memory on {device} ({name}): the weights take {size:,} bytes and "
                f"{RESERVE:,} must stay free, {free:,} bytes are free"
            )
    return torch.empty(size, dtype=torch.uint8, device=device)


def _populate(tensor: Tensor) -> None:
    """Ask the kernel for the pages of a tensor on the CPU at once.

    It clears them while they are in the core's cache, without a trap for each:
    a quarter less time for CSM-1B in bfloat16, as measured.
    """
    if tensor.device.type != "cpu" or _MADVISE is None:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    # refused by kernels before 5.14, on which the pages come one by one
    _MADVISE(start, tensor.data_ptr() + tensor.nbytes - start, _POPULATE_WRITE)


def _needed(targets: Sequence[_Target], most: int) -> list[ByteRange]:
    """Cut what targets cover into ranges of at most so many bytes; fill gaps below a page."""
    runs: list[tuple[int, int]] = []
    for target in targets:
        if runs and target.offset <= runs[-1][1] + mmap.PAGESIZE:
            runs[-1] = (runs[-1][0], max(runs[-1][1], target.end))
        else:
            runs.append((target.offset, target.end))
    return [
        ByteRange(start + block.offset, block.size)
        for start, end in runs
        for block in blocks(end - start, most)
    ]


class _HostConsumer:
    """One buffer, from which bytes are converted into the CPU's memory, or sent to a device."""

    def __init__(self, flat: _FlatBuffer, block: int, device: torch.device) -> None:
        # each consumer has its thread already; torch's own would only be in each other's way
        torch.set_num_threads(1)
        self._flat = flat
        self._buffer = page_buffer(block)
        self._tensor = torch.frombuffer(self._buffer, dtype=torch.uint8)
        self._device = device

    def buffer(self) -> memoryview:
        return self._buffer

    def consume(self, offset: int, size: int) -> None:
        with self._buffer[:size] as host:
            self._flat.put(offset, host, self._tensor[:size].to(self._device))

    def finish(self) -> None:
        pass  # every block is in its place already


class _CudaConsumer:
    """Pinned buffers, copied to the device on a stream of their own while others are filled."""

    def __init__(
        self,
        flat: _FlatBuffer,
        buffers: StagingBuffers,
        device: torch.device,
        before: torch.cuda.Stream,
    ) -> None:
        self._flat = flat
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # the flat buffer may reuse memory that work on the caller's stream still needs
        self._stream.wait_stream(before)
        size, count = buffers.block, range(buffers.count)
        # a tensor a buffer: in one for all they would lie wherever the size makes them
        with torch.cuda.stream(self._stream):
            try:
                self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in count]
            except RuntimeError as error:
                raise MemoryError(
                    f"{size * len(count):,} bytes cannot be pinned: {error}"
                ) from None
            self._blocks = [torch.empty(size, dtype=torch.uint8, device=device) for _ in count]
        # files are read into the memory of the tensors
        pages = [(ctypes.c_char * size).from_address(one.data_ptr()) for one in self._host]
        self._buffers = [memoryview(page).cast("B") for page in pages]
        self._copied = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
        self._index = 0

    def buffer(self) -> memoryview:
        # the buffer whose copy is the oldest
        self._index = (self._index + 1) % len(self._buffers)
        self._copied[self._index].synchronize()
        return self._buffers[self._index]

    def consume(self, offset: int, size: int) -> None:
        # nothing here waits for the device
        index = self._index
        with torch.cuda.stream(self._stream), self._buffers[index][:size] as host:
            block = self._blocks[index][:size]
            block.copy_(self._host[index][:size], non_blocking=True)
            self._flat.put(offset, host, block)
            self._copied[index].record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()

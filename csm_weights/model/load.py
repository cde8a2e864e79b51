"""Load weights to tensors on a device, reading each byte once.

On the CPU files whose tensors need no conversion are mapped. Otherwise all
tensors lie in one flat buffer of the wanted dtype, and the files stream into
it: on the CPU through a small buffer a thread, to a GPU through pinned
buffers, from which copies run while the next blocks are read. Each block goes
to where its elements belong, also where the file has them in another order.
The device converts the dtype. Nothing is unpickled.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import workers
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.transformers_layout import NamedTensor
from csm_weights.model.stream import BlockConsumer, blocks, page_buffer, stream

#: torch's dtypes for those that weights may have.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

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
    """Sizes of the buffers that a file streams through: up to `count` of `block` bytes a thread."""

    block: int
    count: int
    threads: int


def staging_buffers(device: torch.device) -> StagingBuffers:
    """Return the buffers on the way to a device."""
    if device.type == "cpu":
        return StagingBuffers(2 << 20, 1, workers())  # these stay in the cores' caches
    # smaller blocks cost more in Python than they gain, larger ones leave the cores' caches;
    # 32 threads read more than any bus takes, from 256 MiB of pinned memory at most
    return StagingBuffers(4 << 20, 2, min(32, workers()))


def load_tensors(
    tensors: Mapping[str, NamedTensor],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    together: Sequence[Sequence[str]] = (),
    digests: Sequence[ByteRange] = (),
    buffers: StagingBuffers | None = None,
) -> dict[str, Tensor]:
    """Load tensors from their files to `device`: contiguous, by the names given.

    `dtype` None keeps the file's. The tensors of each group of `together` lie
    one after the other, where the file is not mapped. `digests` are ranges
    that must tile the one file; each is verified as its bytes pass.

    Raises WrongContent where a digest is another or a file changes,
    torch.OutOfMemoryError where a GPU has too little memory, and MemoryError
    where no buffers can be pinned.
    """
    sources = list(dict.fromkeys(tensor.source for tensor in tensors.values()))
    if digests:
        # ranges that do not tile the file would leave bytes unverified
        ends = [0, *(one.offset + one.size for one in digests)]
        size = sum(source.size for source in sources)
        if [one.offset for one in digests] != ends[:-1] or (ends[-1], len(sources)) != (size, 1):
            words = (f"{ends[-1]:,} bytes", f"{size:,} bytes", "inv weights")
            finding = Finding(Kind.WRONG_SIZE, sources[0].where, *words)
            raise WrongContent("the weights are not those that are pinned", [finding])
    elif device.type == "cpu" and (mapped := _map(tensors, sources, dtype)):
        return mapped
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # a thread has its own
    loaded = _allocate(tensors, device, dtype, together)
    buffers = buffers or staging_buffers(device)
    before = torch.cuda.current_stream(device) if device.type == "cuda" else None
    threads = torch.get_num_threads()
    for source in sources:
        targets = _Targets(
            (tensor, loaded[name]) for name, tensor in tensors.items() if tensor.source is source
        )

        def open_consumer(targets: _Targets = targets) -> BlockConsumer:
            if before is not None:
                return _CudaConsumer(targets, buffers, device, before)
            return _HostConsumer(targets, buffers.block, device)

        try:
            ranges = digests or targets.needed(max(buffers.block, CLAIM))
            stream(source, ranges, open_consumer, buffers.threads)
        finally:
            torch.set_num_threads(threads)
        targets.finish()
    return loaded


def _map(
    tensors: Mapping[str, NamedTensor], sources: Sequence[MultipartFile], dtype: torch.dtype | None
) -> dict[str, Tensor] | None:
    """Map the files privately; None where their tensors do not lie there as wanted.

    Only tensors whose elements are in another order are copied.
    """
    for info in (tensor.info for tensor in tensors.values()):
        if info.offset % info.itemsize or dtype not in (None, DTYPES[info.dtype]):
            return None
    mapped = {source: source.map() for source in sources}
    loaded = {}
    for name, tensor in tensors.items():
        info, memory = tensor.info, mapped[tensor.source]
        if memory is None:
            return None
        count = len(memory) // info.itemsize
        whole = torch.frombuffer(memory, dtype=DTYPES[info.dtype], count=count)
        view = whole.as_strided(info.shape, info.stride, info.offset // info.itemsize)
        loaded[name] = view.reshape(tensor.shape).contiguous()
    return loaded


def _allocate(
    tensors: Mapping[str, NamedTensor],
    device: torch.device,
    dtype: torch.dtype | None,
    together: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Allocate tensors in one buffer on the device; raises torch.OutOfMemoryError."""
    # each tensor, or group of tensors, starts at an aligned byte
    grouped = {name for group in together for name in group}
    spans: dict[str, tuple[int, int, torch.dtype]] = {}
    end = 0
    for group in (*together, *((name,) for name in tensors if name not in grouped)):
        end += -end % ALIGNMENT
        for name in group:
            info = tensors[name].info
            wanted = dtype or DTYPES[info.dtype]
            start, end = end, end + info.nbytes // info.itemsize * wanted.itemsize
            spans[name] = start, end, wanted
    if device.type == "cuda":
        # memory that torch keeps for later would count as taken
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < end + RESERVE:
            gpu = torch.cuda.get_device_name(device)
            raise torch.OutOfMemoryError(
                f"too little memory on {device} ({gpu}): the weights take {end:,} bytes and "
                f"{RESERVE:,} must stay free, {free:,} bytes are free"
            )
    memory = torch.empty(end, dtype=torch.uint8, device=device)
    return {
        name: memory[start:end].view(wanted).view(tensors[name].shape)
        for name, (start, end, wanted) in spans.items()
    }


@dataclass(frozen=True)
class _Target:
    """The tensor for the bytes `[offset, end)` of a file, with its elements in the file's order.

    `dtype` is the file's; copying to `tensor` converts.
    """

    offset: int
    end: int
    dtype: torch.dtype
    tensor: Tensor


class _Targets:
    """The tensors of one file on the device, filled from blocks of it."""

    def __init__(self, tensors: Iterable[tuple[NamedTensor, Tensor]]) -> None:
        self._sparse: list[tuple[Tensor, Tensor]] = []
        self._fragments: dict[tuple[int, int], bytearray] = {}
        self._lock = threading.Lock()
        targets = []
        for tensor, loaded in tensors:
            info, view, end = tensor.info, loaded, tensor.info.offset + tensor.info.nbytes
            # dimensions in the order in which the file has them, the outermost first
            order = sorted(range(len(info.shape)), key=lambda dim: info.stride[dim], reverse=True)
            shape, stride = (tuple(x[dim] for dim in order) for x in (info.shape, info.stride))
            if replace(info, shape=shape, stride=stride).contiguous:
                view = loaded.view(info.shape).permute(order)
            else:
                # with gaps, or with elements that are repeated: first beside the buffer
                last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                view = torch.empty(last + 1, dtype=DTYPES[info.dtype], device=loaded.device)
                end = info.offset + view.nbytes
                elements = view.as_strided(info.shape, info.stride)
                self._sparse.append((loaded.view(info.shape), elements))
            targets.append(_Target(info.offset, end, DTYPES[info.dtype], view))
        self._targets = sorted(targets, key=lambda target: target.offset)
        # tensors may share bytes: the first that may reach byte n is found by the ends so far
        self._ends = list(itertools.accumulate((t.end for t in self._targets), max))

    def needed(self, most: int) -> list[ByteRange]:
        """Cut what targets cover into ranges of at most `most` bytes; fill gaps below a page."""
        runs: list[tuple[int, int]] = []
        for target in self._targets:
            if runs and target.offset <= runs[-1][1] + mmap.PAGESIZE:
                runs[-1] = (runs[-1][0], max(runs[-1][1], target.end))
            else:
                runs.append((target.offset, target.end))
        return [
            ByteRange(start + block.offset, block.size)
            for start, end in runs
            for block in blocks(end - start, most)
        ]

    def put(self, offset: int, host: memoryview, block: Tensor) -> None:
        """Copy what is wanted of a block, whose first byte is byte `offset` of the file.

        `host` and `block` (uint8, on the device) hold the same bytes.
        """
        end = offset + len(host)
        for index in range(bisect.bisect_right(self._ends, offset), len(self._targets)):
            target = self._targets[index]
            if target.offset >= end:
                return
            # bytes [start, stop) of the block are the target's from byte `within` on
            start, stop = max(offset, target.offset) - offset, min(end, target.end) - offset
            if start >= stop:
                continue
            within, item = start + offset - target.offset, target.dtype.itemsize
            head = min(-within % item, stop - start)
            tail = (stop - start - head) % item
            if head:
                self._keep(index, within, host[start : start + head])
            first, last = start + head, stop - tail
            if first < last:
                whole = block[first:last]
                if first % item:
                    whole = whole.clone()
                _fill(target.tensor, (within + head) // item, whole.view(target.dtype))
            if tail:
                self._keep(index, within + last - start, host[last:stop])

    def _keep(self, index: int, within: int, part: memoryview) -> None:
        """Keep the bytes of an element that two blocks share."""
        item = self._targets[index].dtype.itemsize
        element, start = divmod(within, item)
        with self._lock:
            whole = self._fragments.setdefault((index, element), bytearray(item))
            whole[start : start + len(part)] = part

    def finish(self) -> None:
        """Put what is left into its place, once all blocks were put."""
        for (index, element), whole in self._fragments.items():
            target = self._targets[index]
            _fill(target.tensor, element, torch.frombuffer(whole, dtype=target.dtype))
        for loaded, elements in self._sparse:
            loaded.copy_(elements)


def _fill(view: Tensor, start: int, values: Tensor) -> None:
    """Copy values to the elements of a view from number `start` on, in the view's order."""
    if view.is_contiguous():
        elements = view.view(-1)[start : start + len(values)]
        _populate(elements)
        elements.copy_(values, non_blocking=True)
        return
    # whole rows at once, and the parts of a row before and after them
    row = view[0].numel()
    while len(values):
        index, within = divmod(start, row)
        rows = 0 if within else len(values) // row
        count = rows * row or min(row - within, len(values))
        if rows:
            part = values[:count].view(rows, *view.shape[1:])
            view[index : index + rows].copy_(part, non_blocking=True)
        else:
            _fill(view[index], within, values[:count])
        start, values = start + count, values[count:]


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


class _HostConsumer:
    """One buffer, from which bytes are converted into the CPU's memory, or sent to a device."""

    def __init__(self, targets: _Targets, block: int, device: torch.device) -> None:
        # each consumer has its thread already; torch's own would only be in each other's way
        torch.set_num_threads(1)
        self._targets = targets
        self._buffer = page_buffer(block)
        self._tensor = torch.frombuffer(self._buffer, dtype=torch.uint8)
        self._device = device

    def buffer(self) -> memoryview:
        return self._buffer

    def consume(self, offset: int, size: int) -> None:
        with self._buffer[:size] as host:
            self._targets.put(offset, host, self._tensor[:size].to(self._device))

    def finish(self) -> None:
        pass  # every block is in its place already


class _CudaConsumer:
    """Pinned buffers, copied to the device on a stream of their own while others are filled.

    A further one is pinned, up to their number, when it is needed: the first blocks flow by
    then, as pinning takes up to a millisecond a MiB.
    """

    def __init__(
        self,
        targets: _Targets,
        buffers: StagingBuffers,
        device: torch.device,
        before: torch.cuda.Stream,
    ) -> None:
        self._targets, self._sizes, self._device = targets, buffers, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # the flat buffer may reuse memory that work on the caller's stream still needs
        self._stream.wait_stream(before)
        # the one whose copy is the oldest comes first
        self._pinned: deque[_PinnedBuffer] = deque()

    def buffer(self) -> memoryview:
        is_free = bool(self._pinned) and self._pinned[0].copied.query()
        if not is_free and len(self._pinned) < self._sizes.count:
            with torch.cuda.stream(self._stream):
                self._pinned.append(_PinnedBuffer(self._sizes.block, self._device))
        else:
            self._pinned.rotate(-1)
        # the last one is that which is filled now
        self._pinned[-1].copied.synchronize()
        return self._pinned[-1].memory

    def consume(self, offset: int, size: int) -> None:
        # nothing here waits for the device
        pinned = self._pinned[-1]
        with torch.cuda.stream(self._stream), pinned.memory[:size] as host:
            block = pinned.block[:size]
            block.copy_(pinned.host[:size], non_blocking=True)
            self._targets.put(offset, host, block)
            pinned.copied.record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()


class _PinnedBuffer:
    """A pinned buffer, as `memory` for reading into it, and its block on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            # a tensor a buffer: in one for all they would lie wherever the size makes them
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise MemoryError(
                f"{size:,} bytes of a staging buffer cannot be pinned ({error}); is the memory"
                " that may be locked used up? See ulimit -l, and the limit of the container"
            ) from None
        self.block = torch.empty(size, dtype=torch.uint8, device=device)
        page = (ctypes.c_char * size).from_address(self.host.data_ptr())
        self.memory = memoryview(page).cast("B")
        # torch's events have no types
        self.copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

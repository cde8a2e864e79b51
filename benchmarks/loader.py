"""Loads weights once, in one way, and prints what it took: the measured side of benchmarks.load.

    python -m benchmarks.loader WAY FILE [PART ...]

Seconds and processor seconds are of the loading alone, without the start of
Python and torch; `grown` is by how many bytes the peak of memory grew.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from csm_weights.formats.multipart import MultipartFile
from csm_weights.model.stream import blocks, page_buffer, stream

#: Bytes of a staging buffer, one a thread.
STAGING_BLOCK = 1 << 20


class Nowhere:
    """A consumer that drops its blocks: what reading alone costs."""

    def __init__(self, size: int = STAGING_BLOCK) -> None:
        self._buffer = page_buffer(size)

    def buffer(self) -> memoryview:
        return self._buffer

    def consume(self, offset: int, size: int) -> None:
        pass

    def finish(self) -> None:
        pass


def stage(paths: Sequence[str]) -> object:
    """Stream the whole file to nowhere."""
    with MultipartFile(paths) as source:
        stream(source, blocks(source.size, 64 * STAGING_BLOCK), Nowhere)
    return None


def _ours(device: str) -> Callable[[Sequence[str]], object]:
    def load(paths: Sequence[str]) -> object:
        import torch

        from csm_weights.formats.architecture import FLAVORS, CsmConfig
        from csm_weights.formats.transformers_layout import name_tensors
        from csm_weights.formats.weights_file import open_weights
        from csm_weights.model.load import load_tensors

        csm_1b = CsmConfig(FLAVORS["llama-1B"], FLAVORS["llama-100M"], 128256, 2051, 32)
        with open_weights(paths) as checkpoint:
            tensors = name_tensors([checkpoint], ()).tensors
            is_csm_1b = tensors.keys() == csm_1b.tensor_shapes().keys()
            together = csm_1b.fused_tensors() if is_csm_1b else ()
            return load_tensors(tensors, torch.device(device), torch.bfloat16, together=together)

    return load


def _load_file(device: str) -> Callable[[Sequence[str]], object]:
    def load(paths: Sequence[str]) -> object:
        import torch
        from safetensors.torch import load_file

        tensors = load_file(paths[0], device)
        return {name: tensors.pop(name).to(torch.bfloat16) for name in list(tensors)}

    return load


def _safe_open(device: str) -> Callable[[Sequence[str]], object]:
    def load(paths: Sequence[str]) -> object:
        import torch
        from safetensors import safe_open

        with safe_open(paths[0], "pt", device) as file:
            return {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}  # noqa: SIM118

    return load


def _torch_load(device: str) -> Callable[[Sequence[str]], object]:
    def load(paths: Sequence[str]) -> object:
        import torch

        tensors = torch.load(paths[0], mmap=True, weights_only=True)
        return {name: tensor.to(device, torch.bfloat16) for name, tensor in tensors.items()}

    return load


WAYS: dict[str, Callable[[Sequence[str]], object]] = {"stage": stage}
WAYS |= {"ours cpu": _ours("cpu"), "load_file cpu": _load_file("cpu")}
WAYS |= {"safe_open cpu": _safe_open("cpu"), "torch.load cpu": _torch_load("cpu")}


def _prepare(way: str) -> None:
    """Imports what is not to be measured."""
    if way != "stage":
        import safetensors.torch  # noqa: F401
        import torch  # noqa: F401

        import csm_weights.model.load  # noqa: F401


def _peak() -> int:
    """The most bytes of memory so far; of this program alone, unlike getrusage's."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Loads once and prints one line of JSON."""
    way, paths = sys.argv[1], sys.argv[2:]
    _prepare(way)
    before = _peak()
    cpu, wall = time.process_time(), time.perf_counter()
    kept = WAYS[way](paths)
    taken = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**taken, "grown": _peak() - before}))
    del kept


if __name__ == "__main__":
    main()

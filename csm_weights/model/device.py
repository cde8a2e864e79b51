"""What a device is, and how fast its memory and bus are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from csm_weights.files import read_bounded

#: Bytes copied to measure a bus: enough to hide the start of a copy.
BUS_SAMPLE = 64 << 20

#: Most bytes read to measure a memory's rate; far more than caches hold.
MEMORY_SAMPLE = 512 << 20

#: How often a measurement is made; the fastest counts, since others can only be disturbed.
TRIES = 4

#: Runs of one measurement on a GPU, over which the time to start and to wait is spread.
GPU_RUNS = 20


def describe(device: torch.device) -> tuple[str, str]:
    """Return the name of a device, and its driver's version, "-" for a CPU."""
    if device.type == "cuda":
        pattern = r"Module\s+(?:for \S+\s+)?([0-9.]+)"
        found = _first("/proc/driver/nvidia/version", pattern)
        return torch.cuda.get_device_name(device), found or "unknown"
    return _first("/proc/cpuinfo", r"model name\s*:\s*(.+)") or "CPU", "-"


def _first(path: str, pattern: str) -> str | None:
    """Return the first match of the pattern's group in a small text file."""
    try:
        match = re.search(pattern, read_bounded(Path(path), 64 << 10).decode(errors="replace"))
    except OSError:
        return None
    return match[1].strip() if match else None


def bus_rate(device: torch.device) -> float:
    """Measure bytes a second from pinned memory to a GPU; 0 for the CPU, which has no bus."""
    if device.type != "cuda":
        return 0.0
    host = torch.empty(BUS_SAMPLE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    return BUS_SAMPLE / _fastest(lambda: there.copy_(host, non_blocking=True), device)


def memory_rate(tensor: Tensor) -> float:
    """Measure bytes a second at which a device reads a tensor; a small one is in its caches."""
    flat = tensor.flatten()[: MEMORY_SAMPLE // tensor.element_size()]
    return flat.nbytes / _fastest(lambda: flat.sum(), tensor.device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run in the fastest of a few tries, the first only warming up."""
    times, runs = [], GPU_RUNS if device.type == "cuda" else 1
    for _ in range(TRIES + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(runs):
            run()
        synchronize(device)
        times.append((time.perf_counter() - start) / runs)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

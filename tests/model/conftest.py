"""Fixtures of this room's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.simulated_cuda import CURRENT, Event, Simulation, Stream


@pytest.fixture
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """torch.cuda as far as loading uses it; memory of every device is the CPU's."""
    simulation, empty = Simulation(), torch.empty

    def empty_anywhere(
        *size: Any, device: Any = None, pin_memory: bool = False, **options: Any
    ) -> Tensor:
        if pin_memory and not simulation.can_pin:
            raise RuntimeError("CUDA error: out of memory")
        if device is not None and torch.device(device).type == "cuda":
            simulation.devices.append(torch.device(device))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", empty_anywhere)
    monkeypatch.setattr(torch.cuda, "Stream", simulation.stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", simulation.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: Stream())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CURRENT)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return simulation

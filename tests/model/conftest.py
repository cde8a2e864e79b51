"""Fixtures of this room's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from csm_weights.model.csm import Model
from tests.model.simulated_cuda import CURRENT, Event, Simulation, Stream
from tests.support.networks import TINY, random_model


@pytest.fixture(scope="module")
def no_gradients() -> Iterator[None]:
    """Torch without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Model:
    """A network of the tiny dimensions with random weights."""
    return random_model(TINY)


@pytest.fixture
def simulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """torch.cuda as far as loading uses it; memory of every device is the CPU's."""
    simulation, empty = Simulation(), torch.empty

    def empty_anywhere(
        *size: Any, device: Any = None, pin_memory: bool = False, **options: Any
    ) -> Tensor:
        if pin_memory:
            simulation.pinned += 1
            if simulation.pinned > simulation.most_pinned:
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

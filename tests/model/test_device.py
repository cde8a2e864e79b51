"""Rates of memory and bus, measured."""

from __future__ import annotations

import time

import pytest
import torch

from csm_weights.model import device as devices

#: Seconds that the device of these tests works at a run, and those to wait for it.
WORK, WAIT = 160e-6, 25e-6


def test_starting_and_waiting_are_no_part_of_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose work goes on while the host does, a run's time is the device's to 2 %."""
    clock, queued = [0.0], [0.0]

    def run() -> None:
        queued[0] += WORK

    def synchronize(_: torch.device) -> None:
        clock[0] += queued[0] + WAIT
        queued[0] = 0.0

    monkeypatch.setattr(devices, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    assert devices._fastest(run, torch.device("cuda")) == pytest.approx(WORK, rel=0.02)

"""The one run on a GPU, rehearsed on the CPU: every section, its clocks, and what fails in it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Place, Row, run_section
from csm_weights.model.decoders import open_decoder

CPU, RUN = torch.device("cpu"), subprocess.run


def test_every_section_runs_and_says_what_it_is_held_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the stand-in to chunk files: the rows of each section, with limits where there are."""
    monkeypatch.setattr(gpu, "REHEARSED", 1)
    place, rows = Place(tmp_path, CPU), dict[str, list[Row]]()
    for name, (section, _) in gpu.sections(CPU).items():
        if name != "tests":
            rows[name] = list(section(place))

    names = "prepare load safetensors frames-steps frames-eager speak split"
    assert list(rows) == names.split()
    every = [row for some in rows.values() for row in some]
    assert all(row.value > 0 for row in every)
    limits = {row.what: row.limit for row in every if row.limit != "no limit"}
    assert limits["load, one file, first of a process"] == "at least 30"
    assert limits["load, one file, later"] == "at least 40"
    assert limits["load, 6 chunk files, verified by blocks"] == "at least 20"
    assert not any(row.ok for row in every)
    table = gpu.table(every)
    assert table.count("\n") == len(every) + 1
    assert "steps: launches" in table


def test_a_run_ends_within_eight_minutes() -> None:
    """The limits of all sections of a GPU, each of which may be used up, come to 480 seconds."""
    limits = [limit for _, limit in gpu.sections(torch.device("cuda:0")).values()]

    assert len(limits) == 9
    assert sum(limits) <= 480


class Clock:
    """A device whose runs take 2 ms by its own clock, and events that read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.event(enable_timing))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def run(self) -> None:
        self.now += 2.0


def test_a_gpus_runs_are_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time between two events, over all runs; what the host adds does not count."""
    clock = Clock(monkeypatch)
    place = Place(Path(), torch.device("cuda:0"))

    assert gpu.seconds(place, clock.run, 5) == pytest.approx(0.002)


def test_a_copy_inside_the_device_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is read and written: a million bytes in 2 ms are a thousand million a second."""
    place = Place(Path(), CPU)
    monkeypatch.setattr(gpu, "seconds", lambda *_: 0.002)

    assert gpu.memory_rate(place, 1_000_000) == pytest.approx(1e9)


@pytest.mark.parametrize(("card", "limit"), [("NVIDIA H100", "at most 0.06"), ("X", "no limit")])
def test_the_goal_of_a_card_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str, limit: str
) -> None:
    """The fused path's real-time factor is held to the goal of its card, where it has one."""
    list(gpu.prepare(Place(tmp_path, CPU)))
    monkeypatch.setattr(gpu, "describe_device", lambda _: (card, "1"))
    monkeypatch.setattr(gpu, "open_decoder", lambda model, _: open_decoder(model, "steps"))
    monkeypatch.setattr(gpu, "kernel_table", lambda *_: [])
    rows = {row.what: row for row in gpu.frames(Place(tmp_path, CPU), "fused")}

    assert rows["fused: real-time factor"].limit == limit
    assert (rows["fused: real-time factor"].ok is None) == (limit == "no limit")


def in_child(monkeypatch: pytest.MonkeyPatch, program: str, limit: float = 60) -> list[Row]:
    """The rows of a section whose process runs a program."""
    run = RUN

    def start(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "benchmarks.gpu"]
        return run([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "run", start)
    return run_section("load", Place(Path("folder"), CPU), limit)


def test_a_section_that_fails_is_a_row_after_those_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured counts; its end, or that it did not end, is a line with NOT OK."""
    good = Row("load", 31.0, "GB/s", "at least 30", True)
    says = f"print({json.dumps(asdict(good))!r}, flush=True)"
    assert in_child(monkeypatch, says) == [good]
    kept, failed = in_child(monkeypatch, f"{says}; raise SystemExit(9)")
    assert kept == good
    assert (failed.what, failed.ok) == ("section load: ended with code 9", False)


def test_a_section_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs its time, and the next section goes on."""
    (failed,) = in_child(monkeypatch, "import time; time.sleep(60)", limit=0.1)

    assert failed.what == "section load: not done within 0.1 s"
    assert "| NOT OK |" in gpu.table([failed])

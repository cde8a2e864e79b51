"""The smoke test of an installed model: its verdict, its notes, and what is remembered."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csm_weights.errors import Kind, SmokeFailed, UsageError
from csm_weights.model import smoke
from csm_weights.model.path_checks import PathCheck, PathRequest
from csm_weights.model.smoke_report import path_report_path, read_report, report_path
from csm_weights.pipeline import apply, smoke_test
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome
from tests.support.clone import REPOSITORY

RIGHT = PathCheck("right", True, "1e-2", "4e-2", 20.0)
WRONG = PathCheck("wrong", False, "its process ended by SIGSEGV: no message")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """csm-tiny, installed and not smoke-tested."""
    root = tmp_path_factory.mktemp("root")
    for name in ("manifests", "chunks/csm-tiny"):
        shutil.copytree(REPOSITORY / name, root / name)
    return apply.weights(Request(root, "csm-tiny", ("safetensors",)), smoke=False)


@pytest.fixture(autouse=True)
def folder(installed: Outcome) -> Path:
    """The folder of the installed model, without reports of earlier tests."""
    folder = installed.state.paths.destination
    for report in (folder / ".csm-weights").glob("smoke-report*"):
        report.unlink()
    return folder


def smoke_tested(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome, *found: PathCheck, **options: Any
) -> tuple[Outcome, list[PathRequest]]:
    """Smoke-test on the CPU as if it had fast paths that are to be checked, with that result."""
    asked: list[PathRequest] = []

    def check(request: PathRequest) -> tuple[PathCheck, ...]:
        asked.append(request)
        return found

    monkeypatch.setattr(smoke, "to_check", lambda _: tuple(check.name for check in found))
    monkeypatch.setattr(smoke, "check_in_child", check)
    monkeypatch.setattr(smoke, "_find_device", lambda *_: torch.device("cpu"))
    return smoke_test.run(installed, frames=2, **options), asked


def test_a_wrong_fast_path_is_a_note_and_no_failed_gate(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome
) -> None:
    """The verdict rests on the reference, golden frames and all; the finding names the path."""
    outcome, asked = smoke_tested(monkeypatch, installed, WRONG, RIGHT)

    assert outcome.error is None
    assert outcome.smoke is not None and outcome.smoke.ok
    assert "golden frames" in [check.name for check in outcome.smoke.checks]
    (note,) = outcome.notes
    assert (note.kind, note.where, note.found) == (Kind.FAST_PATH, "path wrong", WRONG.found)
    assert "'right'" in note.help
    assert asked[0].names == ("wrong", "right")
    assert Path(asked[0].path).is_file()


def test_the_speed_is_that_of_the_path_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome
) -> None:
    """Of the first right path, which the limit of speed is for as well; else the reference's."""
    outcome, _ = smoke_tested(monkeypatch, installed, WRONG, RIGHT, max_rtf=0.24)
    assert outcome.smoke is not None
    assert outcome.smoke.real_time_factor == pytest.approx(20.0 / 80)
    assert outcome.smoke.frames_per_second == pytest.approx(50)
    assert isinstance(outcome.error, SmokeFailed)
    assert "real-time factor" in str(outcome.error)
    alone, _ = smoke_tested(monkeypatch, installed, WRONG, max_rtf=1e9)
    assert alone.smoke is not None and alone.smoke.real_time_factor not in (0.0, 0.25)


def test_with_require_fast_a_wrong_path_fails(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome, folder: Path
) -> None:
    """Then it is an error with the smoke test's exit code, and nothing is remembered."""
    outcome, _ = smoke_tested(monkeypatch, installed, RIGHT, WRONG, require_fast=True)

    assert isinstance(outcome.error, SmokeFailed)
    assert "path wrong: its process ended by SIGSEGV" in str(outcome.error)
    assert read_report(report_path(folder)) is None
    good, _ = smoke_tested(monkeypatch, installed, RIGHT, require_fast=True)
    assert good.error is None


def test_checks_of_paths_are_remembered_for_their_machine(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome, folder: Path
) -> None:
    """Beside the last report; a later test on the CPU alone leaves them there."""
    outcome, _ = smoke_tested(monkeypatch, installed, RIGHT)
    assert outcome.smoke is not None
    f = outcome.smoke.figures
    path = path_report_path(folder, f.machine, f.driver, f.torch, f.dtype)
    smoke_tested(monkeypatch, installed)

    remembered, last = read_report(path), read_report(report_path(folder))
    assert remembered is not None and remembered.paths == (RIGHT,)
    assert last is not None and last.paths == ()


def test_a_known_report_does_not_hold_where_fast_paths_are_required(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome
) -> None:
    """One with a wrong path, or with none, is not enough then."""
    for found, is_enough in (((), False), ((RIGHT, WRONG), False), ((RIGHT,), True)):
        smoke_tested(monkeypatch, installed, *found)
        assert smoke_test.known_report(installed.state, require_gpu=False)
        known = smoke_test.known_report(installed.state, require_gpu=False, require_fast=True)
        assert (known is not None) == is_enough


def test_a_folder_that_takes_no_report_holds_a_good_model_all_the_same(
    monkeypatch: pytest.MonkeyPatch, installed: Outcome, folder: Path
) -> None:
    """That the report could not be written is a note, beside the verdict."""
    report_path(folder).mkdir(parents=True)
    try:
        outcome, _ = smoke_tested(monkeypatch, installed, WRONG)
    finally:
        report_path(folder).rmdir()
    assert outcome.error is None and outcome.smoke is not None and outcome.smoke.ok
    assert [(note.kind, note.where) for note in outcome.notes] == [
        (Kind.FAST_PATH, "path wrong"),
        (Kind.IN_THE_WAY, str(report_path(folder))),
    ]


def test_a_smoke_test_without_weights_is_misuse(installed: Outcome) -> None:
    """The error names what to ask for, and says that the files are right."""
    others = tuple(i for i in installed.state.artifacts if not i.artifact.is_weights)
    outcome = smoke_test.run(replace(installed, state=replace(installed.state, artifacts=others)))
    assert isinstance(outcome.error, UsageError) and outcome.smoke is None
    assert "name safetensors or ckpt with --only" in str(outcome.error)
    assert outcome.error.advice == smoke_test.VERIFIED

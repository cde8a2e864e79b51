"""The smoke test of an installed model: its verdict, its notes, and what is remembered."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from csm_weights.errors import Kind, SmokeFailed, UsageError
from csm_weights.model import smoke
from csm_weights.model.path_checks import PathCheck, PathRequest
from csm_weights.model.smoke_report import (
    Check,
    Figures,
    SmokeReport,
    path_report_path,
    read_report,
    report_path,
)
from csm_weights.pipeline import apply, smoke_test
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome
from csm_weights.untrusted import dump_record
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


# ---- which report holds

GOOD = SmokeReport(
    "cpu",
    (Check("finite", "yes", "yes", True),),
    1.0,
    1.0,
    1.0,
    Figures("machine", "-", "torch", "float32", 0, 0.0, 0, 0.0, 0, 0),
)
BAD = Check("finite", "no", "yes", False)


@pytest.fixture
def tests_that_run(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each smoke test is asked for; it finds a good model at once."""
    asked: list[dict[str, Any]] = []

    def run(path: Path, **options: Any) -> SmokeReport:
        asked.append({"path": path, **options})
        return GOOD

    monkeypatch.setattr(smoke, "run", run)
    return asked


def test_weights_are_smoke_tested_once(
    installed: Outcome, folder: Path, tests_that_run: list[dict[str, Any]]
) -> None:
    """Without options a CPU will do; a second run knows the report, and another format does not."""
    request = Request(installed.state.paths.root, "csm-tiny", ("safetensors",))
    first, second = apply.weights(request), apply.weights(request)
    manifest = installed.state.manifest
    (asked,) = tests_that_run
    assert asked == {
        "path": folder / "model.safetensors",
        "device": None,
        "require_gpu": False,
        "frames": 8,
        "golden": Path(manifest.where).parent / (manifest.golden or ""),
        "dtype": None,
        "max_rtf": None,
    }
    assert first.smoke is not None and second.smoke == first.smoke
    assert (first.smoke_is_known, second.smoke_is_known) == (False, True)
    assert (first.error, second.error) == (None, None)
    apply.weights(replace(request, only=("safetensors", "ckpt")))
    assert [one["path"].name for one in tests_that_run] == ["model.safetensors"] * 2


@pytest.mark.parametrize(
    ("options", "require_gpu"),
    [({}, False), ({"require_gpu": True}, True), ({"require_fast": True}, True)],
)
def test_fast_paths_are_those_of_a_gpu(
    installed: Outcome,
    tests_that_run: list[dict[str, Any]],
    options: dict[str, Any],
    require_gpu: bool,
) -> None:
    """Who requires them requires a GPU."""
    smoke_test.run(installed, **options)
    assert [asked["require_gpu"] for asked in tests_that_run] == [require_gpu]


@pytest.mark.usefixtures("tests_that_run")
@pytest.mark.parametrize(
    ("changes", "hidden", "has_driver", "require_gpu", "holds"),
    [
        ({}, None, False, False, True),
        ({"checks": ()}, None, False, False, False),
        ({"checks": (*GOOD.checks, BAD)}, None, False, False, False),
        ({"bound_to": ()}, None, False, False, False),
        ({}, None, False, True, False),
        ({}, None, True, False, False),
        ({}, "", True, False, True),
        ({}, "-1", True, False, True),
        ({}, "0", True, False, False),
        ({"device": "cuda:0"}, None, True, True, True),
        ({"device": "cuda:0"}, None, False, False, True),
    ],
)
def test_a_report_holds_for_the_same_files_where_no_gpu_is_to_be_tried(
    installed: Outcome,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    hidden: str | None,
    has_driver: bool,
    require_gpu: bool,
    holds: bool,
) -> None:
    """One that is good, of these files and versions; one of a CPU only where that is enough."""
    outcome = smoke_test.run(installed)
    assert outcome.smoke is not None
    report_path(folder).write_text(dump_record(replace(outcome.smoke, **changes)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    real = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: has_driver if path.name == "nvidiactl" else real(path)
    )
    known = smoke_test.known_report(installed.state, require_gpu)
    assert (known is not None) is holds
    monkeypatch.setattr(smoke_test, "version", lambda name: f"another {name}")
    assert smoke_test.known_report(installed.state, require_gpu) is None


@pytest.mark.usefixtures("tests_that_run")
def test_a_report_is_bound_to_files_golden_frames_and_versions(installed: Outcome) -> None:
    """Each by its digest, or its version."""
    outcome = smoke_test.run(installed)
    assert outcome.smoke is not None
    receipts = [item.installed.receipt for item in installed.state.artifacts]
    files = [(receipt.path, receipt.sha256) for receipt in receipts if receipt]
    versions = [(name, version(name)) for name in ("torch", "csm-weights")]
    golden = Path(installed.state.manifest.where).parent / str(installed.state.manifest.golden)
    frames = ("golden", hashlib.sha256(golden.read_bytes()).hexdigest())
    assert list(outcome.smoke.bound_to) == [*files, frames, *versions]
    none = replace(installed.state.manifest, golden=None)
    outcome = smoke_test.run(replace(installed, state=replace(installed.state, manifest=none)))
    assert outcome.smoke is not None
    assert list(outcome.smoke.bound_to) == [*files, *versions]
    golden_is_gone = replace(installed.state.manifest, golden="gone.json")
    state = replace(installed.state, manifest=golden_is_gone)
    outcome = smoke_test.run(replace(installed, state=state))
    assert outcome.smoke is not None
    assert list(outcome.smoke.bound_to) == [*files, *versions]

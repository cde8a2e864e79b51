"""Fast paths checked in a child process: whatever happens there is told, and ends nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csm_weights.model.path_checks import PathCheck, PathRequest, check_in_child
from csm_weights.untrusted import dump_record
from tests.model.test_smoke import saved, tiny_state

GOOD, BETTER = PathCheck("one", True, "1e-2", "4e-2", 5.0), PathCheck("two", True, "2e-2", ms=6.0)


def asked(*names: str, path: Path = Path("model"), dtype: str = "float32") -> PathRequest:
    return PathRequest(str(path), "cpu", dtype, 3, names)


def child(monkeypatch: pytest.MonkeyPatch, *programs: str) -> list[str]:
    """Let children run these programs, one after the other; return the requests they get."""
    requests, left, run = [], list(programs), subprocess.run

    def start(command: list[str], **options: object) -> object:
        requests.append(command[-1])
        return run([sys.executable, "-c", left.pop(0)], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", start)
    return requests


def says(*checks: PathCheck) -> str:
    return f"print({chr(10).join(map(dump_record, checks))!r}, flush=True)"


def test_a_path_is_compared_with_the_reference_in_a_real_child(tmp_path: Path) -> None:
    """A right path has its differences, limit and time; one that is not there is told by name."""
    folder = saved(tmp_path / "model", tiny_state(seed=1))
    steps, abacus = check_in_child(asked("steps", "abacus", path=folder))

    assert (steps.name, steps.ok) == ("steps", True)
    assert float(steps.found) < 1e-3
    assert "3e-04 of the largest logit" in steps.limit
    assert steps.ms > 0
    assert (abacus.ok, abacus.ms) == (False, 0.0)
    assert "no path 'abacus' on cpu" in abacus.found


def test_paths_after_one_that_ended_the_process_run_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A crash is told with its signal and last words, and the next path gets a fresh process."""
    crash = "import os, sys; sys.stderr.write('illegal access\\n\\n'); sys.stderr.flush()"
    requests = child(monkeypatch, f"{crash}; os.kill(os.getpid(), 11)", says(BETTER))
    broken, good = check_in_child(asked("one", "two"))

    assert broken == PathCheck("one", False, "its process ended by SIGSEGV: illegal access")
    assert good == BETTER
    assert '"names": ["one", "two"]' in requests[0]
    assert '"names": ["two"]' in requests[1]


def test_paths_after_one_that_raised_run_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error may have spoiled the device: the child tells it and ends, and another goes on."""
    raised = PathCheck("one", False, "RuntimeError: an illegal memory access was encountered")
    requests = child(monkeypatch, says(raised), says(BETTER))

    assert check_in_child(asked("one", "two")) == (raised, BETTER)
    assert len(requests) == 2


def test_results_before_a_crash_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that was found right stays so, whatever the next does to the process."""
    child(monkeypatch, f"{says(GOOD)}; raise SystemExit(3)")

    assert check_in_child(asked("one", "two")) == (
        GOOD,
        PathCheck("two", False, "its process ended with code 3: no message"),
    )


def test_a_child_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that hangs costs its time, and is told."""
    child(monkeypatch, "import time; time.sleep(600)")
    (late,) = check_in_child(asked("one"), timeout=0.1)

    assert late == PathCheck("one", False, "its process did not end within 0.1 s")


@pytest.mark.parametrize("words", ["", "print('hello')", says(BETTER), says(GOOD, GOOD)])
def test_a_child_that_says_something_else_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """No result, another path's, or one twice: each path asked for has just one result."""
    child(monkeypatch, words, "")
    checks = check_in_child(asked("one", "three"))

    assert [check.name for check in checks] == ["one", "three"]
    assert not checks[1].ok


def test_a_child_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process there is no result, and no error either."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    (check,) = check_in_child(asked("one"))

    assert check.found == "its process cannot be started: No such file or directory"

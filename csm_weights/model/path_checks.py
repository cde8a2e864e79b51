"""Checks of the fast paths of decoding, made in a child process; without torch.

An illegal access of a GPU's memory ends its context, and so the process, for
good. What a fast path does wrong must not take the verdict on a model with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from csm_weights.untrusted import dump_record, parse_record, show

#: Fast paths on a GPU, the fastest first.
FAST_PATHS = ("fused", "graphs")

#: Seconds that a child has: it loads the model, compiles kernels and generates some frames.
TIMEOUT = 600.0

#: The program of a child; the request follows as JSON.
_CHILD = "import csm_weights.model.smoke as smoke; smoke.check_paths()"


@dataclass(frozen=True)
class PathCheck:
    """A fast path that was run: what was found, and what is allowed.

    `ms` are milliseconds a frame, 0 where the path does not work.
    """

    name: str
    ok: bool
    found: str
    limit: str = "frames as the reference's"
    ms: float = 0.0


@dataclass(frozen=True)
class PathRequest:
    """The model, device, dtype and number of frames with which paths are to be run."""

    path: str
    device: str
    dtype: str
    frames: int
    names: tuple[str, ...]


def check_in_child(request: PathRequest, timeout: float = TIMEOUT) -> tuple[PathCheck, ...]:
    """Run the paths of a request in a child process, and those after one that ended it in another.

    Never raises for what happens there: a check that is not OK tells it.
    """
    checks: list[PathCheck] = []
    while left := request.names[len(checks) :]:
        lines, why = _run_child(replace(request, names=left), timeout)
        records = (parse_record(line, PathCheck) for line in lines)
        read = [check for check in records if check]
        # a child may end by itself after a path that has spoiled the device
        done = list(takewhile(lambda pair: pair[0] == pair[1].name, zip(left, read, strict=False)))
        checks += [check for _, check in done]
        if len(done) < len(left) and (why or not done):
            why = why or "its process ended without a result"
            checks.append(PathCheck(left[len(done)], False, why))
    return tuple(checks)


def _run_child(request: PathRequest, timeout: float) -> tuple[list[str], str]:
    """Return the lines that a child printed, and why it did not come to its end, or ""."""
    # the package that runs here, also where it is not installed
    known = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", _CHILD, dump_record(request)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, known))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return _lines(late.stdout), f"its process did not end within {timeout:g} s"
    except OSError as error:
        return [], f"its process cannot be started: {error.strerror or error}"
    lines = _lines(done.stdout)
    if done.returncode == 0:
        return lines, ""
    last = next((line for line in reversed(_lines(done.stderr)) if line.strip()), "no message")
    code = done.returncode
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return lines, f"its process ended {how}: {show(last.strip())}"


def _lines(output: bytes | None) -> list[str]:
    return (output or b"").decode(errors="replace").splitlines()

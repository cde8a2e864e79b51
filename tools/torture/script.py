"""recombine.sh, stopped at the programs that it calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tools.torture.forks import LIMIT, Ended
from tools.torture.scene import Scene

#: The programs by which the script changes the disk, or says what is right.
PROGRAMS = ("mkdir", "cat", "sync", "sha256sum", "mv", "rm", "df")

#: Counts its calls in a file, and ends the whole group of processes at one of them.
_SHIM = """#!/bin/bash
echo >> "$TORTURE_COUNT"
at=$(wc -l < "$TORTURE_COUNT")
if [[ $at == "$TORTURE_AT" && $TORTURE_WHEN == before ]]; then kill -"$TORTURE_SIGNAL" 0; fi
{real} "$@"
code=$?
if [[ $at == "$TORTURE_AT" && $TORTURE_WHEN == after ]]; then kill -"$TORTURE_SIGNAL" 0; fi
exit $code
"""


def run_script(
    scene: Scene, at: int = 0, when: str = "before", stop: int = signal.SIGKILL
) -> Ended:
    """Runs the script; the signal comes at call `at` of a program, from 1."""
    process = start_script(scene, at, when, stop)
    began = time.monotonic()
    said = process.communicate(timeout=LIMIT)[0]
    return Ended(process.returncode, said, time.monotonic() - began)


def start_script(scene: Scene, at: int, when: str, stop: int) -> subprocess.Popen[str]:
    """Starts the script in a group of processes of its own."""
    count = _count(scene)
    count.write_text("")
    own = {"PATH": f"{_shims(scene)}:{os.environ['PATH']}", "TORTURE_COUNT": str(count)}
    own |= {"TORTURE_AT": str(at), "TORTURE_WHEN": when, "TORTURE_SIGNAL": str(int(stop))}
    return subprocess.Popen(
        scene.argv,
        cwd=scene.root,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def calls(scene: Scene) -> int:
    """How many programs the last run has called."""
    return _count(scene).read_text().count("\n")


def _count(scene: Scene) -> Path:
    return scene.home.with_suffix(".count")


def _shims(scene: Scene) -> Path:
    folder = scene.home.parent / "shims"
    if not folder.is_dir():
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(_SHIM.format(real=shutil.which(name)))
            (folder / name).chmod(0o755)
    return folder

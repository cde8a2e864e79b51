"""recombine.sh, stopped at the programs that it calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tools.torture.fork_server import LIMIT, Result
from tools.torture.sandbox import Sandbox

#: The programs by which the script changes or checks the disk.
PROGRAMS = ("mkdir", "cat", "sync", "sha256sum", "mv", "rm")

#: A wrapper that counts calls in a file, and signals the whole process group at one of them.
_WRAPPER = """#!/bin/bash
echo >> "$TORTURE_COUNT"
at=$(wc -l < "$TORTURE_COUNT")
if [[ $at == "$TORTURE_AT" && $TORTURE_WHEN == before ]]; then kill -"$TORTURE_SIGNAL" 0; fi
{real} "$@"
code=$?
if [[ $at == "$TORTURE_AT" && $TORTURE_WHEN == after ]]; then kill -"$TORTURE_SIGNAL" 0; fi
exit $code
"""


def run_script(
    sandbox: Sandbox, at: int = 0, when: str = "before", stop: int = signal.SIGKILL
) -> Result:
    """Run the script; the signal is sent at call `at` of a program, from 1."""
    process = start_script(sandbox, at, when, stop)
    began = time.monotonic()
    output = process.communicate(timeout=LIMIT)[0]
    return Result(process.returncode, output, time.monotonic() - began)


def start_script(sandbox: Sandbox, at: int, when: str, stop: int) -> subprocess.Popen[str]:
    """Start the script in a process group of its own."""
    count = _count(sandbox)
    count.write_text("")
    own = {"PATH": f"{_wrappers(sandbox)}:{os.environ['PATH']}", "TORTURE_COUNT": str(count)}
    own |= {"TORTURE_AT": str(at), "TORTURE_WHEN": when, "TORTURE_SIGNAL": str(int(stop))}
    return subprocess.Popen(
        sandbox.argv,
        cwd=sandbox.root,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def call_count(sandbox: Sandbox) -> int:
    """Return the number of programs that the last run called."""
    return _count(sandbox).read_text().count("\n")


def _count(sandbox: Sandbox) -> Path:
    return sandbox.home.with_suffix(".count")


def _wrappers(sandbox: Sandbox) -> Path:
    folder = sandbox.home.parent / "shims"
    if not folder.is_dir():
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(_WRAPPER.format(real=shutil.which(name)))
            (folder / name).chmod(0o755)
    return folder

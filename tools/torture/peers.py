"""The same faults for other programs: `cat`, `hf download` and aria2c, beside `inv fetch`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.toy import flip
from tools.torture.sandbox import COMMANDS, Sandbox, Sandboxes, good

#: The file that every program fetches.
NAME = "a.bin"

#: Bytes of a disk that is too small for it.
SMALL_DISK = 200 << 10

#: Seconds after which a program is taken to hang.
LIMIT = 60.0

#: The programs, each with the ways it can get the file: from the Hub, from chunk files, or both.
PROGRAMS = {"inv fetch": "both", "hf download": "hub", "aria2c": "hub", "cat": "chunks"}


@dataclass
class Row:
    """The outcome of one fault for each program: its exit code and what it left."""

    fault: str
    outcome: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One program and one fault in a sandbox; `out` is the folder for the file."""

    program: str
    sandbox: Sandbox
    out: Path

    @property
    def argv(self) -> list[str]:
        """Return the command line."""
        commands = Path(sys.prefix) / "bin"
        if self.program == "inv fetch":
            source = "hf" if self.sandbox.command.remote else "chunks"
            words = ["fetch", "--model", "toy", "--only", NAME, "--source", source]
            return [str(commands / "inv"), *words]
        if self.program == "hf download":
            return [str(commands / "hf"), "download", "org/toy", NAME, "--local-dir", str(self.out)]
        if self.program == "aria2c":
            url = f"{self.sandbox.hub.endpoint}/org/toy/resolve/main/{NAME}"
            tries = ["--max-tries=3", "--retry-wait=1", "--file-allocation=none", "-q"]
            return ["aria2c", *tries, "-c", "-d", str(self.out), "-o", NAME, url]
        parts = self.sandbox.root / "chunks/toy" / NAME
        return ["sh", "-c", f"cat '{parts}'/{NAME}.part-* > '{self.out / NAME}'"]

    @property
    def final(self) -> Path:
        """Return the final name of the file."""
        return self.out / NAME

    def run(self, kill_at: int = 0) -> int:
        """Run the program; kill it once the Hub has sent `kill_at` bytes, where that is not 0."""
        own = {"PATH": os.environ["PATH"], "HF_HUB_DISABLE_XET": "1"}
        process = subprocess.Popen(
            self.argv,
            cwd=self.sandbox.root,
            env=self.sandbox.env | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + LIMIT
        while process.poll() is None:
            sent = self.sandbox.hub.bytes_sent("storage")
            if time.monotonic() > end or (kill_at and sent >= kill_at):
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait()

    def left(self) -> str:
        """Describe what has the final name."""
        if not self.final.is_file():
            return "nothing"
        found, right = self.final.read_bytes(), good(NAME)[0]
        if found == right:
            return "the right file"
        return "**wrong bytes**" if len(found) == len(right) else f"**{len(found):,} bytes**"


Fault = Callable[[Attempt, ExitStack], str]


def _plain(attempt: Attempt, _: ExitStack) -> str:
    return f"exit {attempt.run()}, {attempt.left()}"


def _server_fault(name: str, **options: Any) -> Fault:
    def apply(attempt: Attempt, stack: ExitStack) -> str:
        fault = attempt.sandbox.hub.fault(name, match=f"*{NAME}*", host="storage", **options)
        stack.callback(fault.clear)
        return _plain(attempt, stack)

    return apply


def _chunk_file(change: Callable[[Path], None]) -> Fault:
    def apply(attempt: Attempt, stack: ExitStack) -> str:
        change(attempt.sandbox.root / f"chunks/toy/{NAME}/{NAME}.part-ac")
        return _plain(attempt, stack)

    return apply


def _killed(attempt: Attempt, _: ExitStack) -> str:
    """Kill the program once half of the file has arrived, and run it again."""
    hub = attempt.sandbox.hub
    fault = hub.fault("trickle", host="storage", rate=150_000, at=0)
    hub.clear()
    attempt.run(kill_at=len(good(NAME)[0]) // 2)
    left = attempt.left()
    fault.clear()
    return f"{left} after the kill; then exit {attempt.run()}, {attempt.left()}"


def _full(attempt: Attempt, stack: ExitStack) -> str:
    attempt.out.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(attempt.out)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        return "needs root"
    stack.callback(subprocess.run, ["umount", str(attempt.out)], check=True)
    return _plain(attempt, stack)


#: Each fault, and whether it applies to the Hub, to chunk files, or to both.
FAULTS: tuple[tuple[str, str, Fault], ...] = (
    ("none", "both", _plain),
    ("a byte is flipped on the wire", "hub", _server_fault("flip", offset=100_000)),
    ("the line ends after 100,000 bytes, every time", "hub", _server_fault("cut", at=100_000)),
    ("the line ends after 100,000 bytes, once", "hub", _server_fault("cut", at=100_000, times=1)),
    ("killed in the middle, and run again", "hub", _killed),
    ("a byte is flipped in a chunk file", "chunks", _chunk_file(flip)),
    ("a chunk file is missing", "chunks", _chunk_file(Path.unlink)),
    ("a chunk file is cut short", "chunks", _chunk_file(lambda path: os.truncate(path, 1000))),
    ("the disk is full", "both", _full),
)


def peers(sandboxes: Sandboxes) -> Iterator[Row]:
    """Yield a row for each fault; takes about twenty seconds."""
    programs = [name for name in PROGRAMS if name != "aria2c" or shutil.which("aria2c")]
    for fault, ways, apply in FAULTS:
        row = Row(fault)
        for program in programs:
            way = _way(PROGRAMS[program], ways)
            if way:
                row.outcome[program] = tried(sandboxes, program, way, apply)
        yield row


def _way(program: str, fault: str) -> str:
    """Return how the file reaches a program under a fault; '' where the fault does not apply."""
    if "both" in (program, fault):
        other = fault if program == "both" else program
        return "chunks" if other == "both" else other
    return program if program == fault else ""


def tried(sandboxes: Sandboxes, program: str, way: str, apply: Fault) -> str:
    """Return the outcome of one fault for one program."""
    sandbox = sandboxes.sandbox(COMMANDS["fetch (Hub)" if way == "hub" else "fetch (chunks)"])
    out = sandbox.root / ("output/toy" if program == "inv fetch" else "theirs")
    if program != "inv fetch":
        out.mkdir()
    with ExitStack() as stack:
        stack.callback(sandboxes.remove, sandbox)
        return apply(Attempt(program, sandbox, out), stack)

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
from tools.torture.scene import COMMANDS, Bench, Scene, good

#: The file that all of them are asked for.
NAME = "a.bin"

#: Bytes of the disk that is too small for it.
SMALL_DISK = 200 << 10

#: Seconds after which a program is taken to hang.
LIMIT = 60.0

#: What each program is called, and what of the two ways the file comes it knows.
PROGRAMS = {"inv fetch": "both", "hf download": "hub", "aria2c": "hub", "cat": "parts"}


@dataclass
class Row:
    """What came of one fault: by program, its exit code and what it has left."""

    fault: str
    came: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Try:
    """One program at one fault, in a scene; `out` is where the file is to come."""

    program: str
    scene: Scene
    out: Path

    @property
    def argv(self) -> list[str]:
        """The command line."""
        commands = Path(sys.prefix) / "bin"
        if self.program == "inv fetch":
            source = "hf" if self.scene.command.far else "chunks"
            words = ["fetch", "--model", "toy", "--only", NAME, "--source", source]
            return [str(commands / "inv"), *words]
        if self.program == "hf download":
            return [str(commands / "hf"), "download", "org/toy", NAME, "--local-dir", str(self.out)]
        if self.program == "aria2c":
            url = f"{self.scene.hub.endpoint}/org/toy/resolve/main/{NAME}"
            tries = ["--max-tries=3", "--retry-wait=1", "--file-allocation=none", "-q"]
            return ["aria2c", *tries, "-c", "-d", str(self.out), "-o", NAME, url]
        parts = self.scene.root / "chunks/toy" / NAME
        return ["sh", "-c", f"cat '{parts}'/{NAME}.part-* > '{self.out / NAME}'"]

    @property
    def final(self) -> Path:
        """The name that the file is to have."""
        return self.out / NAME

    def run(self, kill_at: int = 0) -> int:
        """Runs the program; killed once the Hub has sent so many bytes, where that is not 0."""
        own = {"PATH": os.environ["PATH"], "HF_HUB_DISABLE_XET": "1"}
        process = subprocess.Popen(
            self.argv,
            cwd=self.scene.root,
            env=self.scene.env | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + LIMIT
        while process.poll() is None:
            sent = self.scene.hub.bytes_sent("storage")
            if time.monotonic() > end or (kill_at and sent >= kill_at):
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait()

    def left(self) -> str:
        """What has the final name."""
        if not self.final.is_file():
            return "nothing"
        found, right = self.final.read_bytes(), good(NAME)[0]
        if found == right:
            return "the right file"
        return "**wrong bytes**" if len(found) == len(right) else f"**{len(found):,} bytes**"


Fault = Callable[[Try, ExitStack], str]


def _plain(attempt: Try, _: ExitStack) -> str:
    return f"exit {attempt.run()}, {attempt.left()}"


def _wire(name: str, **options: Any) -> Fault:
    def strike(attempt: Try, stack: ExitStack) -> str:
        fault = attempt.scene.hub.fault(name, match=f"*{NAME}*", host="storage", **options)
        stack.callback(fault.clear)
        return _plain(attempt, stack)

    return strike


def _part(change: Callable[[Path], None]) -> Fault:
    def strike(attempt: Try, stack: ExitStack) -> str:
        change(attempt.scene.root / f"chunks/toy/{NAME}/{NAME}.part-ac")
        return _plain(attempt, stack)

    return strike


def _killed(attempt: Try, _: ExitStack) -> str:
    """Killed once half of the file has come; then run again."""
    hub = attempt.scene.hub
    fault = hub.fault("trickle", host="storage", rate=150_000, at=0)
    hub.clear()
    attempt.run(kill_at=len(good(NAME)[0]) // 2)
    left = attempt.left()
    fault.clear()
    return f"{left} after the kill; then exit {attempt.run()}, {attempt.left()}"


def _full(attempt: Try, stack: ExitStack) -> str:
    attempt.out.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(attempt.out)]
    if os.geteuid() or subprocess.run(["mount", *options], capture_output=True).returncode:
        return "needs root"
    stack.callback(subprocess.run, ["umount", str(attempt.out)], check=True)
    return _plain(attempt, stack)


#: Each fault, and whether it is one of the wire, of the parts, or of both.
FAULTS: tuple[tuple[str, str, Fault], ...] = (
    ("none", "both", _plain),
    ("a byte is flipped on the wire", "hub", _wire("flip", offset=100_000)),
    ("the line ends after 100,000 bytes, every time", "hub", _wire("cut", at=100_000)),
    ("the line ends after 100,000 bytes, once", "hub", _wire("cut", at=100_000, times=1)),
    ("killed in the middle, and run again", "hub", _killed),
    ("a byte is flipped in a part", "parts", _part(flip)),
    ("a part is missing", "parts", _part(Path.unlink)),
    ("a part is cut short", "parts", _part(lambda path: os.truncate(path, 1000))),
    ("the disk is full", "both", _full),
)


def peers(bench: Bench) -> Iterator[Row]:
    """Every fault for each program that it applies to; takes twenty seconds."""
    programs = [name for name in PROGRAMS if name != "aria2c" or shutil.which("aria2c")]
    for fault, ways, strike in FAULTS:
        row = Row(fault)
        for program in programs:
            way = _way(PROGRAMS[program], ways)
            if way:
                row.came[program] = tried(bench, program, way, strike)
        yield row


def _way(program: str, fault: str) -> str:
    """By which way the file comes to a program at a fault; none where it does not apply."""
    if "both" in (program, fault):
        other = fault if program == "both" else program
        return "parts" if other == "both" else other
    return program if program == fault else ""


def tried(bench: Bench, program: str, way: str, strike: Fault) -> str:
    """What comes of one fault for one program."""
    scene = bench.scene(COMMANDS["fetch (Hub)" if way == "hub" else "fetch (parts)"])
    out = scene.root / ("output/toy" if program == "inv fetch" else "theirs")
    if program != "inv fetch":
        out.mkdir()
    with ExitStack() as stack:
        stack.callback(bench.drop, scene)
        return strike(Try(program, scene, out), stack)

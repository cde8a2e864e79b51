"""Parts that all measurements share: running commands, comparing runs, tables, the report."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
INV = BIN / "inv"
REPORT = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Run:
    """One finished command: seconds of wall clock and processor, bytes of peak memory."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Row:
    """One line of the report; `goal` is in words, `ratio` is ours to the peer's or reverse."""

    what: str
    ours: str
    peer: str
    ratio: str
    goal: str


def run(command: Sequence[str] | str, cwd: Path, env: Mapping[str, str] | None = None) -> Run:
    """Runs a command to its end and returns what the kernel accounted for it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        shell=isinstance(command, str),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{errors.decode()}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def in_turn(runs: int, *sides: Callable[[], Run]) -> list[list[Run]]:
    """Runs all sides in turn, `runs` times each."""
    results: list[list[Run]] = [[] for _ in sides]
    for number in range(runs):
        for index, side in enumerate(sides):
            results[index].append(side())
            print(f"run {number + 1} side {index + 1}: {results[index][-1]}", file=sys.stderr)
    return results


def median(runs: Sequence[Run]) -> float:
    """The median wall time in seconds."""
    return statistics.median(r.wall for r in runs)


def ratio(over: Sequence[Run], under: Sequence[Run]) -> float:
    """The median of the ratios of wall times, pair by pair."""
    pairs = zip(over, under, strict=True)
    return statistics.median(a.wall / b.wall for a, b in pairs)


def copy_line(folder: Path) -> None:
    """Puts the pipeline into a folder, where its runs touch nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "tasks.py", folder)
    for name in ("csm_weights", "manifests"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | ours | peer | ratio | goal |", "|---|---|---|---|---|"]
    lines += [f"| {r.what} | {r.ours} | {r.peer} | {r.ratio} | {r.goal} |" for r in rows]
    return "\n".join(lines)


def machine() -> str:
    """The machine in a line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/cpuinfo").read_text()
    match = re.search(r"model name\s*: (.+)", info)
    return (
        f"{match[1] if match else platform.processor()}, {os.cpu_count()} cores,"
        f" {memory / 2**30:.0f} GiB of memory, Linux {platform.release()},"
        f" Python {platform.python_version()}"
    )


def write_report(text: str, mark: str = "measured") -> None:
    """Puts the tables between the marks of docs/performance.md."""
    old = REPORT.read_text()
    start, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    head, found, rest = old.partition(start)
    if not found:
        raise SystemExit(f"{REPORT} has no {start.strip()}")
    REPORT.write_text(head + start + text + "\n" + end + rest.partition(end)[2])

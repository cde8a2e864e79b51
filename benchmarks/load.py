"""Measures loading on the CPU, on the full-size stand-in of CSM-1B; benchmarks.gpu is for a GPU.

    make bench-load                              # needs 38 GB of disk
    python -m benchmarks.load --runs 3 --write   # the same, and puts the figures into docs/
    python -m benchmarks.load --model csm-tiny --runs 1      # does it work at all

Each way of loading runs in a process of its own, in turn with the others, on
files that have just been read (so they are in the page cache as far as they
fit). The start of Python, torch and CUDA is not counted, for anyone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import INV, ROOT, Row, Run, machine, run, table, write_report
from benchmarks.plot import bars


def cool(paths: Sequence[Path]) -> None:
    """Takes files out of the page cache: what a write left there is read more slowly."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(way: str, paths: Sequence[Path]) -> Run:
    """One way of loading, once."""
    for path in paths:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    command = [sys.executable, "-m", "benchmarks.loader", way, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    taken = json.loads(done.stdout)
    result = Run(taken["seconds"], taken["cpu"], taken["grown"])
    print(f"{way}: {result}", file=sys.stderr)
    return result


def in_turn(runs: int, sides: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """Runs all sides in turn, after one run of each that does not count."""
    results: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(runs + 1):
        for name, side in sides.items():
            taken = side()
            if number:
                results[name].append(taken)
    return results


def median(runs: Sequence[Run], what: str = "wall") -> float:
    """The median of one figure of some runs."""
    return float(statistics.median(getattr(r, what) for r in runs))


def measure_staging(file: Path, runs: int) -> list[Row]:
    """The whole file streamed to nowhere, against `cat` to nowhere, by processor time."""
    cat = f"cat '{file}' > /dev/null"
    found = in_turn(runs, {"cat": lambda: run(cat, ROOT), "ours": lambda: load("stage", [file])})
    ours, peer = (median(found[name], "cpu") for name in ("ours", "cat"))
    grown = max(r.memory for r in found["ours"])
    return [
        Row(
            "the file streamed to nowhere, processor time / `cat FILE > /dev/null`",
            f"{ours:.2f} s",
            f"{peer:.2f} s",
            f"{ours / peer:.2f} times",
            "at most 1.15 times",
        ),
        Row("the same: memory", f"{grown / 2**20:.1f} MiB", "", "", "at most 16 MiB"),
    ]


def measure_loading(
    file: Path, parts: Sequence[Path], checkpoint: Path, runs: int
) -> tuple[list[Row], dict[str, float]]:
    """F32 to bfloat16 on the CPU: ours from file, chunk files and ckpt.pt, and the libraries'."""
    sides = {
        "ours": lambda: load("ours cpu", [file]),
        "ours, from chunk files": lambda: load("ours cpu", parts),
        "ours, from ckpt.pt": lambda: load("ours cpu", [checkpoint]),
        "safetensors load_file": lambda: load("load_file cpu", [file]),
        "safetensors safe_open": lambda: load("safe_open cpu", [file]),
        "torch.load(mmap=True)": lambda: load("torch.load cpu", [checkpoint]),
    }
    found = in_turn(runs, sides)
    size = file.stat().st_size
    rates = {name: size / median(of) / 1e9 for name, of in found.items()}
    ours = median(found["ours"])
    peers = {name: of for name, of in found.items() if not name.startswith("ours")}
    fastest = min(median(of) for of in peers.values())
    rows = [
        Row(
            f"bfloat16 on cpu / {name}",
            f"{ours:.2f} s",
            f"{median(of):.2f} s",
            f"{ours / median(of):.2f} times its time",
            "at most 1" if median(of) == fastest else "",
        )
        for name, of in peers.items()
    ]
    for name in ("ours, from chunk files", "ours, from ckpt.pt"):
        taken = median(found[name])
        rows.append(
            Row(
                f"bfloat16 on cpu: {name} / from one file",
                f"{taken:.2f} s",
                f"{ours:.2f} s",
                f"{taken / ours:.2f} times its time",
                "at most 1.05" if "chunk files" in name else "",
            )
        )
    rows.append(Row("bfloat16 on cpu: rate", f"{rates['ours']:.1f} GB/s", "", "", ""))
    return rows, rates


def main() -> None:
    """Measures everything that this machine can."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="csm-1b-standin")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=ROOT / "output" / "bench-load")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    chunks = ROOT / "chunks" / options.model
    if not chunks.is_dir():
        run([str(INV), "standin", "--name", options.model], ROOT)
    try:
        dest = ["--only", "all", "--dest", str(options.dir)]
        run([str(INV), "fetch", "--model", options.model, *dest], ROOT)
        file, checkpoint = options.dir / "model.safetensors", options.dir / "ckpt.pt"
        parts = sorted((chunks / "safetensors").iterdir())
        cool([file, checkpoint, *parts])
        rows = measure_staging(file, options.runs)
        more, rates = measure_loading(file, parts, checkpoint, options.runs)
        rows += more
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    head = f"{machine()}; {options.runs} runs each, medians."
    text = f"{head}\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured loading")
        title = "F32 file to bfloat16 on cpu, GB of the file a second"
        bars(title, rates, ROOT / "docs" / "loading.svg")


if __name__ == "__main__":
    main()

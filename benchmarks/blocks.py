"""Measures digests of blocks: what they cost when a file is verified, and what they gain later.

    python -m benchmarks.blocks                  # a file of 1 GiB in a temporary folder
    python -m benchmarks.blocks --runs 9 --write # the same, and puts the figures into docs/

Both sides of a comparison alternate on a file that has just been read. The gain is that of the
wall clock, against one piece of the size of the file; it needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial as bind
from pathlib import Path

from benchmarks.common import Row, machine, table, write_report
from benchmarks.loader import Nowhere
from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import workers
from csm_weights.formats.multipart import MultipartFile
from csm_weights.hashing import Digests, HashJob, measure
from csm_weights.model.stream import stream


def first(file: Path, has_blocks: bool) -> Digests:
    """Verify a file as one piece, with the digests of its blocks or without."""
    size = file.stat().st_size
    return measure([HashJob(file, size, ((0, size),), blocks=has_blocks)], lambda _: None)[0]


def later(file: Path, digests: Sequence[ByteRange]) -> None:
    """Stream a file as a load with verify=True does, to nowhere."""
    with MultipartFile([file]) as source:
        stream(source, digests, bind(Nowhere, 2 << 20))


def ratio(
    clock: Callable[[], float], runs: int, ours: Callable[[], object], peer: Callable[[], object]
) -> tuple[float, float, float]:
    """Medians of both sides, by a clock, and the median of their ratios, pair by pair."""
    pairs = []
    for _ in range(runs):
        taken = []
        for side in (ours, peer):
            start = clock()
            side()
            taken.append(clock() - start)
        pairs.append(taken)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return medians[0], medians[1], statistics.median(a / b for a, b in pairs)


def _row(what: str, ours: float, peer: float, times: float) -> Row:
    return Row(what, f"{ours:.2f} s", f"{peer:.2f} s", f"{times:.2f} times", "")


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the file")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        with file.open("wb") as target:
            for start in range(0, options.size, 64 << 20):
                target.write(os.urandom(min(64 << 20, options.size - start)))
        found = first(file, has_blocks=True)
        piece = [ByteRange(0, options.size, found.ranges[0])]
        sides = [bind(later, file, found.blocks), bind(later, file, piece)]
        rows = [
            _row(
                "first: verified with digests of blocks / without, processor time",
                *ratio(
                    time.process_time,
                    options.runs,
                    bind(first, file, True),
                    bind(first, file, False),
                ),
            ),
            _row(
                "later: verified by blocks / by one piece, processor time",
                *ratio(time.process_time, options.runs, *sides),
            ),
            _row(
                f"later: the same, on {workers()} cores, wall clock",
                *ratio(time.perf_counter, options.runs, *sides),
            ),
        ]
    text = f"{machine()}; {options.runs} runs each, medians.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured blocks")


if __name__ == "__main__":
    main()

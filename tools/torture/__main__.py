"""`python -m tools.torture [--seed N] [--minutes 10] [--only kills,power,...] [--write]`."""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.torture import kills, peers, power, races, report, swaps
from tools.torture.sandbox import COMMANDS, Sandboxes
from tools.torture.tally import Tally, TimeBox

#: The groups of a run, each with its share of the time.
SHARES = {"kills": 50, "power": 25, "races": 15, "swaps": 4, "peers": 6}

#: Bytes of memory that are enough for the sandboxes.
ROOM = 512 << 20


def main() -> int:
    """Run the groups that were chosen; return 1 if a check failed."""
    options = _options()
    # An ignored signal would be ignored by every program that is started here, too.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    chosen = [name for name in SHARES if name in options.only.split(",")]
    memory = _memory()
    here, there = (None, memory) if options.disk else (memory, None)
    with (
        tempfile.TemporaryDirectory(prefix="torture-", dir=here) as folder,
        tempfile.TemporaryDirectory(prefix="torture-", dir=there) as other,
        Sandboxes.open(Path(folder), Path(other) / "sandboxes") as sandboxes,
    ):
        tallies, rows = _run(sandboxes, chosen, options.seed, options.minutes * 60)
    print(report.summary(tallies))
    if options.write:
        report.write(_tables(tallies, rows), _conditions(options))
    return int(any(tally.wrong for tally in tallies))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default=",".join(SHARES))
    parser.add_argument("--disk", action="store_true", help="on disk, not in memory: slower")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    return parser.parse_args()


def _memory() -> Path | None:
    """Return a folder in memory with room for the sandboxes, where an fsync costs nothing."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    return memory if has_room else None


def _run(
    sandboxes: Sandboxes, chosen: list[str], seed: int, seconds: float
) -> tuple[list[Tally], list[peers.Row]]:
    tallies: list[Tally] = []
    whole, rows = sum(SHARES[name] for name in chosen), list[peers.Row]()
    for name in chosen:
        box = TimeBox.of(seconds * SHARES[name] / whole)
        rng = random.Random(f"{seed} {name}")
        if name == "peers":
            rows = list(peers.peers(sandboxes))
            continue
        for tally in _group(sandboxes, name, rng, box):
            print(" | ".join(tally.cells())[:160], file=sys.stderr, flush=True)
            tallies.append(tally)
    return tallies, rows


def _group(sandboxes: Sandboxes, name: str, rng: random.Random, box: TimeBox) -> Iterator[Tally]:
    if name == "kills":
        yield from kills.at_random(sandboxes, rng, box.share(0.35))
        left = list(COMMANDS.values())
        for number, command in enumerate(left):
            share = box.share(1 / (len(left) - number))
            yield kills.at_calls(sandboxes, command, rng, share)
    elif name == "power":
        left = [command for command in COMMANDS.values() if not command.is_script]
        for number, command in enumerate(left):
            share = box.share(1 / (len(left) - number))
            yield power.cuts(sandboxes, command, rng, share, most=10_000)
    elif name == "races":
        yield from races.races(sandboxes, rng, box)
    else:
        yield from swaps.swaps(sandboxes, box)


def _tables(tallies: list[Tally], rows: list[peers.Row]) -> dict[str, str]:
    groups = {name: [t for t in tallies if t.group == name] for name in SHARES}
    tables = {name: report.table(group) for name, group in groups.items() if group}
    return tables | ({"peers": report.peer_table(rows)} if rows else {})


def _conditions(options: argparse.Namespace) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = "on disk" if options.disk else "in memory"
    return (
        f"Seed {options.seed}, {options.minutes:g} minutes, {where},"
        f" {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}, {cores} cores."
    )


if __name__ == "__main__":
    sys.exit(main())

"""Measures how many lines are used, and how well a limit is kept, against a server on loopback.

    python -m benchmarks.lines            # four minutes; with --write into docs/performance.md

The server gives each line the same rate, and half of all that it has once there are more than
eight lines. Every run gets the same file from nothing; afterwards it is verified.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.common import Row, machine, table, write_report
from csm_weights.concurrency import OnProgress
from csm_weights.manifest.types import Artifact
from csm_weights.transfer.assemble import Assembly, assemble
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.http.lines import FIRST, Climb, Lines
from csm_weights.transfer.http.ranges import RangeDownloader
from csm_weights.transfer.hub import Hub
from tests.support.hub import HubServer

MIB = 1 << 20
REPO, NAME = "org/name", "model.bin"

#: Lines above which the server throttles, the bytes a second of each, and bytes of the file.
ABOVE, RATE, SIZE = 8, 2 * MIB, 480 * MIB

#: The limit, in bytes a second, and the seconds over which it is held.
LIMIT, WINDOW = 20 * MIB, 5.0


class Fixed(Climb):
    """A number of lines that does not change."""

    def measured(self, rate: float) -> None:
        """Keep the number."""


class Bench:
    """A file on a server, and a folder for what is fetched."""

    def __init__(self, hub: HubServer, folder: Path, size: int) -> None:
        self.hub, self.target = hub, folder / NAME
        numbers = random.Random(1)
        data = b"".join(numbers.randbytes(MIB) for _ in range(size // MIB))
        self.artifact = Artifact(NAME, "x", "opaque", size, hashlib.sha256(data).hexdigest())
        self.commit = hub.add_repo(REPO, {NAME: data})

    def seconds(self, lines: Lines, on_progress: OnProgress = lambda _: None) -> float:
        """The seconds that a run takes."""
        for left in self.target.parent.glob(f"{NAME}*"):
            left.unlink()
        began = time.monotonic()
        with RangeDownloader(threading.Event(), lines=lines) as downloader:
            source = Hub(downloader, HubCredentials(self.hub.endpoint, ""), REPO, self.commit)
            job = Assembly(self.artifact, self.target, source, remote=frozenset([0]))
            assemble([job], on_progress)
        return time.monotonic() - began


def measure_throttling(bench: Bench) -> list[Row]:
    """Ours against fixed numbers of lines."""
    fault = bench.hub.fault("crowd", host="storage", lines=ABOVE, rate=RATE)
    fixed = {n: bench.seconds(Lines(climb=Fixed(n))) for n in (FIRST, 6, 7, 8, 9, 10)}
    best = min(fixed, key=lambda number: fixed[number])
    ours = sorted(bench.seconds(Lines()) for _ in range(3))[1]
    fault.clear()
    what = f"{SIZE // MIB} MiB from a server that throttles above {ABOVE} lines"
    return [
        Row(
            f"{what} / the best fixed number, {best}",
            f"{ours:.1f} s",
            f"{fixed[best]:.1f} s",
            f"{fixed[best] / ours:.0%} of its rate",
            "at least 90 %",
        ),
        Row(
            f"the same / {FIRST} lines",
            f"{ours:.1f} s",
            f"{fixed[FIRST]:.1f} s",
            f"{fixed[FIRST] / ours:.0%} of its rate",
            "",
        ),
    ]


def measure_freely(bench: Bench) -> Row:
    """Ours against the same number of lines all the time, from a server that is only limited by \
this machine."""
    fixed = sorted(bench.seconds(Lines(climb=Fixed(FIRST))) for _ in range(3))[1]
    ours = sorted(bench.seconds(Lines()) for _ in range(3))[1]
    what = f"{SIZE // MIB} MiB as fast as it comes / {FIRST} lines all the time"
    times = f"{ours / fixed:.2f} times its time"
    return Row(what, f"{ours:.2f} s", f"{fixed:.2f} s", times, "at most 1.05")


def measure_limit(bench: Bench) -> list[Row]:
    """The most and the least that come in any five seconds, as sent and as read."""
    came, log, over = [0], list[tuple[float, int, int]](), threading.Event()
    before = bench.hub.bytes_sent()

    def count(size: int) -> None:
        came[0] += size

    def watch() -> None:
        while not over.wait(0.02):
            log.append((time.monotonic(), bench.hub.bytes_sent() - before, came[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    bench.seconds(Lines(LIMIT), count)
    over.set()
    thread.join()
    # Between the first byte and the last one.
    log = [entry for entry in log if 0 < entry[2] < SIZE]
    rows = []
    for place, words in ((1, "sent by the server"), (2, "read")):
        rates = [
            (later[place] - entry[place]) / (later[0] - entry[0]) / LIMIT
            for entry in log
            if (later := next((e for e in log if e[0] >= entry[0] + WINDOW), None))
        ]
        found = f"{min(rates):.2%} to {max(rates):.2%} of it"
        what = f"--limit-rate {LIMIT // MIB}M over any {WINDOW:.0f} s, bytes {words}"
        rows.append(Row(what, found, "", "", "97 to 103 %"))
    return rows


def main() -> None:
    """Measures all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        bench = Bench(hub, Path(folder), SIZE)
        rows = [*measure_limit(bench), measure_freely(bench), *measure_throttling(bench)]
    text = f"{machine()}; ours the median of 3 runs.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured lines")


if __name__ == "__main__":
    main()

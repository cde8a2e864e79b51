"""Measures downloads against hf download, curl and aria2c, from a server that saturates the line.

    make bench-download                                   # everything; 25 GB of disk, and root
    python -m benchmarks.download --size 268435456 --runs 1              # a quick look
    python -m benchmarks.download --only kill,repair                     # some of it

All of them get the same file from the same server on this machine, in turn and
from nothing, and share its cores with the server. Ours is verified and durable at
the end; of the others none hashes anything, and their bytes are in the page
cache. Results go to stdout as Markdown, and with --write into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.common import (
    BIN,
    INV,
    ROOT,
    Row,
    Run,
    copy_line,
    in_turn,
    machine,
    median,
    ratio,
    run,
    table,
    write_report,
)
from benchmarks.site import REPO, Site
from benchmarks.wan import DELAY, LOSS, Unavailable, emulated_wan
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest, Piece

GIB = 1 << 30
MIB = 1 << 20

#: Bytes of model.safetensors of CSM-1B.
FULL = 6_211_186_784

#: Bytes of the file that comes over the emulated WAN.
WAN = 32 * MIB

#: Bytes of a piece, where the manifest has some; and how many where one is bad.
PIECE = GIB
CHUNK_FILES = 12

NAME = "model.safetensors"
WHOLE, PIECES, TWELVE, THREE = "whole", "pieces", "twelve", "three"

#: What the manifests are called in the report.
KINDS = {WHOLE: "digest of the whole", PIECES: "digests of 1 GiB pieces"}

#: Those of a run that is killed, which is to be amidst a piece.
KILLED = {WHOLE: KINDS[WHOLE], THREE: "digests of three pieces"}

#: What has to be installed.
TOOLS = ("nginx", "curl", "aria2c")

CASES = ("download", "repair", "kill", "wan")


class Bench:
    """One file, the server that has it, and a folder into which it is downloaded."""

    def __init__(self, folder: Path, site: Site, prefix: tuple[str, ...] = ()) -> None:
        self.site = site
        self.size = site.served.stat().st_size
        self._prefix = prefix
        self._tree = folder / "tree"
        self._home = folder / "home"
        self._by_others = folder / "by-others"
        copy_line(self._tree)
        sizes = {
            WHOLE: 0,
            PIECES: PIECE,
            TWELVE: -(-self.size // CHUNK_FILES),
            THREE: -(-self.size // 3),
        }
        for kind, size in sizes.items():
            self._manifest(kind).write_text(render(_manifest(site, size)))

    def ours(self, kind: str, source: str = "hf") -> Run:
        """The file by `inv fetch`."""
        return self._run(self.command(kind, source), self._tree / "output" / NAME)

    def hf(self, xet: bool = False) -> Run:
        """The file by `hf download`."""
        words = [REPO, NAME, "--revision", self.site.commit, "--local-dir", str(self._by_others)]
        environment = self.environment | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})
        command = [str(BIN / "hf"), "download", *words]
        return self._run(command, self._by_others / NAME, environment)

    def curl(self) -> Run:
        """The file by curl, over one connection."""
        target = self._by_others / NAME
        return self._run(["curl", "-s", "-o", str(target), self.site.url], target)

    def aria2c(self) -> Run:
        """The file by aria2c, over eight connections."""
        words = ["-q", "-x8", "-s8", "-d", str(self._by_others), "-o", NAME, self.site.url]
        return self._run(["aria2c", *words], self._by_others / NAME)

    def command(self, kind: str, source: str = "hf") -> list[str]:
        """The command that is ours."""
        return [str(INV), "fetch", "--model", str(self._manifest(kind)), "--source", source]

    @property
    def tree(self) -> Path:
        """The folder where ours runs."""
        return self._tree

    @property
    def environment(self) -> dict[str, str]:
        """What all are told: this Hub, nothing of the user's, no questions to others."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._home),
            "HF_HOME": str(self._home / "huggingface"),
            "HF_ENDPOINT": self.site.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    def clear(self) -> None:
        """Removes what runs have left, lets the disk come to rest, reads what is served."""
        for made in (self._tree / "output", self._home, self._by_others):
            shutil.rmtree(made, ignore_errors=True)
        self._home.mkdir()
        self._by_others.mkdir()
        os.sync()
        for file in self.site.served.parent.iterdir():
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)

    def write_chunk_files(self) -> None:
        """Cut the file into twelve chunk files, one of which has a wrong byte."""
        for number, piece in enumerate(_pieces(self.site.served, -(-self.size // CHUNK_FILES))):
            part = self._tree / piece.part
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                for block in _blocks(self.site.served, piece):
                    file.write(block)
                if number == CHUNK_FILES // 2:
                    file.seek(piece.size // 2)
                    file.write(bytes(16))

    def _manifest(self, kind: str) -> Path:
        return self._tree / "manifests" / f"{kind}.toml"

    def _run(
        self, command: list[str], target: Path, environment: dict[str, str] | None = None
    ) -> Run:
        self.clear()
        done = run([*self._prefix, *command], self._tree, environment or self.environment)
        if target.stat().st_size != self.size:
            raise SystemExit(f"{command} has not brought the whole file")
        return done


def _manifest(site: Site, piece: int) -> Manifest:
    """A manifest of the file, with pieces of that many bytes, or none."""
    served = site.served
    artifact = Artifact(
        path=NAME,
        group="safetensors",
        format="opaque",
        size=served.stat().st_size,
        sha256=served.name,
        pieces=_pieces(served, piece) if piece else (),
    )
    return Manifest(
        name="bench",
        staging="output",
        destination="models",
        artifacts=(artifact,),
        repo=REPO,
        revision=site.commit,
        default=("all",),
    )


def _pieces(file: Path, size: int) -> tuple[Piece, ...]:
    end = file.stat().st_size
    pieces: list[Piece] = []
    for offset in range(0, end, size):
        bare = Piece(f"chunks/bench/{len(pieces):02}", offset, min(size, end - offset), "")
        digest = hashlib.sha256()
        for block in _blocks(file, bare):
            digest.update(block)
        pieces.append(replace(bare, sha256=digest.hexdigest()))
    return tuple(pieces)


def _blocks(file: Path, piece: Piece) -> Iterator[bytes]:
    with file.open("rb") as opened:
        for offset in range(piece.offset, piece.end, MIB):
            yield os.pread(opened.fileno(), min(MIB, piece.end - offset), offset)


def write_served(folder: Path, size: int) -> Path:
    """A file of random bytes, whose name is its sha256 as on a storage host."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made, digest = folder / "made", hashlib.sha256()
    with made.open("wb") as file:
        while size:
            block = os.urandom(min(size, MIB))
            file.write(block)
            digest.update(block)
            size -= len(block)
    return made.rename(folder / digest.hexdigest())


def measure_download(bench: Bench, runs: int) -> list[Row]:
    """Ours with both kinds of manifests against all others, each from nothing."""
    bench.site.hub.add_xorbs(bench.site.served, bench.site.served.parent)
    peers: dict[str, tuple[Callable[[], Run], str]] = {
        "`hf download`, HTTP": (bench.hf, "at most 0.6"),
        "`hf download`, Xet": (lambda: bench.hf(xet=True), "at most 0.85"),
        "`curl -o`": (bench.curl, "at most 1.3"),
        "`aria2c -x8 -s8`": (bench.aria2c, "at most 1"),
    }
    sides = [lambda: bench.ours(WHOLE), lambda: bench.ours(PIECES)]
    results = in_turn(runs, *sides, *(side for side, _ in peers.values()))
    size = _size(bench.size)
    rows = []
    for kind, ours in zip(KINDS, results[:2], strict=True):
        for (peer, (_, goal)), others in zip(peers.items(), results[2:], strict=True):
            rows.append(_row(f"{size}, {KINDS[kind]} / {peer}", ours, others, goal))
    ours = [r for side in results[:2] for r in side]
    for peer, others in list(zip(peers, results[2:], strict=True))[:2]:
        rows.append(_memory_row(f"{size}: peak memory / {peer}", ours, others))
    return rows


def measure_repair(bench: Bench) -> list[Row]:
    """Measure that of twelve chunk files, one of them bad, only that piece is fetched."""
    bench.write_chunk_files()
    before = bench.site.all_sent()
    bench.ours(TWELVE, source="auto")
    fetched = bench.site.all_sent() - before
    piece = -(-bench.size // CHUNK_FILES)
    shutil.rmtree(bench.tree / "chunks")
    what = f"1 bad chunk file of {CHUNK_FILES}: bytes fetched / its bytes"
    times = f"{fetched / piece:.4f} times"
    return [Row(what, f"{fetched:,}", f"{piece:,}", times, "just that piece")]


def measure_kill(bench: Bench) -> list[Row]:
    """Killed when half of the bytes were sent: what the next run fetches once more."""
    rows = []
    for kind, words in KILLED.items():
        bench.clear()
        before = bench.site.all_sent()
        _kill_at(bench, kind, before + bench.size // 2)
        killed = bench.site.all_sent() - before
        run(bench.command(kind), bench.tree, bench.environment)
        again = bench.site.all_sent() - before - bench.size
        what = f"killed after {killed / bench.size:.0%}, {words}: bytes fetched again"
        share = f"{again / bench.size:.2%} of the file"
        rows.append(Row(what, f"{again:,}", "", share, "at most 1 %"))
    return rows


def _kill_at(bench: Bench, kind: str, sent: int) -> None:
    process = subprocess.Popen(
        bench.command(kind),
        cwd=bench.tree,
        env=bench.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while bench.site.sent() < sent:
            if process.poll() is not None:
                raise SystemExit("it had ended before it was to be killed")
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def measure_wan(folder: Path, runs: int) -> list[Row]:
    """Measure a smaller file from a server behind an emulated WAN."""
    served = write_served(folder / "wan", WAN)
    what = f"{_size(WAN)}, {DELAY * 1000:.0f} ms and {LOSS:.0%} loss"
    try:
        with emulated_wan() as wan, Site(folder / "wan-site", served, wan.address) as site:
            bench = Bench(folder, site, wan.prefix)
            sides = (lambda: bench.ours(WHOLE), bench.hf, bench.aria2c)
            ours, hf, aria2c = in_turn(runs, *sides)
    except Unavailable as reason:
        return [Row(what, "not measured", "", str(reason), "")]
    what += f" ({wan.how})"
    return [
        _row(f"{what} / `hf download`, HTTP", ours, hf, "below 1"),
        _row(f"{what} / `aria2c -x8 -s8`", ours, aria2c, ""),
    ]


def _row(what: str, ours: list[Run], peer: list[Run], goal: str) -> Row:
    times = f"{ratio(ours, peer):.2f} times its time"
    return Row(what, f"{median(ours):.2f} s", f"{median(peer):.2f} s", times, goal)


def _memory_row(what: str, ours: list[Run], peer: list[Run]) -> Row:
    mine, other = (max(r.memory for r in side) for side in (ours, peer))
    return Row(what, f"{mine / MIB:.0f} MiB", f"{other / MIB:.0f} MiB", "", "at most 150 MiB")


def _size(size: int) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / MIB:.3g} MiB"


@contextmanager
def made_bench(folder: Path, size: int) -> Iterator[Bench]:
    """A bench with a file of that size."""
    served = write_served(folder / "served", size)
    with Site(folder / "site", served) as site:
        yield Bench(folder, site)


def measure(options: argparse.Namespace) -> list[Row]:
    """All that was asked for."""
    rows, folder = [], options.dir
    with made_bench(folder, options.size) as bench:
        if "download" in options.only:
            rows += measure_download(bench, options.runs)
        if "repair" in options.only:
            rows += measure_repair(bench)
        if "kill" in options.only:
            rows += measure_kill(bench)
    if options.full:
        with made_bench(folder, FULL) as bench:
            rows += measure_download(bench, 1)
    if "wan" in options.only:
        rows += measure_wan(folder, options.runs)
    return rows


def _cases(text: str) -> list[str]:
    words = text.split(",")
    if unknown := set(words).difference(CASES):
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(CASES)}")
    return words


def main() -> None:
    """Measures everything, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=2 * GIB, help="bytes of the file")
    parser.add_argument("--full", action="store_true", help="once more with 6.2 GB, one run")
    parser.add_argument("--only", type=_cases, default=CASES, help=", ".join(CASES))
    parser.add_argument("--dir", type=Path, default=ROOT / "output" / "bench-download")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise SystemExit(f"these measurements need {', '.join(missing)}")
    # So that everything is cleaned up then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.dir = options.dir.resolve()
    options.dir.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(options)
    finally:
        shutil.rmtree(options.dir)
    text = f"{machine()}; {options.runs} runs each, medians.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text, "measured downloads")


if __name__ == "__main__":
    main()

"""Measures the line against cat and sha256sum, on the full-size stand-in of CSM-1B.

    make bench                              # everything; needs 40 GB of disk, root for XFS
    python -m benchmarks.line --runs 1      # a quick look
    python -m benchmarks.line --model csm-tiny --runs 1   # does it work at all

Each figure is the median of several runs, ours and the peer's in turn, so that
a machine whose speed drifts slows both. Results go to stdout as Markdown, and
with --write into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.common import (
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

#: Seconds below which a copy of gigabytes was none: the file system shared the blocks.
INSTANT = 0.2

#: Bytes hashed to find the speed of one core.
SAMPLE = 1 << 30


class Tree:
    """A folder with the chunk files and the pipeline, where runs are made."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        self.chunks = folder / "chunks" / model
        self.installed = folder / "models" / model
        self.by_hand = folder / "by-hand"
        copy_line(folder)

    def inv(self, *words: str) -> Run:
        """An inv command on the model."""
        return run([str(INV), *words, "--model", self.model], self.folder)

    def warm(self, *folders: Path) -> None:
        """Reads files once, so that they are in the page cache as far as they fit."""
        for folder in folders:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)

    def cool(self, folder: Path) -> None:
        """Takes files out of the page cache, so that others fit into it."""
        for file in (p for p in folder.rglob("*") if p.is_file()):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def clear(self) -> None:
        """Removes what runs have made, and lets the disk come to rest."""
        for folder in (self.folder / "output", self.installed, self.by_hand):
            shutil.rmtree(folder, ignore_errors=True)
        self.by_hand.mkdir()
        os.sync()
        self.warm(self.chunks)

    def assemble(self) -> Run:
        """Ours: both files from chunk files, every byte verified, durable, with receipts."""
        self.clear()
        return self.inv("fetch")

    def cat(self, check: bool) -> Run:
        """By hand: cat, and with `check` also sha256sum -c of both files."""
        self.clear()
        commands = [
            f"cat {self.chunks}/{group}/{name}.part-* > {self.by_hand}/{name}"
            for group, name in (("safetensors", "model.safetensors"), ("ckpt", "ckpt.pt"))
        ]
        if check:
            commands.append(f"cd {self.by_hand} && sha256sum -c {self.folder}/SHA256SUMS")
        return run(" && ".join(commands), self.folder)

    def write_sums(self) -> None:
        """SHA256SUMS of both files, from installed and verified files."""
        names = "model.safetensors ckpt.pt"
        run(f"cd {self.installed} && sha256sum {names} > {self.folder}/SHA256SUMS", self.folder)

    def disk_used(self) -> int:
        """Bytes used on the file system."""
        os.sync()
        return shutil.disk_usage(self.folder).used


def measure_verify(tree: Tree, runs: int) -> list[Row]:
    """`inv verify` against `sha256sum -c`, files in the page cache as far as they fit."""
    tree.clear()
    tree.inv("weights", "--no-smoke")
    tree.write_sums()
    tree.cool(tree.chunks)
    check = f"cd {tree.installed} && sha256sum -c {tree.folder}/SHA256SUMS"

    def warmly(measured: Callable[[], Run]) -> Run:
        tree.warm(tree.installed)
        return measured()

    ours, peer = in_turn(
        runs,
        lambda: warmly(lambda: tree.inv("verify")),
        lambda: warmly(lambda: run(check, tree.folder)),
    )
    return [
        _row("`inv verify` / `sha256sum -c`, both files", ours, peer, "at least 8 times faster"),
        _memory_row("`inv verify`", ours),
    ]


def measure_assemble(tree: Tree, runs: int, where: str) -> list[Row]:
    """Measure assembling and verifying against cat, with and without sha256sum."""
    ours, checked, bare = in_turn(
        runs, tree.assemble, lambda: tree.cat(check=True), lambda: tree.cat(check=False)
    )
    before = _without_output(tree)
    tree.assemble()
    extra = tree.disk_used() - before
    what = f"assemble + verify, {where}"
    rows = [
        _row(f"{what} / `cat` + `sha256sum -c`", ours, checked, "at least 4 times faster"),
        Row(
            f"{what} / bare `cat`",
            f"{median(ours):.2f} s",
            f"{median(bare):.2f} s",
            f"{ratio(ours, bare):.2f} times its time",
            "at most 1.5",
        ),
        Row(f"{what}: extra disk", f"{extra / 2**20:,.1f} MiB", "", "", "near 0 on XFS"),
        _memory_row(what, ours),
    ]
    if median(bare) < INSTANT:
        rows[1] = replace(rows[1], ratio="`cat` shares the blocks too, and verifies nothing")
    return rows


def _without_output(tree: Tree) -> int:
    tree.clear()
    return tree.disk_used()


def measure_convert(tree: Tree, runs: int) -> list[Row]:
    """`inv convert` there and back, against `cp` and `sync` of the file that it wrote."""
    rows = []
    source, original = tree.chunks / "safetensors", tree.folder / "original"
    theirs, copy = tree.folder / "transformers", tree.folder / "copy"
    for read, to, out in ((source, "transformers", theirs), (theirs, "original", original)):

        def convert(read: Path = read, to: str = to, out: Path = out) -> Run:
            shutil.rmtree(out, ignore_errors=True)
            tree.warm(read)
            words = ["convert", str(read), "--to", to, "--out", str(out)]
            return run([str(INV), *words], tree.folder)

        def by_hand(out: Path = out) -> Run:
            copy.unlink(missing_ok=True)
            tree.warm(out)
            return run(f"cp {out}/model.safetensors {copy} && sync {copy}", tree.folder)

        ours, peer = in_turn(runs, convert, by_hand)
        what = f"`inv convert --to {to}`, ext4"
        times = f"{ratio(ours, peer):.2f} times its time"
        walls = f"{median(ours):.2f} s", f"{median(peer):.2f} s"
        rows.append(Row(f"{what} / `cp` + `sync`", *walls, times, "at most 1.5"))
        rows.append(_memory_row(what, ours))
    return rows


def measure_starts(tree: Tree, runs: int) -> list[Row]:
    """What a person waits for when there is nothing to do."""
    tree.clear()
    tree.inv("weights", "--no-smoke")
    bare = tree.folder / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "tasks.py").write_text(
        "from invoke import task\n\n\n@task\ndef nothing(c):\n    pass\n"
    )
    invoke = str(INV.with_name("invoke"))
    again, python, ours, peer = in_turn(
        max(runs, 9),
        lambda: tree.inv("weights", "--no-smoke"),
        lambda: run([sys.executable, "-c", "pass"], tree.folder),
        lambda: run([str(INV), "--list"], tree.folder),
        lambda: run([invoke, "--list"], bare),
    )
    over = median(again) - median(python)
    return [
        Row(
            "second `inv weights`, over the interpreter's start",
            f"{median(again):.2f} s",
            f"{median(python):.2f} s",
            f"{over:.2f} s over it",
            "at most 0.5 s over it",
        ),
        Row(
            "`inv --list` / bare `invoke --list`",
            f"{median(ours):.3f} s",
            f"{median(peer):.3f} s",
            f"{ratio(ours, peer):.2f} times its time",
            "at most 1.3",
        ),
    ]


def measure_limits(tree: Tree) -> list[Row]:
    """What hashing, the page cache and the disk can give here at most, for one core."""
    sample = tree.folder / "sample"
    _write_sample(sample)
    tree.warm(sample)
    one = "import hashlib,sys;hashlib.file_digest(open(sys.argv[1],'rb'),'sha256')"
    file = sample / "zeros"
    ours = run([sys.executable, "-c", one, str(file)], tree.folder)
    peer = run(["sha256sum", str(file)], tree.folder)
    read = run(["cat", str(file)], tree.folder)
    cached = run(f"cat {file} > {sample}/copy", tree.folder)
    direct = run(f"dd if={file} of={sample}/direct bs=4M oflag=direct conv=fsync", tree.folder)
    shutil.rmtree(sample)
    rows = [
        ("hashlib, one core", ours),
        ("sha256sum, one core", peer),
        ("reading the page cache", read),
        ("writing to the page cache (cat)", cached),
        ("writing past it (dd oflag=direct), durable", direct),
    ]
    return [
        Row(f"{what}, a GiB", f"{r.wall:.2f} s", "", f"{r.cpu:.2f} s cpu", "") for what, r in rows
    ]


def _write_sample(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "zeros").open("wb") as file:
        for _ in range(SAMPLE >> 20):
            file.write(bytes(1 << 20))


def _row(what: str, ours: list[Run], peer: list[Run], goal: str) -> Row:
    times = f"{ratio(peer, ours):.2f} times faster"
    return Row(what, f"{median(ours):.2f} s", f"{median(peer):.2f} s", times, goal)


def _memory_row(what: str, runs: list[Run]) -> Row:
    peak = max(r.memory for r in runs)
    return Row(f"{what}: peak memory", f"{peak / 2**20:.0f} MiB", "", "", "at most 150 MiB")


@contextlib.contextmanager
def xfs(folder: Path, size: int) -> Iterator[Path | None]:
    """A loop-mounted XFS of `size` bytes, or None where it cannot be had."""
    image, point = folder / "xfs.img", folder / "xfs"
    if os.geteuid() or not shutil.which("mkfs.xfs"):
        yield None
        return
    point.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run(["mkfs.xfs", "-q", image], check=True)
        # Past the page cache, or everything would be in it twice and not fit.
        attach = ["losetup", "--direct-io=on", "--find", "--show", str(image)]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        try:
            subprocess.run(["mount", device, point], check=True)
            try:
                yield point
            finally:
                subprocess.run(["umount", point], check=True)
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)
    finally:
        image.unlink()


def measure_xfs(tree: Tree, runs: int) -> list[Row]:
    """The same assembling where the file system shares blocks."""
    size = sum(f.stat().st_size for f in tree.chunks.rglob("*") if f.is_file())
    with xfs(tree.folder, max(3 * size, 1 << 30)) as point:
        if point is None:
            return [Row("XFS", "not measured", "", "needs root and mkfs.xfs", "")]
        there = Tree(point / "tree", tree.model)
        shutil.copytree(tree.chunks, there.chunks)
        shutil.copy(tree.folder / "SHA256SUMS", there.folder)
        return measure_assemble(there, runs, "loop-mounted XFS")


def main() -> None:
    """Measures everything, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="csm-1b-standin")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=ROOT / "output" / "bench")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args()
    if not (ROOT / "chunks" / options.model).is_dir():
        run([str(INV), "standin", "--name", options.model], ROOT)
    tree = Tree(options.dir, options.model)
    if not tree.chunks.exists():
        shutil.copytree(ROOT / "chunks" / options.model, tree.chunks, copy_function=os.link)
    try:
        rows = measure_limits(tree) + measure_starts(tree, options.runs)
        rows += measure_verify(tree, options.runs)
        rows += measure_assemble(tree, options.runs, "ext4")
        tree.clear()
        rows += measure_convert(tree, options.runs)
        rows += measure_xfs(tree, options.runs)
    finally:
        shutil.rmtree(options.dir)
    text = f"{machine()}; {options.runs} runs each, medians.\n\n{table(rows)}"
    print(text)
    if options.write:
        write_report(text)


if __name__ == "__main__":
    main()

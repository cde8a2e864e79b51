"""Tests that need root, other file systems, much disk or minutes: `make test-full`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clone import INV, Clone, Result

pytestmark = pytest.mark.full

MIB = 1 << 20
GIB = 1 << 30
TINY = ("--model", "csm-tiny")
WEIGHT_FILES = ("model.safetensors", "ckpt.pt")

#: The published sizes of CSM-1B, in bytes.
SIZES = {"model.safetensors": 6_211_186_784, "ckpt.pt": 6_219_618_714}

#: Bytes of memory that a run at full size may take: the weights are 80 times that.
MEMORY = 150 * MIB

#: Bytes of disk for a run at full size: chunk files, files, and one file that is split.
ROOM = 40 * GIB

#: Before the fifth read of a chunk file, another program fills the disk of the staging folder.
FILLING = """
import errno, itertools, os, threading

calls, preadv, lock = itertools.count(1), os.preadv, threading.Lock()

def fill():
    with open({filler!r}, "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2

def preadv_on_a_busy_disk(*arguments):
    with lock:
        if next(calls) == 5:
            fill()
    return preadv(*arguments)

os.preadv = preadv_on_a_busy_disk
"""

#: Runs a command and prints the most memory that it, or a child of it, held.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""

Disk = Callable[[str, int, Path], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A function that mounts a file system of a kind and size (bytes) on an empty folder."""
    with contextlib.ExitStack() as stack:

        def mount(kind: str, size: int, folder: Path) -> Path:
            if os.geteuid() != 0:
                pytest.skip("mounting a disk needs root")
            if not shutil.which(f"mkfs.{kind}"):
                pytest.skip(f"there is no mkfs.{kind} here")
            image = tmp_path / f"{kind}.img"
            with image.open("wb") as file:
                file.truncate(size)
            force = "-F" if kind == "ext4" else "-f"
            subprocess.run([f"mkfs.{kind}", "-q", force, image], check=True, capture_output=True)
            folder.mkdir(parents=True)
            mounted = subprocess.run(
                ["mount", "-o", "loop", image, folder], capture_output=True, text=True
            )
            if mounted.returncode:
                image.unlink()
                pytest.skip(f"no loop mount of {kind} here: {mounted.stderr.strip()}")
            stack.callback(image.unlink)
            stack.callback(lambda: subprocess.run(["umount", folder], check=True))
            return folder

        yield mount


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone in which nothing has run yet."""
    return Clone.make(tmp_path / "clone")


def files_are_right(clone: Clone) -> bool:
    return all((clone.installed / n).read_bytes() == clone.joined(n) for n in WEIGHT_FILES)


def files_below(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def result_of(result: Result) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    clone: Clone, disk: Disk
) -> None:
    """Where the files do not fit, weights ends with 7, says how much is missing, writes nothing."""
    staging = disk("ext4", 3 * MIB, clone.root / "output")
    free = shutil.disk_usage(staging).free
    manifest = tomllib.loads((clone.root / "manifests" / "csm-tiny.toml").read_text())
    needed = sum(artifact["size"] for artifact in manifest["artifact"])
    result = clone.inv("weights", *TINY, "--no-smoke")
    assert result.returncode == 7
    said = " ".join(result.stderr.split())
    assert f"expected {needed:,} bytes free found {free:,}, {needed - free:,} too few" in said
    assert files_below(staging) == []
    assert not clone.installed.exists()


def test_a_disk_that_fills_up_on_the_way_costs_nothing_that_was_verified(
    clone: Clone, disk: Disk
) -> None:
    """When another program fills the disk, weights ends with 7; with room again it goes on."""
    staging = disk("ext4", 8 * MIB, clone.root / "output")
    filler = staging / "filler"
    clone.fake("sitecustomize", FILLING.format(filler=str(filler)))
    result = clone.inv("weights", *TINY, "--no-smoke")
    assert result.returncode == 7, result.stderr
    assert "No space left on device" in result.stderr
    assert files_below(clone.installed) == [".lock"]
    (clone.extra / "sitecustomize.py").unlink()
    filler.unlink()
    again = clone.inv("weights", *TINY, "--no-smoke")
    assert again.returncode == 0, again.stderr
    assert "verified in an earlier run" in " ".join(again.stdout.split())
    assert files_are_right(clone)


def test_a_destination_on_another_disk_gets_verified_copies(clone: Clone, disk: Disk) -> None:
    """From one file system to another files are copied, verified there, and removed here."""
    disk("ext4", 8 * MIB, clone.root / "models")
    result = clone.inv("weights", *TINY, "--no-smoke")
    assert result.returncode == 0, result.stderr
    assert "install a copy" in result.stdout
    assert files_are_right(clone)
    assert [name for name in files_below(clone.staged) if name in WEIGHT_FILES] == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_sharing_file_systems_assemble_without_more_disk(
    tmp_path: Path, disk: Disk, kind: str
) -> None:
    """On XFS and Btrfs 128 MiB of files need less than 2 MiB of disk beside their chunk files."""
    clone = Clone.make(disk(kind, 512 * MIB, tmp_path / "disk") / "clone")
    content = {name: random.Random(name).randbytes(64 * MIB) for name in ("a.bin", "b.bin")}
    for name, data in content.items():
        (clone.root / name).write_bytes(data)
        into = ("--chunks", f"chunks/toy/{name}", "--manifest", "manifests/toy.toml")
        assert clone.inv("split", name, "--size", "32MiB", *into).returncode == 0
        (clone.root / name).unlink()
    toy = ("--model", "toy", "--no-smoke")
    plan = result_of(clone.inv("weights", *toy, "--dry", "--json"))
    before = used(clone.root)
    result = clone.inv("weights", *toy)
    assert result.returncode == 0, result.stderr
    assert plan["bytes_to_write"] == 0
    assert used(clone.root) - before < 2 * MIB
    for name, data in content.items():
        assert (clone.root / "models" / "toy" / name).read_bytes() == data


def used(folder: Path) -> int:
    """Bytes used on the file system of a folder, once everything is written out."""
    os.sync()
    return shutil.disk_usage(folder).used


def measured(clone: Clone, *arguments: str) -> tuple[int, str]:
    """The most memory that `inv` held, in bytes, and its stderr."""
    command = [sys.executable, "-S", "-c", MEASURED, str(INV), *arguments]
    result = subprocess.run(
        command, cwd=clone.root, env=clone.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout), result.stderr


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Clone]:
    """A clone on a disk with room for a run at full size, removed afterwards."""
    free = shutil.disk_usage(tmp_path).free
    if free < ROOM:
        pytest.skip(f"needs {ROOM:,} bytes of disk at {tmp_path}, {free:,} are free")
    clone = Clone.make(tmp_path / "clone")
    yield clone
    shutil.rmtree(clone.root)


def verdicts(data: dict[str, Any], gate: str) -> dict[str, bool | None]:
    """The verdict of a gate on each weight file."""
    return {r["path"]: r["ok"] for r in data["gates"] if r["gate"] == gate and r["path"] in SIZES}


def test_a_run_at_full_size(roomy: Clone) -> None:
    """A stand-in of CSM-1B's sizes is installed in little memory, and is not taken for CSM-1B."""
    standin = ("--model", "csm-1b-standin")
    made, _ = measured(roomy, "standin")
    status = roomy.inv("status", *standin)
    assert status.returncode == 0
    assert status.stdout.count("assemble from 6 chunk files") == 2
    held, said = measured(roomy, "weights", *standin, "--no-smoke")
    assert "OK: installed and verified" in said
    assert max(made, held) <= MEMORY
    placed = roomy.root / "models" / "csm-1b-standin"
    assert {name: (placed / name).stat().st_size for name in SIZES} == SIZES
    refused = roomy.run(
        *(INV, "verify", "--model", "csm-1b", "--only", "safetensors,ckpt"),
        *("--dest", "models/csm-1b-standin", "--json"),
        limit=1800,
    )
    data = result_of(refused)
    assert (refused.returncode, data["exit_code"]) == (4, 4)
    for gate in ("present", "size", "structure"):
        assert verdicts(data, gate) == dict.fromkeys(SIZES, True)
    assert verdicts(data, "digest") == dict.fromkeys(SIZES, False)
    assert {finding["kind"] for finding in data["findings"]} == {"wrong digest"}

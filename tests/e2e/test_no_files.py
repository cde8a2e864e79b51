"""Pipes, devices, folders and endless files where a command looks for a file: nothing waits."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.clone import Clone

NAME = "model.safetensors"
CSM_TINY = ("--model", "csm-tiny")

#: Seconds that a command may take; with nothing in its way it takes less than one.
LIMIT = 60.0


def _device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make a device")
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "device": _device,
    "folder": Path.mkdir,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /proc": lambda path: path.symlink_to("/proc/self/environ"),
}


@dataclass(frozen=True)
class Place:
    """A file of csm-tiny below the root, the commands that look for it, and their exit codes.

    Without `installed` the model is not there, and a run that makes it was killed.
    """

    path: str
    runs: tuple[tuple[str, int], ...]
    installed: bool = True


#: What is in the way of a rename is reported. What is only read counts as absent.
PLACES = {
    "receipt": Place(f"models/csm-tiny/.csm-weights/{NAME}.json", (("status", 0),)),
    "installed file": Place(f"models/csm-tiny/{NAME}", (("status", 0), ("verify", 4))),
    "manifest": Place("manifests/csm-tiny.toml", (("status", 4), ("weights --no-smoke", 4))),
    "list of digests": Place(
        "models/csm-tiny/SHA256SUMS", (("verify --sums models/csm-tiny/SHA256SUMS", 4),)
    ),
    "attestation": Place(
        "models/csm-tiny/a.json", (("verify --attestation models/csm-tiny/a.json", 4),)
    ),
    "journal": Place(
        f"output/csm-tiny/{NAME}.partial.journal",
        (("status", 0), ("weights --no-smoke", 4), ("clean", 0)),
        installed=False,
    ),
    "partial": Place(
        f"output/csm-tiny/{NAME}.partial",
        (("status", 0), ("weights --no-smoke", 4), ("clean", 0)),
        installed=False,
    ),
    "lock": Place(
        "output/csm-tiny/.lock", (("status", 0), ("weights --no-smoke", 4)), installed=False
    ),
    "chunk file": Place(
        f"chunks/csm-tiny/safetensors/{NAME}.part-ab",
        (("status", 0), ("weights --no-smoke", 4)),
        installed=False,
    ),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A checkout in which csm-tiny is installed."""
    clone = Clone.make(tmp_path_factory.mktemp("no-files") / "root")
    done = clone.inv("weights", *CSM_TINY, "--no-smoke")
    assert done.returncode == 0, done.stderr
    return clone


@pytest.fixture
def clone(installed: Clone, tmp_path: Path) -> Iterator[Clone]:
    """The same, put back afterwards; the folders are copied aside, with their times."""
    folders = [installed.root / name for name in ("models", "output", "manifests", "chunks")]
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    yield installed
    for folder in folders:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / folder.name, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_at_once(clone: Clone, name: str, kind: str) -> None:
    """Each command ends soon, with its exit code and without a traceback."""
    place = PLACES[name]
    path = clone.root / place.path
    if not place.installed:
        shutil.rmtree(clone.installed)
        (clone.staged / f"{NAME}.partial").write_bytes(b"unfinished")
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    for command, code in place.runs:
        task, *options = command.split()
        done = clone.inv(task, *CSM_TINY, *options, limit=LIMIT)
        assert "Traceback" not in done.stderr
        assert done.returncode == code, (command, done.stderr)


def test_a_pipe_in_place_of_the_smoke_report_is_replaced(clone: Clone) -> None:
    """It counts as no report: the smoke test is run, and its report takes the place."""
    pytest.importorskip("torch")
    path = clone.installed / ".csm-weights" / "smoke-report"
    os.mkfifo(path)
    done = clone.inv("weights", *CSM_TINY)
    assert done.returncode == 0, done.stderr
    assert path.is_file()

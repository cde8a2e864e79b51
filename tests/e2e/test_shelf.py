"""Weights from a shelf of disks: `--url file:///…`, folders that are only read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.clone import EMBEDDED, Clone
from tests.support.toy import flip

MODEL = ("--model", "csm-tiny", "--only", "safetensors")
WEIGHTS = ("weights", "--no-smoke", *MODEL)
NAME = "model.safetensors"


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone of this checkout."""
    return Clone.make(tmp_path / "clone")


@pytest.fixture
def shelf(clone: Clone, tmp_path: Path) -> Path:
    """A folder into which the clone's chunk files of csm-tiny were moved, as a tree."""
    folder = tmp_path / "mnt" / "my disk"
    folder.mkdir(parents=True)
    shutil.move(clone.root / EMBEDDED, folder / EMBEDDED)
    return folder


def url(folder: Path) -> str:
    """The option that names a folder."""
    return f"--url={folder.as_uri()}"


def parts(folder: Path) -> list[Path]:
    """The chunk files of the weights below a folder."""
    return sorted(folder.rglob(f"{NAME}.part-*"))


def test_chunk_files_of_a_folder_become_the_file(clone: Clone, shelf: Path) -> None:
    """They may lie as in a checkout; nothing in the folder is changed."""
    before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
    expected = b"".join(part.read_bytes() for part in parts(shelf))
    done = clone.inv(*WEIGHTS, url(shelf))
    assert done.returncode == 0, done.stderr
    assert (clone.installed / NAME).read_bytes() == expected
    assert {path: path.stat().st_mtime_ns for path in shelf.rglob("*")} == before


def test_a_whole_file_of_a_folder_is_taken(clone: Clone, tmp_path: Path) -> None:
    """A folder may hold the file itself, as one that a program keeps its models in."""
    folder = tmp_path / "models" / "sesame"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(clone.joined(NAME))
    shutil.rmtree(clone.root / EMBEDDED)
    done = clone.inv(*WEIGHTS, "--source=mirror", url(folder))
    assert done.returncode == 0, done.stderr


def test_disks_are_read_one_after_the_other(clone: Clone, shelf: Path, tmp_path: Path) -> None:
    """What the first disk has is kept while the next one is inserted; loose chunk files do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    first, second = parts(shelf)[:4], parts(shelf)[4:]
    for part in first:
        shutil.copy(part, disk)
    done = clone.inv(*WEIGHTS, url(disk))
    assert done.returncode == 3
    assert f"{second[0].name}" in done.stderr
    assert first[0].name not in done.stderr
    assert "insert the next disk" in done.stderr
    doctor = clone.inv("doctor", *MODEL, "--no-smoke", url(disk))
    assert doctor.returncode == 3
    assert second[0].name in doctor.stderr
    for part in disk.iterdir():
        part.unlink()
    for part in second:
        shutil.copy(part, disk)
    done = clone.inv(*WEIGHTS, url(disk))
    assert done.returncode == 0, done.stderr
    assert "4 pieces verified in an earlier run" in " ".join(done.stdout.split())


def test_several_disks_at_once_are_one_source(clone: Clone, shelf: Path, tmp_path: Path) -> None:
    """`--url` may be repeated."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for part in parts(shelf)[:3]:
        shutil.move(part, disk)
    assert clone.inv(*WEIGHTS, url(shelf), url(disk)).returncode == 0


def test_a_wrong_byte_on_a_disk_is_refused(clone: Clone, shelf: Path, tmp_path: Path) -> None:
    """A folder is verified like any source: the next one is asked for the piece that is wrong."""
    good = tmp_path / "good"
    shutil.copytree(shelf, good)
    flip(parts(shelf)[2], 1000)
    done = clone.inv(*WEIGHTS, url(shelf))
    assert done.returncode == 4
    assert str(parts(shelf)[2]) in done.stderr.replace("\n", "")
    assert not (clone.installed / NAME).exists()
    assert clone.inv(*WEIGHTS, url(shelf), url(good)).returncode == 0


def test_a_disk_that_is_not_mounted_is_named(clone: Clone, shelf: Path) -> None:
    """The folder's name and what helps are told where nothing else has the file."""
    done = clone.inv(*WEIGHTS, "--source=mirror", url(shelf.parent / "gone"))
    assert done.returncode == 3
    assert str(shelf.parent / "gone") in done.stderr
    assert "insert the disk" in done.stderr

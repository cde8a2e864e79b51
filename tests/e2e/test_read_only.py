"""A checkout that may only be read, with a volume for the files: an image, a shared disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csm_weights.pipeline.actions import Keep, Move
from csm_weights.store.journal import journal_path, partial_path
from tests.support.clone import INV, Clone, Result
from tests.support.privileges import UNPRIVILEGED

MODEL = ("--model", "csm-tiny", "--only", "safetensors")
NAME = "model.safetensors"


def by_permissions(root: Path) -> Callable[[], object]:
    """Take the permission to write from every folder; return what gives it back."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        folder.chmod(0o555)

    def undo() -> None:
        for folder in folders:
            folder.chmod(0o755)

    return undo


def by_mount(root: Path) -> Callable[[], object]:
    """Mount a folder over itself, read-only; return what undoes that."""
    for options in (["--bind", str(root)], ["-o", "remount,bind,ro"]):
        if subprocess.run(["mount", *options, str(root)], capture_output=True).returncode:
            pytest.skip("bind mounts are refused here")
    return lambda: subprocess.run(["umount", str(root)], check=True)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A checkout with Python's caches in it, so that nothing has to be written there."""
    made = Clone.make(tmp_path / "root")
    assert made.inv("--list").returncode == 0
    return made


@pytest.fixture(params=[by_permissions, by_mount])
def read_only(request: pytest.FixtureRequest, clone: Clone) -> Iterator[Clone]:
    """That checkout, which may only be read now."""
    undo = request.param(clone.root)
    yield clone
    undo()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder outside the checkout that takes files."""
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def inv(clone: Clone, *words: str) -> Result:
    """Run `inv`, as root without its privileges."""
    return clone.run(*UNPRIVILEGED, INV, *words)


def receipts(folder: Path) -> dict[str, bytes]:
    """The receipts of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.glob(".csm-weights/*.json")}


def test_the_volume_has_the_files_and_the_state(read_only: Clone, volume: Path) -> None:
    """Weights, status, verify and clean need no option but --dest, and a second run no hashing."""
    before = read_only.tree()
    at = (*MODEL, "--dest", str(volume / "csm"))
    done = inv(read_only, "weights", *at, "--no-smoke")
    assert done.returncode == 0, done.stderr
    assert (volume / "csm" / NAME).read_bytes() == read_only.joined(NAME)
    known = receipts(volume / "csm")
    assert known.keys() == {f"{NAME}.json", "config.json.json"}
    again = inv(read_only, "weights", *at, "--no-smoke", "--json")
    assert {step["verb"] for step in json.loads(again.stdout)["steps"]} <= {Keep.verb}
    for task in ("status", "verify"):
        assert inv(read_only, task, *at, *["--check"] * (task == "status")).returncode == 0
    cleaned = inv(read_only, "clean", "--model", "csm-tiny", "--dest", str(volume / "csm"))
    assert (cleaned.returncode, cleaned.stdout) == (0, "nothing to remove\n")
    assert receipts(volume / "csm") == known
    assert read_only.tree() == before


@pytest.mark.parametrize("option", [False, True])
def test_what_was_begun_is_gone_on_with_and_cleaned(
    option: bool, read_only: Clone, volume: Path
) -> None:
    """The unfinished file lies beside the installed ones, or where --staging says."""
    staged = volume / ("work" if option else "csm/.csm-weights/staging") / NAME
    at = ("--dest", str(volume / "csm"), *["--staging", str(volume / "work")] * option)
    partial, journal = partial_path(staged), journal_path(staged)
    partial.parent.mkdir(parents=True)
    first = read_only.chunk_files(NAME)[0].read_bytes()
    partial.write_bytes(first)
    status = json.loads(inv(read_only, "status", *MODEL, *at, "--json").stdout)
    assert status["bytes_free"] and not status["ok"]
    journal.write_text("{}\n")
    cleaned = inv(read_only, "clean", "--model", "csm-tiny", *at)
    assert cleaned.stdout.splitlines() == [str(partial), str(journal)]
    done = inv(read_only, "fetch", *MODEL, *at)
    assert done.returncode == 0, done.stderr
    assert (volume / "csm" / NAME).read_bytes() == read_only.joined(NAME)


def test_staging_is_a_folder_for_the_parts_of_the_line(clone: Clone, volume: Path) -> None:
    """Fetched into it, placed from it: in a checkout that may be written to as well."""
    work = ("--staging", str(volume / "work"))
    assert (
        clone.make_target("fetch", "MODEL=csm-tiny", f"STAGING={volume / 'work'}").returncode == 0
    )
    assert (volume / "work" / NAME).is_file() and not clone.staged.exists()
    assert inv(clone, "status", *MODEL, *work).stdout.count(Move.verb) == 2
    placed = inv(clone, "place", *MODEL, *work)
    assert placed.returncode == 0, placed.stderr
    assert (clone.installed / NAME).is_file() and not (volume / "work" / NAME).exists()


def test_without_a_folder_that_takes_files_both_options_are_advised(read_only: Clone) -> None:
    """Neither staging nor destination can be written: exit code 7, and what helps."""
    done = inv(read_only, "weights", *MODEL, "--no-smoke")
    assert (done.returncode, "--staging and --dest name other" in done.stderr) == (
        7,
        True,
    ), done.stderr


def test_a_task_advises_only_folders_that_it_can_be_given(read_only: Clone) -> None:
    """What split cannot write is told without options that split lacks."""
    done = inv(read_only, "split", "Makefile")
    assert (done.returncode, "not writable" in done.stderr) == (7, True)
    assert "--staging" not in done.stderr and "--dest" not in done.stderr


@pytest.mark.parametrize("make", [by_permissions, by_mount])
def test_what_was_installed_before_is_known_and_not_hashed_again(
    make: Callable[[Path], Callable[[], object]], clone: Clone
) -> None:
    """The receipts of a checkout that could be written to hold when it no longer can."""
    assert clone.inv("weights", *MODEL, "--no-smoke").returncode == 0
    before, undo = clone.tree(), make(clone.root)
    try:
        for words in (["status", "--check"], ["weights", "--no-smoke", "--json"], ["verify"]):
            done = inv(clone, *words, *MODEL)
            assert done.returncode == 0, done.stderr
            if "--json" in words:
                gates = json.loads(done.stdout)["gates"]
                assert sum("by its receipt" in gate["found"] for gate in gates) == 2
        assert clone.tree() == before
    finally:
        undo()


@pytest.mark.parametrize("make", [by_permissions, by_mount])
def test_what_was_staged_before_is_copied(
    make: Callable[[Path], Callable[[], object]], clone: Clone, volume: Path
) -> None:
    """Files that a run has left in output/ are taken from there, though nothing else has them."""
    assert clone.inv("fetch", *MODEL).returncode == 0
    content = clone.joined(NAME)
    for part in clone.chunk_files(NAME):
        part.unlink()
    before, undo = clone.tree(), make(clone.root)
    try:
        done = inv(clone, "weights", *MODEL, "--no-smoke", "--dest", str(volume / "csm"))
        assert done.returncode == 0, done.stderr
        assert (volume / "csm" / NAME).read_bytes() == content
        assert clone.tree() == before
    finally:
        undo()


def test_receipts_of_staged_files_count_as_before(clone: Clone) -> None:
    """What a former version left in output/ is moved, and its bytes are hashed by nobody."""
    assert clone.inv("fetch", *MODEL).returncode == 0
    done = clone.inv("weights", *MODEL, "--no-smoke", "--json")
    verbs = {step["verb"] for step in json.loads(done.stdout)["steps"]}
    assert (done.returncode, verbs) == (0, {Move.verb})

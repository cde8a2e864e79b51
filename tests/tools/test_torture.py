"""A few kills, power cuts, races and swaps of each command, as `make torture` makes them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.support.clone import REPOSITORY
from tools.torture import kills, power, races, script, swaps
from tools.torture.checks import Baseline, baseline, check_after_stop, differences
from tools.torture.disk import FOLDER, Disk
from tools.torture.fork_server import Child
from tools.torture.sandbox import COMMANDS, Sandbox, Sandboxes
from tools.torture.tally import TimeBox
from tools.torture.tracing import Event

NAMES = [command.name for command in COMMANDS.values()]
INV_NAMES = [command.name for command in COMMANDS.values() if not command.is_script]

#: Bytes of memory that are enough for the sandboxes of several test processes.
ROOM = 512 << 20


@pytest.fixture(scope="module")
def sandboxes() -> Iterator[Sandboxes]:
    """A factory for all tests of a process, in memory where there is room, and on disk."""
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=_memory()))
    other = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        with Sandboxes.open(folder, other) as opened:
            yield opened
    finally:
        shutil.rmtree(folder)


def _memory() -> Path | None:
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    return memory if has_room else None


def at(before: Baseline, name: str, pattern: str) -> int:
    """The number of the first call of that name on a path that matches."""
    return next(
        event.number
        for event in before.events
        if event.name == name and fnmatchcase(event.other or event.path, pattern)
    )


def killed(sandboxes: Sandboxes, command: str, name: str, pattern: str) -> list[str]:
    """What is wrong after a command was killed right after a call, and run again."""
    before = baseline(sandboxes, COMMANDS[command])
    sandbox = sandboxes.sandbox(COMMANDS[command])
    injection = replace(
        sandbox.injection, at=at(before, name, pattern), when="after", one_core=True
    )
    assert sandbox.run(injection).code == -signal.SIGKILL
    wrong = check_after_stop(sandbox, before)
    sandboxes.remove(sandbox)
    return wrong


# ---- killed at any call


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_loses_nothing_and_goes_on(sandboxes: Sandboxes, name: str) -> None:
    """Killed at random calls, nothing is wrong, lost or fetched again, and a plain run ends it."""
    tally = kills.at_calls(sandboxes, COMMANDS[name], random.Random(7), TimeBox.of(30), most=4)
    assert (tally.tries, tally.wrong) == (4, [])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
@pytest.mark.parametrize("name", ["fetch (chunks)", "fetch (Hub)", "place", "seed-cache", "split"])
def test_an_interrupted_command_says_so(
    sandboxes: Sandboxes, name: str, stop: signal.Signals
) -> None:
    """Ctrl-C and a termination signal in the middle end with 130, a message and no traceback."""
    sandbox = sandboxes.sandbox(COMMANDS[name])
    result = sandbox.run(replace(sandbox.injection, at=12, signal=int(stop), one_core=True))
    sandboxes.remove(sandbox)
    assert (result.code, "interrupted" in result.output) == (130, True)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupted_script_says_so(sandboxes: Sandboxes, stop: signal.Signals) -> None:
    """recombine.sh ends with 130 and leaves no partial."""
    sandbox = sandboxes.sandbox(COMMANDS["recombine.sh"])
    result = script.run_script(sandbox, at=20, stop=int(stop))
    left = [name for name in sandbox.listing() if "recombine-partial" in name]
    sandboxes.remove(sandbox)
    assert (result.code, "interrupted" in result.output, left) == (130, True, [])


def test_no_journal_outlives_its_file(sandboxes: Sandboxes) -> None:
    """Killed just after a file got its name, the plain run removes the journal."""
    assert killed(sandboxes, "fetch (chunks)", "rename", "*output/toy/a.bin") == []


def test_no_receipt_outlives_its_file(sandboxes: Sandboxes) -> None:
    """Killed just after a file was moved, the plain run removes the receipt in output/."""
    assert killed(sandboxes, "place", "rename", "*models/toy/.csm-weights/a.bin.json") == []


def test_no_second_copy_outlives_a_move_to_another_disk(sandboxes: Sandboxes) -> None:
    """Killed just after a copy got its name, the plain run removes the staged file."""
    assert killed(sandboxes, "place (other disk)", "rename", "*/a.bin") == []


def test_no_probe_outlives_its_run(sandboxes: Sandboxes) -> None:
    """Killed while it tries to punch a hole, the plain run removes the file of the trial."""
    assert killed(sandboxes, "fetch --consume", "create", "*/.punch.*") == []


# ---- a power cut


@pytest.mark.parametrize("name", INV_NAMES)
def test_a_power_cut_lets_no_wrong_byte_in(sandboxes: Sandboxes, name: str) -> None:
    """On every disk that a cut may leave nothing verified is lost, and a plain run ends it."""
    tally = power.cuts(sandboxes, COMMANDS[name], random.Random(3), TimeBox.of(30), most=5)
    assert (tally.tries, tally.wrong) == (5, [])


@pytest.mark.parametrize(
    ("name", "lost", "found"),
    [
        (
            "fetch (chunks)",
            "fsync */output/toy/a.bin.partial",
            "counts as verified and holds wrong",
        ),
        ("fetch (chunks)", "fsync */output/toy", "is gone"),
        ("fetch --consume", "fdatasync */output/toy/b.bin.partial", "the plain run ends with"),
    ],
    ids=["of the file", "of its folder", "before a hole"],
)
def test_a_missing_sync_is_found(sandboxes: Sandboxes, name: str, lost: str, found: str) -> None:
    """Without one fsync, disks are found on which a file is wrong, gone, or cannot be finished."""
    command, rng = COMMANDS[name], random.Random(3)
    tally = power.cuts(sandboxes, command, rng, TimeBox.of(30), most=16, lost_calls=lost)
    assert [text for text in tally.wrong if found in text]


def test_a_new_folder_is_durable_too(sandboxes: Sandboxes) -> None:
    """With POSIX's guarantees alone, an installed file survives a power cut."""
    command, rng = COMMANDS["place"], random.Random(3)
    tally = power.cuts(sandboxes, command, rng, TimeBox.of(30), most=12, strict=True)
    assert tally.wrong == []


def disk(tmp_path: Path) -> Disk:
    """A disk with one folder and a file in it."""
    (tmp_path / "file").write_bytes(b"old")
    return Disk((tmp_path,), strict=True)


def write(folder: Path, data: bytes) -> list[Event]:
    """The events of writing a new file and renaming it over the other one."""
    new = str(folder / "new")
    return [
        Event("create", new, inode=-5),
        Event("write", new, inode=-5, data=data),
        Event("rename", new, -5, str(folder / "file")),
    ]


def leavings(disk: Disk, path: Path) -> set[bytes]:
    """The contents that cuts leave under a name."""
    rng = random.Random(1)
    found = set()
    for _ in range(60):
        number = disk.survivors(rng).get(str(path))
        assert isinstance(number, int) and number != FOLDER
        found.add(disk.files[number].surviving(rng, rng.choice(("all", "none", "size"))))
    return found


def test_an_unsynced_write_may_be_lost_behind_its_name(tmp_path: Path) -> None:
    """A rename may survive without the bytes: old, new, empty and zeros are all found."""
    model = disk(tmp_path)
    for event in write(tmp_path, b"new"):
        model.feed(event)
    assert leavings(model, tmp_path / "file") == {b"old", b"new", b"", b"\0\0\0"}


def test_synced_bytes_under_an_unsynced_name(tmp_path: Path) -> None:
    """Once the file is synced, the name has all of the old bytes or all of the new."""
    model = disk(tmp_path)
    create, data, rename = write(tmp_path, b"new")
    for event in (create, data, Event("fsync", data.path, -5), rename):
        model.feed(event)
    assert leavings(model, tmp_path / "file") == {b"old", b"new"}


def test_synced_bytes_under_a_synced_name_stay(tmp_path: Path) -> None:
    """With the folder synced as well, only one disk is possible."""
    model = disk(tmp_path)
    create, data, rename = write(tmp_path, b"new")
    for event in (create, data, Event("fsync", data.path, -5), rename):
        model.feed(event)
    model.feed(Event("fsync", str(tmp_path)))
    assert leavings(model, tmp_path / "file") == {b"new"}


# ---- races


@pytest.mark.parametrize("name", ["fetch (chunks)", "fetch (Hub)", "weights (chunks)", "place"])
def test_two_at_once_do_the_work_once(sandboxes: Sandboxes, name: str) -> None:
    """Two runs in one tree end well, and fetch or write about as much as one."""
    before = baseline(sandboxes, COMMANDS[name])
    outcome, wrong = races.race(sandboxes, before, 2, False, random.Random(5))
    assert (outcome, wrong) == ("exit 0", [])


@pytest.mark.parametrize("name", ["fetch (chunks)", "fetch (Hub)", "weights (chunks)"])
def test_without_locks_no_wrong_byte_gets_a_name(sandboxes: Sandboxes, name: str) -> None:
    """Where flock does nothing, three runs at once leave right bytes, and a plain run ends it."""
    before = baseline(sandboxes, COMMANDS[name])
    _, wrong = races.race(sandboxes, before, 3, True, random.Random(5))
    assert [t for t in wrong if "wrong bytes" in t or t.startswith("the plain run")] == []


@pytest.mark.parametrize(
    ("name", "hold"),
    [("split", "rename *long.bin.part-aa"), ("seed-cache", "read *models/toy/a.bin")],
)
def test_a_second_run_waits_for_the_first(sandboxes: Sandboxes, name: str, hold: str) -> None:
    """While one run is at work a second one says that it waits; then both end with 0."""
    before = baseline(sandboxes, COMMANDS[name])
    sandbox = sandboxes.sandbox(COMMANDS[name])
    if name == "seed-cache":  # without receipts there is something to read and to hash
        shutil.rmtree(sandbox.root / "models/toy/.csm-weights")
    held = sandbox.home.with_suffix(".held")
    injection = replace(sandbox.injection, one_core=True, hold=hold, held=str(held))
    first = sandbox.start(injection)
    result, second = swaps.release(sandbox, first, held, lambda: _waiting(sandbox))
    assert (result.code, sandbox.wait(second).code) == (0, 0)
    assert differences(sandbox, before) == []
    sandboxes.remove(sandbox)


def _waiting(sandbox: Sandbox, without_locks: bool = False) -> Child:
    """Start a second run, and return once it says that it waits for the first."""
    child = sandbox.start(replace(sandbox.injection, without_locks=without_locks))
    end = time.monotonic() + 20
    while "waiting for another run" not in child.out.read_text():
        assert time.monotonic() < end, child.out.read_text()
        time.sleep(0.002)
    return child


@pytest.mark.parametrize(
    ("name", "hold"),
    [("fetch (chunks)", "rename *output/toy/a.bin"), ("place", "rename *models/toy/a.bin")],
)
def test_a_second_run_waits_where_locks_do_nothing(
    sandboxes: Sandboxes, name: str, hold: str
) -> None:
    """Where flock does nothing, a marker file makes the second run wait; then both end with 0."""
    sandbox = sandboxes.sandbox(COMMANDS[name])
    first, held = _held_without_locks(sandbox, hold)
    waiting = lambda: _waiting(sandbox, without_locks=True)  # noqa: E731
    result, second = swaps.release(sandbox, first, held, waiting)
    assert (result.code, sandbox.wait(second).code) == (0, 0)
    assert sandbox.wrong_bytes() == []
    sandboxes.remove(sandbox)


def test_the_marker_of_a_killed_run_is_taken_over(sandboxes: Sandboxes) -> None:
    """Where flock does nothing, a run that was killed keeps nobody out."""
    sandbox = sandboxes.sandbox(COMMANDS["fetch (chunks)"])
    first, held = _held_without_locks(sandbox, "rename *output/toy/a.bin")
    swaps.release(sandbox, first, held, lambda: os.kill(first.pid, signal.SIGKILL))
    marker = sandbox.root / "output/toy/.lock.held"
    assert marker.exists()
    assert sandbox.run(replace(sandbox.injection, without_locks=True)).code == 0
    assert not marker.exists()
    sandboxes.remove(sandbox)


def _held_without_locks(sandbox: Sandbox, hold: str) -> tuple[Child, Path]:
    """Start a run where locks do nothing that is held at a call; return it and what holds it."""
    held = sandbox.home.with_suffix(".held")
    without_locks = replace(sandbox.injection, without_locks=True, one_core=True)
    return sandbox.start(replace(without_locks, hold=hold, held=str(held))), held


def test_nothing_is_consumed_where_locks_do_nothing(sandboxes: Sandboxes) -> None:
    """Two runs would overwrite the only copy with holes, so not even one is let in: exit 7."""
    sandbox = sandboxes.sandbox(COMMANDS["fetch --consume"])
    before = sandbox.listing()
    result = sandbox.run(replace(sandbox.injection, without_locks=True))
    assert (result.code, "locks" in result.output) == (7, True)
    assert set(before) <= set(sandbox.listing())
    assert (sandbox.run().code, sandbox.wrong_bytes()) == (0, [])
    sandboxes.remove(sandbox)


# ---- swapped between check and use

_LAST = "the verified file is exchanged at the last moment"


@pytest.mark.parametrize("swap", [s for s in swaps.SWAPS if s.what != _LAST], ids=lambda s: s.what)
def test_what_is_swapped_is_refused(sandboxes: Sandboxes, swap: swaps.Swap) -> None:
    """No wrong byte is installed, nothing outside is written to, and a plain run ends it."""
    _, wrong = swaps.done(sandboxes, swap, baseline(sandboxes, COMMANDS[swap.command]))
    assert wrong == []


def test_a_file_exchanged_at_the_last_moment_is_not_left_under_its_name(
    sandboxes: Sandboxes,
) -> None:
    """A verified file that is exchanged between the last check and the rename is removed again."""
    swap = next(s for s in swaps.SWAPS if s.what == _LAST)
    _, wrong = swaps.done(sandboxes, swap, baseline(sandboxes, COMMANDS[swap.command]))
    assert wrong == []


@pytest.mark.full
def test_consuming_goes_on_with_the_room_it_had() -> None:
    """Killed in the middle with 66 MiB free, each next run goes on, and no byte is lost."""
    command = [sys.executable, "-m", "tools.torture.room", "--gib", "0.25", "--kills", "4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr

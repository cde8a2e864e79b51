"""A slice of the torture harness: a few kills, power cuts, rivals and swaps of each command."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tools.torture import kills, power, rivals, script, swaps
from tools.torture.calls import Event
from tools.torture.checks import Undisturbed, after_stop, undisturbed, whole
from tools.torture.disk import FOLDER, Disk
from tools.torture.forks import Child, Ended
from tools.torture.scene import COMMANDS, Bench, Scene, can_consume, commands
from tools.torture.tally import Clock

NAMES = [command.name for command in commands()]
INV_NAMES = [command.name for command in commands() if not command.is_script]

#: Bytes of memory that are enough for the scenes of several test processes.
ROOM = 512 << 20


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """A bench for all tests of a process: in memory, where an fsync costs nothing, and on disk."""
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=_memory()))
    other = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        with Bench.open(folder, other) as opened:
            yield opened
    finally:
        shutil.rmtree(folder)


def _memory() -> Path | None:
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    return memory if has_room else None


def at(before: Undisturbed, name: str, pattern: str) -> int:
    """The number of the first call of that name about a path that fits."""
    return next(
        event.number
        for event in before.events
        if event.name == name and fnmatchcase(event.other or event.path, pattern)
    )


def killed(bench: Bench, command: str, name: str, pattern: str) -> list[str]:
    """What is wrong once a command was killed right after a call, and run again."""
    before = undisturbed(bench, COMMANDS[command])
    scene = bench.scene(COMMANDS[command])
    orders = replace(scene.orders, at=at(before, name, pattern), when="after", one_core=True)
    assert scene.run(orders).code == -signal.SIGKILL
    wrong = after_stop(scene, before)
    bench.drop(scene)
    return wrong


# ---- killed anywhere


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_loses_nothing_and_goes_on(bench: Bench, name: str) -> None:
    """At calls of chance: no wrong byte, nothing lost or asked for again, a plain run ends it."""
    tally = kills.deliberate(bench, COMMANDS[name], random.Random(7), Clock.of(30), most=4)
    assert (tally.tries, tally.wrong) == (4, [])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
@pytest.mark.parametrize("name", ["fetch (parts)", "fetch (Hub)", "place", "seed-cache", "split"])
def test_an_interrupted_command_says_so(bench: Bench, name: str, stop: signal.Signals) -> None:
    """Ctrl-C and a termination signal in the middle end with 130, a message and no traceback."""
    scene = bench.scene(COMMANDS[name])
    ended = scene.run(replace(scene.orders, at=12, signal=int(stop), one_core=True))
    bench.drop(scene)
    assert (ended.code, "interrupted" in ended.said) == (130, True)
    assert "Traceback" not in ended.said


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupted_script_says_so(bench: Bench, stop: signal.Signals) -> None:
    """recombine.sh ends with 130 and leaves no partial."""
    scene = bench.scene(COMMANDS["recombine.sh"])
    ended = script.run_script(scene, at=20, stop=int(stop))
    left = [name for name in scene.listing() if "recombine-partial" in name]
    bench.drop(scene)
    assert (ended.code, "interrupted" in ended.said, left) == (130, True, [])


def test_no_journal_outlives_its_file(bench: Bench) -> None:
    """Killed just after a file got its name, the plain run tidies the journal away."""
    assert killed(bench, "fetch (parts)", "rename", "*output/toy/a.bin") == []


def test_no_receipt_outlives_its_file(bench: Bench) -> None:
    """Killed just after a file was moved, the plain run removes the receipt in output/."""
    assert killed(bench, "place", "rename", "*models/toy/.csm-weights/a.bin.json") == []


def test_no_second_copy_outlives_a_move_to_another_disk(bench: Bench) -> None:
    """Killed just after a copy got its name, the plain run removes the staged file."""
    assert killed(bench, "place (other disk)", "rename", "*/a.bin") == []


@pytest.mark.skipif(not can_consume(), reason="this checkout has no consuming assembly")
def test_no_probe_outlives_its_run(bench: Bench) -> None:
    """Killed while it finds out whether the disk takes holes, the plain run tidies up."""
    assert killed(bench, "fetch --consume", "create", "*/.punch.*") == []


# ---- a power cut


@pytest.mark.parametrize("name", INV_NAMES)
def test_a_power_cut_lets_no_wrong_byte_in(bench: Bench, name: str) -> None:
    """Of disks that a cut may leave: nothing proven is lost, and a plain run ends it."""
    tally = power.cuts(bench, COMMANDS[name], random.Random(3), Clock.of(30), most=5)
    assert (tally.tries, tally.wrong) == (5, [])


@pytest.mark.parametrize(
    ("name", "lost", "found"),
    [
        ("fetch (parts)", "fsync */output/toy/a.bin.partial", "counts as proven and holds wrong"),
        ("fetch (parts)", "fsync */output/toy", "is gone"),
        ("fetch --consume", "fdatasync */output/toy/b.bin.partial", "the plain run ends with"),
    ],
    ids=["of the file", "of its folder", "before a hole"],
)
def test_a_missing_sync_is_found(bench: Bench, name: str, lost: str, found: str) -> None:
    """Without one fsync, disks are found on which a file is wrong, gone, or cannot be finished."""
    if name not in NAMES:
        pytest.skip("this checkout has no consuming assembly")
    command, rng = COMMANDS[name], random.Random(3)
    tally = power.cuts(bench, command, rng, Clock.of(30), most=16, lost_calls=lost)
    assert [text for text in tally.wrong if found in text]


def test_a_new_folder_is_durable_too(bench: Bench) -> None:
    """By what POSIX alone promises, a file that was placed is there after a power cut."""
    command, rng = COMMANDS["place"], random.Random(3)
    tally = power.cuts(bench, command, rng, Clock.of(30), most=12, strict=True)
    assert tally.wrong == []


def disk(tmp_path: Path) -> Disk:
    """A disk with one folder and a file in it."""
    (tmp_path / "file").write_bytes(b"old")
    return Disk((tmp_path,), strict=True)


def write(folder: Path, data: bytes) -> list[Event]:
    """The events of writing a new file, and of giving it the other's name."""
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
    """A rename may be there before the bytes: old, new, empty and zeros are all found."""
    model = disk(tmp_path)
    for event in write(tmp_path, b"new"):
        model.feed(event)
    assert leavings(model, tmp_path / "file") == {b"old", b"new", b"", b"\0\0\0"}


def test_synced_bytes_under_an_unsynced_name(tmp_path: Path) -> None:
    """Once the file is synced, the name stands for all of the old bytes or all of the new."""
    model = disk(tmp_path)
    create, data, rename = write(tmp_path, b"new")
    for event in (create, data, Event("fsync", data.path, -5), rename):
        model.feed(event)
    assert leavings(model, tmp_path / "file") == {b"old", b"new"}


def test_synced_bytes_under_a_synced_name_stay(tmp_path: Path) -> None:
    """With the folder synced as well there is one disk that a cut may leave."""
    model = disk(tmp_path)
    create, data, rename = write(tmp_path, b"new")
    for event in (create, data, Event("fsync", data.path, -5), rename):
        model.feed(event)
    model.feed(Event("fsync", str(tmp_path)))
    assert leavings(model, tmp_path / "file") == {b"new"}


# ---- rivals


@pytest.mark.parametrize("name", ["fetch (parts)", "fetch (Hub)", "weights (parts)", "place"])
def test_two_at_once_do_the_work_once(bench: Bench, name: str) -> None:
    """Two runs in one tree end well, and fetch or write about as much as one."""
    before = undisturbed(bench, COMMANDS[name])
    came, wrong = rivals.race(bench, before, 2, False, random.Random(5))
    assert (came, wrong) == ("exit 0", [])


@pytest.mark.parametrize("name", ["fetch (parts)", "fetch (Hub)", "weights (parts)"])
def test_without_locks_no_wrong_byte_gets_a_name(bench: Bench, name: str) -> None:
    """Where flock does nothing, three runs at once leave right bytes and a tree that goes on."""
    before = undisturbed(bench, COMMANDS[name])
    _, wrong = rivals.race(bench, before, 3, True, random.Random(5))
    assert [t for t in wrong if "wrong bytes" in t or t.startswith("the plain run")] == []


def overtaken(bench: Bench, command: str, hold: str, lockless: bool = False) -> tuple[Ended, ...]:
    """A run that is held while another one does all the work; how both end."""
    scene = bench.scene(COMMANDS[command])
    held = scene.home.with_suffix(".held")
    orders = replace(scene.orders, lockless=lockless, one_core=True)
    first = scene.forks.start(
        scene.root, scene.argv, scene.env, replace(orders, hold=hold, held=str(held))
    )
    ended = swaps.let_go(scene, first, held, lambda: _other_run(scene, lockless))
    bench.drop(scene)
    return ended


def _other_run(scene: Scene, lockless: bool) -> Ended:
    return scene.run(replace(scene.orders, lockless=lockless))


@pytest.mark.parametrize(
    ("name", "hold"),
    [("split", "rename *long.bin.part-aa"), ("seed-cache", "read *models/toy/a.bin")],
)
def test_a_second_run_waits_for_the_first(bench: Bench, name: str, hold: str) -> None:
    """While one run is at work a second one says that it waits; then both end with 0."""
    before = undisturbed(bench, COMMANDS[name])
    scene = bench.scene(COMMANDS[name])
    if name == "seed-cache":  # without receipts there is something to read and to hash
        shutil.rmtree(scene.root / "models/toy/.csm-weights")
    held = scene.home.with_suffix(".held")
    orders = replace(scene.orders, one_core=True, hold=hold, held=str(held))
    first = scene.forks.start(scene.root, scene.argv, scene.env, orders)
    ended, second = swaps.let_go(scene, first, held, lambda: _waiting(scene))
    assert (ended.code, scene.forks.wait(second).code) == (0, 0)
    assert whole(scene, before) == []
    bench.drop(scene)


def _waiting(scene: Scene) -> Child:
    """Start a second run, and return once it says that it waits for the first."""
    child = scene.forks.start(scene.root, scene.argv, scene.env, scene.orders)
    end = time.monotonic() + 20
    while "waiting for another run" not in child.out.read_text():
        assert time.monotonic() < end, child.out.read_text()
        time.sleep(0.002)
    return child


@pytest.mark.parametrize("name", ["fetch (parts)", "place"])
def test_a_run_overtaken_without_locks_ends_well(bench: Bench, name: str) -> None:
    """Where flock does nothing, a run whose work another one has done ends well too."""
    hold = "rename *models/toy/a.bin" if name == "place" else "rename *output/toy/a.bin"
    ended = overtaken(bench, name, hold, lockless=True)
    assert [e.code for e in ended] == [0, 0]


def test_nothing_is_consumed_where_locks_do_nothing(bench: Bench) -> None:
    """Two at once would copy holes over the only copy, so not even one is let in: exit 7."""
    scene = bench.scene(COMMANDS["fetch --consume"])
    before = scene.listing()
    ended = scene.run(replace(scene.orders, lockless=True))
    assert (ended.code, "locks" in ended.said) == (7, True)
    assert set(before) <= set(scene.listing())
    assert (scene.run().code, scene.wrong_bytes()) == (0, [])
    bench.drop(scene)


def _held(scene: Scene, hold: str, name: str, nth: int = 1) -> tuple[Child, Path]:
    """A run that will be held at a call, and where locks do nothing."""
    held = scene.home.with_suffix(f".{name}")
    orders = replace(scene.orders, lockless=True, one_core=True, held=str(held))
    orders = replace(orders, hold=hold, nth=nth)
    return scene.forks.start(scene.root, scene.argv, scene.env, orders), held


# ---- swapped between look and act

_LAST = "the proven file is exchanged at the last moment"


@pytest.mark.parametrize("swap", [s for s in swaps.SWAPS if s.what != _LAST], ids=lambda s: s.what)
def test_what_is_swapped_is_refused(bench: Bench, swap: swaps.Swap) -> None:
    """No wrong byte is placed, nothing outside is written to, and a plain run ends it."""
    _, wrong = swaps.done(bench, swap, undisturbed(bench, COMMANDS[swap.command]))
    assert wrong == []


def test_a_file_exchanged_at_the_last_moment_is_not_left_under_its_name(bench: Bench) -> None:
    """A proven file that is exchanged between the last look and the rename is taken back."""
    swap = next(s for s in swaps.SWAPS if s.what == _LAST)
    _, wrong = swaps.done(bench, swap, undisturbed(bench, COMMANDS[swap.command]))
    assert wrong == []

"""Commands that end in a power cut: disks that it may leave, and what comes of them."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

from tools.torture.calls import Event, Record
from tools.torture.checks import Undisturbed, after_stop, lost, undisturbed
from tools.torture.disk import Disk
from tools.torture.scene import Bench, Command, Scene, renew_receipts
from tools.torture.tally import Clock, Tally


@dataclass(frozen=True)
class Recorded:
    """A command's events, and the disk before them."""

    scene: Scene
    before: Disk
    events: tuple[Event, ...]

    def disk(self, count: int) -> Disk:
        """The disk after so many events."""
        disk = copy.deepcopy(self.before)
        for event in self.events[:count]:
            disk.feed(event)
        return disk


def record(bench: Bench, command: Command, lost_calls: str, strict: bool) -> Recorded:
    """Records a command; calls of `lost_calls` are not made, see `Orders.lost`."""
    scene = bench.scene(command)
    log = scene.home.with_suffix(".log")
    orders = replace(scene.orders, log=str(log), lost=lost_calls, one_core=True)
    before = Disk((scene.home, scene.other), strict)
    ended = scene.run(orders)
    assert ended.code == 0, ended.said
    return Recorded(scene, before, tuple(Record.load(log).events))


def cuts(
    bench: Bench,
    command: Command,
    rng: random.Random,
    clock: Clock,
    most: int = 40,
    lost_calls: str = "",
    strict: bool = False,
) -> Tally:
    """Cuts the power of a command `most` times, one time in four right after it has ended well."""
    known = undisturbed(bench, command)
    recorded = record(bench, command, lost_calls, strict)
    tally = Tally("power", f"`{command.name}`, power cut" + (" (strict)" if strict else ""))
    last = len(recorded.events)
    for number in range(most):
        if clock.is_over:
            break
        at = last if number % 4 == 0 else rng.randint(0, last)
        seed = rng.getrandbits(32)
        wrong = cut(bench, recorded, known, at, random.Random(seed))
        came = "after its end" if at == last else "meanwhile"
        tally.add(came, wrong, f"cut after call {at} of {last}, disk {seed}")
    bench.drop(recorded.scene)
    return tally


def cut(
    bench: Bench, recorded: Recorded, known: Undisturbed, at: int, rng: random.Random
) -> list[str]:
    """What is wrong with one disk that a cut after `at` events may leave."""
    old = recorded.scene
    scene = bench.blank(old.command)
    scene.home.mkdir(parents=True)
    scene.other.mkdir(parents=True)
    moved = {old.home: scene.home, old.other: scene.other}
    stats = recorded.disk(at).leave(rng, moved)
    for home in moved.values():
        renew_receipts(home, stats)
    scene.damaged = {scene.home / p.relative_to(old.home): d for p, d in old.damaged.items()}
    wrong = _gone(scene, known) if at == len(recorded.events) else []
    wrong += after_stop(scene, known, journals=False)
    bench.drop(scene)
    return wrong


def _gone(scene: Scene, known: Undisturbed) -> list[str]:
    """The files that a command said it had put there, and that the cut has taken."""
    gone = lost(scene)
    for path in scene.allowed():
        top = scene.other if path.is_relative_to(scene.other) else scene.home
        if str(path.relative_to(top)) in known.listing and not path.exists():
            gone.append(f"{path} was there when the command ended well, and is gone")
    return gone

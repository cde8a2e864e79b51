"""Power cuts: the disks that a cut may leave, and what a plain run makes of them."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace

from tools.torture.checks import Baseline, baseline, check_after_stop, lost
from tools.torture.disk import Disk
from tools.torture.sandbox import Command, Sandbox, Sandboxes, renew_receipts
from tools.torture.tally import Tally, TimeBox
from tools.torture.tracing import Event, Trace


@dataclass(frozen=True)
class Recorded:
    """A command's events, and the disk before them."""

    sandbox: Sandbox
    before: Disk
    events: tuple[Event, ...]

    def disk(self, count: int) -> Disk:
        """Return the disk after the first `count` events."""
        disk = copy.deepcopy(self.before)
        for event in self.events[:count]:
            disk.feed(event)
        return disk


def record(sandboxes: Sandboxes, command: Command, lost_calls: str, strict: bool) -> Recorded:
    """Record a command; calls that match `lost_calls` are skipped, see `Injection.lost`."""
    sandbox = sandboxes.sandbox(command)
    log = sandbox.home.with_suffix(".log")
    injection = replace(sandbox.injection, log=str(log), lost=lost_calls, one_core=True)
    before = Disk((sandbox.home, sandbox.other), strict)
    result = sandbox.run(injection)
    assert result.code == 0, result.output
    return Recorded(sandbox, before, tuple(Trace.load(log).events))


def cuts(
    sandboxes: Sandboxes,
    command: Command,
    rng: random.Random,
    box: TimeBox,
    most: int = 40,
    lost_calls: str = "",
    strict: bool = False,
) -> Tally:
    """Cut the power of a command `most` times, one time in four right after its end."""
    known = baseline(sandboxes, command)
    recorded = record(sandboxes, command, lost_calls, strict)
    tally = Tally("power", f"`{command.name}`, power cut" + (" (strict)" if strict else ""))
    last = len(recorded.events)
    for number in range(most):
        if box.is_over:
            break
        at = last if number % 4 == 0 else rng.randint(0, last)
        seed = rng.getrandbits(32)
        wrong = cut(sandboxes, recorded, known, at, random.Random(seed))
        outcome = "after its end" if at == last else "meanwhile"
        tally.add(outcome, wrong, f"cut after call {at} of {last}, disk {seed}")
    sandboxes.remove(recorded.sandbox)
    return tally


def cut(
    sandboxes: Sandboxes, recorded: Recorded, known: Baseline, at: int, rng: random.Random
) -> list[str]:
    """Return what is wrong with one disk that a cut after `at` events may leave."""
    old = recorded.sandbox
    sandbox = sandboxes.empty(old.command)
    sandbox.home.mkdir(parents=True)
    sandbox.other.mkdir(parents=True)
    moved = {old.home: sandbox.home, old.other: sandbox.other}
    stats = recorded.disk(at).materialize(rng, moved)
    for home in moved.values():
        renew_receipts(home, stats)
    sandbox.damaged = {sandbox.home / p.relative_to(old.home): d for p, d in old.damaged.items()}
    wrong = _gone(sandbox, known) if at == len(recorded.events) else []
    wrong += check_after_stop(sandbox, known, journals=False)
    sandboxes.remove(sandbox)
    return wrong


def _gone(sandbox: Sandbox, known: Baseline) -> list[str]:
    """Return the files that the command had installed and the cut has taken."""
    gone = lost(sandbox)
    for path in sandbox.allowed():
        top = sandbox.other if path.is_relative_to(sandbox.other) else sandbox.home
        if str(path.relative_to(top)) in known.listing and not path.exists():
            gone.append(f"{path} was there when the command ended well, and is gone")
    return gone

"""What must be true after a command was stopped, and after it was run again."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from tools.torture.calls import Event, Orders, Record
from tools.torture.forks import Ended
from tools.torture.scene import LONG, WEIGHTS, Bench, Command, Scene, total
from tools.torture.script import run_script


@dataclass(frozen=True)
class Undisturbed:
    """A command that nothing has disturbed: its record, its time, and what it leaves."""

    command: Command
    events: tuple[Event, ...]
    seconds: float
    listing: frozenset[str]
    proven: frozenset[str]
    home: Path
    other: Path


@functools.cache
def undisturbed(bench: Bench, command: Command) -> Undisturbed:
    """Runs a command once, to its end."""
    scene = bench.scene(command)
    log = scene.home.with_suffix(".log")
    ended = run(scene, replace(scene.orders, log=str(log), one_core=True))
    assert ended.code == 0, f"{command.name} ends with {ended.code}: {ended.said}"
    wrong = [*scene.wrong_bytes(), *lost(scene)]
    assert not wrong, f"{command.name}: {wrong}"
    events = () if command.is_script else tuple(Record.load(log).events)
    found = frozenset(scene.listing())
    named = proven_names(scene)
    bench.drop(scene)
    return Undisturbed(command, events, ended.seconds, found, named, scene.home, scene.other)


def run(scene: Scene, orders: Orders | None = None) -> Ended:
    """Runs the scene's command, with orders if it is `inv`."""
    return run_script(scene) if scene.command.is_script else scene.run(orders)


def proven_names(scene: Scene) -> frozenset[str]:
    """The names of the files that count as proven, below their folders."""
    tops = (scene.home, scene.other)
    pairs = ((path, top) for path in scene.proven() for top in tops if path.is_relative_to(top))
    return frozenset(str(path.relative_to(top)) for path, top in pairs)


def lost(scene: Scene) -> list[str]:
    """What was proven, or given, before the command, and is not here any more."""
    command, gone = scene.command, []
    if not command.far and not command.consumes:
        gone += [f"parts of {name} are lost" for name in WEIGHTS if not scene.has_parts(name)]
    if command.before and not command.damage:
        gone += [f"{name} was proven and is lost" for name in WEIGHTS if not scene.copies(name)]
    if not (scene.root / LONG).is_file():
        gone.append(f"{LONG} is lost")
    return gone


def after_stop(scene: Scene, before: Undisturbed, journals: bool = True) -> list[str]:
    """What is wrong with what a stopped command has left, and with the plain run that follows.

    With `journals`, what they say has arrived must not be asked for again; a
    power cut may take what they speak of.
    """
    wrong = [*scene.wrong_bytes(), *lost(scene)]
    held, proven = scene.held(journals), scene.proven_parts(journals)
    scene.quiet()
    log = scene.home.with_suffix(".log")
    ended = run(scene, replace(scene.orders, log=str(log)))
    if ended.code != 0:
        last = ended.said.strip().splitlines()[-2:]
        return [*wrong, f"the plain run ends with {ended.code}: {' '.join(last)}"]
    if not scene.command.is_script and not scene.command.consumes:
        slack = 1 if journals else 2
        wrong += _asked_again(scene, held, proven, Record.load(log), slack)
    return [*wrong, *whole(scene, before)]


def _asked_again(
    scene: Scene, held: int, proven: set[str], record: Record, slack: int
) -> list[str]:
    """What was fetched, or read from its source, though it was proven or had arrived.

    A piece of which a power cut has taken a block is fetched twice: `slack` is 2.
    """
    if scene.command.far:
        most = slack * (total() - held)
        sent = scene.sent()
        return [f"{sent} bytes were fetched, {most} were lacking"] if sent > most else []
    again = sorted(proven & set(record.opened)) if not scene.command.before else []
    return [f"{path} was read again" for path in again]


def whole(scene: Scene, before: Undisturbed) -> list[str]:
    """In what a finished command's folder differs from the undisturbed one's."""
    wrong = [*scene.wrong_bytes(), *lost(scene)]
    here = scene.listing()
    wrong += [f"{name} is left over" for name in sorted(here - before.listing)]
    wrong += [f"{name} is missing" for name in sorted(before.listing - here)]
    unproven = sorted(before.proven - proven_names(scene))
    return wrong + [f"{name} does not count as proven" for name in unproven]

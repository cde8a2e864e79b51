"""Two and eight runs at once in the same tree, with locks and where locks do nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

from tools.torture.calls import Record
from tools.torture.checks import Undisturbed, undisturbed, whole
from tools.torture.forks import Ended
from tools.torture.scene import WEIGHTS, Bench, Command, Scene, commands, total
from tools.torture.tally import Clock, Tally

#: Bytes written beyond the work of one run that are "about once": records, and each run's own.
ABOUT = 1.3


def rivals(bench: Bench, rng: random.Random, clock: Clock, rounds: int = 4) -> Iterator[Tally]:
    """Every command, two and eight of it at once, so many rounds each."""
    known = [undisturbed(bench, command) for command in commands() if not command.is_script]
    kinds = [(count, lockless) for lockless in (False, True) for count in (2, 8)]
    for place, (count, lockless) in enumerate(kinds):
        how = "where locks do nothing" if lockless else "with locks"
        tally = Tally("rivals", f"{count} runs at once {how}")
        box = clock.share(1 / (len(kinds) - place))
        # Consuming is refused where locks do nothing; tests/tools/test_torture.py has that.
        some = [b for b in known if not (lockless and "--consume" in b.command.name)]
        for number in range(rounds * len(some)):
            if box.is_over:
                break
            before = some[number % len(some)]
            came, wrong = race(bench, before, count, lockless, rng)
            tally.add(came, wrong, before.command.name)
        yield tally


def race(
    bench: Bench, before: Undisturbed, count: int, lockless: bool, rng: random.Random
) -> tuple[str, list[str]]:
    """Runs a command `count` times at once; how they ended, and what is wrong."""
    scene = bench.scene(before.command)
    scene.quiet()
    ended = _run_at_once(scene, count, lockless, rng)
    wrong = [f"one ends with {e.code}: {_last(e)}" for e in ended if e.code != 0]
    wrong += _lasting(scene, before)
    if not lockless:
        wrong += _done_once(scene, before.command, count)
    bench.drop(scene)
    codes = sorted({e.code for e in ended})
    return "exit " + ", ".join(map(str, codes)), wrong


def _run_at_once(scene: Scene, count: int, lockless: bool, rng: random.Random) -> list[Ended]:
    children = []
    for number in range(count):
        log = str(scene.home.with_suffix(f".log{number}"))
        orders = replace(scene.orders, lockless=lockless, log=log)
        children.append(scene.forks.start(scene.root, scene.argv, scene.env, orders))
        time.sleep(rng.choice((0.0, 0.005, 0.02)))
    return [scene.forks.wait(child) for child in children]


def _lasting(scene: Scene, before: Undisturbed) -> list[str]:
    """What is wrong once a plain run has followed."""
    wrong = [*scene.wrong_bytes()]
    ended = scene.run()
    if ended.code != 0:
        wrong.append(f"the plain run ends with {ended.code}: {_last(ended)}")
    return wrong + whole(scene, before)


def _done_once(scene: Scene, command: Command, count: int) -> list[str]:
    """The work that was done more than about once."""
    if command.far and scene.sent() > ABOUT * total():
        return [f"{scene.sent()} bytes were fetched for {total()}"]
    logs = [scene.home.with_suffix(f".log{number}") for number in range(count)]
    written = sum(_weights_written(Record.load(log)) for log in logs if log.exists())
    once = total() if command.name != "split" else sum(len(c[0]) for c in _long_parts(scene))
    return [f"{written} bytes were written for {once}"] if written > ABOUT * once else []


def _weights_written(record: Record) -> int:
    """Bytes written to weight files and parts, records left out."""
    names = (*WEIGHTS, "part-")
    return sum(
        len(e.data)
        for e in record.events
        if e.other != "punched"
        and any(name in e.path for name in names)
        and not e.path.endswith((".json", ".json.partial", ".journal"))
    )


def _long_parts(scene: Scene) -> list[tuple[bytes, ...]]:
    return [found for path, found in scene.allowed().items() if "chunks/new" in str(path)]


def _last(ended: Ended) -> str:
    return " ".join(ended.said.strip().splitlines()[-3:])[-300:]

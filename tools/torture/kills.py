"""Commands killed at each of their calls that change the disk, and at any moment."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from tools.torture import script
from tools.torture.checks import Undisturbed, after_stop, undisturbed
from tools.torture.forks import LIMIT, Ended
from tools.torture.scene import Bench, Command, Scene, commands
from tools.torture.tally import Clock, Tally

#: What a child is stopped with.
STOPS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)

#: Moments at random, over all commands.
MOMENTS = 200


def points(before: Undisturbed, calls: int = 0) -> Iterator[tuple[int, str]]:
    """Every point of a command: before each call, within each write, and after the last."""
    named = [(event.number, event.name) for event in before.events]
    named = named or [(number, "") for number in range(1, calls + 1)]
    for number, name in named:
        yield number, "before"
        if name == "write":
            yield number, "torn"
    yield named[-1][0], "after"


def deliberate(
    bench: Bench, command: Command, rng: random.Random, clock: Clock, most: int = 0
) -> Tally:
    """Kills a command at its points, in an order of chance; `most` of them where that is not 0."""
    tally = Tally("kills", f"`{command.name}` killed at a call")
    before = undisturbed(bench, command)
    where = list(points(before, _calls(bench, command)))
    rng.shuffle(where)
    for at, when in where[: most or None]:
        if clock.is_over:
            break
        stop = STOPS[0] if rng.random() < 0.6 else rng.choice(STOPS[1:])
        scene = bench.scene(command)
        ended = _stopped_at(scene, at, when, stop)
        wrong = _ended_wrong(ended, stop) + after_stop(scene, before)
        tally.add(_word(ended), wrong, f"{signal.Signals(stop).name} {when} call {at}")
        bench.drop(scene)
    return tally


def _calls(bench: Bench, command: Command) -> int:
    """How many programs a script calls."""
    if not command.is_script:
        return 0
    scene = bench.scene(command)
    script.run_script(scene)
    bench.drop(scene)
    return script.calls(scene)


def _stopped_at(scene: Scene, at: int, when: str, stop: int) -> Ended:
    if scene.command.is_script:
        return script.run_script(scene, at, "before" if when == "torn" else when, stop)
    orders = replace(scene.orders, at=at, when=when, signal=int(stop), one_core=True)
    return scene.run(orders)


def moments(
    bench: Bench, rng: random.Random, clock: Clock, count: int = MOMENTS
) -> Iterator[Tally]:
    """Stops commands at moments of chance; the run that follows is killed too, one time in four."""
    known = [undisturbed(bench, command) for command in commands()]
    for place, stop in enumerate(STOPS):
        tally = Tally("kills", f"{stop.name} at a random moment")
        box = clock.share(0.5 if place < 2 else 1)
        share = count // 2 if stop is signal.SIGKILL else count // 4
        for number in range(share):
            if box.is_over:
                break
            before = known[number % len(known)]
            scene = bench.scene(before.command)
            delays = [rng.uniform(0.15, 1.0) * before.seconds for _ in range(2)]
            ended = _stopped_after(scene, delays[0], stop)
            if number % 4 == 0:
                _stopped_after(scene, delays[1], signal.SIGKILL)
            wrong = _ended_wrong(ended, stop) + after_stop(scene, before)
            tally.add(_word(ended), wrong, f"{before.command.name} after {delays[0]:.3f} s")
            bench.drop(scene)
        yield tally


def _stopped_after(scene: Scene, delay: float, stop: int) -> Ended:
    if scene.command.is_script:
        process = script.start_script(scene, 0, "", stop)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, stop)
        said = process.communicate(timeout=LIMIT)[0]
        return Ended(process.returncode, said)
    child = scene.forks.start(scene.root, scene.argv, scene.env, scene.orders)
    time.sleep(delay)
    os.kill(child.pid, stop)
    return scene.forks.wait(child)


def _ended_wrong(ended: Ended, stop: int) -> list[str]:
    """An end that a stop must not have: a hang, a traceback, another exit code."""
    allowed = {0, -9} if stop == signal.SIGKILL else {0, 130}
    if ended.code in allowed and "Traceback" not in ended.said:
        return []
    if ended.code in (1, -int(stop)) and not ended.said.strip():
        return []  # it came before the command had begun
    return [f"{signal.Signals(stop).name} makes it end with {ended.code}: {ended.said[-300:]}"]


def _word(ended: Ended) -> str:
    if ended.code == 0:
        return "ended before"
    return {130: "exit 130", -9: "killed"}.get(ended.code, f"exit {ended.code}")

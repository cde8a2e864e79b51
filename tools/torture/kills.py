"""Kills: each command stopped at each call that changes the disk, and at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

from tools.torture import script
from tools.torture.checks import Baseline, baseline, check_after_stop
from tools.torture.fork_server import LIMIT, Result
from tools.torture.sandbox import COMMANDS, Command, Sandbox, Sandboxes
from tools.torture.tally import Tally, TimeBox

#: The signals that stop a child.
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)

#: Kills at random moments, over all commands.
RANDOM_KILLS = 200


def kill_points(before: Baseline, tracing: int = 0) -> Iterator[tuple[int, str]]:
    """Yield every point of a command: before each call, within each write, after the last."""
    named = [(event.number, event.name) for event in before.events]
    named = named or [(number, "") for number in range(1, tracing + 1)]
    for number, name in named:
        yield number, "before"
        if name == "write":
            yield number, "torn"
    yield named[-1][0], "after"


def at_calls(
    sandboxes: Sandboxes, command: Command, rng: random.Random, box: TimeBox, most: int = 0
) -> Tally:
    """Stop a command at its points in random order, at most `most` of them where that is not 0."""
    tally = Tally("kills", f"`{command.name}` killed at a call")
    before = baseline(sandboxes, command)
    where = list(kill_points(before, _calls(sandboxes, command)))
    rng.shuffle(where)
    for at, when in where[: most or None]:
        if box.is_over:
            break
        stop = SIGNALS[0] if rng.random() < 0.6 else rng.choice(SIGNALS[1:])
        sandbox = sandboxes.sandbox(command)
        result = _stopped_at(sandbox, at, when, stop)
        wrong = _ended_wrong(result, stop) + check_after_stop(sandbox, before)
        tally.add(_outcome(result), wrong, f"{signal.Signals(stop).name} {when} call {at}")
        sandboxes.remove(sandbox)
    return tally


def _calls(sandboxes: Sandboxes, command: Command) -> int:
    """Return the number of programs that a script calls."""
    if not command.is_script:
        return 0
    sandbox = sandboxes.sandbox(command)
    script.run_script(sandbox)
    sandboxes.remove(sandbox)
    return script.call_count(sandbox)


def _stopped_at(sandbox: Sandbox, at: int, when: str, stop: int) -> Result:
    if sandbox.command.is_script:
        return script.run_script(sandbox, at, "before" if when == "torn" else when, stop)
    injection = replace(sandbox.injection, at=at, when=when, signal=int(stop), one_core=True)
    return sandbox.run(injection)


def at_random(
    sandboxes: Sandboxes, rng: random.Random, box: TimeBox, count: int = RANDOM_KILLS
) -> Iterator[Tally]:
    """Stop commands at random moments; the run that follows is killed one time in four."""
    known = [baseline(sandboxes, command) for command in COMMANDS.values()]
    for place, stop in enumerate(SIGNALS):
        tally = Tally("kills", f"{stop.name} at a random moment")
        own = box.share(0.5 if place < 2 else 1)
        share = count // 2 if stop is signal.SIGKILL else count // 4
        for number in range(share):
            if own.is_over:
                break
            before = known[number % len(known)]
            sandbox = sandboxes.sandbox(before.command)
            delays = [rng.uniform(0.15, 1.0) * before.seconds for _ in range(2)]
            result = _stopped_after(sandbox, delays[0], stop)
            if number % 4 == 0:
                _stopped_after(sandbox, delays[1], signal.SIGKILL)
            wrong = _ended_wrong(result, stop) + check_after_stop(sandbox, before)
            tally.add(_outcome(result), wrong, f"{before.command.name} after {delays[0]:.3f} s")
            sandboxes.remove(sandbox)
        yield tally


def _stopped_after(sandbox: Sandbox, delay: float, stop: int) -> Result:
    if sandbox.command.is_script:
        process = script.start_script(sandbox, 0, "", stop)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, stop)
        output = process.communicate(timeout=LIMIT)[0]
        return Result(process.returncode, output)
    child = sandbox.start()
    time.sleep(delay)
    os.kill(child.pid, stop)
    return sandbox.wait(child)


def _ended_wrong(result: Result, stop: int) -> list[str]:
    """Return what is wrong with an end: a hang, a traceback, another exit code."""
    allowed = {0, -9} if stop == signal.SIGKILL else {0, 130}
    if result.code in allowed and "Traceback" not in result.output:
        return []
    if result.code in (1, -int(stop)) and not result.output.strip():
        return []  # it came before the command had begun
    shown = result.output[-300:] if result.code != -99 else result.output
    return [f"{signal.Signals(stop).name} makes it end with {result.code}: {shown}"]


def _outcome(result: Result) -> str:
    if result.code == 0:
        return "ended before"
    return {130: "exit 130", -9: "killed"}.get(result.code, f"exit {result.code}")

"""Races: two and eight runs at once in one tree, with locks and where locks do nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

from tools.torture.checks import Baseline, baseline, differences
from tools.torture.fork_server import Result
from tools.torture.sandbox import COMMANDS, WEIGHTS, Command, Sandbox, Sandboxes, total
from tools.torture.tally import Tally, TimeBox
from tools.torture.tracing import Trace

#: The work of one run times this still counts as "about once": each run writes its own records.
ABOUT = 1.3


def races(
    sandboxes: Sandboxes, rng: random.Random, box: TimeBox, rounds: int = 4
) -> Iterator[Tally]:
    """Race every command with itself, `rounds` times with two runs and with eight."""
    known = [baseline(sandboxes, command) for command in COMMANDS.values() if not command.is_script]
    kinds = [(count, without_locks) for without_locks in (False, True) for count in (2, 8)]
    for place, (count, without_locks) in enumerate(kinds):
        conditions = "where locks do nothing" if without_locks else "with locks"
        tally = Tally("races", f"{count} runs at once {conditions}")
        own = box.share(1 / (len(kinds) - place))
        # --consume is refused where locks do nothing; tests/tools/test_torture.py tests that.
        some = [b for b in known if not (without_locks and "--consume" in b.command.name)]
        for number in range(rounds * len(some)):
            if own.is_over:
                break
            before = some[number % len(some)]
            outcome, wrong = race(sandboxes, before, count, without_locks, rng)
            tally.add(outcome, wrong, before.command.name)
        yield tally


def race(
    sandboxes: Sandboxes, before: Baseline, count: int, without_locks: bool, rng: random.Random
) -> tuple[str, list[str]]:
    """Run a command `count` times at once; return how the runs ended, and what is wrong."""
    sandbox = sandboxes.sandbox(before.command)
    sandbox.forget_requests()
    results = _run_at_once(sandbox, count, without_locks, rng)
    wrong = [f"one ends with {e.code}: {_last(e)}" for e in results if e.code != 0]
    wrong += _after_plain_run(sandbox, before)
    if not without_locks:
        wrong += _done_once(sandbox, before.command, count)
    sandboxes.remove(sandbox)
    codes = sorted({e.code for e in results})
    return "exit " + ", ".join(map(str, codes)), wrong


def _run_at_once(
    sandbox: Sandbox, count: int, without_locks: bool, rng: random.Random
) -> list[Result]:
    children = []
    for number in range(count):
        log = str(sandbox.home.with_suffix(f".log{number}"))
        injection = replace(sandbox.injection, without_locks=without_locks, log=log)
        children.append(sandbox.start(injection))
        time.sleep(rng.choice((0.0, 0.005, 0.02)))
    return [sandbox.wait(child) for child in children]


def _after_plain_run(sandbox: Sandbox, before: Baseline) -> list[str]:
    """Run the command once more, and return what is wrong then."""
    wrong = [*sandbox.wrong_bytes()]
    result = sandbox.run()
    if result.code != 0:
        wrong.append(f"the plain run ends with {result.code}: {_last(result)}")
    return wrong + differences(sandbox, before)


def _done_once(sandbox: Sandbox, command: Command, count: int) -> list[str]:
    """Return the work that was done more than about once."""
    if command.remote and sandbox.sent() > ABOUT * total():
        return [f"{sandbox.sent()} bytes were fetched for {total()}"]
    logs = [sandbox.home.with_suffix(f".log{number}") for number in range(count)]
    written = sum(_weights_written(Trace.load(log)) for log in logs if log.exists())
    once = sum(map(len, _long_pieces(sandbox))) if command.name == "split" else total()
    return [f"{written} bytes were written for {once}"] if written > ABOUT * once else []


def _weights_written(record: Trace) -> int:
    """Return the bytes written to weight files and chunk files, without records."""
    names = (*WEIGHTS, "part-")
    return sum(
        len(e.data)
        for e in record.events
        if e.other != "punched"
        and any(name in e.path for name in names)
        and not e.path.endswith((".json", ".json.partial", ".journal"))
    )


def _long_pieces(sandbox: Sandbox) -> list[bytes]:
    return [found[0] for path, found in sandbox.allowed().items() if "chunks/new" in str(path)]


def _last(result: Result) -> str:
    return " ".join(result.output.strip().splitlines()[-3:])[-300:]

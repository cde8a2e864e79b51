"""Checks: what must be true after a command was stopped, and after it was run again."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from tools.torture.fork_server import Result
from tools.torture.sandbox import LONG, WEIGHTS, Command, Sandbox, Sandboxes, total
from tools.torture.script import run_script
from tools.torture.tracing import Event, Injection, Trace


@dataclass(frozen=True)
class Baseline:
    """A command that ran without a fault: its calls, its time in seconds, and what it left."""

    command: Command
    events: tuple[Event, ...]
    seconds: float
    listing: frozenset[str]
    verified: frozenset[str]
    home: Path
    other: Path


@functools.cache
def baseline(sandboxes: Sandboxes, command: Command) -> Baseline:
    """Run a command once without a fault, and return what it left."""
    sandbox = sandboxes.sandbox(command)
    log = sandbox.home.with_suffix(".log")
    result = run(sandbox, replace(sandbox.injection, log=str(log), one_core=True))
    assert result.code == 0, f"{command.name} ends with {result.code}: {result.output}"
    wrong = [*sandbox.wrong_bytes(), *lost(sandbox)]
    assert not wrong, f"{command.name}: {wrong}"
    events = () if command.is_script else tuple(Trace.load(log).events)
    found = frozenset(sandbox.listing())
    named = verified_names(sandbox)
    sandboxes.remove(sandbox)
    return Baseline(command, events, result.seconds, found, named, sandbox.home, sandbox.other)


def run(sandbox: Sandbox, injection: Injection | None = None) -> Result:
    """Run the sandbox's command; an injection applies only to `inv`."""
    return run_script(sandbox) if sandbox.command.is_script else sandbox.run(injection)


def verified_names(sandbox: Sandbox) -> frozenset[str]:
    """Return the names of the files that count as verified, relative to their folder."""
    tops = (sandbox.home, sandbox.other)
    pairs = ((path, top) for path in sandbox.verified() for top in tops if path.is_relative_to(top))
    return frozenset(str(path.relative_to(top)) for path, top in pairs)


def lost(sandbox: Sandbox) -> list[str]:
    """Return what was verified or given before the command and is missing now."""
    command, gone = sandbox.command, []
    if not command.remote and not command.consumes:
        gone += [
            f"chunk files of {name} are lost"
            for name in WEIGHTS
            if not sandbox.has_chunk_files(name)
        ]
    if command.before and not command.damage:
        gone += [f"{name} was verified and is lost" for name in WEIGHTS if not sandbox.copies(name)]
    if not (sandbox.root / LONG).is_file():
        gone.append(f"{LONG} is lost")
    return gone


def check_after_stop(sandbox: Sandbox, before: Baseline, journals: bool = True) -> list[str]:
    """Run a stopped command again, and return what is wrong before and after.

    With `journals`, nothing that they record may be fetched or read again. Pass False after
    a power cut, which may take the bytes that a journal records.
    """
    wrong = [*sandbox.wrong_bytes(), *lost(sandbox)]
    held, verified = sandbox.held(journals), sandbox.verified_chunk_files(journals)
    sandbox.forget_requests()
    log = sandbox.home.with_suffix(".log")
    result = run(sandbox, replace(sandbox.injection, log=str(log)))
    if result.code != 0:
        last = result.output.strip().splitlines()[-2:]
        return [*wrong, f"the plain run ends with {result.code}: {' '.join(last)}"]
    if not sandbox.command.is_script and not sandbox.command.consumes:
        slack = 1 if journals else 2
        wrong += _repeated(sandbox, held, verified, Trace.load(log), slack)
    return [*wrong, *differences(sandbox, before)]


def _repeated(
    sandbox: Sandbox, held: int, verified: set[str], record: Trace, slack: int
) -> list[str]:
    """Return what was fetched or read again although it was verified or had arrived.

    A piece that lost a block in a power cut is fetched twice: then `slack` is 2.
    """
    if sandbox.command.remote:
        most = slack * (total() - held)
        sent = sandbox.sent()
        return [f"{sent} bytes were fetched, {most} were lacking"] if sent > most else []
    again = sorted(verified & set(record.opened)) if not sandbox.command.before else []
    return [f"{path} was read again" for path in again]


def differences(sandbox: Sandbox, before: Baseline) -> list[str]:
    """Return how the folder of a finished command differs from the baseline's."""
    wrong = [*sandbox.wrong_bytes(), *lost(sandbox)]
    here = sandbox.listing()
    wrong += [f"{name} is left over" for name in sorted(here - before.listing)]
    wrong += [f"{name} is missing" for name in sorted(before.listing - here)]
    unverified = sorted(before.verified - verified_names(sandbox))
    return wrong + [f"{name} does not count as verified" for name in unverified]

"""Swaps: another program changes a file or folder between two calls of a command."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tests.support.toy import PIECE_SIZE, flip
from tools.torture.checks import Baseline, baseline, differences, lost
from tools.torture.fork_server import Child, Result
from tools.torture.sandbox import COMMANDS, Sandbox, Sandboxes
from tools.torture.tally import Tally, TimeBox

#: The content of a file outside the tree that no command may write to.
VICTIM = b"somebody else's"

T = TypeVar("T")
Act = Callable[[Sandbox], None]


@dataclass(frozen=True)
class Swap:
    """A change that is made while the command is held at a call.

    `act` is done when `command` is about to make the call `hold` (see `Injection`), `undo`
    afterwards. `codes` are the exit codes that are allowed. `theirs` is a final name that the
    other program has written to, so that wrong bytes there are not ours.
    """

    what: str
    command: str
    hold: str
    act: Act
    undo: Act
    codes: tuple[int, ...] = (4,)
    theirs: str = ""
    nth: int = 1


def outside(sandbox: Sandbox) -> Path:
    """Return a folder outside the tree, with the files of an attacker."""
    folder = sandbox.home.with_suffix(".outside")
    folder.mkdir(exist_ok=True)
    (folder / "victim").write_bytes(VICTIM)
    return folder


def _in_place_of(path: str, make: Callable[[Sandbox, Path], None]) -> tuple[Act, Act]:
    """Put something in the place of a file, and later the file back, or nothing."""

    def act(sandbox: Sandbox) -> None:
        file = sandbox.root / path
        if file.exists():
            file.rename(outside(sandbox) / "kept")
        make(sandbox, file)

    def undo(sandbox: Sandbox) -> None:
        file, kept = sandbox.root / path, outside(sandbox) / "kept"
        file.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(file)

    return act, undo


def _link_to_victim(sandbox: Sandbox, file: Path) -> None:
    file.symlink_to(outside(sandbox) / "victim")


def _evil(sandbox: Sandbox) -> Path:
    """Return a copy of the file that was swapped away, with one byte changed."""
    evil = outside(sandbox) / "evil"
    evil.write_bytes((outside(sandbox) / "kept").read_bytes())
    flip(evil)
    return evil


def _link_to_evil(sandbox: Sandbox, file: Path) -> None:
    file.symlink_to(_evil(sandbox))


def _be_evil(sandbox: Sandbox, file: Path) -> None:
    file.write_bytes(_evil(sandbox).read_bytes())


def _flipped(path: str) -> tuple[Act, Act]:
    return (lambda sandbox: flip(sandbox.root / path),) * 2


def _cut(path: str) -> tuple[Act, Act]:
    def cut(sandbox: Sandbox) -> None:
        file = sandbox.root / path
        (outside(sandbox) / "kept").write_bytes(file.read_bytes())
        os.truncate(file, PIECE_SIZE // 2)

    def undo(sandbox: Sandbox) -> None:
        (sandbox.root / path).write_bytes((outside(sandbox) / "kept").read_bytes())

    return cut, undo


def _closed(folder: str, mode: int = 0o555) -> tuple[Act, Act]:
    def set_mode(to: int) -> Act:
        return lambda sandbox: (sandbox.root / folder).chmod(to)

    return set_mode(mode), set_mode(0o755)


_CHUNK = "chunks/toy/a.bin/a.bin.part-ac"
_STAGED = "output/toy/a.bin"
_FETCH, _PLACE, _CLOSED = "fetch (chunks)", "place", (7, 4)

SWAPS = (
    Swap("a chunk file is written to before it is read", _FETCH, f"read *{_CHUNK}",
         *_flipped(_CHUNK)),
    Swap("a chunk file is written to after its first bytes were read", _FETCH, f"read *{_CHUNK}",
         *_flipped(_CHUNK), nth=2),
    Swap("a chunk file is cut while it is read", _FETCH, f"read *{_CHUNK}", *_cut(_CHUNK), nth=2),
    Swap("a chunk file becomes a link to other bytes", _FETCH, f"open *{_CHUNK}",
         *_in_place_of(_CHUNK, _link_to_evil)),
    Swap("the partial becomes a link out of the tree", _FETCH, f"create *{_STAGED}.partial",
         *_in_place_of(f"{_STAGED}.partial", _link_to_victim)),
    Swap("the journal becomes a link out of the tree", _FETCH, f"create *{_STAGED}.partial.journal",
         *_in_place_of(f"{_STAGED}.partial.journal", _link_to_victim)),
    Swap("a receipt becomes a link out of the tree", _FETCH, "create *a.bin.json.partial",
         *_in_place_of("output/toy/.csm-weights/a.bin.json.partial", _link_to_victim)),
    Swap("the verified file becomes a link to other bytes", _FETCH, f"fsync *{_STAGED}.partial",
         *_in_place_of(f"{_STAGED}.partial", _link_to_evil)),
    Swap("the verified file is exchanged at the last moment", _FETCH, f"rename *{_STAGED}",
         *_in_place_of(f"{_STAGED}.partial", _be_evil)),
    Swap("a staged file becomes a link to other bytes", _PLACE, f"fsync *{_STAGED}",
         *_in_place_of(_STAGED, _link_to_evil), theirs=_STAGED),
    Swap("a staged file is written to", _PLACE, f"fsync *{_STAGED}", *_flipped(_STAGED),
         theirs=_STAGED),
    Swap("output/ loses its permission before the first file", _FETCH,
         f"create *{_STAGED}.partial", *_closed("output/toy"), codes=_CLOSED),
    Swap("output/ loses its permission before the name is given", _FETCH, f"rename *{_STAGED}",
         *_closed("output/toy"), codes=_CLOSED),
    Swap("the folder of receipts loses its permission", _FETCH, "create *a.bin.json.partial",
         *_closed("output/toy/.csm-weights"), codes=_CLOSED),
    Swap("the destination loses its permission", _PLACE, "rename *models/toy/b.bin",
         *_closed("models/toy"), codes=_CLOSED),
    Swap("the folder of chunk files loses its permission", _FETCH, f"open *{_CHUNK}",
         *_closed("chunks/toy/a.bin", 0o000), codes=_CLOSED),
)  # fmt: skip


def swaps(sandboxes: Sandboxes, box: TimeBox) -> Iterator[Tally]:
    """Make every swap once."""
    known = {name: baseline(sandboxes, COMMANDS[name]) for name in (_FETCH, _PLACE)}
    for swap in SWAPS:
        if box.is_over:
            return
        tally = Tally("swaps", swap.what)
        outcome, wrong = done(sandboxes, swap, known[swap.command])
        tally.add(outcome, wrong, swap.command)
        yield tally


def done(sandboxes: Sandboxes, swap: Swap, before: Baseline) -> tuple[str, list[str]]:
    """Make a swap; return how the command ended, and what is wrong then and after a plain run."""
    sandbox = sandboxes.sandbox(COMMANDS[swap.command])
    victim = outside(sandbox) / "victim"
    held = sandbox.home.with_suffix(".held")
    injection = replace(sandbox.injection, hold=swap.hold, nth=swap.nth, held=str(held))
    child = sandbox.start(replace(injection, one_core=True, unprivileged=True))
    result, _ = release(sandbox, child, held, lambda: swap.act(sandbox))
    wrong = []
    if result.code not in swap.codes:
        wrong.append(f"it ends with {result.code}: {result.output[-200:]}")
    if victim.read_bytes() != VICTIM:
        wrong.append("a file outside of the tree was written to")
    theirs = f"{sandbox.root / swap.theirs} holds"
    wrong += [w for w in sandbox.wrong_bytes() if not (swap.theirs and w.startswith(theirs))]
    swap.undo(sandbox)
    wrong += lost(sandbox) if swap.command == _FETCH else []
    again = sandbox.run()
    if again.code != 0:
        wrong.append(f"the plain run ends with {again.code}: {again.output[-200:]}")
    wrong += differences(sandbox, before)
    sandboxes.remove(sandbox)
    return f"exit {result.code}", wrong


def release(sandbox: Sandbox, child: Child, held: Path, act: Callable[[], T]) -> tuple[Result, T]:
    """Wait until a child is held, act, and release it; return its end and what `act` returned."""
    end = time.monotonic() + 20
    while not held.exists():
        if time.monotonic() > end:
            raise AssertionError(f"the child is not held: {sandbox.wait(child, 0).output}")
        time.sleep(0.002)
    returned = act()
    held.unlink()
    return sandbox.wait(child), returned

"""What somebody else does to a file or folder just between two calls of a command."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tests.support.toy import PIECE_SIZE, flip
from tools.torture.checks import Undisturbed, lost, undisturbed, whole
from tools.torture.forks import Child, Ended
from tools.torture.scene import COMMANDS, Bench, Scene
from tools.torture.tally import Clock, Tally

#: What a file outside of the tree holds, that nobody may write to.
VICTIM = b"somebody else's"

T = TypeVar("T")
Act = Callable[[Scene], None]


@dataclass(frozen=True)
class Swap:
    """`act` is done when `command` is about to do `hold`, see `Orders`; `undo` afterwards.

    `codes` are the exit codes that it may end with. `theirs` is a final name
    to which somebody else has written, so that wrong bytes there are not ours.
    """

    what: str
    command: str
    hold: str
    act: Act
    undo: Act
    codes: tuple[int, ...] = (4,)
    theirs: str = ""
    nth: int = 1


def outside(scene: Scene) -> Path:
    """A folder outside of the tree, with what an attacker has there."""
    folder = scene.home.with_suffix(".outside")
    folder.mkdir(exist_ok=True)
    (folder / "victim").write_bytes(VICTIM)
    return folder


def _in_place_of(path: str, make: Callable[[Scene, Path], None]) -> tuple[Act, Act]:
    """Puts something in the place of a file, and later the file back, or nothing."""

    def act(scene: Scene) -> None:
        file = scene.root / path
        if file.exists():
            file.rename(outside(scene) / "kept")
        make(scene, file)

    def undo(scene: Scene) -> None:
        file, kept = scene.root / path, outside(scene) / "kept"
        file.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(file)

    return act, undo


def _link_to_victim(scene: Scene, file: Path) -> None:
    file.symlink_to(outside(scene) / "victim")


def _evil(scene: Scene) -> Path:
    """The file that was swapped away, with one other byte."""
    evil = outside(scene) / "evil"
    evil.write_bytes((outside(scene) / "kept").read_bytes())
    flip(evil)
    return evil


def _link_to_evil(scene: Scene, file: Path) -> None:
    file.symlink_to(_evil(scene))


def _be_evil(scene: Scene, file: Path) -> None:
    file.write_bytes(_evil(scene).read_bytes())


def _flipped(path: str) -> tuple[Act, Act]:
    return (lambda scene: flip(scene.root / path),) * 2


def _cut(path: str) -> tuple[Act, Act]:
    def cut(scene: Scene) -> None:
        file = scene.root / path
        (outside(scene) / "kept").write_bytes(file.read_bytes())
        os.truncate(file, PIECE_SIZE // 2)

    def undo(scene: Scene) -> None:
        (scene.root / path).write_bytes((outside(scene) / "kept").read_bytes())

    return cut, undo


def _closed(folder: str, mode: int = 0o555) -> tuple[Act, Act]:
    def set_mode(to: int) -> Act:
        return lambda scene: (scene.root / folder).chmod(to)

    return set_mode(mode), set_mode(0o755)


_PART = "chunks/toy/a.bin/a.bin.part-ac"
_STAGED = "output/toy/a.bin"
_FETCH, _PLACE, _CLOSED = "fetch (parts)", "place", (7, 4)

SWAPS = (
    Swap("a part is written to before it is read", _FETCH, f"read *{_PART}", *_flipped(_PART)),
    Swap("a part is written to after its first bytes were read", _FETCH, f"read *{_PART}",
         *_flipped(_PART), nth=2),
    Swap("a part is cut while it is read", _FETCH, f"read *{_PART}", *_cut(_PART), nth=2),
    Swap("a part becomes a link to other bytes", _FETCH, f"open *{_PART}",
         *_in_place_of(_PART, _link_to_evil)),
    Swap("the partial becomes a link out of the tree", _FETCH, f"create *{_STAGED}.partial",
         *_in_place_of(f"{_STAGED}.partial", _link_to_victim)),
    Swap("the journal becomes a link out of the tree", _FETCH, f"create *{_STAGED}.partial.journal",
         *_in_place_of(f"{_STAGED}.partial.journal", _link_to_victim)),
    Swap("a receipt becomes a link out of the tree", _FETCH, "create *a.bin.json.partial",
         *_in_place_of("output/toy/.csm-weights/a.bin.json.partial", _link_to_victim)),
    Swap("the proven file becomes a link to other bytes", _FETCH, f"fsync *{_STAGED}.partial",
         *_in_place_of(f"{_STAGED}.partial", _link_to_evil)),
    Swap("the proven file is exchanged at the last moment", _FETCH, f"rename *{_STAGED}",
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
    Swap("the folder of parts loses its permission", _FETCH, f"open *{_PART}",
         *_closed("chunks/toy/a.bin", 0o000), codes=_CLOSED),
)  # fmt: skip


def swaps(bench: Bench, clock: Clock) -> Iterator[Tally]:
    """Every swap once."""
    known = {name: undisturbed(bench, COMMANDS[name]) for name in (_FETCH, _PLACE)}
    for swap in SWAPS:
        if clock.is_over:
            return
        tally = Tally("swaps", swap.what)
        came, wrong = done(bench, swap, known[swap.command])
        tally.add(came, wrong, swap.command)
        yield tally


def done(bench: Bench, swap: Swap, before: Undisturbed) -> tuple[str, list[str]]:
    """Does a swap; how the command ended, and what is wrong then and after a plain run."""
    scene = bench.scene(COMMANDS[swap.command])
    victim = outside(scene) / "victim"
    held = scene.home.with_suffix(".held")
    orders = replace(scene.orders, hold=swap.hold, nth=swap.nth, held=str(held))
    child = scene.forks.start(
        scene.root, scene.argv, scene.env, replace(orders, one_core=True, powerless=True)
    )
    ended, _ = let_go(scene, child, held, lambda: swap.act(scene))
    wrong = [] if ended.code in swap.codes else [f"it ends with {ended.code}: {ended.said[-200:]}"]
    if victim.read_bytes() != VICTIM:
        wrong.append("a file outside of the tree was written to")
    theirs = f"{scene.root / swap.theirs} holds"
    wrong += [w for w in scene.wrong_bytes() if not (swap.theirs and w.startswith(theirs))]
    swap.undo(scene)
    wrong += lost(scene) if swap.command == _FETCH else []
    again = scene.run()
    if again.code != 0:
        wrong.append(f"the plain run ends with {again.code}: {again.said[-200:]}")
    wrong += whole(scene, before)
    bench.drop(scene)
    return f"exit {ended.code}", wrong


def await_held(scene: Scene, child: Child, held: Path) -> None:
    """Waits until a child is held."""
    end = time.monotonic() + 20
    while not held.exists():
        if time.monotonic() > end:
            raise AssertionError(f"the child is not held: {scene.forks.wait(child, 0).said}")
        time.sleep(0.002)


def let_go(scene: Scene, child: Child, held: Path, act: Callable[[], T]) -> tuple[Ended, T]:
    """Waits until a child is held, acts, and lets it go on; how it ended, and what came of it."""
    await_held(scene, child, held)
    done = act()
    held.unlink()
    return scene.forks.wait(child), done

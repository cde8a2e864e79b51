"""What interrupted runs have left: found by its name and by what is beside it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from csm_weights.files import Fingerprint
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.store.inspect import Paths, State, inspect
from csm_weights.store.install import record
from csm_weights.store.journal import journal_path, partial_path
from csm_weights.store.leftovers import leftovers, unfinished
from csm_weights.store.receipts import read_receipt, receipt_path
from tests.support.toy import Toy


def seen(toy: Toy) -> State:
    paths = Paths.of(toy.manifest, toy.root)
    return inspect(toy.manifest, (toy.artifact("a.bin"),), paths, {})


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_unfinished_files_are_those_of_the_chosen_artifacts(toy: Toy) -> None:
    """Partials and journals beside its files and chunk files, and the stand-in's folder."""
    assert unfinished(seen(toy)) == []
    chunk = toy.chunk_file("a.bin", 1)
    ours = [
        made(partial_path(toy.staged("a.bin"))),
        made(journal_path(toy.staged("a.bin"))),
        made(partial_path(toy.installed("a.bin"))),
        made(toy.installed("a.bin.recombine-partial.17")),
        made(partial_path(chunk)),
    ]
    for name in ("b.bin.partial", "an.partial", "a.bin", "a.bin.txt", ".partial"):
        made(toy.staged(name))
    standin = toy.root / "output" / "toy.unfinished"
    standin.mkdir()
    assert unfinished(seen(toy)) == sorted([*ours, standin])


@pytest.fixture
def installed(toy: Toy) -> Toy:
    """A toy repository with a.bin installed."""
    apply.weights(toy.request("a.bin"), smoke=False)
    return toy


def receipt_of(file: Path) -> Path:
    return receipt_path(file.parent, file.name)


def test_a_verified_file_has_no_journal_and_no_half_a_receipt(installed: Toy) -> None:
    """What is named like them and is no file stays, and so does a journal with its partial."""
    file = installed.installed("a.bin")
    assert leftovers(seen(installed), goal_is_staged=False) == []
    journal, half = made(journal_path(file)), made(partial_path(receipt_of(file)))
    assert leftovers(seen(installed), goal_is_staged=False) == [journal, half]
    made(partial_path(file))
    half.unlink()
    half.mkdir()
    assert leftovers(seen(installed), goal_is_staged=False) == []


def test_a_file_that_is_not_verified_has_no_leftovers(installed: Toy) -> None:
    """Its journal may be gone on with."""
    file = installed.installed("a.bin")
    made(journal_path(file))
    receipt_of(file).unlink()
    assert leftovers(seen(installed), goal_is_staged=False) == []


@pytest.mark.parametrize("is_staged", [False, True])
def test_leftovers_of_a_later_file_are_found(toy: Toy, is_staged: bool) -> None:
    """Behind one that is not verified, and behind one that is only staged."""
    apply.weights(toy.request("b.bin"), smoke=False)
    if is_staged:
        apply.apply(toy.request("a.bin"), Target.STAGED)
    left = Path(
        shutil.copy(receipt_of(toy.installed("b.bin")), made(receipt_of(toy.staged("b.bin"))))
    )
    state = inspect(toy.manifest, toy.manifest.artifacts, Paths.of(toy.manifest, toy.root), {})
    assert leftovers(state, goal_is_staged=False) == [left]


def test_the_receipt_of_a_file_that_was_moved_on_goes(installed: Toy) -> None:
    """Once the installed file is verified; before that, nothing goes."""
    file, staged = installed.installed("a.bin"), installed.staged("a.bin")
    left = Path(shutil.copy(receipt_of(file), made(receipt_of(staged))))
    for goal_is_staged in (False, True):
        assert leftovers(seen(installed), goal_is_staged) == [left]
    made(staged)
    assert leftovers(seen(installed), goal_is_staged=False) == []


def verified(file: Path, known: Path) -> None:
    """Write the receipt that `known` has for a copy of it."""
    receipt = read_receipt(known.parent, known.name)
    assert receipt is not None
    record(file.parent, replace(receipt, fingerprint=Fingerprint.of(file.stat())))


def test_a_staged_copy_goes_where_none_is_wanted(installed: Toy) -> None:
    """With its receipt; one that is the installed file under another name stays."""
    file, staged = installed.installed("a.bin"), installed.staged("a.bin")
    shutil.copy(file, made(staged))
    verified(staged, file)
    assert leftovers(seen(installed), goal_is_staged=False) == [staged, receipt_of(staged)]
    assert leftovers(seen(installed), goal_is_staged=True) == []
    receipt_of(file).unlink()
    assert leftovers(seen(installed), goal_is_staged=False) == []
    staged.unlink()
    staged.hardlink_to(file)
    for path in (file, staged):
        verified(path, staged)
    assert leftovers(seen(installed), goal_is_staged=False) == []

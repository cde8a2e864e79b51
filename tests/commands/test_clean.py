"""Removing what interrupted runs have left, and nothing else."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from csm_weights.commands.clean import clean
from csm_weights.commands.split import SPLIT_LOCK
from csm_weights.errors import WrongContent
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.store.journal import journal_path, partial_path
from csm_weights.transfer import consume
from tests.support.toy import Toy, flip
from tests.transfer.test_consume import STEP, begun, fetch, is_finished, made

NAME = "b.bin"


@pytest.fixture
def interrupted(toy: Toy) -> Toy:
    """A toy repository with the partial of a run that met a wrong chunk file."""
    flip(toy.chunk_file(NAME, 1))
    with pytest.raises(WrongContent):
        apply.apply(toy.request(NAME), Target.STAGED)
    flip(toy.chunk_file(NAME, 1))
    return toy


@pytest.mark.parametrize(
    "lock", ["output/toy/.lock", "models/toy/.csm-weights/.lock", f"output/{SPLIT_LOCK}"]
)
def test_clean_waits_for_a_run_that_is_at_work(interrupted: Toy, lock: str) -> None:
    """While another run holds a lock nothing is removed."""
    partial, path = partial_path(interrupted.staged(NAME)), interrupted.root / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(path):
            waiting = pool.submit(clean, interrupted.request("all"), False)
            time.sleep(0.5)
            assert partial.exists()
        assert str(partial) in waiting.result(timeout=30)
    assert not partial.exists()


def test_clean_keeps_what_was_consumed_while_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is removed is decided under the lock: a run may have consumed chunk files meanwhile."""
    monkeypatch.setattr(consume, "STEP", STEP)
    consumed = begun(made(tmp_path / "consumed"))
    toy = made(tmp_path / "toy")
    partial, journal = partial_path(toy.staged(NAME)), journal_path(toy.staged(NAME))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"begun")
    with ThreadPoolExecutor(1) as pool:
        with FileLock(partial.parent / ".lock"):
            waiting = pool.submit(clean, toy.request("all"), False)
            time.sleep(0.5)
            shutil.copy(partial_path(consumed.staged(NAME)), partial)
            shutil.copy(journal_path(consumed.staged(NAME)), journal)
            shutil.copytree(consumed.root / "chunks", toy.root / "chunks", dirs_exist_ok=True)
        assert f"kept: {partial}" in waiting.result(timeout=30)
    fetch(toy)
    assert is_finished(toy)


def test_a_link_to_a_folder_is_removed_and_its_target_stays(toy: Toy, tmp_path: Path) -> None:
    """A symbolic link that is named like something unfinished is removed as a link."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("precious")
    link = partial_path(toy.staged(NAME))
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    clean(toy.request("all"), dry=False)
    assert not link.is_symlink()
    assert (target / "file").read_text() == "precious"


def test_a_dry_clean_removes_nothing(interrupted: Toy) -> None:
    """A dry run says what would be removed."""
    partial = partial_path(interrupted.staged(NAME))
    assert str(partial) in clean(interrupted.request("all"), dry=True)
    assert partial.exists()

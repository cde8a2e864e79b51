"""Removing what interrupted runs have left, and nothing else."""

from __future__ import annotations

import contextlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

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


@pytest.fixture(
    params=["output/toy/.lock", "models/toy/.csm-weights/.lock", f"output/{SPLIT_LOCK}"]
)
def lock(request: pytest.FixtureRequest, interrupted: Toy) -> FileLock:
    """Each of the locks of those that write unfinished files: a run's two, and that of split."""
    path = interrupted.root / request.param
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def test_clean_waits_for_a_run_that_is_at_work(
    interrupted: Toy, lock: FileLock, capfd: pytest.CaptureFixture[str]
) -> None:
    """While another run holds a lock nothing is removed, and clean says what it waits for."""
    partial, said = partial_path(interrupted.staged(NAME)), ""
    with ThreadPoolExecutor(1) as pool:
        with lock:
            waiting = pool.submit(clean, interrupted.request("all"), False)
            while "it holds the lock" not in said and not waiting.done():
                time.sleep(0.01)
                said += capfd.readouterr().err
            assert not waiting.done() and partial.exists()
        assert str(partial) in str(waiting.result(timeout=30))
    assert not partial.exists()


def test_clean_keeps_others_out_until_it_is_done(
    interrupted: Toy, lock: FileLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds every lock while it removes each file."""
    free, unlink = [], Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            free.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    partial = partial_path(interrupted.staged(NAME))
    assert str(partial) in str(clean(interrupted.request("all"), False))
    assert (free, partial.exists()) == ([], False)
    with lock.acquire(timeout=0):
        pass


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
        assert f"kept: {partial}" in str(waiting.result(timeout=30))
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
    assert str(partial) in str(clean(interrupted.request("all"), dry=True))
    assert partial.exists()

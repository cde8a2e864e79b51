"""Locks: one acting run at a time, also where the file system's own locks do nothing."""

from __future__ import annotations

import fcntl
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from csm_weights.store import atomic, lock
from csm_weights.store.inspect import Paths


@pytest.mark.parametrize(
    ("staging", "destination", "with_destination", "expected"),
    [
        ("a", "b", True, ["a/.lock", "b/.csm-weights/.lock"]),
        ("b", "a", True, ["a/.csm-weights/.lock", "b/.lock"]),
        ("a", "b", False, ["a/.lock"]),
        ("a", "a", True, ["a/.lock"]),
        ("link-to-c", "b", True, ["b/.csm-weights/.lock", "link-to-c/.lock"]),
    ],
)
def test_both_folders_of_a_run_are_locked_in_one_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    staging: str,
    destination: str,
    with_destination: bool,
    expected: list[str],
) -> None:
    """That of the folders' real names, so that two runs never wait for each other."""
    (tmp_path / "c").mkdir()
    (tmp_path / "link-to-c").symlink_to("c")
    asked: list[str] = []
    real = atomic.create

    def create(path: Path) -> int:
        asked.append(path.relative_to(tmp_path).as_posix())
        return real(path)

    monkeypatch.setattr(atomic, "create", create)
    paths = Paths(tmp_path, tmp_path / staging, tmp_path / destination)
    with lock.locked(paths, with_destination):
        for path in expected:
            with pytest.raises(Timeout):
                FileLock(tmp_path / path).acquire(timeout=0)
    for path in expected:
        FileLock(tmp_path / path).acquire(timeout=0).lock.release()
    assert asked == expected


def test_where_locks_do_nothing_a_marker_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lies beside the lock while the run holds it; who waits is told which file it is."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    marker, order = tmp_path / "name.held", list[str]()

    def second() -> None:
        with lock.lock(tmp_path, "name"):
            order.append("second")

    other = threading.Thread(target=second)
    with lock.lock(tmp_path, "name"):
        assert marker.exists()
        assert not lock.are_real(tmp_path / "name")
        other.start()
        said = ""
        while "it holds the lock" not in said:
            said += capsys.readouterr().err
            assert other.is_alive()
            other.join(0.01)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert f"waiting for another run in {tmp_path}" in said
    hint = f"; if there is none on any machine, remove {marker}"
    assert f"it holds the lock; this run continues when it ends{hint}" in said
    assert not marker.exists()


def test_locks_that_keep_others_out_need_no_marker(tmp_path: Path) -> None:
    """Of two that hold a lock one would wait, which shows that the locks are real."""
    with lock.lock(tmp_path, "name"):
        assert lock.are_real(tmp_path / "name")
        assert [path.name for path in tmp_path.iterdir()] == ["name"]
    assert not lock.are_real(tmp_path / "name")  # nobody holds it


def test_the_locks_of_windows_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be taken twice, so nothing is tried out."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert lock.are_real(tmp_path / "absent")

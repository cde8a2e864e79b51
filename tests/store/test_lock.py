"""Locks: one acting run at a time, also where the file system's own locks do nothing."""

from __future__ import annotations

import fcntl
import sys
import threading
from pathlib import Path

import pytest

from csm_weights.store import lock


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
    assert f"; if there is none on any machine, remove {marker}" in said
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

"""Tests that give up root's privileges meet permission bits, and get the privileges back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.privileges import UNPRIVILEGED, unprivileged


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A file that nobody may read."""
    path = tmp_path / "closed"
    path.write_text("content")
    path.chmod(0)
    return path


def test_a_block_without_privileges(closed: Path) -> None:
    """A file without read permission is refused in the block and, to root, readable after it."""
    with unprivileged(), pytest.raises(PermissionError):
        closed.read_text()
    closed.chmod(0o600)
    assert closed.read_text() == "content"


def test_a_program_without_privileges(closed: Path) -> None:
    """Neither the program nor one that it starts may read the file."""
    command = [*UNPRIVILEGED, "sh", "-c", f"cat '{closed}' || exec cat '{closed}'"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("Permission denied") == 2

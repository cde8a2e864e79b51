"""Large files: ranges whose blocks are shared, and ranges that are given back to the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
import sys
from pathlib import Path

import pytest

from csm_weights.store import block_io


def test_a_range_that_is_shared_is_named_as_linux_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument is struct file_clone_range: source, its offset, the size, the new offset."""
    asked: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *arguments: asked.append(arguments))
    assert block_io.clone_range(3, 1 << 40, 4, 8192, 4096)
    assert asked == [(4, 0x4020940D, struct.pack("=qQQQ", 3, 1 << 40, 4096, 8192))]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
def test_a_file_system_that_shares_nothing_is_no_error(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whatever it says, the range is copied then."""

    def refuse(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert not block_io.clone_range(3, 0, 4, 0, 4096)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_not_asked_to_share(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Their kernels have other calls under Linux's numbers."""
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(sys, "platform", system)
    assert not block_io.clone_range(3, 0, 4, 0, 4096)


def test_a_range_that_cannot_be_given_back_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the kernel's own, or that there is no such call on this system."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor") as caught:
        block_io.punch(file.fileno(), 0, 4096)  # open for reading alone
    assert caught.value.errno == errno.EBADF
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    with path.open("r+b") as file, pytest.raises(OSError, match="not supported") as caught:
        block_io.punch(file.fileno(), 0, 4096)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert path.read_bytes() == bytes(8192)

"""Large files: ranges whose blocks are shared, and ranges that are given back to the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from csm_weights.concurrency import Cancelled
from csm_weights.errors import NoSpace
from csm_weights.hashing import sha256
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give no blocks back")
def test_just_the_range_is_given_back(tmp_path: Path) -> None:
    """It reads as zeros, the bytes around it and the size stay."""
    path, data = tmp_path / "file", b"\1" * 16_384
    path.write_bytes(data)
    if not block_io.can_punch(tmp_path):
        pytest.skip("this file system gives no blocks back")
    with path.open("r+b") as file:
        block_io.punch(file.fileno(), 4096, 8192)
        block_io.punch(file.fileno(), 16_384, 4096)
    assert path.read_bytes() == data[:4096] + bytes(8192) + data[:4096]


@pytest.mark.parametrize("names", [["fallocate64", "fallocate"], ["fallocate"]])
def test_the_call_with_offsets_of_64_bits_is_taken(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """Where the C library has two; it punches the hole (2) and keeps the size (1)."""
    asked: list[tuple[object, ...]] = []

    class Call:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *arguments: int) -> int:
            asked.append((self.name, *arguments))
            return 0

    libc = SimpleNamespace(**{name: Call(name) for name in names})
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    block_io.punch(7, 1 << 40, 4096)
    assert asked == [(names[0], 7, 3, 1 << 40, 4096)]


def refused(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no")


def emptied(fd: int, offset: int, size: int) -> None:
    assert (offset, size) == (0, os.fstat(fd).st_size)
    os.ftruncate(fd, 0)


def grown(fd: int, _: int, size: int) -> None:
    os.pwrite(fd, b"\1" * size, size)


def test_another_run_may_remove_the_file_that_is_tried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs may try it in one folder at the same time."""
    probe = tmp_path / ".punch.partial"
    monkeypatch.setattr(block_io, "punch", lambda *_: probe.unlink())
    assert not block_io.can_punch(tmp_path)


@pytest.mark.parametrize(
    ("punch", "can"), [(emptied, True), (lambda *_: None, False), (grown, False), (refused, False)]
)
def test_whether_blocks_are_given_back_is_tried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, punch: Callable[..., None], can: bool
) -> None:
    """By what the file takes then, as some file systems refuse and others do nothing."""
    monkeypatch.setattr(block_io, "punch", punch)
    assert block_io.can_punch(tmp_path) is can
    assert list(tmp_path.iterdir()) == []


# ---- writing


#: What `os.pwrite` is asked for: through the page cache or past it, the size, the offset.
Written = list[tuple[bool, int, int]]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> block_io.OutputFile:
    """A new file with a second descriptor for direct writes, that takes any bytes."""
    asked: list[int] = []

    def open_direct(path: Path, flags: int) -> int:
        asked.append(flags)
        return os.open(path, os.O_WRONLY)

    monkeypatch.setattr(block_io, "open_regular", open_direct)
    file = block_io.OutputFile(tmp_path / "file")
    assert asked == [os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW]
    return file


def watch(
    monkeypatch: pytest.MonkeyPatch, target: block_io.OutputFile, most: int, error: int = 0
) -> Written:
    """List the writes; at most so many bytes are taken at once, and direct ones are refused."""
    written, real = Written(), os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        is_direct = fd != target.fd
        written.append((is_direct, len(data), offset))
        if is_direct and error:
            raise OSError(error, "refused")
        return real(fd, data[:most], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return written


DATA = random.Random(1).randbytes(10_000)


@pytest.mark.parametrize(
    ("size", "offset", "direct", "most", "written"),
    [
        (10_000, 4096, True, 1 << 20, [(True, 8192, 4096), (False, 1808, 12_288)]),
        (8192, 0, True, 1 << 20, [(True, 8192, 0)]),
        (4096, 0, True, 1 << 20, [(True, 4096, 0)]),
        (4095, 0, True, 1 << 20, [(False, 4095, 0)]),
        (10_000, 1, True, 1 << 20, [(False, 10_000, 1)]),
        (10_000, 0, False, 1 << 20, [(False, 10_000, 0)]),
        (10_000, 0, True, 5000, [(True, 8192, 0), (False, 5904, 4096), (False, 904, 9096)]),
        (10_000, 5, False, 5000, [(False, 10_000, 5), (False, 5000, 5005)]),
    ],
)
def test_whole_blocks_go_past_the_page_cache_and_the_rest_through_it(
    target: block_io.OutputFile,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    offset: int,
    direct: bool,
    most: int,
    written: Written,
) -> None:
    """Only at an offset that is aligned; what the system does not take is written again."""
    found = watch(monkeypatch, target, most)
    target.write(memoryview(DATA)[:size], offset, direct)
    target.close()
    assert found == written
    assert target.path.read_bytes() == bytes(offset) + DATA[:size]


def test_a_direct_write_that_is_refused_goes_through_the_page_cache(
    target: block_io.OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems want a larger alignment; any other error is one of the disk."""
    found = watch(monkeypatch, target, 1 << 20, errno.EINVAL)
    target.write(memoryview(DATA), 0, direct=True)
    assert found == [(True, 8192, 0), (False, 10_000, 0)]
    watch(monkeypatch, target, 1 << 20, errno.ENOSPC)
    with pytest.raises(NoSpace):
        target.write(memoryview(DATA), 0, direct=True)
    target.close()
    assert target.path.read_bytes() == DATA


def test_a_file_system_without_direct_writes_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written through the page cache then."""
    monkeypatch.setattr(block_io, "open_regular", refused)
    target = block_io.OutputFile(tmp_path / "file")
    target.write(memoryview(DATA), 0, direct=True)
    target.close()
    assert target.path.read_bytes() == DATA


# ---- copying


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_a_range_is_copied_and_hashed(
    target: block_io.OutputFile, monkeypatch: pytest.MonkeyPatch, shared: bool, direct: bool
) -> None:
    """In steps, each into every sink; where the blocks are shared, they are only read."""

    def clone(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> bool:
        return shared and os.pwrite(dst, os.pread(src, size, src_offset), dst_offset) > 0

    monkeypatch.setattr(block_io, "clone_range", clone)
    monkeypatch.setattr(block_io, "STEP", 4096)
    source = target.path.with_name("source")
    source.write_bytes(DATA)
    sinks, counts = [sha256(), sha256()], list[int]()
    with source.open("rb") as file:
        extent = block_io.Extent(file.fileno(), 100, 9000)
        cancel = threading.Event()
        block_io.copy_hashed(extent, target, 8192, sinks, direct, counts.append, cancel)
    target.close()
    assert target.path.read_bytes() == bytes(8192) + DATA[100:9100]
    assert counts == ([9000] if shared else [4096, 4096, 808])
    assert {s.hexdigest() for s in sinks} == {hashlib.sha256(DATA[100:9100]).hexdigest()}


def test_a_source_that_ends_early_is_told_by_its_last_byte(
    target: block_io.OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is that the run was cancelled, before anything is read."""
    monkeypatch.setattr(block_io, "clone_range", lambda *_: False)
    source, cancel = target.path.with_name("source"), threading.Event()
    source.write_bytes(DATA)
    with source.open("rb") as file:
        extent = block_io.Extent(file.fileno(), 9000, 1001)
        with pytest.raises(EOFError, match=r"^it ends at byte 10,000$"):
            block_io.copy_hashed(extent, target, 0, [], False, lambda _: None, cancel)
        cancel.set()
        with pytest.raises(Cancelled):
            block_io.copy_hashed(extent, target, 0, [], False, lambda _: None, cancel)
    target.close()

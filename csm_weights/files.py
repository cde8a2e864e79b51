"""Stat and open files that another program may have put there or may change."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent


@dataclass(frozen=True)
class Fingerprint:
    """The stat fields by which an untouched file is known without reading it.

    `size` is in bytes, the times in nanoseconds. The change time cannot be
    set back by a program, so an edit that restores `mtime_ns` still shows.
    The device number is left out: it differs from boot to boot on some disks.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        """Return the fingerprint of a stat result."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def same_bytes(self, other: Fingerprint) -> bool:
        """Compare all but the change time, which a rename sets."""
        return (self.inode, self.size, self.mtime_ns) == (other.inode, other.size, other.mtime_ns)


class NotRegular(OSError):
    """The name belongs to a folder, a FIFO, a device or a socket, not to a regular file."""

    def __init__(self, path: Path, mode: int) -> None:
        what = "a folder" if stat.S_ISDIR(mode) else "neither file nor folder"
        super().__init__(errno.EINVAL, what, str(path))


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file that may be anything and return its descriptor.

    Never blocks, as opening a FIFO would. Follows links unless `flags` has
    O_NOFOLLOW. Raises NotRegular, an OSError, for anything but a regular file.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise NotRegular(path, mode)
    return fd


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as `open_regular` does; close it in the end."""
    fd = open_regular(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_bounded(path: Path, limit: int = 64 << 20) -> bytes:
    """Return the first `limit` bytes of a regular file; raises OSError."""
    content = bytearray()
    with opened(path) as fd:
        # A block at a time: files of /proc do not tell their size, and `limit` is far more
        # than most files have.
        while block := os.read(fd, min(limit - len(content), 1 << 16)):
            content += block
    return bytes(content)


def read_file(path: Path, limit: int, what: str) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; `what` it is, for messages.

    Raises MissingInput where there is none, WrongContent for a larger file or
    for what is no regular file.
    """
    try:
        data, found = read_bounded(path, limit + 1), "more"
        if len(data) <= limit:
            return data
    except NotRegular as error:
        found = str(error.strerror)
    except OSError as error:
        found = error.strerror or str(error)
        finding = Finding(Kind.MISSING, str(path), what, found, "check the path")
        raise MissingInput(f"{what} cannot be read", [finding]) from None
    expected = f"{what}, a regular file of at most {limit:,} bytes"
    finding = Finding(Kind.MALFORMED, str(path), expected, found, "check the path")
    raise WrongContent(f"{what} cannot be read", [finding])


def stat_of(path: Path, where: str = "") -> tuple[os.stat_result | None, Finding | None]:
    """Return the stat of a regular file; a finding where something else is in its place."""
    where, is_link = where or str(path), False
    try:
        status = path.lstat()
        if is_link := stat.S_ISLNK(status.st_mode):
            status = path.stat()
    except OSError as error:
        if is_link:
            found = "a symbolic link that leads to no file"
            return None, Finding(Kind.MISSING, where, "a file", found, "fix or remove the link")
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None, None
        return None, Finding.unreadable(where, error)
    if not stat.S_ISREG(status.st_mode):
        found = str(NotRegular(path, status.st_mode).strerror)
        return None, Finding(Kind.UNREADABLE, where, "a plain file", found, "move it away")
    return status, None


def size_finding(path: Path, sizes: list[int], size: int, where: str = "") -> Finding | None:
    """Return what a file of the wrong size is: a pointer, a refusal page, or just wrong."""
    if size in sizes:
        return None
    where = where or str(path)
    expected = " or ".join(f"{s:,}" for s in sizes) + " bytes"
    try:
        head = read_bounded(path, 256)
    except OSError as error:
        return Finding.unreadable(where, error)
    found = f"{size:,} bytes"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        found = f"a pointer of {found} in place of the content"
        return Finding(Kind.LFS_POINTER, where, expected, found, "git lfs pull")
    if head.startswith(b"Access to model ") and b" is restricted" in head:
        found = f"the Hub's error page saved as a file ({found})"
        mend = "delete it; accept the model's terms on the Hub and download it with a token"
        return Finding(Kind.ACCESS_PAGE, where, expected, found, mend)
    mend = "get it again" if size else "it is empty; get it again"
    return Finding(Kind.WRONG_SIZE, where, expected, found, mend)

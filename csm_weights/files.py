"""Writing files of ours: created safely, copied in the kernel, durable when it counts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csm_weights.errors import Finding, Kind, NoSpace

#: What the file system says when it takes no more; EIO on write is among them.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES}

#: Bytes the kernel copies at a time. On XFS and Btrfs each step is a clone.
STEP = 8 << 20

Feeder = Callable[[int, int], None]

#: Bytes of one plain copy, where the kernel cannot copy by itself.
_PLAIN = 1 << 20


def create(path: Path, flags: int = 0) -> int:
    """Opens a file of ours for reading and writing, 0644 less umask, never through a link.

    Makes its folders. Raises NoSpace when the file system does not take it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        everywhere = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, everywhere | flags, 0o644)


def write_all(fd: int, data: bytes, path: Path) -> None:
    """Writes all of `data`; `path` is for messages. Raises NoSpace."""
    view = memoryview(data)
    with writing(path):
        while view:
            view = view[os.write(fd, view) :]


def copy_range(src: int, src_offset: int, dst: int, dst_offset: int, size: int, path: Path) -> int:
    """Copies up to `size` bytes between files, in the kernel where it can.

    Returns the number of bytes copied, 0 where the source ends. `path` is
    the target, for messages. Raises OSError when the source cannot be read,
    NoSpace when the target takes no more.
    """
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(src, dst, size, src_offset, dst_offset)
        except OSError:
            pass  # Across file systems, or a fault: the plain copy below tells which.
    data = os.pread(src, min(size, _PLAIN), src_offset)
    with writing(path):
        return os.pwrite(dst, data, dst_offset)


def copy_hashed(
    src: int, src_offset: int, dst: int, dst_offset: int, size: int, path: Path, feeder: Feeder
) -> None:
    """Copies just `size` bytes between files and hashes them as they stand in `dst`.

    `feeder` gets half-open ranges of `dst`, as offset and size, while their
    bytes are still in the processor's cache. Raises EOFError where the
    source ends early, and as `copy_range` does.
    """
    done = 0
    while done < size:
        step = min(STEP, size - done)
        count = copy_range(src, src_offset + done, dst, dst_offset + done, step, path)
        if count == 0:
            raise EOFError(f"it ends at byte {src_offset + done:,}")
        feeder(dst_offset + done, count)
        done += count


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with writing(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all, durably."""
    unfinished = path.with_name(path.name + ".partial")
    fd = create(unfinished, os.O_TRUNC)
    try:
        write_all(fd, text.encode(), unfinished)
        with writing(unfinished):
            os.fsync(fd)
    finally:
        os.close(fd)
    unfinished.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a file system says when it takes no more into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        finding = Finding(
            Kind.NO_SPACE,
            str(path),
            "room and permission to write",
            error.strerror or str(error),
            "free some disk or choose another --dest, and run the same command again",
        )
        raise NoSpace("the disk takes no more", [finding]) from error

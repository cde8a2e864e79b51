"""Write large files: direct I/O, shared blocks, and freed ranges."""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from csm_weights.concurrency import Cancelled, OnProgress, deferred_interrupts
from csm_weights.files import open_regular
from csm_weights.hashing import Sink, feed
from csm_weights.store.atomic import create, created, write_all, writing

#: Bytes copied and hashed at a time.
STEP = 4 << 20

#: Bytes that direct writes must be aligned to: no disk block is larger.
ALIGNMENT = 4096

#: File systems that never give back blocks in the middle of a file.
NOT_PUNCHING = frozenset({"vfat", "msdos", "exfat", "hfsplus", "ntfs", "9p", "iso9660"})


class OutputFile:
    """A file of ours that is being written, through the page cache or past it.

    Past it (`direct`) a write costs the processor almost nothing and leaves the
    cache to others, but reading the bytes again reads the disk.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        self.fd = create(path, flags)
        self._direct = None
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):
                self._direct = open_regular(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, data: memoryview, offset: int, direct: bool) -> None:
        """Write all of `data` at byte `offset`; raises NoSpace.

        The part of a direct write that is not aligned, or is refused, goes
        through the page cache.
        """
        done = 0
        with writing(self.path):
            size = len(data) // ALIGNMENT * ALIGNMENT
            if direct and self._direct is not None and size and offset % ALIGNMENT == 0:
                try:
                    with data[:size] as aligned:
                        done = os.pwrite(self._direct, aligned, offset) // ALIGNMENT * ALIGNMENT
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            while done < len(data):
                with data[done:] as rest:
                    done += os.pwrite(self.fd, rest, offset + done)


def clone_range(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> bool:
    """Let `dst` share the blocks of a range of `src`; return whether the file system did so.

    XFS and Btrfs can, where the range is aligned to their blocks.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        # FICLONERANGE of linux/fs.h
        fcntl.ioctl(dst, 0x4020940D, struct.pack("=qQQQ", src, src_offset, size, dst_offset))
    except OSError:
        return False
    return True


def punch(fd: int, offset: int, size: int) -> None:
    """Give the blocks of `[offset, offset + size)` back to the disk; the range reads as zeros.

    The file keeps its size. Raises OSError where the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if fallocate is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    # FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE of linux/falloc.h
    if fallocate(fd, 0x02 | 0x01, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def can_punch(folder: Path) -> bool:
    """Check with a small file whether files in `folder` give blocks back; raises NoSpace."""
    probe = folder / ".punch.partial"
    with created(probe) as fd:
        try:
            write_all(fd, bytes(4 * ALIGNMENT), probe)
            with writing(probe):
                os.fsync(fd)
            before = os.fstat(fd).st_blocks
            punch(fd, 0, 4 * ALIGNMENT)
            return os.fstat(fd).st_blocks < before
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)


@dataclass(frozen=True)
class Extent:
    """The half-open byte range `[offset, offset + size)` of an open file."""

    fd: int
    offset: int
    size: int


def copy_hashed(
    source: Extent,
    target: OutputFile,
    offset: int,
    sinks: Sequence[Sink],
    direct: bool,
    on_progress: OnProgress,
    cancel: threading.Event,
) -> None:
    """Copy `source` into `target` at byte `offset` and hash just what was put there.

    Shared blocks are hashed in the source, which may be in the page cache and
    must not change meanwhile. Else the buffer that is hashed is the one that
    is written, with `direct` past the page cache. Raises EOFError where the
    source ends early, OSError where it cannot be read, NoSpace where the
    target takes no more.
    """
    size = source.size
    if clone_range(source.fd, source.offset, target.fd, offset, size):
        feed(source.fd, source.offset, size, sinks, on_progress, cancel)
        return
    # Anonymous memory is aligned to pages, which direct writes need.
    with (
        deferred_interrupts() as raise_pending,
        mmap.mmap(-1, STEP) as memory,
        memoryview(memory) as buffer,
        ThreadPoolExecutor(1) as writer,
    ):
        done = 0
        while done < size:
            raise_pending()
            if cancel.is_set():
                raise Cancelled
            with buffer[: min(STEP, size - done)] as room:
                count = os.preadv(source.fd, [room], source.offset + done)
            if count == 0:
                raise EOFError(f"it ends at byte {source.offset + done:,}")
            with buffer[:count] as block:
                # The disk takes the block while the processor hashes it.
                written = writer.submit(target.write, block, offset + done, direct)
                for sink in sinks:
                    sink.update(block)
                written.result()
            done += count
            on_progress(count)

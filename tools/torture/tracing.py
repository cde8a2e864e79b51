"""The calls by which a child changes its disk: recorded, counted, stopped at one of them.

`install` wraps them in the child. Writes by other ways, such as a file opened with Python's
`open`, are not seen; no command writes so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.support.privileges import drop_privileges

#: The ioctl of linux/fs.h that shares a range of blocks.
FICLONERANGE = 0x4020940D

#: Seconds after which a held child goes on by itself.
HOLD_LIMIT = 30.0


@dataclass(frozen=True)
class Injection:
    """The fault that is injected into a child.

    Only calls below `roots` count. The child gets `signal` at call `at`, from 1: `when` is
    "before" it, "torn" (half of a write is done) or "after" it.

    `hold` is "NAME GLOB": at the `nth` such call a file `held` is made, and the child waits
    until that file is gone. Calls that match `lost` ("fsync GLOB") do nothing; with
    `without_locks` nor does flock. `unprivileged` takes root's privileges away. `log` is the
    file for the trace.
    """

    roots: tuple[str, ...] = ()
    at: int = 0
    when: str = "before"
    signal: int = signal.SIGKILL
    hold: str = ""
    nth: int = 1
    held: str = ""
    lost: str = ""
    without_locks: bool = False
    one_core: bool = False
    unprivileged: bool = False
    log: str = ""


@dataclass(frozen=True)
class Event:
    """One call that was made: its name and path, and what a disk may lose of it.

    `inode` is the file's; `is_new` says that the call made the file; `offset` and `data` are
    a write's, `offset` alone is the size of a truncation. `other` is the target of a rename or
    link. `number` is the call's number for `Injection.at`; a call that failed is counted and
    has no event.
    """

    name: str
    path: str
    inode: int = 0
    other: str = ""
    offset: int = 0
    data: bytes = b""
    is_new: bool = False
    number: int = 0


@dataclass
class Trace:
    """The calls of a child that changed the disk, and the files that it opened to read."""

    events: list[Event] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    @property
    def written(self) -> int:
        """Count the bytes written, without those given back to the disk."""
        return sum(len(event.data) for event in self.events if event.other != "punched")

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read the trace that a child has left at `path`."""
        found = pickle.loads(path.read_bytes())
        assert isinstance(found, Trace)
        return found


_real = {
    name: getattr(os, name)
    for name in (
        *("open", "write", "pwrite", "pwritev", "ftruncate", "truncate", "fsync", "fdatasync"),
        *("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir"),
        *("chmod", "fchmod", "preadv"),
    )
}


#: A call that gives a range of a file, (descriptor, offset, size in bytes), back to the disk.
Punch = Callable[[int, int, int], None]

#: One name for calls that do the same.
_PLAIN = {"ftruncate": "truncate", "fchmod": "chmod", "remove": "unlink", "replace": "rename"}


class Tracer:
    """The wrapped calls of one child."""

    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        self.record = Trace()
        self._count = 0
        self._lock = threading.RLock()
        self._passes = 0
        roots = tuple(os.path.realpath(root) for root in injection.roots)
        self._roots = tuple(f"{root}/" for root in roots)

    def dump(self) -> None:
        """Write the trace to the file that the injection names."""
        if self.injection.log:
            Path(self.injection.log).write_bytes(pickle.dumps(self.record))

    def is_watched(self, path: str) -> bool:
        """Return whether a path is below the roots."""
        return path.startswith(self._roots)

    def perform(self, name: str, path: str, act: Callable[[], Event], torn: Any = None) -> None:
        """Make a call that changes the disk, or stop at it.

        One call at a time, so that the trace has the order in which they were made.
        """
        self.hold(name, path)
        with self._lock:
            self._count += 1
            is_due = self._count == self.injection.at
            if is_due and self.injection.when != "after":
                if self.injection.when == "torn" and torn:
                    torn()
                self._send_signal()
            self.record.events.append(replace(act(), number=self._count))
            if is_due and self.injection.when == "after":
                self._send_signal()

    def _send_signal(self) -> None:
        os.kill(os.getpid(), self.injection.signal)
        if self.injection.signal == signal.SIGKILL:
            time.sleep(HOLD_LIMIT)  # the signal takes a moment

    def hold(self, name: str, path: str) -> None:
        """Wait here if this is the call at which the child is held."""
        wanted, _, pattern = self.injection.hold.partition(" ")
        if wanted != name or not fnmatchcase(path, pattern):
            return
        self._passes += 1
        if self._passes != self.injection.nth:
            return
        os.close(_real["open"](self.injection.held, os.O_CREAT | os.O_WRONLY, 0o666))
        end = time.monotonic() + HOLD_LIMIT
        while os.path.lexists(self.injection.held) and time.monotonic() < end:
            time.sleep(0.002)

    def is_skipped(self, name: str, path: str) -> bool:
        """Return whether the injection skips a call of that name."""
        wanted, _, pattern = self.injection.lost.partition(" ")
        return wanted == name and fnmatchcase(path, pattern)


def _absolute(path: Any, dir_fd: int | None = None) -> str:
    text = os.fsdecode(os.fspath(path)) if not isinstance(path, int) else _path_of(path)
    if dir_fd is not None:
        text = os.path.join(_path_of(dir_fd), text)  # noqa: PTH118
    folder, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")  # noqa: PTH115


def _inode(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.lstat(path).st_ino
    return 0


def _opening(tracer: Tracer) -> Callable[..., int]:
    def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def really() -> int:
            return int(_real["open"](path, flags, mode, dir_fd=dir_fd))

        where = _absolute(path, dir_fd)
        if not tracer.is_watched(where):
            return really()
        if not flags & (os.O_CREAT | os.O_TRUNC):
            tracer.record.opened.append(where)
            tracer.hold("open", where)
            return really()
        opened: list[int] = []

        def act() -> Event:
            is_new = not os.path.lexists(where)
            opened.append(really())
            name = "create" if is_new else ("empty" if flags & os.O_TRUNC else "reopen")
            return Event(name, where, os.fstat(opened[0]).st_ino, is_new=is_new)

        tracer.perform("create", where, act)
        return opened[0]

    return opening


def _writing(tracer: Tracer, name: str) -> Callable[..., int]:
    def writing(fd: int, data: Any, *rest: int) -> int:
        path = _path_of(fd)
        if not tracer.is_watched(path):
            return int(_real[name](fd, data, *rest))
        whole = b"".join(bytes(part) for part in data) if name == "pwritev" else bytes(data)
        done: list[int] = []

        def act() -> Event:
            done.append(_real[name](fd, data, *rest))
            start = rest[0] if rest else os.lseek(fd, 0, os.SEEK_CUR) - done[0]
            return Event("write", path, os.fstat(fd).st_ino, "", start, whole[: done[0]])

        def torn() -> None:
            half = memoryview(whole)[: len(whole) // 2]
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            _real["pwrite"](fd, half, *rest) if rest else _real["write"](fd, half)

        tracer.perform("write", path, act, torn)
        return done[0]

    return writing


def _on_file(tracer: Tracer, name: str) -> Callable[..., Any]:
    """Wrap a call on a descriptor: fsync, fdatasync, ftruncate, fchmod."""

    def call(fd: Any, *rest: Any) -> None:
        where = _path_of(fd) if isinstance(fd, int) else _absolute(fd)
        if not tracer.is_watched(f"{where}/"):
            _real[name](fd, *rest)
            return
        if tracer.is_skipped(name, where):
            return

        def act() -> Event:
            _real[name](fd, *rest)
            size = int(rest[0]) if name in ("ftruncate", "truncate") else 0
            inode = os.fstat(fd).st_ino if isinstance(fd, int) else _inode(where)
            return Event(_PLAIN.get(name, name), where, inode, "", size)

        tracer.perform(name, where, act)

    return call


def _on_name(tracer: Tracer, name: str) -> Callable[..., Any]:
    """Wrap a call on one name: unlink, mkdir, rmdir, chmod."""

    def call(path: Any, *rest: Any, dir_fd: int | None = None, **options: Any) -> None:
        where = _absolute(path, dir_fd)
        if dir_fd is not None:
            options["dir_fd"] = dir_fd
        if not tracer.is_watched(where):
            _real[name](path, *rest, **options)
            return

        def act() -> Event:
            before = _inode(where)
            _real[name](path, *rest, **options)
            return Event(_PLAIN.get(name, name), where, before or _inode(where))

        tracer.perform(name, where, act)

    return call


def _on_names(tracer: Tracer, name: str) -> Callable[..., Any]:
    """Wrap a call on two names: rename, replace, link, symlink."""

    def call(src: Any, dst: Any, *rest: Any, **options: Any) -> None:
        target = _absolute(dst)
        source = os.fsdecode(os.fspath(src)) if name == "symlink" else _absolute(src)
        if not tracer.is_watched(target):
            _real[name](src, dst, *rest, **options)
            return

        def act() -> Event:
            _real[name](src, dst, *rest, **options)
            return Event(_PLAIN.get(name, name), source, _inode(target), target)

        tracer.perform(_PLAIN.get(name, name), target, act)

    return call


def _punching(tracer: Tracer, real: Punch) -> Punch:
    """Wrap the call that gives a range of a file back to the disk, as a write of zeros."""

    def punching(fd: int, offset: int, size: int) -> None:
        path = _path_of(fd)
        if not tracer.is_watched(path):
            real(fd, offset, size)
            return

        def act() -> Event:
            real(fd, offset, size)
            status = os.fstat(fd)
            zeros = bytes(max(0, min(size, status.st_size - offset)))
            return Event("write", path, status.st_ino, "punched", offset, zeros)

        tracer.perform("punch", path, act)

    return punching


def _wrap_punch(tracer: Tracer) -> None:
    """Wrap `block_io.punch`, which calls fallocate past Python, wherever it is imported by name."""
    files = sys.modules.get("csm_weights.store.block_io")
    if not hasattr(files, "punch"):
        return
    real: Punch = getattr(files, "punch")  # noqa: B009
    for name, module in list(sys.modules.items()):
        if name.startswith("csm_weights") and getattr(module, "punch", None) is real:
            setattr(module, "punch", _punching(tracer, real))  # noqa: B010


def _reading(tracer: Tracer) -> Callable[..., int]:
    def reading(fd: int, buffers: Any, offset: int, *rest: int) -> int:
        if tracer.injection.hold.startswith("read "):
            tracer.hold("read", _path_of(fd))
        return int(_real["preadv"](fd, buffers, offset, *rest))

    return reading


def install(injection: Injection) -> Tracer:
    """Wrap the calls of this process; see `Injection`."""
    tracer = Tracer(injection)
    if injection.unprivileged:
        drop_privileges()
    setattr(os, "open", _opening(tracer))  # noqa: B010
    setattr(os, "preadv", _reading(tracer))  # noqa: B010
    for name in ("write", "pwrite", "pwritev"):
        setattr(os, name, _writing(tracer, name))
    for name in ("fsync", "fdatasync", "ftruncate", "truncate", "fchmod"):
        setattr(os, name, _on_file(tracer, name))
    for name in ("unlink", "remove", "mkdir", "rmdir", "chmod"):
        setattr(os, name, _on_name(tracer, name))
    for name in ("rename", "replace", "link", "symlink"):
        setattr(os, name, _on_names(tracer, name))
    _wrap_punch(tracer)
    if injection.without_locks:
        setattr(fcntl, "flock", lambda *_: None)  # noqa: B010
    return tracer

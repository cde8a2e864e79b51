"""The calls by which a child changes its disk: recorded, counted, and stopped at one of them.

`install` wraps them in the child. What Python does by other ways (a file opened
for writing by `open`) is not seen; no acting command writes so.
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

#: Seconds that a child waits at most where it is held.
HELD = 30.0


@dataclass(frozen=True)
class Orders:
    """What is to happen to a child.

    Only calls below `roots` count. The child gets `signal` at call `at`, from
    1: `when` is "before" it, "torn" (half of a write is done) or "after" it.
    `hold` is "NAME GLOB": at the first such call a file `held` is made, and
    the child waits until it is gone. The calls named in `lost` ("fsync GLOB")
    do nothing, nor do locks with `lockless`. `nth` lets some such calls pass
    before the child is held. `powerless` takes from root what lets it pass by
    permissions. `log` is where the record goes.
    """

    roots: tuple[str, ...] = ()
    at: int = 0
    when: str = "before"
    signal: int = signal.SIGKILL
    hold: str = ""
    nth: int = 1
    held: str = ""
    lost: str = ""
    lockless: bool = False
    one_core: bool = False
    powerless: bool = False
    log: str = ""


@dataclass(frozen=True)
class Event:
    """One call that was done: its name and path, and what the disk may lose of it.

    `inode` is the file's; `is_new` that the call made it; `offset` and `data`
    are a write's, `offset` alone a truncation's size. `other` is the target of
    a rename or link. `number` is what `Orders.at` calls it: calls that failed
    are counted, and have no event.
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
class Record:
    """What a child did: the calls that change the disk, and what it opened to read."""

    events: list[Event] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    @property
    def written(self) -> int:
        """Bytes written; what was given back to the disk is none."""
        return sum(len(event.data) for event in self.events if event.other != "punched")

    @classmethod
    def load(cls, path: Path) -> Record:
        """The record that a child has left at `path`."""
        found = pickle.loads(path.read_bytes())
        assert isinstance(found, Record)
        return found


_real = {
    name: getattr(os, name)
    for name in (
        *("open", "write", "pwrite", "pwritev", "ftruncate", "truncate", "fsync", "fdatasync"),
        *("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir"),
        *("chmod", "fchmod", "preadv"),
    )
}


#: What gives a range of a file, (descriptor, offset, size), back to the disk.
Punch = Callable[[int, int, int], None]

#: One name for calls that do the same.
_PLAIN = {"ftruncate": "truncate", "fchmod": "chmod", "remove": "unlink", "replace": "rename"}


class Watch:
    """The wrapped calls of one child."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.record = Record()
        self._count = 0
        self._lock = threading.RLock()
        self._passes = 0
        roots = tuple(os.path.realpath(root) for root in orders.roots)
        self._roots = tuple(f"{root}/" for root in roots)

    def dump(self) -> None:
        """Leaves the record where it was ordered."""
        if self.orders.log:
            Path(self.orders.log).write_bytes(pickle.dumps(self.record))

    def concerns(self, path: str) -> bool:
        """Whether a path is below the roots."""
        return path.startswith(self._roots)

    def through(self, name: str, path: str, act: Callable[[], Event], torn: Any = None) -> None:
        """Does a call that changes the disk, unless it is the one to stop at.

        One at a time, so that the record has the order in which they were done.
        """
        self.hold(name, path)
        with self._lock:
            self._count += 1
            is_due = self._count == self.orders.at
            if is_due and self.orders.when != "after":
                if self.orders.when == "torn" and torn:
                    torn()
                self._strike()
            self.record.events.append(replace(act(), number=self._count))
            if is_due and self.orders.when == "after":
                self._strike()

    def _strike(self) -> None:
        os.kill(os.getpid(), self.orders.signal)
        if self.orders.signal == signal.SIGKILL:
            time.sleep(HELD)  # it takes a moment to die

    def hold(self, name: str, path: str) -> None:
        """Waits here if this is the call at which the child is held."""
        wanted, _, pattern = self.orders.hold.partition(" ")
        if wanted != name or not fnmatchcase(path, pattern):
            return
        self._passes += 1
        if self._passes != self.orders.nth:
            return
        os.close(_real["open"](self.orders.held, os.O_CREAT | os.O_WRONLY, 0o666))
        end = time.monotonic() + HELD
        while os.path.lexists(self.orders.held) and time.monotonic() < end:
            time.sleep(0.002)

    def is_lost(self, name: str, path: str) -> bool:
        """Whether a call of that name is ordered to do nothing."""
        wanted, _, pattern = self.orders.lost.partition(" ")
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


def _opening(watch: Watch) -> Callable[..., int]:
    def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def really() -> int:
            return int(_real["open"](path, flags, mode, dir_fd=dir_fd))

        where = _absolute(path, dir_fd)
        if not watch.concerns(where):
            return really()
        if not flags & (os.O_CREAT | os.O_TRUNC):
            watch.record.opened.append(where)
            watch.hold("open", where)
            return really()
        opened: list[int] = []

        def act() -> Event:
            is_new = not os.path.lexists(where)
            opened.append(really())
            name = "create" if is_new else ("empty" if flags & os.O_TRUNC else "reopen")
            return Event(name, where, os.fstat(opened[0]).st_ino, is_new=is_new)

        watch.through("create", where, act)
        return opened[0]

    return opening


def _writing(watch: Watch, name: str) -> Callable[..., int]:
    def writing(fd: int, data: Any, *rest: int) -> int:
        path = _path_of(fd)
        if not watch.concerns(path):
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

        watch.through("write", path, act, torn)
        return done[0]

    return writing


def _on_file(watch: Watch, name: str) -> Callable[..., Any]:
    """A call on a descriptor: fsync, fdatasync, ftruncate, fchmod."""

    def call(fd: Any, *rest: Any) -> None:
        where = _path_of(fd) if isinstance(fd, int) else _absolute(fd)
        if not watch.concerns(f"{where}/"):
            _real[name](fd, *rest)
            return
        if watch.is_lost(name, where):
            return

        def act() -> Event:
            _real[name](fd, *rest)
            size = int(rest[0]) if name in ("ftruncate", "truncate") else 0
            inode = os.fstat(fd).st_ino if isinstance(fd, int) else _inode(where)
            return Event(_PLAIN.get(name, name), where, inode, "", size)

        watch.through(name, where, act)

    return call


def _on_name(watch: Watch, name: str) -> Callable[..., Any]:
    """A call on one name: unlink, mkdir, rmdir, chmod."""

    def call(path: Any, *rest: Any, dir_fd: int | None = None, **options: Any) -> None:
        where = _absolute(path, dir_fd)
        if dir_fd is not None:
            options["dir_fd"] = dir_fd
        if not watch.concerns(where):
            _real[name](path, *rest, **options)
            return

        def act() -> Event:
            before = _inode(where)
            _real[name](path, *rest, **options)
            return Event(_PLAIN.get(name, name), where, before or _inode(where))

        watch.through(name, where, act)

    return call


def _on_names(watch: Watch, name: str) -> Callable[..., Any]:
    """A call on two names: rename, replace, link, symlink."""

    def call(src: Any, dst: Any, *rest: Any, **options: Any) -> None:
        target = _absolute(dst)
        source = os.fsdecode(os.fspath(src)) if name == "symlink" else _absolute(src)
        if not watch.concerns(target):
            _real[name](src, dst, *rest, **options)
            return

        def act() -> Event:
            _real[name](src, dst, *rest, **options)
            return Event(_PLAIN.get(name, name), source, _inode(target), target)

        watch.through(_PLAIN.get(name, name), target, act)

    return call


def _punching(watch: Watch, real: Punch) -> Punch:
    """Giving a range of a file back to the disk: it is as if zeros were written there."""

    def punching(fd: int, offset: int, size: int) -> None:
        path = _path_of(fd)
        if not watch.concerns(path):
            real(fd, offset, size)
            return

        def act() -> Event:
            real(fd, offset, size)
            status = os.fstat(fd)
            zeros = bytes(max(0, min(size, status.st_size - offset)))
            return Event("write", path, status.st_ino, "punched", offset, zeros)

        watch.through("punch", path, act)

    return punching


def _wrap_punch(watch: Watch) -> None:
    """Wraps the product's own call, which is made past Python; it may be imported by name."""
    files = sys.modules.get("csm_weights.store.block_io")
    if not hasattr(files, "punch"):
        return
    real: Punch = getattr(files, "punch")  # noqa: B009
    for name, module in list(sys.modules.items()):
        if name.startswith("csm_weights") and getattr(module, "punch", None) is real:
            setattr(module, "punch", _punching(watch, real))  # noqa: B010


def _reading(watch: Watch) -> Callable[..., int]:
    def reading(fd: int, buffers: Any, offset: int, *rest: int) -> int:
        if watch.orders.hold.startswith("read "):
            watch.hold("read", _path_of(fd))
        return int(_real["preadv"](fd, buffers, offset, *rest))

    return reading


def install(orders: Orders) -> Watch:
    """Wraps the calls of this process; see `Orders`."""
    watch = Watch(orders)
    if orders.powerless:
        drop_privileges()
    setattr(os, "open", _opening(watch))  # noqa: B010
    setattr(os, "preadv", _reading(watch))  # noqa: B010
    for name in ("write", "pwrite", "pwritev"):
        setattr(os, name, _writing(watch, name))
    for name in ("fsync", "fdatasync", "ftruncate", "truncate", "fchmod"):
        setattr(os, name, _on_file(watch, name))
    for name in ("unlink", "remove", "mkdir", "rmdir", "chmod"):
        setattr(os, name, _on_name(watch, name))
    for name in ("rename", "replace", "link", "symlink"):
        setattr(os, name, _on_names(watch, name))
    _wrap_punch(watch)
    if orders.lockless:
        setattr(fcntl, "flock", lambda *_: None)  # noqa: B010
    return watch

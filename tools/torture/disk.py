"""A model of a disk that loses power: everything that was not made durable may be lost.

A write is durable once its file was synced after it; a change of a folder's entries is
durable once that folder was. What is not durable may survive, be lost, or survive in part,
each write and entry by itself. A rename may survive although the bytes of the file do not.

Unless the model is `strict`, two guarantees hold that the journals of ext4, XFS and Btrfs
give and POSIX does not: a rename across folders survives as a whole or not at all, and
syncing a folder makes the folder itself durable.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from tools.torture.tracing import Event

#: The value of a name that is a folder.
FOLDER = -1

#: For a file's inode on the old disk: the time at which it was written (ns) if that was before
#: the first event, else None; and its stat on the new disk.
Stats = dict[int, tuple[int | None, os.stat_result]]

#: The value of a name: a file's number, FOLDER, the target of a symbolic link, or nothing.
Value = int | str | None


@dataclass
class File:
    """A file: the bytes that are durable, and the events since."""

    durable: bytes
    pending: list[Event] = field(default_factory=list)

    def surviving(self, rng: random.Random, mode: str) -> bytes:
        """Return bytes that a cut may leave; `mode` is all, none, size (zeros), or some."""
        if mode == "none":
            return self.durable
        whole = self._applied([(event, "kept") for event in self.pending])
        if mode == "all":
            return whole
        fates = ("lost",) if mode == "size" else ("kept", "lost", "torn", "garbage")
        left = self._applied([(e, _fate(e, rng, fates)) for e in self.pending], rng)
        keeps_size = mode == "size" or rng.random() < 0.5
        return left.ljust(len(whole), b"\0") if keeps_size else left

    def _applied(self, fates: list[tuple[Event, str]], rng: random.Random | None = None) -> bytes:
        data = bytearray(self.durable)
        for event, fate in fates:
            if event.name == "truncate" and fate == "kept":
                del data[event.offset :]
                data.extend(bytes(event.offset - len(data)))
            elif event.name == "write" and fate != "lost":
                _put(data, event.offset, _written(event.data, fate, rng))
        return bytes(data)


def _fate(event: Event, rng: random.Random, fates: tuple[str, ...]) -> str:
    fate = rng.choice(fates)
    return "kept" if event.name == "truncate" and fate in ("torn", "garbage") else fate


def _written(data: bytes, fate: str, rng: random.Random | None) -> bytes:
    if fate == "torn":
        return data[: len(data) // 2]
    return rng.randbytes(len(data)) if fate == "garbage" and rng else data


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(piece)] = piece


@dataclass(frozen=True)
class Change:
    """One entry of a folder that was set; changes of one `act` happened at once."""

    act: int
    path: str
    value: Value

    @property
    def folder(self) -> str:
        """Return the folder whose sync makes the change durable."""
        return os.path.dirname(self.path)  # noqa: PTH120


class Disk:
    """A disk that is fed the events of a command; see the module for `strict`."""

    def __init__(self, tops: tuple[Path, ...], strict: bool = False) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[str, Value] = {}
        self.pending: list[Change] = []
        self.inodes: dict[int, int] = {}
        self.times: dict[int, int] = {}
        self._strict = strict
        self._acts = 0
        for top in tops:
            self.names[str(top)] = FOLDER
            for path in sorted(top.rglob("*")):
                self._scan(path)

    def _scan(self, path: Path) -> None:
        if path.is_symlink():
            self.names[str(path)] = os.readlink(path)  # noqa: PTH115
        elif path.is_dir():
            self.names[str(path)] = FOLDER
        else:
            inode = path.stat().st_ino
            self.times[inode] = path.stat().st_mtime_ns
            number = self.inodes.setdefault(inode, len(self.files))
            self.files.setdefault(number, File(path.read_bytes()))
            self.names[str(path)] = number

    def feed(self, event: Event) -> None:
        """Apply an event."""
        self._acts += 1
        if event.name == "create":
            self.inodes[event.inode] = number = len(self.files)
            self.times.pop(event.inode, None)
            self.files[number] = File(b"")
            self._set(event.path, number)
        elif event.name == "empty":
            self._file(event).pending.append(Event("truncate", event.path))
        elif event.name in ("write", "truncate"):
            self._file(event).pending.append(event)
        elif event.name in ("fsync", "fdatasync"):
            self._sync(event)
        else:
            self._rename(event)

    def _rename(self, event: Event) -> None:
        """Apply an event that changes names."""
        if event.name in ("unlink", "rmdir"):
            self._set(event.path, None)
        elif event.name == "mkdir":
            self._set(event.path, FOLDER)
        elif event.name == "symlink":
            self._set(event.other, event.path)
        elif event.name in ("rename", "link"):
            self._set(event.other, self._now(event.path))
            if event.name == "rename":
                self._set(event.path, None)

    def _file(self, event: Event) -> File:
        return self.files[self.inodes[event.inode]]

    def _now(self, path: str) -> Value:
        last = [change.value for change in self.pending if change.path == path]
        return last[-1] if last else self.names.get(path)

    def _set(self, path: str, value: Value) -> None:
        self.pending.append(Change(self._acts, path, value))

    def _sync(self, event: Event) -> None:
        if self._now(event.path) != FOLDER:
            file = self._file(event)
            file.durable = file.surviving(random.Random(), "all")
            file.pending.clear()
            return
        made = {event.path}
        if not self._strict:
            made |= {str(parent) for parent in Path(event.path).parents}
        acts = {c.act for c in self.pending if c.folder == event.path and not self._strict}
        for change in list(self.pending):
            is_in = change.folder == event.path or change.act in acts
            if is_in or (change.value == FOLDER and change.path in made):
                self.names[change.path] = change.value
                self.pending.remove(change)

    def survivors(self, rng: random.Random) -> dict[str, Value]:
        """Return the names that a cut may leave, with their values."""
        mode = rng.choice(("all", "none", "first", "some"))
        acts = sorted({change.act for change in self.pending})
        if mode in ("all", "none"):
            kept = set(acts if mode == "all" else ())
        elif mode == "first":
            kept = set(acts[: rng.randint(0, len(acts))])
        else:
            kept = {act for act in acts if rng.random() < 0.5}
        names = dict(self.names)
        for change in self.pending:
            if change.act in kept:
                names[change.path] = change.value
        return {path: value for path, value in names.items() if value is not None}

    def materialize(self, rng: random.Random, moved: dict[Path, Path]) -> Stats:
        """Write what a cut may leave to disk, below the folders that `moved` maps the old ones to.

        Return the stat of each file that survived; see `Stats`.
        """
        contents = {n: f.surviving(rng, _mode(rng)) for n, f in self.files.items()}
        made: dict[int, Path] = {}
        for name, value in sorted(self.survivors(rng).items()):
            path = _moved(Path(name), moved)
            if value == FOLDER:
                if path.parent.is_dir():
                    path.mkdir(exist_ok=True)
            elif path.parent.is_dir():
                _make(path, value, contents, made)
        here = {i: made[n] for i, n in self.inodes.items() if n in made}
        return {i: (self.times.get(i), path.stat()) for i, path in here.items()}


def _mode(rng: random.Random) -> str:
    return rng.choice(("all", "none", "size", "some", "some"))


def _moved(path: Path, moved: dict[Path, Path]) -> Path:
    top = next(old for old in moved if path.is_relative_to(old))
    return moved[top] / path.relative_to(top)


def _make(path: Path, value: Value, contents: dict[int, bytes], made: dict[int, Path]) -> None:
    if isinstance(value, str):
        path.symlink_to(value)
    elif value in made:
        path.hardlink_to(made[value])
    elif value is not None:
        path.write_bytes(contents[value])
        if contents[value].startswith(b"#!"):
            path.chmod(0o755)
        made[value] = path

"""Create, write and replace files safely and durably."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csm_weights.errors import Finding, Kind, NoSpace, WrongContent
from csm_weights.manifest.parse import parse
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest that has been read back and found valid."""
    text = render(manifest)
    parse(text.encode(), str(path))
    write_whole(path, text)


#: What the file system says when it is full, or a limit is reached.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: What it says when something else has the name.
_IN_THE_WAY = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}

_ROOM = "free some disk or choose another --dest, and run the same command again"
_CLOSED = "check its permissions, or choose another --dest"


def create(path: Path, flags: int = 0) -> int:
    """Opens a file of ours for reading and writing, 0644 less umask, never through a link.

    Makes its folders. Raises NoSpace when the file system does not take it,
    WrongContent where the name is on a file of another user, or on no file.
    """
    with writing(path):
        make_folder(path.parent)
        everywhere = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, everywhere | flags & ~os.O_TRUNC, 0o644)
        except PermissionError:
            if os.path.lexists(path):
                _require_ours(path.lstat(), path)
            raise
    try:
        _require_ours(os.fstat(fd), path)
        if flags & os.O_TRUNC:
            with writing(path):
                os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each with a durable entry in the one above.

    Raises OSError where the file system does not take it.
    """
    missing = [f for f in (folder, *folder.parents) if not f.is_dir()]
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        if os.access(new.parent, os.R_OK):
            sync(new.parent)


def _require_ours(status: os.stat_result, path: Path) -> None:
    """Raises WrongContent unless it is the stat of a plain file of this user.

    Whoever owns a lock may hold it for ever, and whoever owns an unfinished
    file may change it after it was proven.
    """
    found = "something that is no plain file"
    if stat.S_ISREG(status.st_mode):
        if status.st_uid == os.geteuid() or status.st_uid == _owner_of_new_files(path.parent):
            return
        found = f"one of user {status.st_uid}"
    finding = Finding(
        Kind.IN_THE_WAY,
        str(path),
        f"a file of this user ({os.geteuid()}), or none",
        found,
        f"if no run of another user is at work in {path.parent}, remove the file",
    )
    raise WrongContent("a lock or an unfinished file of another user is not trusted", [finding])


def _owner_of_new_files(folder: Path) -> int | None:
    """The user to whom a file belongs that is made in `folder`: some mounts put another one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:
        return None


def stay_inside(folder: Path, base: Path) -> None:
    """Raises WrongContent where a link on the way from `base` to `folder` leads out of `base`.

    `base` itself may be a link: which folder is meant is the caller's choice.
    """
    led, home = Path(os.path.realpath(folder)), Path(os.path.realpath(base))
    if led.is_relative_to(home):
        return
    finding = Finding(
        Kind.IN_THE_WAY,
        str(folder),
        f"a folder inside {base}",
        f"a link that leads to {led}",
        "remove the link; with --dest another folder can be named",
    )
    raise WrongContent("nothing is written through a link out of the folder", [finding])


def let_go_if_linked(path: Path) -> None:
    """Removes an unfinished file's name where its content has another one, and so is not ours.

    A run that was killed between linking a file of the Hub's cache and naming
    it leaves such a one; writing there would write into the cache.
    """
    with writing(path), contextlib.suppress(FileNotFoundError):
        if path.lstat().st_nlink > 1:
            path.unlink()


def write_all(fd: int, data: bytes, path: Path) -> None:
    """Writes all of `data`; `path` is for messages. Raises NoSpace."""
    view = memoryview(data)
    with writing(path):
        while view:
            view = view[os.write(fd, view) :]


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, durable."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_whole(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all, durably."""
    unfinished = path.with_name(path.name + ".partial")
    let_go_if_linked(unfinished)
    fd = create(unfinished, os.O_TRUNC)
    try:
        write_all(fd, text.encode(), unfinished)
        with writing(unfinished):
            os.fsync(fd)
    finally:
        os.close(fd)
    with writing(path):
        unfinished.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a file system says to a write into NoSpace, or WrongContent.

    The latter where a link, a folder or a file is in the way of `path`. That
    a rename would cross file systems (EXDEV) stays an OSError.
    """
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        if error.errno == errno.EXDEV:
            raise
        if error.errno in _IN_THE_WAY:
            wrong = Finding(
                Kind.IN_THE_WAY, str(path), "a plain file or nothing", found, "move it away"
            )
            raise WrongContent("the file cannot be written", [wrong]) from error
        if error.errno in _FULL:
            full = Finding(Kind.NO_SPACE, str(path), "room to write", found, _ROOM)
            raise NoSpace("the disk takes no more", [full]) from error
        closed = Finding(Kind.NOT_WRITABLE, str(path), "a place to write", found, _CLOSED)
        raise NoSpace("it cannot be written there", [closed]) from error

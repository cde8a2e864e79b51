"""Create, write and replace files safely and durably."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csm_weights.errors import Finding, Kind, NoSpace, WrongContent
from csm_weights.files import NotRegular

#: Errors of a write where something else has the name.
_IN_THE_WAY = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}


def create(path: Path, flags: int = 0) -> int:
    """Open a file of ours for reading and writing, 0644 less umask, never through a link.

    Makes its folders. Raises NoSpace when the file system refuses, WrongContent
    where another user's file, or something else than a file, has the name.
    """
    with writing(path):
        make_folder(path.parent)
        always = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(path, always | flags & ~os.O_TRUNC, 0o644)
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
    """Make a folder and those above it, each with a durable entry in the one above.

    Raises OSError where the file system does not take it.
    """
    missing = [f for f in (folder, *folder.parents) if not f.is_dir()]
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        if os.access(new.parent, os.R_OK):
            sync(new.parent)


def _require_ours(status: os.stat_result, path: Path) -> None:
    """Raise WrongContent unless it is the stat of a plain file of this user.

    The owner of a lock may hold it for ever, and the owner of an unfinished
    file may change it after it was verified.
    """
    found, owner = "not a regular file", status.st_uid
    if stat.S_ISREG(status.st_mode):
        if owner == os.geteuid() or owner == _owner_of_new_files(path.parent):
            return
        found = f"one of user {owner}"
    expected = f"a file of this user ({os.geteuid()}), or none"
    mend = f"if no run of another user is at work in {path.parent}, remove the file"
    finding = Finding(Kind.IN_THE_WAY, str(path), expected, found, mend)
    raise WrongContent("a lock or an unfinished file of another user is not trusted", [finding])


def _owner_of_new_files(folder: Path) -> int | None:
    """Return the owner of a file that is made in `folder`: some mounts put another user."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid
    return None


def why_read_only(folder: Path) -> str:
    """Return why a folder, or the one it would be made in, takes no files; "" where it does."""
    above = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in above if path.exists())
    if hasattr(os, "statvfs") and os.statvfs(existing).f_flag & os.ST_RDONLY:
        return "a read-only file system"
    by_effective_user = os.access in os.supports_effective_ids
    is_ours = os.access(existing, os.W_OK | os.X_OK, effective_ids=by_effective_user)
    return "" if is_ours else "no permission to write"


def require_writable(file: Path, option: str) -> None:
    """Raise NoSpace where a file, named by an option, cannot be written; before long work."""
    if reason := "a folder of that name" if file.is_dir() else why_read_only(file.parent):
        words = ("a file that can be written", reason, f"choose another {option}")
        finding = Finding(Kind.NOT_WRITABLE, str(file), *words)
        raise NoSpace(f"{file.name} cannot be written", [finding])


def stay_inside(folder: Path, base: Path) -> None:
    """Raise WrongContent where a link on the way from `base` to `folder` leads out of `base`.

    `base` itself may be a link: which folder is meant is the caller's choice.
    """
    led = Path(os.path.realpath(folder))
    if led.is_relative_to(os.path.realpath(base)):
        return
    words = (f"a folder inside {base}", f"a link that leads to {led}")
    mend = "remove the link, or name another folder: with --dest, or the cache's with HF_HUB_CACHE"
    finding = Finding(Kind.IN_THE_WAY, str(folder), *words, mend)
    raise WrongContent("refusing to write through a link out of the folder", [finding])


def unlink_shared(path: Path) -> None:
    """Remove the name of an unfinished file whose content has another name, and so is not ours.

    A run of a former version that was killed between linking a file of the Hub's
    cache and renaming it has left one; writing there would write into the cache.
    """
    with writing(path), contextlib.suppress(FileNotFoundError):
        if path.lstat().st_nlink > 1:
            path.unlink()


@contextmanager
def created(path: Path) -> Iterator[int]:
    """Make an empty file of ours, as `create` does; yield its descriptor and close it."""
    unlink_shared(path)
    fd = create(path, os.O_TRUNC)
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes, path: Path) -> None:
    """Write all of `data`; `path` is for messages. Raises NoSpace."""
    view = memoryview(data)
    with writing(path):
        while view:
            view = view[os.write(fd, view) :]


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all, durably; a text is in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    unfinished = path.with_name(path.name + ".partial")
    with created(unfinished) as fd:
        write_all(fd, data, unfinished)
        with writing(unfinished):
            os.fsync(fd)
    with writing(path):
        unfinished.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of a write into NoSpace, or WrongContent.

    The latter where a link, a folder or a file is in the way of `path`. That
    a rename would cross file systems (EXDEV) stays an OSError.
    """
    try:
        yield
    except OSError as error:
        where, found = str(path), error.strerror or str(error)
        if error.errno == errno.EXDEV:
            raise
        if error.errno in _IN_THE_WAY or isinstance(error, NotRegular):
            words = ("a regular file, or none", found, "move it away")
            finding = Finding(Kind.IN_THE_WAY, where, *words)
            raise WrongContent("the file cannot be written", [finding]) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            mend = "free some disk or choose another folder, and run the same command again"
            finding = Finding(Kind.NO_SPACE, where, "room to write", found, mend)
            raise NoSpace("the disk is full", [finding]) from error
        mend = "make it writable, or choose another folder"
        finding = Finding(Kind.NOT_WRITABLE, where, "a place to write", found, mend)
        raise NoSpace("the file cannot be written there", [finding]) from error

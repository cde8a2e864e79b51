"""One acting run at a time on one folder, where the file system knows locks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csm_weights.manifest.types import RECEIPTS
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import Paths

if sys.platform != "win32":
    import fcntl

#: The lock's name in the staging folder.
NAME = ".lock"


@contextmanager
def locked(paths: Paths, with_destination: bool) -> Iterator[None]:
    """One acting run at a time on one folder; a second one waits.

    Other models, and other checkouts, may have the same destination. Folders
    are locked in one order, so that two runs never wait for each other.
    """
    folders = {paths.staging: NAME}
    if with_destination:
        folders.setdefault(paths.destination, f"{RECEIPTS}/{NAME}")
    with contextlib.ExitStack() as locks:
        for folder in sorted(folders, key=lambda folder: str(folder.resolve())):
            locks.enter_context(lock(folder, folders[folder]))
        yield


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock called `name` in a folder; says so when it has to wait for it."""
    from filelock import FileLock, Timeout

    path = folder / name
    os.close(atomic.create(path))
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        with Progress(f"waiting for another run in {folder}", 0) as progress:
            progress.log("it holds the lock; this one goes on when it ends")
            held.acquire()
    try:
        yield
    finally:
        held.release()


def are_real(path: Path) -> bool:
    """Whether a lock that this run holds, at `path`, would keep another one out.

    On some network file systems every flock succeeds.
    """
    if sys.platform == "win32":
        return True
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False

"""One acting run at a time on one folder, where the file system knows locks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from csm_weights.files import opened
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import Paths

if TYPE_CHECKING:
    from filelock import BaseFileLock

#: The lock's name in the staging folder.
NAME = ".lock"


@contextmanager
def locked(paths: Paths, with_destination: bool) -> Iterator[None]:
    """Let one run at a time act on one folder; a second one waits.

    Other models, and other checkouts, may have the same destination.
    """
    folders = {paths.staging: NAME}
    if with_destination:
        folders.setdefault(paths.destination, f"{RECEIPTS}/{NAME}")
    with contextlib.ExitStack() as locks:
        # In one order, so that two runs never wait for each other.
        for folder in sorted(folders, key=lambda folder: str(folder.resolve())):
            locks.enter_context(lock(folder, folders[folder]))
        yield


@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock called `name` in a folder; say so when another run has it.

    Where the file system's own locks keep nobody out, a marker file beside it
    does; that of a run on this machine that was killed is taken over.
    """
    from filelock import FileLock, SoftFileLock

    path = folder / name
    os.close(atomic.create(path))
    with contextlib.ExitStack() as held:
        held.enter_context(_acquired(FileLock(path), ""))
        if not are_real(path):
            marker = path.with_name(f"{path.name}.held")
            hint = f"; if there is none on any machine, remove {marker}"
            held.enter_context(_acquired(SoftFileLock(marker), hint))
        yield


def _acquired(lock: BaseFileLock, hint: str) -> AbstractContextManager[object]:
    """Acquire a lock, and log it where another run has it; leaving the context releases it."""
    from filelock import Timeout

    try:
        return lock.acquire(timeout=0)
    except Timeout:
        label = f"waiting for another run in {Path(lock.lock_file).parent}"
        Progress(label).log(f"it holds the lock; this run continues when it ends{hint}")
        return lock.acquire()


def are_real(path: Path) -> bool:
    """Check that a lock that this run holds, at `path`, would keep another one out.

    On some network file systems every flock succeeds.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    with opened(path, os.O_RDWR | os.O_NOFOLLOW) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

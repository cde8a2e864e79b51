"""What is in the place of a file: told by its stat, and by the first bytes of a wrong one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from csm_weights.errors import Finding, Kind

#: Bytes read of a file that has the wrong size, to say what it is.
PEEK = 256


def stat_of(path: Path, where: str = "") -> tuple[os.stat_result | None, Finding | None]:
    """The stat of a regular file; a finding where something else is in its place."""
    where = where or str(path)
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            found = "a symbolic link that leads to no file"
            return None, Finding(Kind.MISSING, where, "a file", found, "mend or remove the link")
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None, None
        return None, unreadable(where, error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "neither file nor folder"
        return None, Finding(Kind.UNREADABLE, where, "a plain file", found, "move it away")
    return status, None


def unreadable(where: str, found: str) -> Finding:
    """That a file is there and cannot be read, and why."""
    return Finding(Kind.UNREADABLE, where, "a readable file", found, "check its permissions")


def size_finding(path: Path, sizes: list[int], size: int, where: str = "") -> Finding | None:
    """What a file of the wrong size is: a pointer, a refusal, or just wrong."""
    if size in sizes:
        return None
    where = where or str(path)
    expected = " or ".join(f"{s:,}" for s in sizes) + " bytes"
    try:
        with path.open("rb") as file:
            head = file.read(PEEK)
    except OSError as error:
        return unreadable(where, error.strerror or str(error))
    found = f"{size:,} bytes"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        found = f"a pointer of {found} in place of the content"
        return Finding(Kind.LFS_POINTER, where, expected, found, "git lfs pull")
    if head.startswith(b"Access to model ") and b" is restricted" in head:
        found = f"the Hub's refusal saved as a file ({found})"
        return Finding(
            Kind.ACCESS_PAGE,
            where,
            expected,
            found,
            "delete it; accept the model's terms on the Hub and download it with a token",
        )
    what = "get it again" if size else "it is empty; get it again"
    return Finding(Kind.WRONG_SIZE, where, expected, found, what)

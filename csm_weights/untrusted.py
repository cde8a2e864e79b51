"""Files and text that anyone may have written: what they are, and how to show them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent


@dataclass(frozen=True)
class Fingerprint:
    """The stat fields by which an untouched file is known without reading it.

    `size` is in bytes, the times in nanoseconds. The change time cannot be
    set back by a program, so an edit that restores `mtime_ns` still shows.
    The device number is left out: it differs from boot to boot on some disks.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        """The fingerprint of a stat result."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def same_bytes(self, other: Fingerprint) -> bool:
        """Equal but for the change time, which a rename sets."""
        return (self.inode, self.size, self.mtime_ns) == (other.inode, other.size, other.mtime_ns)


class Malformed(Exception):
    """Bytes break a rule of their format. `at` is the place inside the file, or empty."""

    def __init__(self, expected: str, found: str, at: str = "") -> None:
        super().__init__(f"{at}: expected {expected}, found {found}")
        self.expected, self.found, self.at = expected, found, at


def show(value: object) -> str:
    """A value from a file on one line of at most 80 ASCII characters; containers by type only."""
    if not isinstance(value, str | bytes | int | float | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    text = value if isinstance(value, str) else repr(value)
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."


def is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 can write: JSON and pickles may hold lone surrogates."""
    if type(value) is not str:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def are_sizes(values: object) -> bool:
    """Whether it is a list or tuple of whole numbers a file can hold: from 0 to 2^63 - 1."""
    if not isinstance(values, list | tuple):
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


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
        return None, Finding.unreadable(where, error)
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "neither file nor folder"
        return None, Finding(Kind.UNREADABLE, where, "a plain file", found, "move it away")
    return status, None


def read_file(path: Path, limit: int, what: str) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; `what` it is, for messages.

    Raises MissingInput where there is none, WrongContent for a larger file, a
    folder, a pipe or a device. A pipe that nobody writes to does not block.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        finding = Finding(Kind.MISSING, str(path), what, error.strerror or str(error))
        raise MissingInput(f"{what} is needed", [finding]) from None
    with open(fd, "rb") as file:  # noqa: PTH123 - the descriptor is open
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        data = file.read(limit + 1) if is_regular else b""
    if not is_regular or len(data) > limit:
        expected = f"{what}, a regular file of at most {limit:,} bytes"
        found = "more" if is_regular else "a folder, a pipe or a device"
        finding = Finding(Kind.MALFORMED, str(path), expected, found)
        raise WrongContent(f"{what} cannot be read", [finding])
    return data


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
        return Finding.unreadable(where, error)
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

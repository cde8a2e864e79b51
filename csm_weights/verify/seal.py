"""Seal an installed file: read-only, and by fs-verity where the file system has it.

A read-only file is safe from slips: its owner can allow writing again. With
fs-verity the kernel checks every block that is read against a hash tree that
nobody can change any more: a disk that rots or is tampered with gives an
error, not wrong bytes. The file can still be renamed and removed.
"""

import errno
import os
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from csm_weights.errors import CsmWeightsError, Finding, Kind, NoSpace, WrongContent, from_os_error
from csm_weights.files import open_regular
from csm_weights.store.atomic import writing
from csm_weights.store.receipts import Receipt

#: The ioctls of linux/fsverity.h: build and keep the hash tree of a file; read its digest.
_FS_IOC_ENABLE_VERITY = 0x40806685
_FS_IOC_MEASURE_VERITY = 0xC0046686

#: struct fsverity_enable_arg: version 1, hash algorithm 1 (SHA-256), bytes of a block; no
#: salt, no signature, reserved words.
_ENABLE_ARG = struct.pack("=III116x", 1, 1, 4096)

#: The permissions that a sealed file may have.
_READABLE = 0o444

#: Errors of a kernel or file system that has no fs-verity, or not for such a file.
_NO_VERITY = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM}


@dataclass(frozen=True)
class Sealed:
    """A sealed file: always read-only, with `verity` guarded by the kernel too."""

    path: str
    verity: bool

    @property
    def how(self) -> str:
        """The state of the seal, as a person reads it."""
        return "read-only, fs-verity" if self.verity else "read-only (no fs-verity here)"


def seal(directory: Path, receipt: Receipt) -> Sealed:
    """Seal the file of a receipt. The receipt has to be renewed: the change time is new.

    Raises WrongContent for a link, or a file that is not the one of the
    receipt, NoSpace for one whose permissions this user may not change.
    """
    file = directory / receipt.path
    with writing(file):
        fd = open_regular(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not receipt.is_current(status):
            raise WrongContent("only verified files are sealed", [Finding.edited(file)])
        verity = enable_verity(fd, file)
        if stat.S_IMODE(os.fstat(fd).st_mode) & ~_READABLE:
            try:
                os.fchmod(fd, stat.S_IMODE(status.st_mode) & _READABLE)
                os.fsync(fd)
            except OSError as error:
                raise _not_ours(error, file) from error
    finally:
        os.close(fd)
    return Sealed(receipt.path, verity)


def enable_verity(fd: int, file: Path) -> bool:
    """Turn fs-verity on (SHA-256, 4,096-byte blocks); return whether the file has it now.

    `fd` is open for reading. Raises WrongContent where some program has the
    file open for writing, NoSpace where the hash tree, 1/127 of the file,
    finds no room.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:  # only a file with a hash tree has a digest of it
        fcntl.ioctl(fd, _FS_IOC_MEASURE_VERITY, struct.pack("=HH64x", 0, 64))
        return True
    except OSError:
        pass
    try:
        try:
            fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, _ENABLE_ARG)
        except PermissionError as error:
            if error.errno != errno.EACCES:
                raise
            # The kernel wants a file that may be written; one sealed elsewhere may not.
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | stat.S_IWUSR)
            fcntl.ioctl(fd, _FS_IOC_ENABLE_VERITY, _ENABLE_ARG)
    except OSError as error:
        if error.errno in _NO_VERITY:
            return False
        if error.errno == errno.ETXTBSY:
            changed = Finding.changed(file, "a program that has it open for writing")
            raise WrongContent("the file could not be sealed", [changed]) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise _not_ours(error, file) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            words = ("room for its hash tree", error.strerror or "no room", "free some disk")
            finding = Finding(Kind.NO_SPACE, str(file), *words)
            raise NoSpace("the file could not be sealed", [finding]) from error
        raise from_os_error(OSError(error.errno, error.strerror, str(file))) from error
    return True


def _not_ours(error: OSError, file: Path) -> CsmWeightsError:
    found, expected = error.strerror or str(error), "a file that this user may seal"
    help_text = "seal it as its owner, or copy it to a folder of your own with --dest"
    finding = Finding(Kind.NOT_WRITABLE, str(file), expected, found, help_text)
    return NoSpace("the file could not be sealed", [finding])

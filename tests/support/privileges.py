"""Give up root's privileges, so that permission bits hold for a test that runs as root.

    with unprivileged():                        # this thread and the threads it starts
        path.read_bytes()                       # PermissionError, for root too
    subprocess.run([*UNPRIVILEGED, "./recombine.sh"])    # a program and all that it starts

Nothing happens where the tests do not run as root. Linux only, as root's tests are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator

#: The version of the capability structures, and prctl's numbers (linux/capability.h,
#: linux/prctl.h, linux/securebits.h).
_VERSION = 0x20080522
_PR_SET_SECUREBITS = 28
_NOROOT = 1

#: Two triples of 32 bits: the effective, permitted and inheritable capabilities.
_SETS = struct.Struct("=6I")

#: What to put before a command to run it without root's privileges.
UNPRIVILEGED = (sys.executable, os.path.abspath(__file__))  # noqa: PTH100


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Take the capabilities from this thread until the block ends."""
    if os.geteuid() != 0:
        yield
        return
    held = _capabilities()
    _set_capabilities((0, *held[1:3], 0, *held[4:6]))
    try:
        yield
    finally:
        _set_capabilities(held)


def drop_privileges() -> None:
    """Take the capabilities from this process and the programs that it will start, for good."""
    if os.geteuid() == 0:
        _check(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECUREBITS, _NOROOT, 0, 0, 0))
        _set_capabilities((0,) * 6)


def _capabilities() -> tuple[int, ...]:
    sets = ctypes.create_string_buffer(_SETS.size)
    header = struct.pack("=Ii", _VERSION, 0)
    _check(ctypes.CDLL(None, use_errno=True).capget(header, sets))
    return _SETS.unpack(sets.raw)


def _set_capabilities(sets: tuple[int, ...]) -> None:
    header = struct.pack("=Ii", _VERSION, 0)
    _check(ctypes.CDLL(None, use_errno=True).capset(header, _SETS.pack(*sets)))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    drop_privileges()
    os.execvp(sys.argv[1], sys.argv[1:])

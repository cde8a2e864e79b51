"""An emulated WAN: a network namespace behind a link that delays packets and loses some.

`tc netem` does it where the kernel has it. Otherwise a process relays packets over TUN
devices, delays each and drops some (`python -m benchmarks.wan`).
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT

#: Seconds that each packet to the namespace takes longer, and how many of them are lost.
DELAY = 0.05
LOSS = 0.01

#: Names of what is made, and its addresses: those that are kept for benchmarks (RFC 2544).
NAMESPACE, HERE, THERE = "csm-bench", "csm-bench0", "csm-bench1"
HERE_AT, THERE_AT = "198.18.255.1", "198.18.255.2"

#: Packets that may be on their way; fewer would lose more of them.
QUEUE = 50_000

#: The ioctl of linux/if_tun.h that makes a device, and its flags: IP packets, no header.
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class Unavailable(Exception):
    """An emulated WAN cannot be had here; the message says why."""


@dataclass(frozen=True)
class Wan:
    """The namespace: `prefix` runs a command in it, `address` is this side as seen from there."""

    address: str
    prefix: tuple[str, ...]
    how: str


@contextmanager
def emulated_wan() -> Iterator[Wan]:
    """Make the namespace and its link, and remove both; raises Unavailable."""
    if os.geteuid() or not shutil.which("ip"):
        raise Unavailable("needs root and iproute2")
    # One that a killed run has left is in the way.
    subprocess.run(["ip", "netns", "del", NAMESPACE], capture_output=True)
    with ExitStack() as made:
        _ip("netns", "add", NAMESPACE)
        made.callback(_ip, "netns", "del", NAMESPACE)
        how = "tc netem"
        if not _has_netem():
            made.enter_context(_relay())
            how = "a relay of packets"
        for device, address, where in ((HERE, HERE_AT, ()), (THERE, THERE_AT, ("-n", NAMESPACE))):
            _ip(*where, "address", "add", f"{address}/30", "dev", device)
            _ip(*where, "link", "set", device, "txqueuelen", str(QUEUE), "up")
        _ip("-n", NAMESPACE, "link", "set", "lo", "up")
        # The sender is on this side, and most servers use cubic.
        route = ("route", "replace", f"{THERE_AT}/32", "dev", HERE, "congctl", "cubic")
        _ip(*route)
        yield Wan(HERE_AT, ("ip", "netns", "exec", NAMESPACE), how)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _has_netem() -> bool:
    """Join both sides by a pair of devices with netem, or leave nothing behind."""
    _ip("link", "add", HERE, "gso_max_segs", "1", "type", "veth", "peer", "name", THERE)
    _ip("link", "set", THERE, "netns", NAMESPACE)
    netem = f"netem delay {DELAY * 1000:.0f}ms loss {LOSS:.0%} limit {QUEUE}"
    command = ["tc", "qdisc", "add", "dev", HERE, "root", *netem.split()]
    if shutil.which("tc") and not subprocess.run(command, capture_output=True).returncode:
        return True
    _ip("link", "del", HERE)
    return False


@contextmanager
def _relay() -> Iterator[None]:
    """Join both sides by a process that has a device on each."""
    if not Path("/dev/net/tun").exists():
        raise Unavailable("this kernel has neither netem nor TUN")
    command = [sys.executable, "-m", "benchmarks.wan"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Unavailable("TUN devices cannot be made here")
        _ip("link", "set", THERE, "netns", NAMESPACE)
        yield
    finally:
        process.terminate()
        process.wait()


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _carry(here: int, there: int) -> None:
    """Relay packets for ever: from here to there late and not all, in return at once."""
    late: deque[tuple[float, bytes]] = deque()
    poll = select.poll()
    for fd in (here, there):
        poll.register(fd, select.POLLIN)
    while True:
        wait = max(0.0, late[0][0] - time.monotonic()) * 1000 if late else None
        for fd, _ in poll.poll(wait):
            for packet in _waiting(fd):
                if fd == there:
                    _pass_on(here, packet)
                elif random.random() >= LOSS and len(late) < QUEUE:
                    late.append((time.monotonic() + DELAY, packet))
        while late and late[0][0] <= time.monotonic():
            _pass_on(there, late.popleft()[1])


def _waiting(fd: int, most: int = 64) -> Iterator[bytes]:
    with suppress(BlockingIOError):
        for _ in range(most):
            yield os.read(fd, 65536)


def _pass_on(fd: int, packet: bytes) -> None:
    # A device that is not up yet takes nothing.
    with suppress(OSError):
        os.write(fd, packet)


def main() -> None:
    """Make both devices, print "ready", and relay packets until the process is ended."""
    here, there = _open_tun(HERE), _open_tun(THERE)
    print("ready", flush=True)
    _carry(here, there)


if __name__ == "__main__":
    main()

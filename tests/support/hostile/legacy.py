"""Files of torch from before 1.6: five pickles and the storages, wrong on purpose."""

from __future__ import annotations

import struct

from tests.support.hostile.checkpoints import GOOD_PICKLE
from tests.support.hostile.common import Bad
from tests.support.hostile.opcodes import number, state_dict, storage, tensor, text

LITTLE = b"}" + text("little_endian") + b"\x88s"

STORAGE = struct.pack("<Q", 6) + bytes(24)


def legacy(
    pickle: bytes = GOOD_PICKLE,
    storages: bytes = b"",
    keys: bytes = b"\x80\x02].",
    version: bytes = number(1001),
    system: bytes = LITTLE,
) -> bytes:
    """Return a file of five pickles, of which the third is given whole, and of storages."""
    head = (number(0x1950A86A20F9469CFC6C), version, system)
    return b"".join(b"\x80\x02" + value + b"." for value in head) + pickle + keys + storages


def listed(*keys: str) -> bytes:
    """Return the pickle of a list of keys."""
    return b"\x80\x02](" + b"".join(map(text, keys)) + b"e."


_TWO = state_dict(text("v"), tensor(), text("w"), tensor(of=storage("1")))

_KEYS = "the keys of all storages"

BAD_LEGACY: Bad = {
    "version_before": (legacy(version=number(1000)), "version 1001 and a system"),
    "version_of_another": (legacy(version=number(1002)), "version 1001 and a system"),
    "system_is_a_list": (legacy(system=b"]"), "version 1001 and a system"),
    "numbers_big_endian": (
        legacy(system=b"}" + text("little_endian") + b"\x89s"),
        "numbers in little-endian order, found others",
    ),
    "endian_is_a_number": (
        legacy(system=b"}" + text("little_endian") + b"K\1s"),
        "numbers in little-endian order, found others",
    ),
    "endian_not_told": (
        legacy(system=b"}"),
        "numbers in little-endian order, found others",
    ),
    "keys_are_a_dict": (
        legacy(keys=b"\x80\x02}" + text("0") + b"K\0s."),
        f"pickle 5: malformed: expected {_KEYS}",
    ),
    "key_missing": (legacy(keys=listed(), storages=STORAGE), f"{_KEYS}, found others"),
    "key_too_many": (legacy(keys=listed("0", "1")), f"{_KEYS}, found others"),
    "key_is_a_number": (legacy(keys=b"\x80\x02]K\0a."), f"{_KEYS}, found others"),
    "key_of_another": (legacy(keys=listed("7")), f"{_KEYS}, found another: 7"),
    "key_twice": (
        legacy(_TWO, STORAGE * 2, listed("0", "0")),
        f"pickle 5: malformed: expected {_KEYS}, found another: 0",
    ),
    "storage_of_fewer_elements": (
        legacy(keys=listed("0"), storages=struct.pack("<Q", 5) + bytes(24)),
        "storage 0: malformed: expected 6 elements, found others",
    ),
    "storage_of_elements_beyond_32_bits": (
        legacy(keys=listed("0"), storages=struct.pack("<Q", 6 | 1 << 63) + bytes(24)),
        "storage 0: malformed: expected 6 elements, found others",
    ),
    "storage_cut": (legacy(keys=listed("0"), storages=STORAGE[:-1]), "storages up to the end"),
    "storage_longer": (legacy(keys=listed("0"), storages=STORAGE + b"\0"), "storages up to the"),
    "storage_without_size": (legacy(keys=listed("0"), storages=STORAGE[:7]), "8 bytes at byte"),
}

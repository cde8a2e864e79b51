"""A writer of zip archives as torch lays them out, with any field replaced."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Entry:
    """A record of a zip; the other fields replace what its two headers would say.

    `local` and `central` take the keys flags, method, crc, packed, size, name, extra, and for
    `central` also offset and comment. `descriptor` replaces the 16 bytes after the data, and
    `before` precedes the local header.
    """

    name: str
    content: bytes
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)
    descriptor: bytes | None = None
    before: bytes = b""


def zip_of(entries: Sequence[Entry], **end: Any) -> bytes:
    """Return a zip as torch lays it out, with the replaced fields.

    `end` takes count, length, offset, comment (of the end record) and before (the directory).
    """
    body, directory = bytearray(), bytearray()
    for record in entries:
        body += record.before
        directory += _central(record, len(body))
        body += _local(record)
    body += end.get("before", b"")
    count, comment = end.get("count", len(entries)), end.get("comment", b"")
    length, offset = end.get("length", len(directory)), end.get("offset", len(body))
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, offset, len(comment))
    return bytes(body + directory + last + comment)


def _local(record: Entry) -> bytes:
    crc, size = zlib.crc32(record.content), len(record.content)
    says: dict[str, Any] = dict.fromkeys(("method", "crc", "packed", "size"), 0)
    says |= {"flags": _flags(record), "extra": b"FB\0\0", "name": record.name, **record.local}
    name: bytes = says["name"].encode("latin-1")
    numbers = [says[key] for key in ("flags", "method")]
    sizes = [says[key] for key in ("crc", "packed", "size")]
    lengths = (len(name), len(says["extra"]))
    header: bytes = struct.pack("<4s5H3I2H", b"PK\3\4", 0, *numbers, 0, 0, *sizes, *lengths)
    descriptor = record.descriptor
    if descriptor is None:
        descriptor = data_descriptor(crc, size) if size else b""
    extra: bytes = says["extra"]
    return header + name + extra + record.content + descriptor


def data_descriptor(crc: int, size: int) -> bytes:
    return struct.pack("<4s3I", b"PK\7\b", crc, size, size)


def _flags(record: Entry) -> int:
    return 0x0808 if record.content else 0x0800


def _central(record: Entry, offset: int) -> bytes:
    crc, size = zlib.crc32(record.content), len(record.content)
    says: dict[str, Any] = {"flags": _flags(record), "method": 0, "crc": crc, "packed": size}
    says |= {"size": size, "extra": b"", "comment": b"", "offset": offset, "name": record.name}
    says |= record.central
    name: bytes = says["name"].encode("latin-1")
    rest: bytes = says["extra"] + says["comment"]
    numbers = [0, 0, says["flags"], says["method"], 0, 0, says["crc"], says["packed"], says["size"]]
    lengths = [len(name), len(says["extra"]), len(says["comment"])]
    header = struct.pack("<4s6H3I5H2I", b"PK\1\2", *numbers, *lengths, 0, 0, 0, says["offset"])
    return header + name + rest

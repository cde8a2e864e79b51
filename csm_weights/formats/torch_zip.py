"""The zip that torch.save writes, read strictly as data.

A zip has two accounts of itself, the directory at its end and a header before
each record, and readers differ in which they trust. Here both must agree, the
records must follow one another from byte 0 to the directory without gap or
overlap, and nothing may follow the end record. All are stored, none compressed,
so a file cannot expand. Nothing is extracted.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, replace

from csm_weights.formats.multipart import MultipartFile, read_at
from csm_weights.untrusted import Malformed, Unsupported, show

#: Ceiling of the directory, bytes. CSM-1B's is about 15 kB.
MAX_DIRECTORY = 4 << 20

# Struct layouts of the zip format, all little-endian (PKWARE's APPNOTE 4.3).
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
LOCAL_SIGN, CENTRAL_SIGN, DESCRIPTOR_SIGN = b"PK\3\4", b"PK\1\2", b"PK\7\b"
END_SIGN, END64_SIGN, LOCATOR_SIGN = b"PK\5\6", b"PK\6\6", b"PK\6\7"

#: The flags torch sets: names are UTF-8, and CRC and sizes come in a data descriptor
#: after the data. An empty record has no descriptor.
UTF8_FLAG, DESCRIPTOR_FLAG = 0x0800, 0x0008
BOTH_FLAGS = UTF8_FLAG | DESCRIPTOR_FLAG
#: Extra fields by tag: sizes beyond 32 bits, and torch's padding before the data.
ZIP64, PADDING = 0x0001, 0x4246
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF

_NAME = re.compile(
    r"(?P<folder>[^/\\]{1,255})/(?P<name>data\.pkl|version|byteorder|\.format_version"
    r"|\.storage_alignment|\.data/serialization_id|data/(0|[1-9][0-9]{0,19}))"
)


@dataclass(frozen=True)
class Record:
    """One record: its header begins at byte `header`, its data are `[data, data + size)`."""

    name: str
    crc: int
    size: int
    header: int
    data: int = 0


def read_records(file: MultipartFile, size: int) -> dict[str, Record]:
    """Read the records of a file of `size` bytes, by their name inside the archive's one folder.

    Raises Malformed when the file is not laid out as torch.save lays it out,
    Unsupported for TorchScript's archives.
    """
    start, length, count = _find_directory(file, size)
    directory = read_at(file, start, length)
    if b"/code/" in directory and b"/constants.pkl" in directory:
        raise Unsupported("a torch checkpoint", "a TorchScript archive, which holds a program")
    records: dict[str, Record] = {}
    folders = set()
    position = 0
    for entry in sorted(_read_directory(directory, count), key=lambda entry: entry.header):
        at = show(entry.name)
        if entry.header != position:
            raise Malformed(f"a record at byte {position}", f"at byte {entry.header}", at)
        data, position = _check_record(file, entry, start)
        match = _NAME.fullmatch(entry.name)
        if match is None:
            raise Malformed("a name that torch.save writes", at, "zip directory")
        folders.add(match["folder"])
        if len(folders) > 1:
            raise Malformed("one folder", f"another: {at}", "zip directory")
        if match["name"] in records:
            raise Malformed("each name once", f"{at} twice", "zip directory")
        records[match["name"]] = replace(entry, name=match["name"], data=data)
    if position != start:
        raise Malformed(f"records up to byte {start}", f"up to byte {position}", "zip")
    for name in ("data.pkl", "version"):
        if name not in records:
            raise Malformed(f"a record {name}", "none", "zip directory")
    return records


def torch_flags(size: int) -> int:
    """Return the general purpose flags of a record of `size` bytes."""
    return BOTH_FLAGS if size else UTF8_FLAG


def read_content(file: MultipartFile, record: Record, ceiling: int) -> bytes:
    """Read a small record, of at most `ceiling` bytes, and check its CRC where there is one.

    torch writes 0 as every CRC where it is told to save the time.
    """
    if record.size > ceiling:
        raise Unsupported(f"at most {ceiling} bytes", f"{record.size}", record.name)
    content = read_at(file, record.data, record.size)
    if record.crc and (crc := zlib.crc32(content)) != record.crc:
        raise Malformed(f"CRC {record.crc:#010x}", f"{crc:#010x}", record.name)
    return content


def extra_fields(extra: bytes, at: str) -> dict[int, bytes]:
    """Return the zip64 and padding fields by tag; refuse any other, which could hide bytes."""
    fields: dict[int, bytes] = {}
    while extra:
        head, extra = extra[:4], extra[4:]
        # a head that is cut gets a length beyond the end
        tag, length = struct.unpack("<2H", head.ljust(4, b"\xff"))
        if tag not in (ZIP64, PADDING) or tag in fields or len(extra) < length:
            raise Malformed("padding or zip64 sizes", f"extra field {tag:#06x}", at)
        fields[tag], extra = extra[:length], extra[length:]
    return fields


def _find_directory(file: MultipartFile, size: int) -> tuple[int, int, int]:
    """Find offset, bytes and entry count of the directory; its end records must end the file."""
    if size < END.size:
        raise Malformed("a zip archive", f"a file of {size} bytes")
    at = size - END.size
    sign, disk, first, here, count, length, start, comment = END.unpack(read_at(file, at, END.size))
    if sign != END_SIGN:
        if file.read(257, 5) == b"ustar":
            raise Malformed("a zip archive", "a tar archive, which torch.load refuses too")
        head = file.read(0, 16)
        kind = Malformed if head.startswith(LOCAL_SIGN) else Unsupported
        raise kind("a zip archive that ends the file", f"a file that starts {show(head)}")
    if (disk, first, here, comment) != (0, 0, count, 0):
        raise Malformed("one disk and no comment", "something else", "zip end record")
    if at >= LOCATOR.size + END64.size:
        locator = LOCATOR.unpack(read_at(file, at - LOCATOR.size, LOCATOR.size))
        if locator[0] == LOCATOR_SIGN:
            at -= LOCATOR.size + END64.size
            sign, rest, _, _, disk, first, here, *wide = END64.unpack(read_at(file, at, END64.size))
            if (sign, rest, *locator[1:]) != (END64_SIGN, END64.size - 12, 0, at, 1):
                raise Malformed(f"a zip64 end record at byte {at}", "none", "zip end record")
            # what does not fit the short record is all ones there
            shorts = ((count, FULL16), (length, FULL32), (start, FULL32))
            agree = all(s in (w, full) for (s, full), w in zip(shorts, wide, strict=True))
            count, length, start = wide
            if (disk, first, here, agree) != (0, 0, count, True):
                raise Malformed("two end records that agree", "different ones", "zip end record")
    if start + length != at:
        raise Malformed(f"a directory up to byte {at}", f"{start + length}", "zip end record")
    if length > MAX_DIRECTORY:
        raise Unsupported(f"a directory of at most {MAX_DIRECTORY} bytes", f"{length}", "zip")
    return start, length, count


def _read_directory(directory: bytes, count: int) -> list[Record]:
    entries: list[Record] = []
    end = 0
    while end < len(directory):
        at, end = end, end + CENTRAL.size
        if end > len(directory):
            raise Malformed("a whole entry", "a truncated one", "zip directory")
        fields = CENTRAL.unpack_from(directory, at)
        sign, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        names, extras, comment, disk, _, _, header = fields[10:]
        name = directory[end : end + names].decode("ascii", "backslashreplace")
        end += names + extras
        if sign != CENTRAL_SIGN or end > len(directory) or comment or disk:
            raise Malformed("a directory entry without comment", "something else", show(name))
        if method or flags & ~BOTH_FLAGS:
            found = f"method {method}, flags {flags:#06x}"
            raise Malformed("a stored entry, not encrypted", found, show(name))
        wide = extra_fields(directory[end - extras : end], show(name)).get(ZIP64, b"")
        shorts = (size, packed, header)
        if len(wide) != 8 * shorts.count(FULL32):
            raise Malformed("zip64 sizes where they are needed", f"{len(wide)} bytes", show(name))
        wider = iter(struct.unpack(f"<{len(wide) // 8}Q", wide))
        size, packed, header = (next(wider) if short == FULL32 else short for short in shorts)
        if packed != size:
            raise Malformed(f"{size} bytes stored", f"{packed}", show(name))
        entries.append(Record(name, crc, size, header))
    if len(entries) != count:
        raise Malformed(f"{count} entries", f"{len(entries)}", "zip directory")
    return entries


def _check_record(file: MultipartFile, entry: Record, limit: int) -> tuple[int, int]:
    """Return where the data of a record begin, and where the next record does.

    The local header and the descriptor after the data, which its flags announce,
    must agree with the directory, and both end before byte `limit`. The flags
    may be others than there: a zip that Python has written anew has no descriptors.
    """
    at = show(entry.name)
    if entry.header + LOCAL.size > limit:
        raise Malformed(f"records before byte {limit}", f"one at byte {entry.header}", at)
    sign, _, flags, method, _, _, crc, packed, size, names, extras = LOCAL.unpack(
        read_at(file, entry.header, LOCAL.size)
    )
    data = entry.header + LOCAL.size + names + extras
    end = data + entry.size
    if end > limit:
        raise Malformed(f"data before byte {limit}", f"up to byte {end}", at)
    tail = read_at(file, entry.header + LOCAL.size, names + extras)
    same = (sign, tail[:names], method) == (LOCAL_SIGN, entry.name.encode(), 0)
    wide = extra_fields(tail[names:], at).get(ZIP64, b"")
    known = [(entry.crc, entry.size, entry.size)]
    if flags & DESCRIPTOR_FLAG:
        # CRC and sizes are not known yet when this header is written
        known += [(0, 0, 0), (0, FULL32, FULL32)]
    elif wide == struct.pack("<2Q", entry.size, entry.size):
        known.append((entry.crc, FULL32, FULL32))
    if not same or flags & ~BOTH_FLAGS or (crc, packed, size) not in known:
        raise Malformed("a local header like the directory's entry", "another", at)
    if not wide and entry.size > FULL32:
        raise Malformed("zip64 sizes", "none", at)
    numbers = {wide[i : i + 8] for i in range(0, len(wide), 8)}
    if not numbers <= {struct.pack("<Q", one) for one in (0, entry.size, entry.header)}:
        raise Malformed("zip64 sizes like the directory's", "others", at)
    descriptor = b""
    if flags & DESCRIPTOR_FLAG:
        layout = "<4sI2Q" if wide else "<4sI2I"
        descriptor = struct.pack(layout, DESCRIPTOR_SIGN, entry.crc, entry.size, entry.size)
    if read_at(file, end, len(descriptor)) != descriptor:
        raise Malformed("a data descriptor like the directory's entry", "another", at)
    return data, end + len(descriptor)

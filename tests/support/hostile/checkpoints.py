"""Checkpoints: a zip around a pickle, sound and wrong on purpose."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from tests.support.hostile.common import Bad
from tests.support.hostile.opcodes import state_dict, tensor, text
from tests.support.hostile.zips import Entry, data_descriptor, zip_of


def records(pickle: bytes, **others: bytes) -> list[Entry]:
    """Return the records of a checkpoint with one storage of 24 bytes."""
    contents = {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(24), "version": b"3\n"}
    contents |= others
    return [Entry(f"archive/{name}", content) for name, content in contents.items()]


def checkpoint(pickle: bytes) -> bytes:
    """Return a checkpoint around a pickle."""
    return zip_of(records(pickle))


GOOD_PICKLE = state_dict(text("w"), tensor())


def good_checkpoint() -> bytes:
    """Return one tensor, `w` of 2 x 3 elements of F32."""
    return checkpoint(GOOD_PICKLE)


def _changed(index: int, **fields: Any) -> bytes:
    entries = records(GOOD_PICKLE)
    for key, value in fields.items():
        setattr(entries[index], key, value)
    return zip_of(entries)


def _with_zip64_end(content: bytes, **fields: int) -> bytes:
    """Return a zip with a zip64 end record and its locator.

    `fields` replace numbers of the record, and of the locator: the record's disk, its byte,
    and how many disks there are.
    """
    body, last = content[:-22], content[-22:]
    here, count, length, start = struct.unpack("<2H2I", last[8:20])
    says = {"sign": 0x06064B50, "rest": 44, "made": 45, "needs": 45, "disk": 0, "first": 0}
    says |= {"here": here, "count": count, "length": length, "start": start}
    says |= {"at_disk": 0, "at": len(body), "disks": 1} | fields
    *wide, disk, at, disks = says.values()
    locator = struct.pack("<4sIQI", b"PK\6\7", disk, at, disks)
    return body + struct.pack("<IQ2H2I4Q", *wide) + locator + last


def _patched(sign: bytes, at: int, byte: int = 1) -> bytes:
    """Return the good checkpoint with one byte changed behind the last of some header's signs."""
    content = bytearray(good_checkpoint())
    content[content.rindex(sign) + at] = byte
    return bytes(content)


def _without(name: str) -> bytes:
    return zip_of([e for e in records(GOOD_PICKLE) if e.name != f"archive/{name}"])


def compressed(content: bytes, name: str = "archive/data/1") -> Entry:
    packed = zlib.compress(content, 9)[2:-4]
    says = {"method": 8, "size": len(content), "crc": zlib.crc32(content)}
    return Entry(name, packed, central=says, local={"method": 8})


GOOD = records(GOOD_PICKLE)

_HIDDEN = Entry("archive/data/0", b"other bytes")


def _with_last_header(header: bytes) -> bytes:
    """Return a checkpoint with `header` in place of the one of its last and empty record."""
    start = good_checkpoint().index(b"PK\1\2")
    content = zip_of([*GOOD, Entry("archive/data/1", b"")], offset=start + len(header))
    return content[:start] + header + content[content.index(b"PK\1\2") :]


def _with_directory(last: bytes = b"", names: int = 0) -> bytes:
    """Return a checkpoint with more bytes in its directory, and a longer last name in that."""
    content, end = good_checkpoint()[:-22], bytearray(good_checkpoint()[-22:])
    at = content.rindex(b"PK\1\2")
    entry = bytearray(content[at:] + last)
    entry[28] += names
    length, start = struct.unpack("<2I", end[12:20])
    end[12:20] = struct.pack("<2I", length + len(last), start)
    return content[:at] + bytes(entry + end)


_SECRET = struct.pack("<2H", 0x7777, 6) + b"secret"

_WIDE = struct.pack("<2HQ", 1, 8, 24)

BAD_ZIPS: Bad = {
    "empty": (b"", "a file of 0 bytes"),
    "text": (b"Access to model sesame/csm-1b is restricted." * 3, "starts b'Access to model '"),
    "text_with_letters_where_a_tar_has_its_sign": (b"x" * 300, "starts b'xxx"),
    "tar": (bytes(257) + b"ustar\0" + bytes(249), "a zip archive, found a tar archive"),
    "bytes_beyond_those_of_a_pickle": (b"\xff" * 30, "starts b'\\xff"),
    "bare_pickle": (GOOD_PICKLE, "a pickle of something else"),
    "only_an_end_record": (zip_of([]), "a record data.pkl"),
    "truncated": (good_checkpoint()[:-1], "a zip archive that ends the file"),
    "trailing_byte": (good_checkpoint() + b"\0", "a zip archive that ends the file"),
    "trailing_comment": (zip_of(GOOD, comment=b"hello"), "a zip archive that ends the file"),
    "end_record_cut": (b"PK\5\6" + bytes(17), "a file of 21 bytes"),
    "end_record_of_another_disk": (_patched(b"PK\5\6", 4), "one disk and no comment"),
    "directory_on_another_disk": (_patched(b"PK\5\6", 6), "one disk and no comment"),
    "entries_on_another_disk": (_patched(b"PK\5\6", 8), "one disk and no comment"),
    "comment_length_lies": (good_checkpoint()[:-2] + b"\1\0", "no comment"),
    "bytes_before_the_zip": (b"\x7fELF" + good_checkpoint(), "a directory up to byte"),
    "bytes_before_the_first_record": (_changed(0, before=b"\x7fELF"), "a record at byte 0"),
    "bytes_between_records": (_changed(2, before=b"gap!"), "a record at byte"),
    "bytes_before_the_directory": (zip_of(GOOD, before=b"gap!"), "records up to byte"),
    "record_not_in_the_directory": (
        zip_of(GOOD[:2]).partition(b"PK\1\2")[0] + good_checkpoint(),
        "a directory up to byte",
    ),
    "count_lies": (zip_of(GOOD, count=3), "3 entries"),
    "count_too_large": (zip_of(GOOD, count=5), "5 entries"),
    "entry_of_another_sign": (_patched(b"PK\1\2", 3), "a directory entry without comment"),
    "entry_of_another_disk": (_patched(b"PK\1\2", 34), "a directory entry without comment"),
    "header_of_another_sign": (_patched(b"PK\3\4", 3), "a local header like"),
    "directory_length_lies": (zip_of(GOOD, length=10), "a directory up to byte"),
    "directory_huge": (
        zip_of([], before=b"", length=0xFFFFFFF0, offset=0),
        "a directory up to byte",
    ),
    "directory_over_the_ceiling": (
        zip_of([Entry(f"archive/data/{10**12 + i}", b"") for i in range(65_000)]),
        "a directory of at most 4194304 bytes",
    ),
    "directory_with_part_of_an_entry": (_with_directory(b"PK\1\2"), "a whole entry"),
    "directory_ends_within_a_name": (_with_directory(names=1), "a directory entry without comment"),
    "directory_garbled": (_changed(1, central={"extra": b"\1\0\x40\0"}), "extra field 0x0001"),
    "compressed": (zip_of([*GOOD, compressed(bytes(24))]), "method 8"),
    "zip_bomb": (zip_of([*GOOD, compressed(bytes(5_000_000))]), "method 8"),
    "compressed_only_locally": (_changed(2, local={"method": 8}), "a local header like"),
    "encrypted": (_changed(2, central={"flags": 0x0809}), "flags 0x0809"),
    "encrypted_only_locally": (_changed(2, local={"flags": 0x0809}), "a local header like"),
    "local_name_differs": (_changed(2, local={"name": "archive/data/1"}), "a local header like"),
    "local_size_differs": (_changed(2, local={"size": 20}), "a local header like"),
    "local_crc_differs": (_changed(2, local={"crc": 1}), "a local header like"),
    "local_zip64_size_differs": (
        _changed(2, local={"extra": struct.pack("<2HQ", 1, 8, 99)}),
        "zip64 sizes like",
    ),
    **{
        f"local_zip64_sizes_{first}_and_{second}": (
            _changed(
                2,
                central={"flags": 0},
                local={
                    "flags": 0,
                    "crc": zlib.crc32(bytes(24)),
                    **dict.fromkeys(("packed", "size"), 0xFFFFFFFF),
                    "extra": struct.pack("<2H2Q", 1, 16, first, second),
                },
                descriptor=b"",
            ),
            "a local header like",
        )
        for first, second in ((0, 24), (24, 0))
    },
    "local_zip64_without_wide_descriptor": (_changed(2, local={"extra": _WIDE}), "descriptor"),
    "descriptor_differs": (
        _changed(2, descriptor=data_descriptor(0, 24)),
        "a data descriptor like",
    ),
    "descriptor_missing": (_changed(3, descriptor=b""), "a data descriptor like"),
    "sizes_neither_before_nor_after_the_data": (
        _changed(2, local={"flags": 0x0800}, descriptor=b""),
        "a local header like",
    ),
    "hidden_extra_field": (_changed(2, local={"extra": _SECRET}), "extra field 0x7777"),
    "padding_twice": (_changed(2, local={"extra": b"FB\0\0" * 2}), "extra field 0x4246"),
    "padding_cut": (_changed(2, local={"extra": b"FB\5\0ZZZZ"}), "extra field 0x4246"),
    **{
        f"extra_field_of_{size}_bytes": (
            _changed(2, local={"extra": b"FB\0"[:size]}),
            f"extra field {tag}",
        )
        for size, tag in ((1, "0xff46"), (2, "0x4246"), (3, "0x4246"))
    },
    "central_extra_field": (_changed(2, central={"extra": _SECRET}), "extra field 0x7777"),
    **{
        f"zip64_end_with_another_{field}": (
            _with_zip64_end(good_checkpoint(), **{field: value}),
            "a zip64 end record at byte",
        )
        for field, value in {"sign": 7, "rest": 45, "at_disk": 1, "at": 0, "disks": 2}.items()
    },
    **{
        f"zip64_end_of_another_{field}": (
            _with_zip64_end(good_checkpoint(), **{field: value}),
            "two end records that agree",
        )
        for field, value in {
            "disk": 1,
            "first": 1,
            "here": 3,
            "count": 3,
            "length": 7,
            "start": 7,
        }.items()
    },
    **{
        f"zip64_locator_at_byte_{at}": (
            _with_zip64_end(zip_of([]))[56 - at :],
            f"to byte {at + 20}",
        )
        for at in (0, 55)
    },
    "only_zip64_ends": (_with_zip64_end(zip_of([])), "a record data.pkl"),
    "central_zip64_missing": (
        _changed(3, central={"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}),
        "zip64 sizes where they are needed, found 0 bytes",
    ),
    "central_zip64_not_needed": (_changed(2, central={"extra": _WIDE}), "where they are needed"),
    "central_comment": (_changed(2, central={"comment": b"hi"}), "without comment"),
    "central_packed_larger": (_changed(2, central={"packed": 30}), "24 bytes stored"),
    "central_sizes_differ": (_changed(2, central={"packed": 20}), "24 bytes stored"),
    "central_crc_differs": (_changed(0, central={"crc": 1}), "a data descriptor like"),
    "size_beyond_the_file": (
        _changed(3, central={"size": 1 << 30, "packed": 1 << 30}),
        "data before byte",
    ),
    "size_one_beyond_the_records": (
        _changed(3, central={"size": 3, "packed": 3}, descriptor=b""),
        "data before byte",
    ),
    "header_missing": (_with_last_header(b""), "records before byte"),
    "header_cut": (_with_last_header(struct.pack("<4s25x", b"PK\3\4")), "records before byte"),
    "name_empty": (
        zip_of([*GOOD, Entry("", b"", local={"extra": b""})]),
        "a name that torch.save writes",
    ),
    "torchscript": (
        zip_of([*GOOD, Entry("archive/code/a.py", b"x"), Entry("archive/constants.pkl", b"x")]),
        "a TorchScript archive, which holds a program",
    ),
    "records_overlap": (
        _changed(2, central={"size": 30, "packed": 30}, descriptor=b""),
        "a data descriptor like",
    ),
    "two_entries_of_one_record": (
        zip_of([*GOOD, Entry("archive/data/1", b"", central={"offset": 0})]),
        "a record at byte",
    ),
    "name_twice": (zip_of([*GOOD, _HIDDEN]), "archive/data/0 twice"),
    "two_folders": (zip_of([*GOOD, Entry("other/data/1", b"x")]), "one folder"),
    "no_folder": (zip_of([*GOOD, Entry("data/1", b"x")]), "a name that torch.save writes"),
    "name_climbs_out": (zip_of([*GOOD, Entry("../data/1", b"x")]), "one folder"),
    "name_with_control_characters": (
        zip_of([*GOOD, Entry("archive/\x1b[2J\n", b"x")]),
        "'archive/\\x1b[2J\\n'",
    ),
    "name_unknown": (zip_of([*GOOD, Entry("archive/code/run.py", b"x")]), "torch.save writes"),
    "storage_number_padded": (zip_of([*GOOD, Entry("archive/data/01", b"x")]), "torch.save"),
    "no_pickle": (_without("data.pkl"), "a record data.pkl"),
    "no_version": (_without("version"), "a record version"),
    "storage_record_missing": (_without("data/0"), "a record data/0"),
    "storage_nobody_names": (zip_of([*GOOD, Entry("archive/data/1", b"x")]), "data/1: malformed"),
    "big_endian": (zip_of(records(GOOD_PICKLE, byteorder=b"big")), "byteorder: malformed"),
    "version_not_a_number": (zip_of(records(GOOD_PICKLE, version=b"three")), "version: malformed"),
    "version_huge": (zip_of(records(GOOD_PICKLE, version=b"3" * 99)), "at most 40 bytes"),
    "serialization_id_hides_bytes": (
        zip_of(records(GOOD_PICKLE, **{".data/serialization_id": b"\x7fELF"})),
        ".data/serialization_id: malformed",
    ),
    "format_version_hides_bytes": (
        zip_of(records(GOOD_PICKLE, **{".format_version": b"#!/bin/sh"})),
        ".format_version: malformed",
    ),
    "pickle_huge": (checkpoint(b"\x80\x02" + b"}" * ((4 << 20) - 1)), "at most 4194304 bytes"),
    **{
        f"pickle_crc_{crc:#010x}": (
            _changed(0, central={"crc": crc}, descriptor=data_descriptor(crc, len(GOOD_PICKLE))),
            f"expected CRC {crc:#010x}, found {zlib.crc32(GOOD_PICKLE):#010x}",
        )
        for crc in (7, 0xFFFFFFFF)
    },
}

"""Weight files that are wrong on purpose, named for what is wrong with them.

Each collection maps a name to the bytes of a file and to a phrase of the
finding that must refuse it. Everything is built by hand, so that the readers
are not tested against their own writer, and needs no torch.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Bad = Mapping[str, tuple[bytes, str]]


# --- safetensors


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `header` is JSON text, its bytes, or an object to write as JSON."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def good_safetensors() -> bytes:
    """Two tensors, `a` of 2 and `b` of 1 x 3 elements of F32, with metadata."""
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(8, 20, [1, 3])}
    return safetensors(header, bytes(range(20)))


def _one(**fields: Any) -> bytes:
    return safetensors({"w": entry(**fields)}, bytes(8))


_NAN = '{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'
_TWICE = '{"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "w": {}}'
_LONG_INT = '{"w": {"dtype": "U8", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}'
_KEY_TWICE = '{"w": {"dtype": "U8", "dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}'

BAD_SAFETENSORS: Bad = {
    "empty": (b"", "a file of 0 bytes"),
    "access_page": (b"Access to model sesame/csm-1b is restricted.", "header length"),
    "shorter_than_its_length_field": (b"\x10\0\0", "a file of 3 bytes"),
    "header_longer_than_file": (safetensors({}, length=1 << 40), "header length"),
    "header_length_with_top_bit": (safetensors({}, length=(1 << 64) - 1), "header length"),
    "header_over_the_ceiling": (safetensors(" " * ((1 << 20) + 1)), "2 to 1048576 bytes"),
    "header_truncated": (safetensors({"w": entry()})[:-5], "header length"),
    "header_empty": (safetensors(b""), "header length"),
    "header_is_a_list": (safetensors("[1, 2]"), "starts with '{'"),
    "header_starts_with_space": (safetensors(" {}"), "starts with '{'"),
    "header_not_json": (safetensors("{nothing}"), "JSON"),
    "header_not_utf8": (safetensors(b'{"\xff": 1}'), "UnicodeDecodeError"),
    "header_nested_deep": (safetensors('{"w": ' + "[" * 500_000), "RecursionError"),
    "header_with_nan": (safetensors(_NAN, bytes(8)), "NaN is not JSON"),
    "header_with_5000_digits": (safetensors(_LONG_INT, bytes(8)), "JSON"),
    "name_twice": (safetensors(_TWICE, bytes(4)), "the name w twice"),
    "name_with_lone_surrogate": (safetensors('{"\\ud800": {}}'), "not UTF-8"),
    "key_twice": (safetensors(_KEY_TWICE, bytes(8)), "the name dtype twice"),
    "metadata_is_a_list": (safetensors({"__metadata__": []}), "__metadata__"),
    "metadata_holds_a_number": (safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry_is_a_list": (safetensors({"w": []}), "dtype, shape and data_offsets"),
    "entry_lacks_a_key": (safetensors({"w": {"dtype": "F32", "shape": []}}), "w: malformed"),
    "entry_has_another_key": (safetensors({"w": {**entry(), "x": 1}}, bytes(8)), "w: malformed"),
    "dtype_unknown": (_one(dtype="F31"), "found F31"),
    "dtype_is_a_number": (_one(dtype=4), "a known dtype"),
    "dtype_lies": (_one(dtype="F64"), "expected 16 bytes"),
    "shape_lies": (_one(shape=[3]), "expected 12 bytes"),
    "shape_overflows_64_bits": (_one(shape=[1 << 32, 1 << 32, 0]), "expected 0 bytes"),
    "shape_negative": (_one(shape=[-2]), "a shape of"),
    "shape_of_floats": (_one(shape=[2.0]), "a shape of"),
    "shape_of_bools": (_one(shape=[True, 2]), "a shape of"),
    "shape_beyond_64_bits": (_one(shape=[1 << 63]), "a shape of"),
    "shape_is_a_number": (_one(shape=2), "a shape of"),
    "shape_of_nine_dimensions": (_one(shape=[1] * 8 + [2]), "at most 8 sizes"),
    "offsets_negative": (_one(begin=-8, end=0), "[begin, end]"),
    "offsets_of_floats": (_one(begin=0.0, end=8.0), "[begin, end]"),
    "offsets_of_bools": (_one(begin=False, end=True, shape=[1], dtype="U8"), "[begin, end]"),
    "offsets_reversed": (_one(begin=8, end=0), "[begin, end]"),
    "offsets_beyond_64_bits": (_one(begin=0, end=1 << 64), "[begin, end]"),
    "offsets_beyond_the_file": (safetensors({"w": entry(0, 4000, [1000])}, bytes(8)), "the end"),
    "hole_at_the_start": (safetensors({"w": entry(4, 12)}, bytes(12)), "a hole"),
    "hole_between_tensors": (
        safetensors({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
        "b: malformed: expected data from byte",
    ),
    "tensors_overlap": (
        safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "an overlap",
    ),
    "one_tensor_inside_another": (
        safetensors({"a": entry(0, 16, [4]), "b": entry(4, 8, [1])}, bytes(16)),
        "an overlap",
    ),
    "trailing_byte": (safetensors({"w": entry()}, bytes(9)), "data up to the end"),
    "data_truncated": (safetensors({"w": entry()}, bytes(7)), "data up to the end"),
}


# --- the zip of a checkpoint


@dataclass
class Entry:
    """A record of a zip; the other fields replace what its two headers should say.

    `local` and `central` take the keys flags, method, crc, packed, size, name,
    extra, and for `central` also offset and comment; `descriptor` replaces
    the 16 bytes after the data, `before` precedes the local header.
    """

    name: str
    content: bytes
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)
    descriptor: bytes | None = None
    before: bytes = b""


def zip_of(entries: Sequence[Entry], **end: Any) -> bytes:
    """A zip as torch lays it out, but for the replaced fields.

    `end` takes count, length, offset, comment (of the end record) and before
    (the directory).
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
        descriptor = _descriptor(crc, size) if size else b""
    extra: bytes = says["extra"]
    return header + name + extra + record.content + descriptor


def _descriptor(crc: int, size: int) -> bytes:
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


# --- the pickle of a checkpoint

HOOKS = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOAT = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    """Opcodes that push text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Opcodes that push a whole number of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Sequence[int]) -> bytes:
    """Opcodes that push a tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", elements: int = 6, kind: bytes = FLOAT) -> bytes:
    """Opcodes that push a storage."""
    parts = (text("storage"), kind, text(key), text("cpu"), number(elements))
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    offset: int = 0,
    shape: Sequence[int] = (2, 3),
    stride: Sequence[int] = (3, 1),
    of: bytes = storage(),
    tail: bytes = b"\x89" + HOOKS,
) -> bytes:
    """Opcodes that push a tensor, by default all six elements of storage 0."""
    return REBUILD + b"(" + of + number(offset) + numbers(shape) + numbers(stride) + tail + b"tR"


def state_dict(*items: bytes, after: bytes = b"") -> bytes:
    """A pickle of a dict made by the opcodes of names and values in turn."""
    return b"\x80\x02}(" + b"".join(items) + b"u" + after + b"."


def records(pickle: bytes, **others: bytes) -> list[Entry]:
    """The records of a checkpoint with one storage of 24 bytes."""
    contents = {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(24), "version": b"3\n"}
    contents |= others
    return [Entry(f"archive/{name}", content) for name, content in contents.items()]


def checkpoint(pickle: bytes) -> bytes:
    """A checkpoint, sound but for its pickle."""
    return zip_of(records(pickle))


GOOD_PICKLE = state_dict(text("w"), tensor())


def good_checkpoint() -> bytes:
    """One tensor, `w` of 2 x 3 elements of F32."""
    return checkpoint(GOOD_PICKLE)


def _changed(index: int, **fields: Any) -> bytes:
    entries = records(GOOD_PICKLE)
    for key, value in fields.items():
        setattr(entries[index], key, value)
    return zip_of(entries)


def _without(name: str) -> bytes:
    return zip_of([e for e in records(GOOD_PICKLE) if e.name != f"archive/{name}"])


def _compressed(content: bytes, name: str = "archive/data/1") -> Entry:
    packed = zlib.compress(content, 9)[2:-4]
    says = {"method": 8, "size": len(content), "crc": zlib.crc32(content)}
    return Entry(name, packed, central=says, local={"method": 8})


_GOOD = records(GOOD_PICKLE)
_HIDDEN = Entry("archive/data/0", b"other bytes")
_SECRET = struct.pack("<2H", 0x7777, 6) + b"secret"
_WIDE = struct.pack("<2HQ", 1, 8, 24)

BAD_ZIPS: Bad = {
    "empty": (b"", "a file of 0 bytes"),
    "text": (b"Access to model sesame/csm-1b is restricted." * 3, "starts b'Access to"),
    "legacy_pickle": (GOOD_PICKLE, "starts b'\\x80"),
    "only_an_end_record": (zip_of([]), "a record data.pkl"),
    "truncated": (good_checkpoint()[:-1], "a zip archive that ends the file"),
    "trailing_byte": (good_checkpoint() + b"\0", "a zip archive that ends the file"),
    "trailing_comment": (zip_of(_GOOD, comment=b"hello"), "a zip archive that ends the file"),
    "comment_length_lies": (good_checkpoint()[:-2] + b"\1\0", "no comment"),
    "bytes_before_the_zip": (b"\x7fELF" + good_checkpoint(), "a directory up to byte"),
    "bytes_before_the_first_record": (_changed(0, before=b"\x7fELF"), "a record at byte 0"),
    "bytes_between_records": (_changed(2, before=b"gap!"), "a record at byte"),
    "bytes_before_the_directory": (zip_of(_GOOD, before=b"gap!"), "records up to byte"),
    "record_not_in_the_directory": (
        zip_of(_GOOD[:2]).partition(b"PK\1\2")[0] + good_checkpoint(),
        "a directory up to byte",
    ),
    "count_lies": (zip_of(_GOOD, count=3), "3 entries"),
    "directory_length_lies": (zip_of(_GOOD, length=10), "a directory up to byte"),
    "directory_huge": (
        zip_of([], before=b"", length=0xFFFFFFF0, offset=0),
        "a directory up to byte",
    ),
    "directory_over_the_ceiling": (
        zip_of([Entry(f"archive/data/{i}", b"") for i in range(30_000)]),
        "a directory of at most",
    ),
    "directory_garbled": (_changed(1, central={"extra": b"\1\0\x40\0"}), "extra field 0x0001"),
    "compressed": (zip_of([*_GOOD, _compressed(bytes(24))]), "method 8"),
    "zip_bomb": (zip_of([*_GOOD, _compressed(bytes(5_000_000))]), "method 8"),
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
    "local_zip64_without_wide_descriptor": (_changed(2, local={"extra": _WIDE}), "descriptor"),
    "descriptor_differs": (_changed(2, descriptor=_descriptor(0, 24)), "a data descriptor like"),
    "descriptor_missing": (_changed(3, descriptor=b""), "a data descriptor like"),
    "hidden_extra_field": (_changed(2, local={"extra": _SECRET}), "extra field 0x7777"),
    "central_extra_field": (_changed(2, central={"extra": _SECRET}), "extra field 0x7777"),
    "central_zip64_not_needed": (_changed(2, central={"extra": _WIDE}), "where they are needed"),
    "central_comment": (_changed(2, central={"comment": b"hi"}), "without comment"),
    "central_sizes_differ": (_changed(2, central={"packed": 20}), "24 bytes stored"),
    "central_crc_differs": (_changed(0, central={"crc": 1}), "a data descriptor like"),
    "size_beyond_the_file": (
        _changed(3, central={"size": 1 << 30, "packed": 1 << 30}),
        "data before byte",
    ),
    "records_overlap": (
        _changed(2, central={"size": 30, "packed": 30}, descriptor=b""),
        "a data descriptor like",
    ),
    "two_entries_of_one_record": (
        zip_of([*_GOOD, Entry("archive/data/1", b"", central={"offset": 0})]),
        "a record at byte",
    ),
    "name_twice": (zip_of([*_GOOD, _HIDDEN]), "archive/data/0 twice"),
    "two_folders": (zip_of([*_GOOD, Entry("other/data/1", b"x")]), "one folder"),
    "no_folder": (zip_of([*_GOOD, Entry("data/1", b"x")]), "a name that torch.save writes"),
    "name_climbs_out": (zip_of([*_GOOD, Entry("../data/1", b"x")]), "one folder"),
    "name_with_control_characters": (
        zip_of([*_GOOD, Entry("archive/\x1b[2J\n", b"x")]),
        "'archive/\\x1b[2J\\n'",
    ),
    "name_unknown": (zip_of([*_GOOD, Entry("archive/code/run.py", b"x")]), "torch.save writes"),
    "storage_number_padded": (zip_of([*_GOOD, Entry("archive/data/01", b"x")]), "torch.save"),
    "no_pickle": (_without("data.pkl"), "a record data.pkl"),
    "no_version": (_without("version"), "a record version"),
    "storage_record_missing": (_without("data/0"), "a record data/0"),
    "storage_nobody_names": (zip_of([*_GOOD, Entry("archive/data/1", b"x")]), "data/1: malformed"),
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
    "pickle_huge": (checkpoint(b"\x80\x02" + b"}" * (1 << 20)), "at most 1048576 bytes"),
    "pickle_crc_wrong": (
        _changed(0, central={"crc": 7}, descriptor=_descriptor(7, len(GOOD_PICKLE))),
        "expected CRC 0x00000007",
    ),
}


# --- pickles that do more than name tensors


def running_pickles(target: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that open the file `target` for writing when any unpickler runs them.

    All begin as protocol 2 does, which no unpickler holds them to. The last group
    needs pip, numpy or torch.
    """
    bodies = _plain_tricks(target) | _computed_tricks(target) | _gadgets(target)
    return {name: (b"\x80\x02" + code, why) for name, (code, why) in bodies.items()}


def words(*values: str) -> bytes:
    """Opcodes that push a tuple of text."""
    return b"(" + b"".join(map(text, values)) + b"t"


def _short(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def _plain_tricks(target: str) -> dict[str, tuple[bytes, str]]:
    call, opens = text(target) + text("w"), b"cbuiltins\nopen\n"
    lines = f"V{target}\nVw\n".encode()
    run = opens + b"(" + call + b"tR"
    getattr_ = b"cbuiltins\ngetattr\n(cbuiltins\nobject\n" + text("__subclasses__") + b"tR)R0"
    names = _short("builtins") + _short("open")
    framed = b"\x95" + struct.pack("<Q", len(run) + 1) + run
    return {
        "global_and_reduce": (run + b".", "global builtins open"),
        "global_after_state_dict": (GOOD_PICKLE[2:-1] + b"0" + run + b".", "opcode POP"),
        "global_before_state_dict": (run + b"0" + GOOD_PICKLE[2:], "global builtins open"),
        "global_as_tensor": (b"}(" + text("w") + run + b"u.", "global builtins open"),
        "global_as_dict_key": (b"}(" + run + b"K\1u.", "global builtins open"),
        "global_as_hooks": (tensor(tail=b"\x89" + run) + b".", "global builtins open"),
        "global_as_persistent_id": (run + b"Q.", "global builtins open"),
        "global_under_build": (HOOKS + run + b"b.", "global builtins open"),
        "runs_then_breaks": (run + b"\xff.", "global builtins open"),
        "runs_then_ends": (run, "global builtins open"),
        "stack_global": (names + b"\x93(" + call + b"tR.", "opcode SHORT_BINUNICODE"),
        "inst": (b"(" + call + b"ibuiltins\nopen\n.", "opcode INST"),
        "inst_of_text_opcodes": (b"(" + lines + b"ibuiltins\nopen\n.", "opcode UNICODE"),
        "obj": (b"(" + opens + call + b"o.", "global builtins open"),
        "list_around_it": (b"](" + run + b"e.", "opcode EMPTY_LIST"),
        "frame_around_it": (framed + b".", "opcode FRAME"),
        "protocol_told_twice": (b"\x80\4" + run + b".", "opcode PROTO"),
        "getattr_first": (getattr_ + run + b".", "global builtins getattr"),
    }


def _computed_tricks(target: str) -> dict[str, tuple[bytes, str]]:
    """What is called stands nowhere in the pickle, or not where it is looked for."""
    arguments = words(target, "w")
    joined = b"c_operator\nconcat\n" + words("buil", "tins") + b"R"
    swapped = text("open") + b"q\0" + text("builtins") + b"q\1" + b"00h\1h\0\x93"
    escaped = b"V\\u0062uiltins\nVop\\u0065n\n\x93"
    module = b"cimportlib\nimport_module\n" + words("io") + b"R"
    by_getattr = b"cbuiltins\ngetattr\n(" + module + text("open") + b"tR"
    by_caller = b"coperator\nmethodcaller\n" + words("open", target, "w") + b"R"
    partial = b"cfunctools\npartial\n(cbuiltins\nlen\ntR"
    state = b"(cio\nopen\n" + arguments + b"}Nt"
    inner = b"cbuiltins\nopen\n" + arguments + b"R."
    nested = b"B" + struct.pack("<I", len(inner)) + inner
    dotted = text("io") + text("open.__call__") + b"\x93"
    return {
        "words_computed": (joined + text("open") + b"\x93" + arguments + b"R.", "_operator concat"),
        "words_from_the_memo": (swapped + arguments + b"R.", "opcode POP"),
        "words_escaped": (escaped + arguments + b"R.", "opcode UNICODE"),
        "name_with_dots": (b"\x80\4" + dotted + arguments + b"R.", "opcode PROTO"),
        "getattr_of_a_module": (by_getattr + arguments + b"R.", "global builtins getattr"),
        "methodcaller": (by_caller + b"(" + module + b"tR.", "operator methodcaller"),
        "build_swaps_the_function": (partial + state + b"b)R.", "functools partial"),
        "extension_registry": (b"\x82\xf0" + arguments + b"R.", "opcode EXT1"),
        "pickle_in_a_pickle": (b"cpickle\nloads\n(" + nested + b"tR.", "global pickle loads"),
        "another_module's_name": (b"c_pyio\nopen\n" + arguments + b"R.", "global _pyio open"),
    }


def _gadgets(target: str) -> dict[str, tuple[bytes, str]]:
    """Functions of well-known libraries that run what they are given, or write files."""
    code = f"open({target!r}, 'w')"
    pip = (
        b"(]("
        + text("--quiet")
        + text("--log")
        + text(target)
        + text("cache")
        + text("dir")
        + b"etR."
    )
    inner = b"\x80\x02cbuiltins\nopen\n" + words(target, "w") + b"R."
    legacy = b"(B" + struct.pack("<I", len(inner)) + inner + b"tR."
    calls = {
        "timeit": ("timeit timeit", words("pass", code) + b"R."),
        "profile": ("cProfile runctx", b"(" + text(code) + b"}}tR."),
        "logging": ("logging FileHandler", words(target) + b"R."),
        "zipfile": ("zipfile ZipFile", words(target, "w") + b"R."),
        "pip": ("pip main", pip),
        "numpy": ("numpy.testing._private.utils runstring", b"(" + text(code) + b"}tR."),
        "torch_jit": ("torch.jit.unsupported_tensor_ops execWrapper", b"(" + text(code) + b"}}tR."),
        "torch_collect_env": ("torch.utils.collect_env run", words(f": > '{target}'") + b"R."),
        "torch_storage": ("torch.storage _load_from_bytes", legacy),
    }
    return {
        f"gadget_of_{name}": (b"c" + what.replace(" ", "\n").encode() + b"\n" + rest, what)
        for name, (what, rest) in calls.items()
    }


#: Running files that torch.load refuses or reads harmlessly: a scanner is to be confused.
DECOYS = frozenset(
    {
        "flags_say_encrypted",
        "flags_say_patch",
        "pickle_twice",
        "pickle_in_another_folder",
        "script_beside_it",
        "zip_after_7z",
    }
)

#: The number of the extension that `extension_registry` calls, which a victim would have.
EXTENSION = 0xF0


def running_files(target: str) -> dict[str, tuple[bytes, str]]:
    """Files that run a pickle under torch.load, or make a scanner look at another one.

    The pickle opens `target` for writing, before it answers with a sound state dict.
    """
    run = b"\x80\x02cbuiltins\nopen\n" + words(target, "w") + b"R0" + GOOD_PICKLE[2:]
    bodies = {
        f"protocol_{version}": (_in_protocol(version, target), "pickle protocol 2")
        for version in (0, 1, 3, 4, 5)
    }
    files = {name: (checkpoint(body), why) for name, (body, why) in bodies.items()}
    return files | _zip_tricks(run) | _disguises(run)


def _in_protocol(version: int, target: str) -> bytes:
    lines = f"cbuiltins\nopen\n(V{target}\nVw\ntR.".encode()
    binary = b"cbuiltins\nopen\n" + words(target, "w") + b"R."
    modern = _short("builtins") + _short("open") + b"\x93" + words(target, "w") + b"R."
    frame = b"\x95" + struct.pack("<Q", len(modern)) + modern
    head = b"\x80" + bytes([version])
    return [lines, binary, head + binary, head + binary, head + frame, head + frame][version]


def _zip_tricks(run: bytes) -> dict[str, tuple[bytes, str]]:
    def changed(**fields: Any) -> bytes:
        first, *rest = records(run)
        for key, value in fields.items():
            setattr(first, key, value)
        return zip_of([first, *rest])

    crc = _descriptor(7, len(run))
    good, evil = records(GOOD_PICKLE), Entry("archive/data.pkl", run)
    other = Entry("archive/other.pkl", b"")
    return {
        "flags_say_encrypted": (changed(central={"flags": 0x0809}), "flags 0x0809"),
        "flags_say_patch": (changed(central={"flags": 0x0828}), "flags 0x0828"),
        "flags_of_the_header": (changed(local={"flags": 0x0809}), "a local header like"),
        "name_of_the_header": (changed(local={"name": "archive/data.txt"}), "a local header like"),
        "crc_wrong": (changed(central={"crc": 7}, descriptor=crc), "expected CRC 0x00000007"),
        "pickle_twice": (zip_of([*good, evil]), "archive/data.pkl twice"),
        "pickle_twice_first": (zip_of([evil, *good]), "archive/data.pkl twice"),
        "pickle_in_capitals": (
            zip_of([Entry("archive/DATA.PKL", run), *good[1:]]),
            "a name that torch.save writes",
        ),
        "pickle_in_another_folder": (
            zip_of([*records(run), Entry("a/data.pkl", GOOD_PICKLE)]),
            "one folder",
        ),
        "pickle_beside_it": (zip_of([*records(run), other]), "a name that torch.save writes"),
        "folder_before_it": (
            zip_of([Entry("archive/", b""), *records(run)]),
            "a name that torch.save writes",
        ),
        "folder_called_as_it": (
            zip_of([Entry("archive/data.pkl/", b""), *records(run)]),
            "a name that torch.save writes",
        ),
        "script_beside_it": (
            zip_of([*records(run), Entry("archive/constants.pkl", run)]),
            "a name that torch.save writes",
        ),
        "compressed": (
            zip_of([_compressed(run, "archive/data.pkl"), *good[1:]]),
            "method 8",
        ),
    }


def _disguises(run: bytes) -> dict[str, tuple[bytes, str]]:
    """Pickles where another kind of file is expected; torch reads those without a zip too."""
    return {
        "bare_pickle": (run, "a zip archive"),
        "bare_pickle_before_a_zip": (run + good_checkpoint(), "a directory up to byte"),
        "zip_after_7z": (b"7z\xbc\xaf'\x1c" + checkpoint(run), "a directory up to byte"),
        "tar": (_tar({"storages": run, "tensors": run, "pickle": run}), "a zip archive"),
    }


def _tar(files: Mapping[str, bytes]) -> bytes:
    """The format of torch before 0.1.10, whose pickles torch.load reads one by one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _protocol(version: int) -> bytes:
    return b"\x80" + bytes([version]) + GOOD_PICKLE[2:]


def _one_tensor(**fields: Any) -> bytes:
    return state_dict(text("w"), tensor(**fields))


_SYSTEM = b"cos\nsystem\n"
_NESTED = b"\x80\x02}" + text("model") + b"}" + text("w") + tensor() + b"ss."
_ESCAPED = b"\x80\x02ctorch\\x2e_utils\n_rebuild_tensor_v2\n."
_SHARED = b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64)) + b"."
_LOOP = b"\x80\x02}q\0" + text("self") + b"h\0s."
_PARAMETER = b"ctorch._utils\n_rebuild_parameter\n("
_HOOKED = b"ccollections\nOrderedDict\n)R" + text("a") + b"K\1s"

BAD_PICKLES: Bad = {
    "empty": (b"", "pickle protocol 2"),
    "only_protocol": (b"\x80\x02", "the end of the pickle"),
    "protocol_0": (b"(dp0\n.", "pickle protocol 2"),
    "protocol_1": (b"}q\0.", "pickle protocol 2"),
    "protocol_3": (_protocol(3), "pickle protocol 2"),
    "protocol_4": (_protocol(4), "pickle protocol 2"),
    "protocol_5": (_protocol(5), "pickle protocol 2"),
    "protocol_twice": (b"\x80\x02\x80\x02}.", "opcode PROTO"),
    "no_stop": (GOOD_PICKLE[:-1], "the end of the pickle"),
    "bytes_after_stop": (GOOD_PICKLE + b".", "nothing after it"),
    "objects_left_over": (b"\x80\x02}" + GOOD_PICKLE[2:], "nothing after it"),
    "mark_left_over": (b"\x80\x02(}.", "nothing after it"),
    "not_an_opcode": (b"\x80\x02\xff.", "opcode byte 0xff"),
    "truncated_text": (b"\x80\x02X\xff\xff\xff\x7fabc", "the argument of BINUNICODE"),
    "text_not_utf8": (b"\x80\x02X\1\0\0\0\xff.", "the argument of BINUNICODE"),
    "truncated_global": (b"\x80\x02ctorch\nFloatStorage", "torch FloatStorage"),
    "global_os_system": (b"\x80\x02" + _SYSTEM + text("true") + b"\x85R.", "global os system"),
    "global_with_escapes": (_ESCAPED, "torch\\x2e_utils"),
    "global_load_from_bytes": (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "newobj_ex": (b"\x80\x02ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "ext1": (b"\x80\x02\x82\1.", "opcode EXT1"),
    "ext2": (b"\x80\x02\x83\1\0.", "opcode EXT2"),
    "ext4": (b"\x80\x02\x84\1\0\0\0.", "opcode EXT4"),
    "persid_of_text": (b"\x80\x02Phello\n.", "opcode PERSID"),
    "frame": (b"\x80\x02\x95" + bytes(8), "opcode FRAME"),
    "memoize": (b"\x80\x02}\x94.", "opcode MEMOIZE"),
    "buffer": (b"\x80\x02\x97.", "opcode NEXT_BUFFER"),
    "call_of_a_storage_type": (b"\x80\x02" + FLOAT + b")R.", "a call of global torch FloatStorage"),
    "call_of_a_call": (b"\x80\x02" + HOOKS + b")R.", "a call of a OrderedDict"),
    "call_with_a_dict": (b"\x80\x02ccollections\nOrderedDict\n}R.", "a call of global collections"),
    "dict_call_with_items": (
        b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
        "a call of global collections OrderedDict",
    ),
    "build_of_a_dict": (b"\x80\x02}}" + text("_metadata") + b"}sb.", "BUILD of a dict"),
    "build_of_a_global": (b"\x80\x02" + FLOAT + b"}b.", "BUILD of global torch FloatStorage"),
    "build_of_a_tensor": (b"\x80\x02" + tensor() + b"}b.", "BUILD of a tensor"),
    "build_sets_setstate": (
        b"\x80\x02" + HOOKS + b"}" + text("__setstate__") + FLOAT + b"sb.",
        "BUILD of a OrderedDict",
    ),
    "build_with_slots": (b"\x80\x02" + HOOKS + b"N}\x86b.", "BUILD of a OrderedDict"),
    "set_item_of_a_global": (b"\x80\x02" + FLOAT + text("a") + b"K\1s.", "for a dict"),
    "odd_set_items": (b"\x80\x02}(" + text("a") + b"u.", "for a dict"),
    "number_as_name": (b"\x80\x02}K\1K\2s.", "a name that is text"),
    "tuple_as_name": (_SHARED[:-1] + b"}h\1K\2s.", "a name that is text"),
    "surrogate_as_name": (b"\x80\x02}" + text("\ud800") + b"K\2s.", "a name that is text"),
    "name_twice": (state_dict(text("w"), tensor(), text("w"), tensor()), "w twice"),
    "pop_from_nothing": (b"\x80\x02R", "an object on the stack"),
    "pop_below_a_mark": (b"\x80\x02}}(R", "an object on the stack"),
    "tuple_without_mark": (b"\x80\x02t", "a mark on the stack"),
    "memo_never_put": (b"\x80\x02h\7.", "memo 7"),
    "stack_too_deep": (b"\x80\x02" + b"N" * 20_000, "at most 10000 objects"),
    "marks_too_many": (b"\x80\x02" + b"(" * 20_000, "at most 10000 marks"),
    "sharing_of_exponential_size": (_SHARED, "a state dict, found a tuple"),
    "dict_in_itself": (_LOOP, "a dict under self"),
    "nested_state_dict": (_NESTED, "a dict under model"),
    "number_for_a_tensor": (state_dict(text("epoch"), b"K\1"), "a number under epoch"),
    "storage_for_a_tensor": (state_dict(text("w"), storage()), "a storage under w"),
    "storage_of_another_kind": (
        state_dict(text("w"), tensor(of=storage(kind=b"ctorch\nQInt8Storage\n"))),
        "global torch QInt8Storage",
    ),
    "storage_type_is_a_function": (_one_tensor(of=storage(kind=REBUILD)), "a storage: type"),
    "storage_of_bool_size": (
        b"\x80\x02(" + text("storage") + FLOAT + text("0") + text("cpu") + b"\x88tQ.",
        "a storage: type",
    ),
    "storage_of_negative_size": (_one_tensor(of=storage(elements=-1)), "a storage: type"),
    "storage_record_is_larger": (_one_tensor(of=storage(elements=5)), "20 bytes in data/0"),
    "storage_record_is_smaller": (_one_tensor(of=storage(elements=7)), "28 bytes in data/0"),
    "storage_dtype_lies": (
        _one_tensor(of=storage(kind=b"ctorch\nDoubleStorage\n")),
        "48 bytes in data/0",
    ),
    "storage_key_climbs_out": (_one_tensor(of=storage(key="../0")), "a record data/../0"),
    "tensor_with_metadata": (_one_tensor(tail=b"\x89" + HOOKS + b"}"), "other arguments"),
    "tensor_with_hooks": (_one_tensor(tail=b"\x89" + _HOOKED), "other arguments"),
    "tensor_without_hooks": (_one_tensor(tail=b"\x89"), "other arguments"),
    "tensor_of_another_tensor": (_one_tensor(of=tensor()), "other arguments"),
    "tensor_negative_offset": (_one_tensor(offset=-1), "other arguments"),
    "tensor_negative_stride": (_one_tensor(offset=5, stride=(-3, -1)), "other arguments"),
    "tensor_negative_shape": (_one_tensor(shape=(-2, -3)), "other arguments"),
    "tensor_stride_too_short": (_one_tensor(stride=(1,)), "other arguments"),
    "tensor_of_nine_dimensions": (_one_tensor(shape=[1] * 9, stride=[1] * 9), "other arguments"),
    "tensor_size_beyond_64_bits": (_one_tensor(shape=(1 << 64, 0)), "other arguments"),
    "tensor_after_its_storage": (_one_tensor(offset=1), "a view of 6 elements"),
    "tensor_stride_leaves_storage": (_one_tensor(stride=(4, 1)), "a view of 6 elements"),
    "tensor_of_overflowing_extent": (
        _one_tensor(shape=(1 << 62, 1 << 62), stride=(1 << 62, 1 << 62)),
        "a view of 6 elements",
    ),
    "tensor_repeats_its_storage": (_one_tensor(shape=(1 << 40, 1), stride=(0, 1)), "a view of 6"),
    "empty_tensor_after_its_storage": (_one_tensor(offset=7, shape=(0, 3)), "a view of 6"),
    "parameter_of_a_storage": (
        state_dict(text("w"), _PARAMETER + storage() + b"\x88" + HOOKS + b"tR"),
        "a call of global torch._utils _rebuild_parameter",
    ),
    "parameter_with_hooks": (
        state_dict(text("w"), _PARAMETER + tensor() + b"\x88" + _HOOKED + b"tR"),
        "a call of global torch._utils _rebuild_parameter",
    ),
}


# --- files that are costly to refuse, made only when they are asked for


def heavy_safetensors() -> dict[str, tuple[bytes, str]]:
    """Headers of many megabytes, or of many things."""
    names = ",".join(f'"{i}":0' for i in range(60_000))
    tiny = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[],"data_offsets":[0,1]}}' for i in range(16_000)
    )
    ints = ",".join(["9" * 4_299] * 240)
    return {
        "header_of_100_mb": (safetensors(b"{" + b" " * 99_999_999), "2 to 1048576 bytes"),
        "header_deep": (safetensors("{" + '"a":{' * 150_000), "RecursionError"),
        "header_wide": (safetensors('{"a":[' + "[]," * 340_000 + "[]]}"), "a: malformed"),
        "header_of_names": (safetensors("{" + names + "}"), "more findings"),
        "header_of_overlaps": (safetensors("{" + tiny + "}", b"x"), "more findings"),
        "header_of_long_numbers": (safetensors('{"a":[' + ints + "]}"), "a: malformed"),
        "header_of_escapes": (safetensors('{"' + "\\u00e9" * 170_000 + '":0}'), "malformed"),
    }


def heavy_zips() -> dict[str, tuple[bytes, str]]:
    """Zips and pickles just below the ceilings, and bombs."""
    shared = [Entry("archive/data/0", b"x" * 999)]
    shared += [Entry(f"archive/data/{i}", b"", central={"offset": 0}) for i in range(15_000)]
    memo = (b"}r" + struct.pack("<I", i) + b"\x85" for i in range(9_999))
    nested = (text(f"{i}") + b"}s" for i in range(50_000))
    tuples = (b"(" + b"h\0" * 9_000 + b"tr" + struct.pack("<I", i) + b"0" for i in range(50))
    memos = (b"r" + struct.pack("<I", i) for i in range(200_000))
    pickles = {
        "pickle_of_dicts_in_memo": (b"".join(memo), "the end of the pickle"),
        "pickle_of_dicts": (b"}" + b"".join(nested) + b".", "a dict under 0"),
        "pickle_of_long_numbers": ((b"\x8a\xff" + b"\x7f" * 255 + b"\x85" * 3) * 4_000, "pickle"),
        "pickle_of_large_tuples": (b"}q\0" + b"".join(tuples), "opcode POP"),
        "pickle_of_memo": (b"}" + b"".join(memos), "the end of the pickle"),
        "pickle_of_one_name": (b"}X" + struct.pack("<I", 1_000_000) + b"n" * 1_000_000 + b"K\1s.",
            "a number under nnn"),
    }  # fmt: skip
    files = {name: (checkpoint(b"\x80\2" + code), why) for name, (code, why) in pickles.items()}
    many = [Entry(f"archive/data/{i}", b"") for i in range(15_000)]
    packed = _compressed(bytes(100_000_000))
    return files | {
        "zip_of_many_records": (zip_of(many), "a record data.pkl"),
        "zip_of_many_storages": (zip_of([*_GOOD, *many[1:]]), "more findings"),
        "bomb_of_overlapping_records": (zip_of(shared), "a record at byte"),
        "bomb_of_100_mb": (zip_of([*_GOOD, packed]), "method 8"),
        "bomb_in_the_pickle": (
            zip_of([_compressed(b"N" * 100_000_000, "archive/data.pkl"), *_GOOD[1:]]),
            "method 8",
        ),
    }


# --- config.json and the index of shards

_FLAVORS: dict[str, Any] = {
    "backbone_flavor": "tiny-backbone",
    "decoder_flavor": "tiny-decoder",
    "text_vocab_size": 512,
    "audio_vocab_size": 35,
    "audio_num_codebooks": 32,
}
_STACK: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
}
_SIZES: dict[str, Any] = {"text_vocab_size": 512, "vocab_size": 35, "num_codebooks": 32}


def config(**changes: Any) -> bytes:
    """A config.json of the first edition, but for what is given."""
    return json.dumps(_FLAVORS | changes).encode()


def config_of_layers(**changes: Any) -> bytes:
    """A config.json in transformers' layout, with changes to both its stacks."""
    stack = _STACK | changes
    return json.dumps(stack | _SIZES | {"depth_decoder_config": stack}).encode()


BAD_CONFIGS: Bad = {
    "empty": (b"", "JSON"),
    "not_json": (b"Access to model sesame/csm-1b is restricted.", "JSON"),
    "not_utf8": (b'{"\xff": 1}', "JSON"),
    "a_list": (b"[]", "a JSON object"),
    "nested_deep": (b"[" * 500_000, "RecursionError"),
    "number_of_5_000_digits": (b'{"a": ' + b"9" * 5_000 + b"}", "JSON"),
    "keys_missing": (b"{}", "no such key"),
    "flavor_unknown": (config(backbone_flavor="llama-\x1b[2J"), "known are"),
    "flavor_is_a_list": (config(backbone_flavor=[]), "dimensions of a CSM network"),
    "vocabulary_of_2_to_the_63": (config(text_vocab_size=1 << 63), "not an integer from 1"),
    "vocabulary_negative": (config(text_vocab_size=-1), "not an integer from 1"),
    "vocabulary_of_a_bool": (config(text_vocab_size=True), "not an integer from 1"),
    "vocabulary_is_infinite": (config(text_vocab_size=float("inf")), "not an integer from 1"),
    "codebooks_none": (config(audio_num_codebooks=1), "fewer than 2 codebooks"),
    "heads_none": (config_of_layers(num_attention_heads=0), "not an integer from 1"),
    "heads_do_not_divide": (config_of_layers(num_attention_heads=3), "3 heads"),
    "layers_by_the_million": (config_of_layers(num_hidden_layers=1 << 24), "not an integer from 1"),
    "decoder_is_text": (
        json.dumps(_STACK | _SIZES | {"depth_decoder_config": "x"}).encode(),
        "dimensions of a CSM network",
    ),
}

BAD_INDEXES: Bad = {
    "empty": (b"", "a weight_map"),
    "a_list": (b"[]", "a weight_map"),
    "nested_deep": (b"[" * 500_000, "a weight_map"),
    "map_is_a_list": (b'{"weight_map": []}', "a weight_map"),
    "map_of_lists": (b'{"weight_map": {"a": []}}', "a weight_map"),
    "map_of_numbers": (b'{"weight_map": {"a": 1}}', "a weight_map"),
    "no_shards": (b'{"weight_map": {}}', "1 to 200 shards"),
    "shard_climbs_out": (
        b'{"weight_map": {"a": "../model-00001-of-00001.safetensors"}}',
        "a weight_map",
    ),
    "shard_absolute": (
        b'{"weight_map": {"a": "/etc/model-00001-of-00001.safetensors"}}',
        "a weight_map",
    ),
    "shard_of_another_kind": (b'{"weight_map": {"a": "pytorch_model.bin"}}', "a weight_map"),
    "shards_by_the_thousand": (
        json.dumps(
            {"weight_map": {f"{i}": f"m-{i:05}-of-09999.safetensors" for i in range(9_999)}}
        ).encode(),
        "1 to 200 shards",
    ),
}


# --- manifests

_HEAD = 'schema = 1\nname = "bad"\n[layout]\nstaging = "output/bad"\ndestination = "{to}"\n'
_FILE = '[[artifact]]\npath = "{path}"\ngroup = "g"\nformat = "opaque"\nsize = {size}\n{more}\n'
_SHA = f'sha256 = "{"1" * 64}"'


def manifest(path: str = "a.bin", size: object = 8, more: str = _SHA, to: str = "m/bad") -> bytes:
    """The text of a manifest of one file, sound but for what is given."""
    head, file = _HEAD.replace("{to}", to), _FILE.replace("{path}", path)
    return (head + file.replace("{size}", str(size)).replace("{more}", more)).encode()


def files(*paths: str) -> bytes:
    """The text of a manifest of small files of those paths."""
    entry = manifest().partition(b"[[artifact]]")[2].decode()
    entries = ("[[artifact]]" + entry.replace("a.bin", path) for path in paths)
    return _HEAD.replace("{to}", "m/bad").encode() + "".join(entries).encode()


def _pieces(*pieces: str, size: object = 8) -> bytes:
    return manifest(size=size, more=f"pieces = [{', '.join(pieces)}]")


def piece(offset: object, size: object, part: str = "chunks/p-aa") -> str:
    """A piece of the array, in TOML."""
    return f'{{ part = "{part}", offset = {offset}, size = {size}, {_SHA} }}'


_MANY = [piece(i, 1, f"chunks/p-{i}") for i in range(20_000)]

BAD_MANIFESTS: Bad = {
    "path_climbs_out": (manifest("../../.bashrc"), "'..' component"),
    "path_climbs_out_from_within": (manifest("a/../../b"), "'..' component"),
    "path_absolute": (manifest("/etc/cron.d/run"), "absolute"),
    "path_of_a_windows_drive": (manifest("C:/Windows/run"), "some file system refuses"),
    "path_with_backslashes": (manifest("..\\\\..\\\\b"), "some file system refuses"),
    "path_in_the_home_of_git": (manifest(".git/hooks/pre-commit"), "reserved folder"),
    "path_that_macos_takes_for_git": (manifest(".g\\u200cit/config"), "cannot be seen"),
    "path_with_escape_sequence": (manifest("a\\u001b]0;owned\\u0007"), "some file system refuses"),
    "path_with_c1_escape": (manifest("a\\u009b2Jb"), "some file system refuses"),
    "path_turned_round": (manifest("gnp.\\u202esh"), "cannot be seen"),
    "path_with_nul": (manifest("a\\u0000b"), "some file system refuses"),
    "path_of_a_receipt": (manifest(".csm-weights/a.json"), "reserved folder"),
    "path_of_a_journal": (manifest("a.partial.journal"), "unfinished files"),
    "path_of_a_megabyte": (manifest("a/" * 500_000 + "b"), "at most 1,000 bytes"),
    "path_replaces_the_tasks": (manifest("tasks.py", to="."), "the pipeline's own files"),
    "path_replaces_the_makefile": (manifest("GNUmakefile", to="."), "the pipeline's own files"),
    "path_replaces_a_library": (manifest("torch.py", to="."), "the pipeline's own files"),
    "path_replaces_a_package": (manifest("__init__.py", to="invoke"), "the pipeline's own files"),
    "path_replaces_the_tests": (manifest("tests/conftest.py", to="."), "pipeline's own files"),
    "path_in_the_workflows": (manifest("x.yml", to=".github/workflows"), "pipeline's own files"),
    "paths_differ_in_case": (files("a.bin", "A.BIN"), "a path of its own"),
    "paths_differ_in_composed_accents": (files("\u00e9", "e\u0301"), "a path of its own"),
    "path_below_another_file": (files("a", "a/b"), "below the file at"),
    "destination_absolute": (manifest(to="/etc"), "absolute"),
    "destination_climbs_out": (manifest(to="../up"), "'..' component"),
    "size_2_to_the_63": (manifest(size=1 << 63), "an integer of bytes"),
    "size_minus_2_to_the_63": (manifest(size=-(1 << 63)), "an integer of bytes"),
    "size_of_40_000_bits": (manifest(size="0x" + "f" * 10_000), "an integer of 40,000 bits"),
    "size_of_5_000_digits": (manifest(size="9" * 5_000), "TOML"),
    "size_infinite": (manifest(size="inf"), "an integer of bytes"),
    "size_is_a_date": (manifest(size="1979-05-27"), "an integer of bytes"),
    "pieces_leave_a_hole": (_pieces(piece(0, 4), piece(5, 3, "chunks/p-ab")), "a hole"),
    "pieces_overlap": (_pieces(piece(0, 5), piece(4, 4, "chunks/p-ab")), "an overlap"),
    "piece_of_size_2_to_the_63": (_pieces(piece(0, 1 << 63)), "an integer of bytes"),
    "piece_of_negative_size": (_pieces(piece(8, -8)), "an integer of bytes"),
    "piece_outside": (_pieces(piece(0, 8, "../../secret")), "'..' component"),
    "pieces_by_the_million": (_pieces("{}, " * 1_000_000), "at most 40,000 tables"),
    "pieces_as_numbers": (_pieces("1, " * 300_000), "at most 300,000 items"),
    "pieces_larger_than_the_ceiling": (_pieces(*_MANY * 2), "4,194,304 bytes"),
    "tables_by_the_thousand": (b"[[artifact]]\n" * 300_000, "at most 40,000 tables"),
    "alternatives_by_the_thousand": (
        manifest(more="[[artifact.alternative]]\nsize = 1\n" * 13_000),
        "more findings",
    ),
    "key_of_4_000_words": (b"a." * 4_000 + b"a = 1", "keys of at most 8 words"),
    "key_of_4_000_quoted_words": (b"'!'." * 4_000 + b'"\\u0061" = 1', "keys of at most 8 words"),
    "key_of_4_000_words_in_a_header": (b"[" + b"a . " * 4_000 + b"a]", "keys of at most 8 words"),
    "keys_of_many_words": (
        b"".join(b"a%d.b.c.d.e.f.g=1\n" % i for i in range(7_000)),
        "at most 40,000 tables",
    ),
    "arrays_100_000_deep": (b"x = " + b"[" * 30_000, "TOML"),
    "tables_100_000_deep": (b"x = " + b"{a=" * 30_000, "TOML"),
    "quotes_only": (b'"' * 3_000_000, "TOML"),
    "quotes_escaped": (b'x = """' + b'""\\"' * 900_000, "TOML"),
    "comments_of_megabytes": (b"#" * ((4 << 20) + 1), "at most 4,194,304 bytes"),
    "not_utf8": (b"\xff\xfe", "TOML"),
    "not_toml": (b"Access to model sesame/csm-1b is restricted.", "TOML"),
    "empty": (b"", "schema"),
}


def written(folder: Path, content: bytes, name: str = "weights") -> Path:
    """The content as a file in the folder."""
    path = folder / name
    path.write_bytes(content)
    return path

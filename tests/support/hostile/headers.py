"""Safetensors files that are wrong on purpose."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.support.hostile.common import Bad


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file; `header` is JSON text, its bytes, or an object."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """Return one tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def good_safetensors() -> bytes:
    """Return two tensors, `a` of 2 and `b` of 1 x 3 elements of F32, with metadata."""
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
    "dtype_unknown_and_a_hole": (
        safetensors({"w": entry(4, 12, dtype="F31")}, bytes(12)),
        "a hole",
    ),
    "dtype_is_a_number": (_one(dtype=4), "a known dtype"),
    "dtype_lies": (_one(dtype="F64"), "expected 16 bytes"),
    "shape_lies": (_one(shape=[3]), "expected 12 bytes"),
    "shape_overflows_64_bits": (_one(shape=[1 << 32, 1 << 32, 0]), "expected 0 bytes"),
    "shape_negative": (_one(shape=[-2]), "a shape of"),
    "shape_of_floats": (_one(shape=[2.0]), "a shape of"),
    "shape_of_bools": (_one(shape=[True, 2]), "a shape of"),
    "shape_beyond_64_bits": (_one(shape=[1 << 63]), "a shape of"),
    "shape_is_a_number": (_one(shape=2), "a shape of"),
    "shape_of_65_dimensions": (_one(shape=[1] * 64 + [2]), "at most 64 dimensions"),
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

"""Files that are costly to refuse, made only when a test needs them."""

from __future__ import annotations

import struct

from tests.support.hostile.checkpoints import GOOD, checkpoint, compressed
from tests.support.hostile.headers import safetensors
from tests.support.hostile.opcodes import text
from tests.support.hostile.zips import Entry, zip_of


def heavy_safetensors() -> dict[str, tuple[bytes, str]]:
    """Return headers of many megabytes, or of many entries."""
    names = ",".join(f'"{i}":0' for i in range(60_000))
    tiny = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[],"data_offsets":[0,1]}}' for i in range(16_000)
    )
    empty = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(130_000)
    )
    ints = ",".join(["9" * 4_299] * 240)
    return {
        "header_of_100_mb": (safetensors(b"{" + b" " * 99_999_999), "JSON"),
        "header_over_100_mb": (safetensors(b"{" + b" " * 100_000_000), "2 to 100000000 bytes"),
        "header_of_metadata": (
            safetensors(b'{"__metadata__": {"a": "' + b"\\n" * 5_000_000 + b'", "b": 1}}'),
            "__metadata__",
        ),
        "header_of_tensors": (safetensors("{" + empty + "}"), "an index of about 100,000 tensors"),
        "header_deep": (safetensors("{" + '"a":{' * 150_000), "RecursionError"),
        "header_wide": (safetensors('{"a":[' + "[]," * 340_000 + "[]]}"), "a: malformed"),
        "header_of_names": (safetensors("{" + names + "}"), "more findings"),
        "header_of_overlaps": (safetensors("{" + tiny + "}", b"x"), "more findings"),
        "header_of_long_numbers": (safetensors('{"a":[' + ints + "]}"), "a: malformed"),
        "header_of_escapes": (safetensors('{"' + "\\u00e9" * 170_000 + '":0}'), "malformed"),
    }


def heavy_zips() -> dict[str, tuple[bytes, str]]:
    """Return zips and pickles just below the limits, and bombs."""
    shared = [Entry("archive/data/0", b"x" * 999)]
    shared += [Entry(f"archive/data/{i}", b"", central={"offset": 0}) for i in range(15_000)]
    memo = (b"}r" + struct.pack("<I", i) + b"\x85" for i in range(9_999))
    nested = (text(f"{i}") + b"}s" for i in range(50_000))
    tuples = (b"(" + b"h\0" * 9_000 + b"tr" + struct.pack("<I", i) + b"0" for i in range(50))
    memos = (b"r" + struct.pack("<I", i) for i in range(200_000))
    pickles = {
        "pickle_of_dicts_in_memo": (b"".join(memo), "the end of the pickle"),
        "pickle_of_objects": (b"]" + b")\x85a" * 300_000, "at most 300,000 objects"),
        "pickle_of_dicts": (b"}" + b"".join(nested), "the end of the pickle"),
        "pickle_of_long_numbers": ((b"\x8a\xff" + b"\x7f" * 255 + b"\x85" * 3) * 4_000, "pickle"),
        "pickle_of_large_tuples": (b"}q\0" + b"".join(tuples), "opcode POP"),
        "pickle_of_memo": (b"}" + b"".join(memos), "the end of the pickle"),
        "pickle_of_one_name": (b"}X" + struct.pack("<I", 1_000_000) + b"n" * 1_000_000 + b"K\1s",
            "the end of the pickle"),
    }  # fmt: skip
    files = {name: (checkpoint(b"\x80\2" + code), why) for name, (code, why) in pickles.items()}
    many = [Entry(f"archive/data/{i}", b"") for i in range(15_000)]
    packed = compressed(bytes(100_000_000))
    return files | {
        "zip_of_many_records": (zip_of(many), "a record data.pkl"),
        "zip_of_many_storages": (zip_of([*GOOD, *many[1:]]), "more findings"),
        "bomb_of_overlapping_records": (zip_of(shared), "a record at byte"),
        "bomb_of_100_mb": (zip_of([*GOOD, packed]), "method 8"),
        "bomb_in_the_pickle": (
            zip_of([compressed(b"N" * 100_000_000, "archive/data.pkl"), *GOOD[1:]]),
            "method 8",
        ),
    }

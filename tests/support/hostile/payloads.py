"""Checkpoints that would run code, were they unpickled."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping
from typing import Any

from tests.support.hostile.checkpoints import (
    GOOD_PICKLE,
    checkpoint,
    compressed,
    good_checkpoint,
    records,
)
from tests.support.hostile.legacy import legacy
from tests.support.hostile.opcodes import HOOKS, tensor, text
from tests.support.hostile.zips import Entry, data_descriptor, zip_of


def running_pickles(target: str) -> dict[str, tuple[bytes, str]]:
    """Return pickles that open the file `target` for writing when any unpickler runs them.

    All begin as protocol 2 does, which no unpickler checks. The last group needs pip, numpy
    or torch.
    """
    bodies = _plain_tricks(target) | _computed_tricks(target) | _gadgets(target)
    return {name: (b"\x80\x02" + code, why) for name, (code, why) in bodies.items()}


def words(*values: str) -> bytes:
    """Return opcodes that push a tuple of text."""
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
        "stack_global": (names + b"\x93(" + call + b"tR.", "global builtins open"),
        "inst": (b"(" + call + b"ibuiltins\nopen\n.", "opcode INST"),
        "inst_of_text_opcodes": (b"(" + lines + b"ibuiltins\nopen\n.", "opcode UNICODE"),
        "obj": (b"(" + opens + call + b"o.", "global builtins open"),
        "list_around_it": (b"](" + run + b"e.", "global builtins open"),
        "frame_around_it": (framed + b".", "global builtins open"),
        "protocol_told_twice": (b"\x80\4" + run + b".", "opcode PROTO"),
        "getattr_first": (getattr_ + run + b".", "global builtins getattr"),
    }


def _computed_tricks(target: str) -> dict[str, tuple[bytes, str]]:
    """Return pickles whose call is computed, or named where nobody looks for it."""
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
    """Return calls of well-known libraries that run their arguments, or write files."""
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
    """Return files that run a pickle under torch.load, or make a scanner look at another one.

    The pickle opens `target` for writing and then gives a sound state dict.
    """
    run = b"\x80\x02cbuiltins\nopen\n" + words(target, "w") + b"R0" + GOOD_PICKLE[2:]
    bodies = {
        f"protocol_{version}": (
            _in_protocol(version, target),
            "global builtins open" if version > 1 else "pickle protocol 2",
        )
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

    crc = data_descriptor(7, len(run))
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
            zip_of([compressed(run, "archive/data.pkl"), *good[1:]]),
            "method 8",
        ),
    }


def _disguises(run: bytes) -> dict[str, tuple[bytes, str]]:
    """Return pickles where another kind of file is expected; torch reads those without a zip."""
    return {
        "bare_pickle": (run, "global builtins open"),
        "bare_pickle_before_a_zip": (run + good_checkpoint(), "global builtins open"),
        "legacy_file": (legacy(run), "global builtins open"),
        "legacy_file_after_a_namespace": (
            legacy(b"\x80\x02cargparse\nNamespace\n)\x81.", keys=run),
            "global builtins open",
        ),
        "zip_after_7z": (b"7z\xbc\xaf'\x1c" + checkpoint(run), "a directory up to byte"),
        "tar": (_tar({"storages": run, "tensors": run, "pickle": run}), "a tar archive"),
    }


def _tar(files: Mapping[str, bytes]) -> bytes:
    """Return a file as before torch 0.1.10, whose pickles torch.load reads one by one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def protocol(version: int) -> bytes:
    return b"\x80" + bytes([version]) + GOOD_PICKLE[2:]


SYSTEM = b"cos\nsystem\n"

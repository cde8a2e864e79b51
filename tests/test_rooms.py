"""Imports that the layers contract does not see: Invoke, torch, and clients of the Hub."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import csm_weights
from csm_weights import errors
from csm_weights.errors import CsmWeightsError, Finding, Kind, error_for

PACKAGE = Path(csm_weights.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it, such as "sources.local"."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()

#: The modules that are written for Invoke, and for Triton.
OF_INVOKE = {"commands.cli", "commands.program", "commands.task"}
OF_TRITON = {"model.fused_decoder", "model.kernels"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - OF_INVOKE))
def test_nobody_knows_the_tasks(name: str) -> None:
    """The package works without the switchboard, and without Invoke."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.partition(".")[0] for n in names} & {"tasks", "invoke"} == set()


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running `code`."""
    show = "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    command = [sys.executable, "-c", f"{code}\n{show}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


HEAVY = {"torch", "numpy", "safetensors", "transformers", "requests", "huggingface_hub"}
HEAVY |= {"securesystemslib", "cryptography"}


@pytest.mark.parametrize(
    "code",
    [
        "import csm_weights.pipeline.apply, csm_weights.commands.render.json",
        "import csm_weights.commands.split",
        "import csm_weights.pipeline.doctor, csm_weights.commands.render.text",
        "import csm_weights.commands.lock",
        "import csm_weights.commands.smoke",
        "import csm_weights.commands.attest, csm_weights.commands.seal",
        "import csm_weights, csm_weights.pipeline.locate",
        "import csm_weights.commands.compare, csm_weights.commands.speak",
        "import tasks",
    ],
)
def test_the_light_half_loads_nothing_heavy(code: str) -> None:
    """Everything up to the gates, and the list of tasks, comes without torch."""
    assert loaded_by(code) & HEAVY == set()


def test_a_status_loads_nothing_heavy() -> None:
    """Inspecting and planning, with a report of it, loads no torch on the way either."""
    code = """
from pathlib import Path
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.pipeline import apply, request
as_json.render(apply.status(request.Request(Path.cwd())))
"""
    assert loaded_by(code) & HEAVY == set()


# ---- the listing


DIALECT = re.compile(r"(What|Whether|Where|How|Why|That|When)\b")


def room_of(name: str) -> str:
    """The room of a module, or "" for the files above the rooms."""
    return name.partition(".")[0] if (PACKAGE / name.partition(".")[0]).is_dir() else ""


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_of_functions_begin_with_a_verb(name: str) -> None:
    """No function's docstring begins with a question word."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    found = {f.name: ast.get_docstring(f) or "" for f in functions}
    assert [function for function, text in found.items() if DIALECT.match(text)] == []


def test_modules_and_rooms_can_be_read_in_a_sitting() -> None:
    """No module has more than 500 lines, no room more than 4,000; eight files are below all."""
    lines = {name: lines_of(path) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 500} == {}
    rooms = {room: sum(n for m, n in lines.items() if room_of(m) == room) for room in ROOMS}
    assert {room: count for room, count in rooms.items() if count > 4000} == {}
    assert len([name for name in MODULES if not room_of(name)]) <= len(ABOVE) + 8


#: The package's `__init__` and api, above the rooms.
ABOVE = ("", "__main__", "api")
ROOMS = sorted({room_of(name) for name in MODULES} - {""})


# ---- files that anyone may have put there


#: The functions that open a file by its name. All others go through `open_regular`, which
#: waits for nothing and takes regular files only.
OPENING = {
    "files.open_regular",
    "store.atomic.create",  # makes the file, or requires that it is a regular one of this user
    "store.atomic.sync",  # folders too, and nothing is read
    "commands.attest._make_keys",  # makes the file
    "commands.console._open_streams",  # /dev/null, as the next one
    "commands.console._print",
    "commands.reports.append",  # a file of GitHub's runner
    "commands.reports.write",  # what someone named to be written to, also /dev/stdout
    "transfer.policy.deliver",  # a connection, as the next one
    "pipeline.doctor._ask",
}

#: Methods of a path, and functions of modules, that open a file by its name.
OPENERS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "ZipFile"}


def opening(name: str) -> set[str]:
    """The functions of a module that call something that opens a file by its name."""
    found = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for call in ast.walk(function):
                called = call.func if isinstance(call, ast.Call) else None
                is_method = isinstance(called, ast.Attribute) and called.attr in OPENERS
                if is_method or (isinstance(called, ast.Name) and called.id == "open"):
                    found.add(f"{name}.{function.name}")
    return found


def test_one_function_opens_what_was_not_just_made() -> None:
    """A pipe, a device or an endless file in any file's place is refused in one place."""
    assert {function for name in MODULES for function in opening(name)} == OPENING


# ---- the error tree


EXIT_CODES = {
    "CsmWeightsError": 1,
    "UsageError": 2,
    "MissingInput": 3,
    "WrongContent": 4,
    "ManifestInvalid": 4,
    "AccessRefused": 5,
    "NetworkFailed": 6,
    "NoSpace": 7,
    "SmokeFailed": 8,
    "SmokeUnavailable": 77,
    "Interrupted": 130,
}


def error_classes() -> dict[str, type[CsmWeightsError]]:
    """All classes of errors.py that derive from the base."""
    return {
        name: value
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, CsmWeightsError)
    }


def test_exit_codes_are_those_of_the_design() -> None:
    """Each branch of the tree has the exit code that callers rely on, and there is no other."""
    assert {name: kind.exit_code for name, kind in error_classes().items()} == EXIT_CODES


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "errors"}))
def test_errors_of_other_modules_keep_the_codes(name: str) -> None:
    """A module's own error is a leaf: it adds no exit code."""
    if name in OF_TRITON:
        pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    module = importlib.import_module(f"csm_weights.{name}")
    own = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, CsmWeightsError) and value.__module__ == module.__name__
    ]
    assert [kind.__name__ for kind in own if "exit_code" in vars(kind)] == []


def finding(kind: Kind) -> Finding:
    return Finding(kind, "a", "b", "c")


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([Kind.MISSING], 3),
        ([Kind.LFS_POINTER, Kind.MISSING], 3),
        ([Kind.MISSING, Kind.WRONG_DIGEST], 4),
        ([Kind.ACCESS_PAGE], 4),
        ([Kind.EXTRA_CHUNK_FILE], 4),
        ([Kind.NO_SPACE], 7),
        ([Kind.MISSING, Kind.NO_SPACE], 7),
        ([Kind.WRONG_DIGEST, Kind.NOT_WRITABLE], 7),
        ([Kind.MISSING, Kind.TERMS, Kind.NO_NETWORK], 5),
        ([Kind.OFFLINE, Kind.CERTIFICATE], 6),
        ([Kind.NOT_INSTALLED], 77),
        ([Kind.NOT_INSTALLED, Kind.MISSING], 3),
        ([], 3),
    ],
)
def test_many_findings_have_one_code(kinds: list[Kind], code: int) -> None:
    """Of several findings the one of the first category decides the exit code."""
    assert error_for("message", [finding(kind) for kind in kinds]).exit_code == code

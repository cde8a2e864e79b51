"""Who may import whom: nouns below, stages side by side, the pipeline above."""

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

#: What everyone may import: values and the reading of formats.
NOUNS = {
    "errors",
    "architecture",
    "digest",
    "manifest",
    "records",
    "files",
    "landing",
    "peek",
    "environment",
    "joined",
    "checkpoint",
    "elements",
    "tensors",
    "malformed",
    "statedict",
    "torchzip",
    "toml",
}

#: Modules that know the order of things, and so import stages; each may import those before it.
CONDUCTORS = ["locks", "request", "proving", "sourcing", "seeding", "pipeline", "inquiry", "doctor"]
CONDUCTORS += ["authoring", "locking", "comparing", "obtaining", "sealing", "attesting"]

#: What a source needs that asks a server.
ASKING = {"sources", "sources.answers", "sources.asking"}

#: What else a module may import, with the reason.
EXCEPTIONS = {
    "plan": {"state"},  # its input
    "state": {"hubcache"},  # what knows where the Hub's cache keeps a file
    "assemble": {"sources"},  # the interface it drives
    "consume": {"assemble", "sources"},  # the file it fills, and how it says that a part is wrong
    "sources.local": {"sources"},  # the interface it implements
    "sources.answers": {"sources"},  # whose errors it raises
    "sources.asking": {"sources", "sources.answers", "sources.waits"},  # how it judges, waits
    "sources.wire": ASKING,  # the sink it fills, and how it asks
    "sources.hub": {*ASKING, "sources.wire"},  # how its bytes come
    "sources.mirror": {*ASKING, "sources.wire"},  # likewise
    "listing": {"publish", "sources.answers", "sources.hub"},  # who asks; the words of entries
    "load": {"reading"},  # how the bytes come
    "model": {"load", "reading"},  # how it is filled
    "decoding": {"model"},  # whose frames it makes
    "signing": {"attest"},  # what it says who signed with
    "smoke": {"model", "decoding", "machine"},  # what it checks, and how fast it may be
    "speech": {"hubcache"},  # what knows where the Hub's cache keeps a file
    "watermark": {"hubcache"},  # likewise
    "generator": {"model", "decoding", "speech", "watermark"},  # what it makes speech with
    "api": {"request", "obtaining", "reading", "model", "generator"},  # what a program asks for
    "report": {"request", "gates", "plan", "state"},  # whose values it shows
    "compare": {"sides"},  # what it holds against each other
    "report_compare": {"report", "compare", "sides"},  # likewise
    "report_attest": {"report", "attesting"},  # likewise
    "report_hub": {"report", "doctor", "seeding"},  # likewise, and how it shows them
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it, such as "sources.local"."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()
STAGES = sorted(set(MODULES) - NOUNS - set(CONDUCTORS) - set(EXCEPTIONS) - {""})


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    own = {name.removeprefix("csm_weights.") for name in names if name.startswith("csm_weights.")}
    return own & set(MODULES)


def test_the_walk_sees_imports() -> None:
    """The rule below is not kept by seeing nothing."""
    assert {"state", "assemble", "sources", "sources.local", "gates"} <= imports(
        MODULES["pipeline"]
    )


@pytest.mark.parametrize("name", sorted(NOUNS & set(MODULES)))
def test_nouns_know_only_nouns(name: str) -> None:
    """A noun imports no stage."""
    assert imports(MODULES[name]) - NOUNS == set()


@pytest.mark.parametrize("name", STAGES)
def test_stages_know_only_nouns(name: str) -> None:
    """A stage imports nouns, and no other stage."""
    assert imports(MODULES[name]) - NOUNS == set()


@pytest.mark.parametrize("name", sorted(EXCEPTIONS.keys() & MODULES.keys()))
def test_exceptions_are_only_those_with_a_reason(name: str) -> None:
    """The few modules that know another one know no third."""
    assert imports(MODULES[name]) - NOUNS <= EXCEPTIONS[name]


def test_only_the_conductors_know_the_stages() -> None:
    """The stages are imported by the conductors, and nobody else."""
    stages = set(STAGES) | {"plan", "assemble", "consume", "sources.local", "smoke"}
    allowed = {"report", *CONDUCTORS, *EXCEPTIONS}
    knowing = {name for name, path in MODULES.items() if imports(path) & stages}
    assert knowing - allowed == set()


def test_nobody_knows_the_pipeline_but_those_above_it() -> None:
    """The conductors import each other one way; nothing imports report or authoring."""
    for index, name in enumerate(c for c in CONDUCTORS if c in MODULES):
        assert imports(MODULES[name]) & set(CONDUCTORS[index:]) == set()
    knowing = {name for name, path in MODULES.items() if "pipeline" in imports(path)}
    assert knowing <= {"authoring", "doctor", "obtaining", "sealing"}
    tops = [name for name, path in MODULES.items() if imports(path) & {"report", "authoring"}]
    assert sorted(tops) == ["report_attest", "report_compare", "report_hub"]


@pytest.mark.parametrize("name", sorted(MODULES))
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
        "import csm_weights.pipeline, csm_weights.report",
        "import csm_weights.authoring",
        "import csm_weights.doctor, csm_weights.report_hub",
        "import csm_weights.locking",
        "import csm_weights.attesting, csm_weights.sealing, csm_weights.report_attest",
        "import csm_weights, csm_weights.obtaining",
        "import csm_weights.comparing, csm_weights.report_compare",
        "import tasks",
    ],
)
def test_the_light_half_loads_nothing_heavy(code: str) -> None:
    """Everything up to the gates, and the list of tasks, comes without torch."""
    assert loaded_by(code) & HEAVY == set()


def test_a_status_loads_nothing_heavy() -> None:
    """Looking and planning, with a report of it, loads no torch on the way either."""
    code = """
from pathlib import Path
from csm_weights import pipeline, report, request
report.survey_json(pipeline.survey(request.Request(Path.cwd())))
"""
    assert loaded_by(code) & HEAVY == set()


# ---- the error tree


EXIT_CODES = {
    "CsmWeightsError": 1,
    "UsageError": 1,
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


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """The drawing at the top of errors.py has every class with its code."""
    drawn = re.findall(r"^ *[│├└─ ]*(\w+) +(\d+)  ", errors.__doc__ or "", re.MULTILINE)
    assert {name: int(code) for name, code in drawn} == EXIT_CODES


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "errors", "model", "load"}))
def test_errors_of_other_modules_keep_the_codes(name: str) -> None:
    """A module's own error is a leaf: it adds no exit code."""
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
        ([Kind.EXTRA_PART], 4),
        ([Kind.NO_SPACE], 7),
        ([Kind.MISSING, Kind.NO_SPACE], 7),
    ],
)
def test_many_findings_have_one_code(kinds: list[Kind], code: int) -> None:
    """Wrong content outweighs what is missing, and a full disk stands for itself."""
    assert error_for("message", [finding(kind) for kind in kinds]).exit_code == code

"""The package as pip installs it: a program, in a folder that is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clone import EMBEDDED, REPOSITORY, Result

#: What a source distribution is built from.
SOURCES = ("csm_weights", "manifests", "pyproject.toml", "README.md")

Program = Callable[..., Result]


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment into which the built wheel was installed."""
    top = tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, top / "source" / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, top / "source")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = top / "venv" / "bin" / "python"
    constraints = ["-c", str(REPOSITORY / "constraints.txt")]
    for command in (
        [sys.executable, "-m", "build", "--outdir", str(top / "dist"), str(top / "source")],
        [sys.executable, "-m", "venv", str(top / "venv")],
    ):
        subprocess.run(command, check=True, capture_output=True, env=environment)
    assert len(list((top / "dist").glob("*.tar.gz"))) == 1
    [wheel] = (top / "dist").glob("*.whl")
    install = [str(python), "-m", "pip", "install", "-q", *constraints, str(wheel)]
    subprocess.run(install, check=True, capture_output=True, env=environment)
    return python.parent


@pytest.fixture
def program(bin_folder: Path, tmp_path: Path) -> Program:
    """Run the installed program, or another of its environment, in an empty folder."""

    def run(*arguments: str, name: str = "csm-weights") -> Result:
        command = [str(bin_folder / name), *arguments]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "COLUMNS": "200"}
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)

    return run


def test_the_program_and_the_module_are_the_same(program: Program) -> None:
    """`csm-weights` and `python -m csm_weights` have the same version and tasks."""
    module = ("-m", "csm_weights")
    assert program("--version").stdout == program(*module, "--version", name="python").stdout
    listed = program("--list").stdout
    assert listed == program(*module, "--list", name="python").stdout
    assert {"weights", "fetch", "verify", "status"} <= set(listed.split())


def test_chunk_files_become_verified_weights(program: Program, tmp_path: Path) -> None:
    """Files and their state go below the current folder, by a manifest of the package."""
    here = tmp_path / "here"
    shutil.copytree(REPOSITORY / EMBEDDED, here / EMBEDDED)
    done = program("weights", "--model=csm-tiny", "--no-smoke")
    assert done.returncode == 0, done.stderr
    assert "csm-weights smoke --model csm-tiny" in done.stdout
    assert "inv " not in done.stdout
    placed = here / "models" / "csm-tiny"
    assert (placed / "model.safetensors").stat().st_size == 1_191_632
    assert list((placed / ".csm-weights").iterdir())
    assert program("verify", "--model=csm-tiny", "--report=page.html").returncode == 0
    assert "OK: installed and verified" in (here / "page.html").read_text(encoding="utf-8")
    with (placed / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"poison")
    assert program("verify", "--model=csm-tiny").returncode == 4


def test_advice_names_the_program(program: Program) -> None:
    """What a person is told to type is what they have."""
    done = program("weights", "--source=chunks")
    assert done.returncode == 3
    assert "csm-weights weights" in done.stderr
    assert "inv " not in done.stderr
    slip = program("weights", "csm-tiny")
    assert slip.returncode == 2
    assert slip.stderr.strip().endswith("csm-weights weights --model csm-tiny")


def test_a_missing_extra_is_one_pip_command(program: Program, tmp_path: Path) -> None:
    """Without torch the smoke test ends with 77 and names the extra."""
    shutil.copytree(REPOSITORY / EMBEDDED, tmp_path / "here" / EMBEDDED)
    done = program("weights", "--model=csm-tiny")
    assert done.returncode == 77
    assert "pip install 'csm-weights[torch]'" in done.stderr


def test_the_shipped_manifest_decides(program: Program) -> None:
    """Sesame's repository is verified by the manifest of the package, in any folder."""
    code = (
        "from csm_weights.pipeline import locate, session\n"
        "begun = session.begin(locate.of_repo(locate.checkout(), 'sesame/csm-1b', None))\n"
        "print(begun.manifest.artifacts[0].sha256)"
    )
    done = program("-c", code, name="python")
    manifest = (REPOSITORY / "manifests" / "csm-1b.toml").read_text()
    assert done.returncode == 0, done.stderr
    assert f'sha256 = "{done.stdout.strip()}"' in manifest


def test_the_current_folder_is_not_imported_from(program: Program, tmp_path: Path) -> None:
    """A data folder may hold a file that is named like a module."""
    program("--version")
    for module in ("invoke", "filelock", "tqdm", "requests", "typing"):
        (tmp_path / "here" / f"{module}.py").write_text("raise SystemExit(99)")
    for arguments, name in (((), "csm-weights"), (("-m", "csm_weights"), "python")):
        done = program(*arguments, "status", "--model=csm-tiny", name=name)
        assert done.returncode == 0, done.stderr

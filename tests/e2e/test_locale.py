"""Names in letters that a locale does not have."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from tests.support.clone import INV, REPOSITORY

NAME = "\xe9t\xe9\u65e5.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout whose one model has a file with such a name; its text is in the manifest."""
    id_ = "78981922613b2afb6025042ff6bd878ac1994e85"  # printf 'a\\n' | git hash-object --stdin
    file = Artifact(NAME, "g", "opaque", 2, text="a\n", git_sha1=id_)
    (tmp_path / "manifests").mkdir()
    text = render(Manifest("x", "output/x", "models/x", (file,)))
    (tmp_path / "manifests/x.toml").write_text(text, encoding="utf-8")
    shutil.copy(REPOSITORY / "tasks.py", tmp_path)
    return tmp_path


def inv(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    command = [str(INV), *words, "--model", "x"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


COMMANDS = [("weights", "--no-smoke"), ("status",), ("verify",)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_terminal_without_the_letters_shows_escapes(words: tuple[str, ...], root: Path) -> None:
    """What stdout cannot write is escaped there; the file gets its own name."""
    inv(root, "weights", "--no-smoke")
    done = inv(root, *words, PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (root / "models/x" / NAME).is_file()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_locale_that_cannot_name_the_file_says_so(words: tuple[str, ...], root: Path) -> None:
    """Where files cannot have such names, the way out is told, and nothing is written."""
    legacy = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = inv(root, *words, **legacy)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "PYTHONUTF8=1" in done.stderr
    assert not (root / "models").exists()

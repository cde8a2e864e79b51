"""The example in each room's docstring, run as it is written on a small model."""

from __future__ import annotations

import importlib
import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from tests.support.clone import REPOSITORY
from tests.support.network import VARIABLES
from tests.support.servers import serving
from tests.test_rooms import ROOMS

#: The room and the folders within rooms that have a docstring of their own.
FOLDERS = [*ROOMS, "commands.render", "transfer.http"]

#: The model of the examples, and the small one that takes its place here.
NAMED, SMALL = "csm-1b", "csm-tiny"


def docstring(folder: str) -> str:
    """Return what the package says of a room."""
    return importlib.import_module(f"csm_weights.{folder}").__doc__ or ""


def example(folder: str) -> str:
    """Return the indented lines of a room's docstring."""
    lines = docstring(folder).splitlines()
    indented = [line for line in lines if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(indented)).strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout in which the small model is installed, with a Hub that knows a repository."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "manifests").mkdir()
    for path in REPOSITORY.glob(f"manifests/{SMALL}.*"):
        shutil.copy(path, root / "manifests")
    (root / "chunks").symlink_to(REPOSITORY / "chunks")
    assert apply.weights(Request(root, SMALL, ("all",)), smoke=False).error is None
    yield root


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_example_of_a_room_runs(
    folder: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each room says what it promises and never does, and its example is a program that runs."""
    assert "Promises: " in docstring(folder)
    assert "Never: " in docstring(folder)
    page = tmp_path / "api" / "models" / "sesame" / NAMED
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"id": f"sesame/{NAMED}"}))
    monkeypatch.chdir(checkout)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with serving(tmp_path, ranges=False) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        text = example(folder)
        if folder != "transfer.http":
            text = text.replace(NAMED, SMALL)
        assert text
        exec(compile(text, folder, "exec"), {})

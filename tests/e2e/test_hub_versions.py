"""A seeded cache as former and present versions of huggingface_hub see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csm_weights.commands.seed_cache import seed_cache
from csm_weights.pipeline.request import Request
from tests.commands.test_seed_cache import LOAD, REPO, digests, home, tiny
from tests.store.test_hub_cache import ask_client

pytestmark = pytest.mark.integration

__all__ = ["home", "tiny"]

#: The version that CSM's own requirements name, the last of the former major one, today's.
VERSIONS = ("0.28.1", "1.17.0", "2.4.0")

#: What pip says where it gets no answer from an index, or one without the package.
NO_INDEX = ("No matching distribution", "Could not find a version", "Connection", "Temporary")

#: Seconds for an installation: a few megabytes.
LIMIT = 300


@pytest.fixture(params=VERSIONS)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A version of huggingface_hub, and a folder with it and what it needs."""
    version, folder = str(request.param), tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(folder), f"huggingface_hub=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip has not installed huggingface_hub {version} in {LIMIT} s")
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip(f"no package index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return version, folder


def test_each_version_loads_the_model_offline(
    installed: tuple[str, Path], tiny: Request, home: Path
) -> None:
    """Files and the model come from the seeded cache, whole, with no socket opened."""
    version, folder = installed
    seed_cache(tiny)
    pinned = digests(tiny)
    answer = ask_client(home, REPO, list(pinned), LOAD, before=folder)
    assert answer["version"] == version
    assert answer["files"] == pinned
    assert (answer["sockets"], answer["equal"]) == (0, True)

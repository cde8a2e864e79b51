"""`inv speak` and `make speak` in a clone: a WAV file from chunk files, and exit codes."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path

import pytest

from tests.commands.test_speak import files
from tests.support.clone import Clone

__all__ = ["files"]  # a fixture


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone.make(tmp_path / "clone")


def test_inv_and_make_write_a_file(clone: Clone, files: Path) -> None:
    """Without a tokenizer it ends with 3; files that are there are found; stdout has the result."""
    refused = clone.inv("speak", "Hi", "--out", "hi.wav", "--model", "csm-tiny")
    assert refused.returncode == 3
    assert "hf download sesame/csm-1b tokenizer.json" in refused.stderr
    assert "Traceback" not in refused.stderr
    clone.installed.mkdir(parents=True)
    shutil.copy(files / "tokenizer.json", clone.installed)
    mimi = clone.extra / ".cache/huggingface/hub/models--kyutai--mimi/snapshots" / ("c" * 40)
    shutil.copytree(files / "mimi", mimi)
    made = clone.make_target(
        "speak", "TEXT=Hi", "OUT=made.wav", "MODEL=csm-tiny", "MAX_SECONDS=0.4"
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.endswith("OK: spoken with csm-tiny, speaker 0, seed 0\n")
    assert "%" not in made.stderr
    with wave.open(str(clone.root / "made.wav")) as file:
        assert file.getnframes() == 5 * 1920

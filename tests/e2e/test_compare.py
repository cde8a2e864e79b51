"""`inv compare` as a person calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.commands.test_identify import released
from tests.support.clone import Clone
from tests.support.networks import TINY
from tests.support.oracles import transformers_model
from tests.support.schema import checked


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A checkout in which torch must not be touched."""
    clone = Clone.make(tmp_path_factory.mktemp("compare") / "clone")
    clone.fake("torch", "raise RuntimeError('torch was imported')\n")
    return clone


def test_the_command_compares_without_torch(clone: Clone) -> None:
    """`inv compare` compares the two formats; results on stdout, exit code 0."""
    done = clone.inv("compare", "--model", "csm-tiny")
    assert (done.returncode, done.stderr.removeprefix("compare ...\n")) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("OK: 52 tensors, 1.1 MiB, are equal")


def test_the_command_takes_files(clone: Clone) -> None:
    """One file that differs, in JSON and by make: exit code 4, and a result all the same."""
    state = clone.joined("model.safetensors")
    other = clone.root / "other.safetensors"
    other.write_bytes(state[:-4] + b"\0\0\0\0")
    done = clone.inv("compare", "--model", "csm-tiny", "--file", "other.safetensors", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, data["exit_code"]) == (4, 4)
    assert [d["name"] for d in data["differences"]] == ["text_embeddings.weight"]
    assert data["differences"][0]["index"] == [511, 63]
    made = clone.make_target("compare", "MODEL=csm-tiny", f"FILE={other} {other}")
    assert (made.returncode, made.stdout.splitlines()[-1][:6]) == (0, "OK: 52")
    assert clone.inv("compare", "--file", "none.pt").returncode == 3
    often = clone.inv("compare", *("--file", "other.safetensors") * 3)
    assert (often.returncode, "at most twice" in often.stderr) == (2, True)
    assert "Traceback" not in often.stderr


def test_identify_tells_what_a_file_is_without_torch(clone: Clone) -> None:
    """One line a path, whatever the file is called; soon, where nothing is to be hashed."""
    wrong = clone.root / "pytorch_model.bin"
    wrong.write_bytes(clone.joined("model.safetensors"))
    start = time.monotonic()
    done = clone.inv("identify", "pytorch_model.bin", "--also", "chunks/csm-tiny/ckpt")
    assert time.monotonic() - start < 5
    assert (done.returncode, done.stderr.removeprefix("identify ...\n")) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == (
        "pytorch_model.bin: another CSM in the original layout, safetensors, F32, "
        "296,640 parameters; model.safetensors of csm-tiny, by its digest"
    )
    assert second.endswith("torch-zip, F32, 296,640 parameters; ckpt.pt of csm-tiny, by its digest")
    data = checked(clone.inv("identify", "--json", "pytorch_model.bin").stdout)
    assert data["files"][0]["file"] == "model.safetensors"
    assert clone.inv("identify", "none.pt").returncode == 3
    wrong.write_bytes(b"Access to model sesame/csm-1b is restricted.")
    assert clone.inv("identify", "pytorch_model.bin").returncode == 4


def test_the_page_about_fine_tunes_works_as_written(clone: Clone) -> None:
    """Its commands are run on a tiny model that transformers has trained and saved."""
    page = (clone.root / "docs" / "fine-tuned.md").read_text()
    commands, code = re.findall(r"^```(?:sh|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[:2]
    state = released()
    state["projection.weight"] = state["projection.weight"] + 0.25
    transformers_model(TINY, state).save_pretrained(clone.root / "my-voice", max_shard_size="400KB")
    shown = []
    for command in commands.splitlines():
        done = clone.inv(*command.split()[1:])
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert "a fine-tune of csm-tiny: 1 of 52 tensors differ" in shown[0]
    assert "next: inv verify --model my-voice" in shown[1]
    assert shown[2].splitlines()[-1].startswith("OK") or "OK: installed and verified" in shown[2]

    script = code + "print(bool(model.verified), float(model.projection.weight.sum()))"
    environment = {**os.environ, "PYTHONPATH": str(clone.root)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=clone.root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    verified, total = done.stdout.split()
    assert verified == "True"
    assert float(total) == pytest.approx(float(state["projection.weight"].sum()), rel=1e-4)

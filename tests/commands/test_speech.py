"""`inv weights --with speak`: one command brings all that speaking takes, verified."""

from __future__ import annotations

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from invoke.program import Program

from csm_weights.commands.cli import collection
from csm_weights.commands.speak import speak
from csm_weights.errors import WrongContent
from csm_weights.manifest.parse import load
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.model.codec import find_codec
from csm_weights.model.tokenizer import find_tokenizer
from csm_weights.pipeline import apply, doctor, speech
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome
from tests.commands.test_speak import files
from tests.support.clone import REPOSITORY, copy_tiny
from tests.support.hub import HubServer
from tests.support.schema import checked
from tests.test_api import hub, online, root
from tools.standin.speech import CHUNKS

__all__ = ["files", "hub", "online", "root"]  # fixtures


def run(folder: Path, *words: str) -> int:
    """Run a task for a folder; return its exit code."""
    try:
        Program(namespace=collection(folder)).run(["inv", *words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the chunk files of csm-tiny and its codec, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(REPOSITORY / CHUNKS, tmp_path / "tiny" / CHUNKS)
    return copy_tiny(tmp_path / "tiny")


def test_csm_tiny_speaks_from_chunk_files(tiny: Path) -> None:
    """Two commands make a WAV file on a fresh machine, and the second one again the same."""
    page = tiny / "page.html"
    words = ("weights", "--model=csm-tiny", "--with=speak", "--no-smoke", f"--report={page}")
    assert run(tiny, *words) == 0
    assert "mimi-tiny: tokenizer.json" in page.read_text(encoding="utf-8")
    request = Request(tiny, "csm-tiny")
    said = [tiny / "first.wav", tiny / "again.wav"]
    for path in said:
        speak(request, "Hello from Sesame.", path, max_seconds=0.4, seed=1)
    first, again = (path.read_bytes() for path in said)
    assert len(first) == 44 + 2 * 5 * 1920
    assert first == again
    assert doctor.closure(request).error is None


def test_the_codec_counts_once_it_is_installed_and_whole(tiny: Path) -> None:
    """Its folder is known then, not before, nor where a file is gone; no codec has none."""
    request = Request(tiny, "csm-tiny")
    assert speech.codec_folder(request) is None
    done = apply.weights(speech.codec_of(request, "mimi-tiny"), smoke=False)
    home = done.state.paths.destination
    assert speech.codec_folder(request) == home
    assert speech.codec_folder(Request(tiny, "mimi-tiny")) is None
    (home / done.state.artifacts[-1].artifact.path).unlink()
    assert speech.codec_folder(request) is None


def test_a_dry_run_tells_all_and_writes_nothing(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan has what goes with the model, also as JSON."""
    words = ("weights", "--model=csm-tiny", "--with=speak", "--no-smoke")
    assert run(tiny, *words, "--dry") == 0
    assert "mimi-tiny -> " in capsys.readouterr().out
    assert not (tiny / "models").exists()
    assert run(tiny, *words, "--json") == 0
    done = checked(capsys.readouterr().out)
    [codec] = done["also"]
    assert (codec["model"], len(codec["files"])) == ("mimi-tiny", 3)


def test_a_folder_of_ones_own_takes_the_codec_too(tiny: Path) -> None:
    """With --dest the codec lies in a folder of its name there, and is found there."""
    dest = tiny.parent / "volume"
    words = ("weights", "--model=csm-tiny", "--with=speak", "--no-smoke", f"--dest={dest}")
    assert run(tiny, *words) == 0
    request = Request(tiny, "csm-tiny", dest=str(dest))
    assert speech.codec_folder(request) == dest / "mimi-tiny"
    (dest / "mimi-tiny" / "model.safetensors").write_bytes(b"edited")
    assert speech.codec_folder(request) is None
    assert run(tiny, *words) == 0
    assert speech.codec_folder(request) == dest / "mimi-tiny"


def test_a_wrong_codec_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A codec that is not the pinned one ends with 4; the model stays."""
    part = next((tiny / CHUNKS).rglob("model.safetensors.part-aa"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert run(tiny, "weights", "--model=csm-tiny", "--with=speak", "--no-smoke") == 4
    assert "wrong digest" in capsys.readouterr().err
    assert (tiny / "models" / "csm-tiny" / "model.safetensors").exists()


def test_a_codec_that_fails_a_gate_ends_the_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of what goes with a model is that of the run."""
    real = apply.weights

    def weights(request: Request, *options: bool, **more: bool) -> Outcome:
        error = WrongContent("no") if request.model == "mimi-tiny" else None
        return replace(real(request, *options, **more), error=error)

    monkeypatch.setattr(apply, "weights", weights)
    assert run(tiny, "weights", "--model=csm-tiny", "--with=speak", "--no-smoke") == 4


@pytest.mark.parametrize(
    ("word", "model", "said"),
    [
        ("speek", "csm-tiny", "did you mean speak"),
        ("speak", "mimi-tiny", "names no codec"),
    ],
)
def test_what_cannot_go_with_a_model_is_refused(
    tiny: Path, capsys: pytest.CaptureFixture[str], word: str, model: str, said: str
) -> None:
    """Another word, and a model without a codec, are misuse."""
    assert run(tiny, "weights", f"--model={model}", f"--with={word}", "--no-smoke") == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_everything_comes_from_the_hub(root: Path, online: HubServer, files: Path) -> None:
    """Model, tokenizer and codec come verified; the codec is also where transformers looks."""
    tokenizer = (files / "tokenizer.json").read_bytes()
    codec = {path.name: path.read_bytes() for path in (files / "mimi").iterdir()}
    path = root / "manifests" / "csm-1b.toml"
    model = load(path)
    commit = online.push("sesame/csm-1b", {"tokenizer.json": tokenizer})
    pinned = artifact("tokenizer.json", tokenizer)
    artifacts = (*model.artifacts, pinned)
    path.write_text(render(replace(model, revision=commit, codec="mimi", artifacts=artifacts)))
    layout = ("output/mimi", "models/mimi")
    mimi = Manifest("mimi", *layout, tuple(artifact(*file) for file in codec.items()))
    mimi = replace(mimi, repo="kyutai/mimi", default=("all",))
    revision = online.add_repo("kyutai/mimi", codec)
    (root / "manifests" / "mimi.toml").write_text(render(replace(mimi, revision=revision)))

    assert run(root, "weights", "--with=speak", "--no-smoke", "--source=hf") == 0
    assert find_tokenizer(root / "models" / "csm-1b").encode("")
    assert find_codec(32, torch.device("cpu")).sample_rate == 24_000
    assert doctor.closure(Request(root)).error is None
    asked = len(online.log)
    assert run(root, "weights", "--with=speak", "--no-smoke", "--source=hf") == 0
    assert len(online.log) == asked


def artifact(path: str, content: bytes) -> Artifact:
    group = path.partition(".")[0]
    return Artifact(path, group, "opaque", len(content), sha256(content).hexdigest())


def test_the_shipped_codec_is_pinned() -> None:
    """CSM-1B's codec is Mimi at one commit, each file with its size and sha256."""
    manifest = load(REPOSITORY / "manifests" / "csm-1b.toml")
    codec = load(REPOSITORY / "manifests" / f"{manifest.codec}.toml")
    assert codec.repo == "kyutai/mimi"
    assert [a.path for a in codec.artifacts if a.sha256] == ["config.json", "model.safetensors"]

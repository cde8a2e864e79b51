"""A text as a WAV file: its bytes, its length, and what is refused before a model is loaded."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import socket
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
import torch

from csm_weights.commands.render import json as as_json
from csm_weights.commands.speak import speak
from csm_weights.errors import (
    CsmWeightsError,
    MissingInput,
    NoSpace,
    UsageError,
    WrongContent,
)
from csm_weights.manifest.parse import load
from csm_weights.model.codec import Mimi
from csm_weights.model.csm import Model
from csm_weights.model.generator import Generator, Segment
from csm_weights.model.tokenizer import TextTokenizer
from csm_weights.model.wav import read_wav, wav_bytes
from csm_weights.pipeline.locate import network_in
from csm_weights.pipeline.request import Request
from tests.model.test_generator import FakeCipher
from tests.support.clone import EMBEDDED, REPOSITORY, copy_tiny
from tests.support.privileges import unprivileged
from tests.support.schema import checked
from tests.support.toy import flip
from tools.standin.speech import CHUNKS

#: Seven frames of 1,920 samples.
SECONDS, SAMPLES = 0.56, 7 * 1920


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and, in mimi/, a codec of random weights."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "mimi").mkdir()
    for part in (REPOSITORY / CHUNKS).rglob("*.part-aa"):
        shutil.copy(part, folder / "mimi" / part.stem)
    (folder / "mimi" / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the chunk files of csm-tiny; no cache, no network, no silentcipher."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "silentcipher", None)

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return copy_tiny(tmp_path / "root")


def spoken(root: Path, files: Path, **options: Any) -> tuple[Path, str]:
    """Speak with csm-tiny; return the WAV file and what is shown."""
    named = {"tokenizer": str(files / "tokenizer.json"), "codec": str(files / "mimi")}
    given: dict[str, Any] = (
        {"text": "Hi", "out": root / "hi.wav", "max_seconds": SECONDS} | named | options
    )
    shown = speak(Request(root, "csm-tiny"), **given)
    assert checked(as_json.render(shown, "speak"))["seconds"] >= 0
    return given["out"], str(shown)


def recording(path: Path, channels: int = 1, width: int = 2, rate: int = 24_000) -> Path:
    """Write a fifth of a second of a tone, sampled at `rate` Hz."""
    tone = torch.sin(torch.arange(rate // 5) * 2 * torch.pi * 440 / rate) * 2**13
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(
            b"".join(
                int(v).to_bytes(width, "little", signed=True) * channels
                for v in (tone if width == 2 else tone / 256)
            )
        )
    return path


def test_a_text_becomes_a_wav_file(
    root: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has so many frames of 80 ms at 24 kHz, mono, 16 bits; what is shown says so."""
    out, shown = spoken(root, files, out=root / "new" / "hi.wav")
    with wave.open(str(out)) as file:
        params, data = file.getparams(), file.readframes(SAMPLES + 1)

    assert params[:4] == (1, 2, 24_000, SAMPLES)
    assert len(data) == 2 * SAMPLES and any(data)
    assert [out] == list(out.parent.iterdir())
    assert f"{out}: 0.56 s, 24,000 Hz, mono, 16 bits\n" in shown
    assert "cut off by --max-seconds" in shown
    assert "no watermark" in shown and "pip install git+https://" in shown
    assert shown.endswith("OK: spoken with csm-tiny, speaker 0, seed 0")
    assert "speaking: at most 7 frames of 80 ms" in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["soundfile", "sox"])
def test_other_readers_read_it(root: Path, files: Path, reader: str) -> None:
    """soundfile and sox find the same rate, channel and length."""
    out, _ = spoken(root, files)
    if reader == "soundfile":
        pytest.importorskip("soundfile")
        samples, rate = importlib.import_module("soundfile").read(out)
        assert (rate, samples.shape) == (24_000, (SAMPLES,))
        return
    if not shutil.which("soxi"):
        pytest.skip("sox is not installed")
    told = [subprocess.check_output(["soxi", f"-{f}", out], text=True).strip() for f in "rcbs"]
    assert ["24000", "1", "16", str(SAMPLES)] == told


def test_the_same_seed_gives_the_same_bytes(root: Path, files: Path) -> None:
    """A second run with a seed replaces the file by an equal one; another seed gives another."""
    runs = [spoken(root, files, seed=seed)[0].read_bytes() for seed in (1, 2, 1)]

    assert runs[0] == runs[2]
    assert runs[0] != runs[1]


@pytest.mark.filterwarnings("ignore:the audio carries no watermark")
def test_the_file_has_what_the_generator_makes(root: Path, files: Path, tmp_path: Path) -> None:
    """Text, speaker, recordings and seed are the generator's, and the samples its audio."""
    said = [recording(tmp_path / "a.wav"), recording(tmp_path / "b.wav", rate=16_000)]
    words = ["ah", "oh"]
    context: dict[str, Any] = {"context": [str(one) for one in said], "context_text": words}
    out, _ = spoken(root, files, speaker=3, seed=5, **context)
    weights = sorted((root / EMBEDDED).rglob("model.safetensors.part-*"))
    manifest = load(root / "manifests" / "csm-tiny.toml")
    model = Model.from_local(weights, config=network_in(manifest))
    tokenizer = TextTokenizer.from_file(files / "tokenizer.json")
    generator = Generator(model, tokenizer, Mimi.from_local(files / "mimi"))
    segments = [Segment(3, w, read_wav(f, 24_000)) for w, f in zip(words, said, strict=True)]
    torch.manual_seed(5)
    audio = generator.generate("Hi", 3, segments, 560)

    assert wav_bytes(audio, 24_000) == out.read_bytes()
    assert spoken(root, files, speaker=3, seed=5)[0].read_bytes() != wav_bytes(audio, 24_000)


def test_samples_are_scaled_clipped_and_resampled(tmp_path: Path) -> None:
    """Samples come back as they were; those beyond 1 are clipped; 16 kHz becomes 24 kHz."""
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(torch.tensor([0.0, 0.5, -1.0, 1.5]), 24_000))
    back = read_wav(path, 24_000)
    torch.testing.assert_close(back, torch.tensor([0.0, 0.5, -1.0, 1.0]), atol=1e-4, rtol=0)
    again = read_wav(recording(tmp_path / "b.wav", rate=16_000), 24_000)
    direct = read_wav(recording(tmp_path / "c.wav"), 24_000)
    middle = slice(1000, 3800)
    torch.testing.assert_close(again[middle], direct[middle], atol=5e-3, rtol=0)


def test_a_watermark_is_said(root: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With silentcipher the audio is marked, and what is shown says it."""
    monkeypatch.setitem(sys.modules, "silentcipher", cipher := FakeCipher())
    plain, shown = spoken(root, files)

    assert cipher.encoded and "it carries Sesame's watermark" in shown
    assert "no watermark" not in shown
    assert plain.stat().st_size == 44 + 2 * SAMPLES


def test_installed_and_cached_files_are_found(root: Path, files: Path, tmp_path: Path) -> None:
    """A tokenizer beside the weights and Mimi in the Hub's cache need not be named."""
    named = spoken(root, files)[0].read_bytes()
    (root / "models" / "csm-tiny").mkdir(parents=True)
    shutil.copy(files / "tokenizer.json", root / "models" / "csm-tiny")
    snapshot = tmp_path / "hf" / "hub" / "models--kyutai--mimi" / "snapshots" / ("c" * 40)
    shutil.copytree(files / "mimi", snapshot)

    assert spoken(root, files, tokenizer="", codec="")[0].read_bytes() == named


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"text": " "}, UsageError, "no text"),
        ({"context": ["a.wav"]}, UsageError, "each --context"),
        ({"max_seconds": 0.07}, UsageError, "at least 0.08"),
        ({"max_seconds": float("nan")}, UsageError, "at least 0.08"),
        ({"max_seconds": 1e6}, UsageError, "Inputs too long"),
        ({"seed": -1}, UsageError, "--seed -1"),
        ({"seed": 2**63}, UsageError, "--seed"),
        ({"tokenizer": "none.json"}, MissingInput, r"none\.json"),
        ({"tokenizer": ""}, MissingInput, "inv weights --with speak --model csm-tiny"),
        ({"tokenizer": ""}, MissingInput, "--tokenizer FILE"),
        ({"codec": "none"}, MissingInput, "none/model.safetensors.*hf download kyutai/mimi"),
        ({"codec": ""}, MissingInput, "inv weights --with speak --model csm-tiny"),
        ({"codec": ""}, MissingInput, "--codec FOLDER"),
        ({"context": ["none.wav"], "context_text": ["a"]}, MissingInput, r"none\.wav"),
    ],
)
def test_what_cannot_be_spoken_is_refused(
    root: Path, files: Path, options: dict[str, Any], error: type[CsmWeightsError], said: str
) -> None:
    """Options that make no sense and files that are not there are named, and nothing is written."""
    with pytest.raises(error, match=said):
        spoken(root, files, **options)

    assert not (root / "hi.wav").exists()


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ({"channels": 2}, "2 channels, 16 bits"),
        ({"width": 3}, "1 channels, 24 bits"),
        (None, "RIFF"),
        (0, "ends too early"),
        (30, "ends too early|fmt chunk"),
        (44, "0 samples|1 channels"),
    ],
)
def test_a_recording_that_is_no_mono_wav_is_refused(
    root: Path, files: Path, tmp_path: Path, kind: Any, found: str
) -> None:
    """Stereo, other widths, other files and cut off ones: the finding has the way to convert."""
    path = recording(tmp_path / "a.wav", **(kind if isinstance(kind, dict) else {}))
    if not isinstance(kind, dict):
        path.write_bytes(b"no recording" if kind is None else path.read_bytes()[:kind])
    with pytest.raises(WrongContent, match=rf"a\.wav: malformed.*({found}).*ffmpeg -i"):
        spoken(root, files, context=[str(path)], context_text=["a"])


def test_a_folder_that_takes_no_file_is_refused(root: Path, files: Path, tmp_path: Path) -> None:
    """A folder without permission, and a folder of the file's name, are said before the work."""
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    with unprivileged(), pytest.raises(NoSpace, match=r"no permission.*another --out"):
        spoken(root, files, out=closed / "hi.wav")
    with pytest.raises(NoSpace, match=r"a folder of that name.*another --out"):
        spoken(root, files, out=closed)


def test_a_full_disk_leaves_the_file_of_before(
    root: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is replaced by a whole one or not at all."""
    (root / "hi.wav").write_text("before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match="no space"):
        spoken(root, files)

    assert (root / "hi.wav").read_text() == "before"


def test_weights_that_are_wrong_or_not_there_are_refused(root: Path, files: Path) -> None:
    """A damaged chunk file is found while it is loaded; without any the command is named."""
    part = next((root / EMBEDDED).rglob("model.safetensors.part-ac"))
    flip(part)
    with pytest.raises(WrongContent, match="wrong digest"):
        spoken(root, files)
    shutil.rmtree(root / EMBEDDED)
    with pytest.raises(MissingInput, match="inv weights --model csm-tiny"):
        spoken(root, files)


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_a_missing_extra_is_named(
    root: Path, files: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Without a package of the extra `speak` there is the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingInput, match=rf"{package}: not installed.*\[speak\]"):
        spoken(root, files)

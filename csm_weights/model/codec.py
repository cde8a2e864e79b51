"""Audio to codes and back, with Mimi from files on this machine; nothing here asks a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent
from csm_weights.model.offline_assets import (
    BRING,
    CODEC_FILES,
    CODEC_REPO,
    codec_folder,
    not_installed,
)


class Codec(Protocol):
    """Turns audio into codes and back; `sample_rate` in Hz, `codebooks` K."""

    sample_rate: int
    codebooks: int

    def encode(self, audio: Tensor) -> Tensor:
        """Return the codes (K, T) of mono audio (samples,)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return mono audio (samples,) of codes (K, T)."""


class Mimi:
    """transformers' Mimi, for one recording of mono audio at a time, in float32.

    `model` is a MimiModel; `codebooks` is how many of its codebooks are used.
    Raises WrongContent where it has fewer.
    """

    def __init__(self, model: Any, codebooks: int = 32, device: str | torch.device = "cpu") -> None:
        config = model.config
        self.sample_rate = int(config.sampling_rate)
        self.codebooks = codebooks
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        if config.num_quantizers < codebooks:
            words = (f"{codebooks} codebooks, as the model has", f"{config.num_quantizers}")
            finding = Finding(Kind.MALFORMED, "the codec", *words)
            raise WrongContent("the codec does not fit the model", [finding])

    @classmethod
    def from_local(
        cls, folder: Path | str, codebooks: int = 32, device: str | torch.device = "cpu"
    ) -> Mimi:
        """Read config.json and model.safetensors of a folder; no tensor may be missing.

        Raises MissingInput without the files or transformers, WrongContent.
        """
        files = [Path(folder) / name for name in CODEC_FILES]
        if absent := [file for file in files if not file.is_file()]:
            mend = f"hf download {CODEC_REPO}"
            findings = [Finding.missing(file, "a file of Mimi", mend) for file in absent]
            raise MissingInput("the codec is not there", findings)
        try:
            from safetensors import SafetensorError
            from transformers import MimiModel
        except ImportError:
            raise not_installed("transformers", "runs the audio codec") from None
        try:
            model, report = MimiModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            # transformers fills tensors that a file lacks with random numbers
            for key in ("missing_keys", "mismatched_keys"):
                if report.get(key):
                    names = ", ".join(sorted(map(str, report[key]))[:3])
                    raise ValueError(f"{key.replace('_', ' ')}: {names}")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            found, command = str(error)[:300], f"hf download {CODEC_REPO} --force-download"
            words = ("Mimi for transformers, whole", found, command)
            finding = Finding(Kind.MALFORMED, str(folder), *words)
            raise WrongContent("the codec cannot be used", [finding]) from None
        return cls(model, codebooks, device)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Return the codes (K, T) of mono audio (samples,)."""
        if audio.ndim != 1 or not audio.numel():
            raise UsageError(f"audio is (samples,), mono; this is {tuple(audio.shape)}")
        batch = audio.to(self._model.device, torch.float32)[None, None]
        codes: Tensor = self._model.encode(batch, num_quantizers=self.codebooks).audio_codes
        return codes[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return mono audio (samples,) of codes (K, T); raises UsageError for unknown codes."""
        require_below(codes, self._model.config.codebook_size, "codes", "the codec")
        audio: Tensor = self._model.decode(codes[None].to(self._model.device)).audio_values
        return audio[0, 0]


def require_below(values: Tensor, count: int, what: str, whose: str) -> None:
    """Raise UsageError for values out of range, which would end a GPU's process."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
        low, high = int(values.min()), int(values.max())
        raise UsageError(f"{what} {low} to {high}; {whose} has 0 to {count - 1}")


def find_codec(
    codebooks: int, device: torch.device, folder: Path | None = None, command: str = BRING
) -> Mimi:
    """Find Mimi in a folder where it is installed, or in the Hub's cache.

    Raises MissingInput, with the command that brings it verified, where it is not.
    """
    if found := codec_folder(folder):
        return Mimi.from_local(found, codebooks, device)
    where = f"{CODEC_REPO} in {HubEnvironment.read().cache}"
    finding = Finding(Kind.MISSING, where, " and ".join(CODEC_FILES), "not both", command)
    advice = (
        f"Or: hf download {CODEC_REPO}\n"
        "inv speak takes one by --codec FOLDER; a program gets the codes by generate_frames."
    )
    raise MissingInput(
        "audio needs the codec Mimi, which is not on this machine", [finding], advice
    )

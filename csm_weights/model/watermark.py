"""The watermark that Sesame's generator puts into its audio, where silentcipher is installed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from csm_weights.model.offline_assets import snapshots

#: The key of all audio that the published CSM-1B code makes; it is public.
#: Source: Sesame's repository, watermarking.py.
CSM_KEY = (212, 211, 146, 56, 201)

#: Hz at which the watermark is embedded, and silentcipher's word for that model.
RATE, MODEL = 44_100, "44.1k"

#: Decibels by which the watermark is softer than the audio; Sesame's figure.
SDR = 36

#: The repository of silentcipher's weights, and the folder of those for 44.1 kHz.
REPO, FOLDER = "sony/silentcipher", "44_1_khz/73999_iteration"

#: Seconds of silence that a resampled signal is given on either side.
MARGIN = 0.1


@torch.no_grad()
def mark(watermarker: Any, audio: Tensor, sample_rate: int) -> tuple[Tensor, bool]:
    """Return audio (samples,) of the same rate and length, and True where it is watermarked.

    `watermarker` is silentcipher's model. Silence, and empty audio, can carry no watermark.
    """
    if not audio.any():
        return audio, False
    upsampled = resample(audio.float(), sample_rate, RATE)
    key = list(CSM_KEY)
    marked, *_ = watermarker.encode_wav(upsampled, RATE, key, calc_sdr=False, message_sdr=SDR)
    marked = torch.as_tensor(marked, dtype=torch.float32, device=audio.device)
    downsampled = resample(marked, RATE, sample_rate)[: len(audio)]
    return torch.nn.functional.pad(downsampled, (0, len(audio) - len(downsampled))), True


def find_watermarker(device: torch.device) -> Any:
    """Load silentcipher's model where it is installed; else return None, with a warning.

    Its weights are taken from the Hub's cache; where they are not there,
    silentcipher downloads them itself, as it does for Sesame's generator.
    """
    try:
        import silentcipher
    except ImportError as error:
        install = "pip install git+https://github.com/SesameAILabs/silentcipher installs it"
        warnings.warn(f"the audio carries no watermark: {error}; {install}", stacklevel=2)
        return None
    settings = f"{FOLDER}/hparams.yaml"
    home, options = next(snapshots(REPO, (settings,)), None), {}
    if home:
        options = {"ckpt_path": str(home / FOLDER), "config_path": str(home / settings)}
    return silentcipher.get_model(model_type=MODEL, device=str(device), **options)


def resample(audio: Tensor, rate: int, wanted: int) -> Tensor:
    """Resample audio (samples,) from `rate` to `wanted` Hz, limited to the band that both have.

    Exact for a signal within that band that begins and ends in silence.
    """
    if rate == wanted:
        return audio
    common = math.gcd(rate, wanted)
    old, new = rate // common, wanted // common
    margin = old * math.ceil(MARGIN * rate / old)
    padding = (margin, margin + -len(audio) % old)
    padded = torch.nn.functional.pad(audio, padding)
    size = len(padded) // old * new
    spectrum = torch.fft.rfft(padded)[: size // 2 + 1]
    scaled: Tensor = torch.fft.irfft(spectrum, n=size) * (new / old)
    start = margin // old * new
    return scaled[start : start + math.ceil(len(audio) * new / old)]

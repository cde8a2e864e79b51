"""Audio in WAV files, mono, 16 bits: written from tensors, and read as context."""

import array
import io
import wave
from pathlib import Path

import torch
from torch import Tensor

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.files import read_file
from csm_weights.model.watermark import resample

#: Most bytes read of a recording: the model's positions have room for less than 8 MB at 24 kHz.
MAX_RECORDING = 64 << 20


def read_wav(path: Path, rate: int) -> Tensor:
    """Return the samples (samples,) of a mono WAV file of 16 bits, resampled to `rate` Hz.

    Raises MissingInput, and WrongContent for anything but such a file.
    """
    data = read_file(path, MAX_RECORDING, "a recording")
    try:
        with wave.Wave_read(io.BytesIO(data)) as file:
            channels, width, own, frames, *_ = file.getparams()
            found = f"{channels} channels, {8 * width} bits, {own} Hz, {frames:,} samples"
            samples = array.array(
                "h", file.readframes(frames) if (channels, width) == (1, 2) else b""
            )
    except (wave.Error, EOFError, ValueError) as error:
        found, samples, own = str(error) or "a file that ends too early", array.array("h"), 0
    if not samples or own <= 0:
        mend = f"ffmpeg -i RECORDING -ac 1 -ar {rate} -c:a pcm_s16le NEW.wav converts a recording"
        finding = Finding(Kind.MALFORMED, str(path), "a WAV file, mono, 16 bits", found, mend)
        raise WrongContent("the recording cannot be used", [finding])
    return resample(torch.tensor(samples, dtype=torch.float32) / 2**15, own, rate)


def wav_bytes(audio: Tensor, rate: int) -> bytes:
    """Return audio (samples,), from -1 to 1, as the bytes of a mono WAV file of 16 bits."""
    samples = (audio.float().clamp(-1, 1) * (2**15 - 1)).round().int().tolist()
    data = io.BytesIO()
    with wave.Wave_write(data) as file:
        file.setparams((1, 2, rate, len(samples), "NONE", ""))
        file.writeframes(array.array("h", samples).tobytes())
    return data.getvalue()

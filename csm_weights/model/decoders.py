"""Decoders of one voice: the fast paths, the reference, and which one a generator takes.

On a GPU a fast path is taken once `inv smoke` has checked it there: with this
card, driver, torch and dtype. Until then the readable reference speaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_weights.errors import UsageError
from csm_weights.files import read_bounded
from csm_weights.model.csm import Model, Sampler, make_sampler
from csm_weights.model.fast_decoder import Decoder
from csm_weights.model.path_checks import FAST_PATHS
from csm_weights.model.smoke_report import path_report_path, read_report


class FrameDecoder(Protocol):
    """A decoder of sequences, one after the other; see `fast_decoder.Decoder`."""

    @property
    def logits(self) -> Tensor:
        """The logits (1, K, V) of the last frame."""

    def start(
        self, tokens: Tensor, tokens_mask: Tensor, temperature: float = 0.9, topk: int = 50
    ) -> Tensor:
        """Begin a new sequence; return the codes (1, K) of the first frame after a prompt."""

    def step(self) -> Tensor:
        """Return the codes (1, K) of the next frame."""


class EagerDecoder:
    """The reference as a `FrameDecoder`; it uses the caches of the model itself."""

    def __init__(self, model: Model) -> None:
        self._model, self._length = model, 0
        self._sampler: Sampler | None = None
        self._codes, self._logits = Tensor(), Tensor()

    @property
    def logits(self) -> Tensor:
        """See `FrameDecoder`."""
        return self._logits

    def start(
        self, tokens: Tensor, tokens_mask: Tensor, temperature: float = 0.9, topk: int = 50
    ) -> Tensor:
        """See `FrameDecoder`; raises as `Model.generate_frame`."""
        self._sampler = make_sampler(temperature, topk)
        self._model.setup_caches(1)
        self._length = 0
        return self._read(tokens, tokens_mask)

    def step(self) -> Tensor:
        """See `FrameDecoder`."""
        tokens = F.pad(self._codes, (0, 1))[:, None]
        tokens_mask = torch.ones_like(tokens, dtype=torch.bool)
        tokens_mask[..., -1] = False
        return self._read(tokens, tokens_mask)

    def _read(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
        if self._sampler is None:
            raise UsageError("there is no sequence to go on with: start one with a prompt")
        S = tokens.shape[1]
        input_pos = torch.arange(self._length, self._length + S, device=tokens.device)[None]
        frame = self._model.generate_logits(tokens, tokens_mask, input_pos, self._sampler)
        (self._codes, self._logits), self._length = frame, self._length + S
        return self._codes


@dataclass(frozen=True)
class DecodingPath:
    """The way that a generator decodes: its name, and why it is this one."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def names_of(device: torch.device) -> tuple[str, ...]:
    """Return the paths of a device, the fastest first; "eager" is the reference."""
    return (*(FAST_PATHS if device.type == "cuda" else ("steps",)), "eager")


def open_decoder(model: Model, name: str) -> FrameDecoder:
    """Return a decoder of the path `name`.

    Raises UsageError for one that the device or the network has not, or without Triton.
    """
    device = model.projection.weight.device
    _require_path(name, device)
    if name == "eager":
        return EagerDecoder(model)
    if name == "fused":
        from csm_weights.model.fused_decoder import FusedDecoder

        return FusedDecoder(model)
    return Decoder(model)


def _require_path(name: str, device: torch.device) -> None:
    if name not in (names := names_of(device)):
        raise UsageError(f"no path {name!r} on {device}; there are {', '.join(names)}")


def choose_path(model: Model, fast: str | None) -> DecodingPath:
    """Return the path to decode a model by: `fast` where given, else the fastest that may be.

    On a GPU that is the first that the smoke test of the model in this folder
    found right, with this card, driver, torch and dtype. Raises UsageError for
    a name that the device has not.
    """
    weight = model.projection.weight
    if fast is not None:
        _require_path(fast, weight.device)
        return DecodingPath(fast, "as asked for")
    if weight.device.type != "cuda":
        return DecodingPath(names_of(weight.device)[0], "the fast path of the CPU")
    report = None
    if model.folder is not None:
        report = read_report(path_of_report(model.folder, weight.device, weight.dtype))
    if report is None:
        why = "no fast path was checked here with this card, driver, torch and dtype"
        return DecodingPath("eager", f"{why}; inv smoke checks them")
    failed = [f"{check.name}: {check.found}" for check in report.paths if not check.ok]
    name = next((check.name for check in report.paths if check.ok), "eager")
    return DecodingPath(name, "; ".join([f"checked at {report.made_at}", *failed]))


def path_of_report(folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """Return where the smoke test of this card, driver, torch and dtype is kept."""
    machine, driver = describe_device(device)
    return path_report_path(
        folder, machine, driver, torch.__version__, str(dtype).removeprefix("torch.")
    )


def describe_device(device: torch.device) -> tuple[str, str]:
    """Return the name of a device, and its driver's version, "-" for a CPU."""
    if device.type == "cuda":
        pattern = r"Module\s+(?:for \S+\s+)?([0-9.]+)"
        found = _first("/proc/driver/nvidia/version", pattern)
        return torch.cuda.get_device_name(device), found or "unknown"
    return _first("/proc/cpuinfo", r"model name\s*:\s*(.+)") or "CPU", "-"


def _first(path: str, pattern: str) -> str | None:
    """Return the first match of the pattern's group in a small text file."""
    try:
        match = re.search(pattern, read_bounded(Path(path), 64 << 10).decode(errors="replace"))
    except OSError:
        return None
    return match[1].strip() if match else None

"""The two readers of weight files, by a path."""

from __future__ import annotations

from pathlib import Path

from csm_weights.formats.tensor_index import TensorIndex
from csm_weights.formats.weights_file import open_weights


def read_safetensors(path: Path) -> TensorIndex:
    with open_weights([path], "safetensors") as weights:
        return weights.index


def read_checkpoint(path: Path) -> TensorIndex:
    with open_weights([path], "torch-zip") as weights:
        return weights.index

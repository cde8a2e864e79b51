"""model.safetensors of a stand-in: the header, and where each tensor's bytes go."""

from __future__ import annotations

import json
import math
import struct
from typing import BinaryIO

from csm_weights.formats.architecture import CsmConfig
from tools.standin.values import ITEM, SPARE


def safetensors_layout(config: CsmConfig) -> tuple[bytes, dict[str, int], int]:
    """Return the header, the byte offset of each tensor, and the size of the file."""
    header, begins = {}, {}
    end = 0
    for name, shape in config.tensor_shapes().items():
        begin, end = end, end + math.prod(shape) * ITEM
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
        begins[name] = begin
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in begins.items()}
    return struct.pack("<Q", len(text)) + text, offsets, start + end


class SafetensorsWriter:
    """A model.safetensors under way: blocks in any order."""

    def __init__(self, file: BinaryIO, config: CsmConfig, _seed: int) -> None:
        header, self.offsets, _ = safetensors_layout(config)
        self.file = file
        self.file.write(header)

    def write(self, name: str, at: int, block: memoryview) -> int:
        if name == SPARE:
            return 0
        self.file.seek(self.offsets[name] + at)
        return self.file.write(block)

    def finish(self) -> None:
        pass

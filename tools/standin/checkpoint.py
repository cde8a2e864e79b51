"""ckpt.pt of a stand-in: the archive as torch 2.4 and 2.5 wrote it, without torch."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from hashlib import shake_128
from typing import BinaryIO

from csm_weights.formats.architecture import CsmConfig
from csm_weights.formats.torch_writer import (
    CONTENTS,
    ArchiveRecord,
    Stored,
    directory,
    layout_records,
    pickle_state_dict,
)
from tools.standin.values import HEAD, ITEM, SPARE

#: The folder inside the archive: torch takes the stem of the path saved to. Five
#: characters give the published size.
FOLDER = "model"

#: The order of a module's state dict, which numbers the storages.
_PARTS = (
    "backbone.layers",
    "backbone.norm",
    "decoder.layers",
    "decoder.norm",
    "text_embeddings",
    "audio_embeddings",
    "projection",
    "codebook0_head",
    "audio_head",
)
_LAYER_PARTS = (
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.output_proj",
    "mlp.w1",
    "mlp.w2",
    "mlp.w3",
    "sa_norm",
    "mlp_norm",
)


def _module_order(name: str) -> tuple[int, int, int]:
    """Return a sort key that puts tensor names in the order of `_PARTS`."""
    part = next(index for index, start in enumerate(_PARTS) if name.startswith(start))
    layer, _, rest = name.partition(".layers.")[2].partition(".")
    within = (index for index, start in enumerate(_LAYER_PARTS) if rest.startswith(start))
    return part, int(layer or 0), next(within, 0)


@dataclass(frozen=True)
class CheckpointLayout:
    """All records in file order, the bytes of the small ones, and where each tensor goes.

    `tensors` maps a tensor, or the spare codebook, to its record and its byte
    offset in there.
    """

    records: dict[str, ArchiveRecord]
    contents: dict[str, bytes]
    tensors: dict[str, tuple[str, int]]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        ends = directory([(record, 0) for record in self.records.values()])
        return max(record.end for record in self.records.values()) + len(ends)


def checkpoint_layout(config: CsmConfig, seed: int) -> CheckpointLayout:
    """Return the layout of torch 2.4 and 2.5 in March 2025, which gives the published size.

    They sorted the storages by their number as text (0, 1, 10, 100, ...), and
    knew neither `.format_version` nor `.storage_alignment`.
    """
    shapes = config.tensor_shapes()
    names = sorted(shapes, key=_module_order)
    storages = {f"data/{index}": name for index, name in enumerate(names)}
    per_book = math.prod(shapes[HEAD][1:])
    stored = {name: Stored("F32", shapes[name]) for name in names}
    stored[HEAD] = Stored("F32", shapes[HEAD], per_book, per_book * (shapes[HEAD][0] + 1))
    # torch identifies the content here; any 40 digits do
    identity = int.from_bytes(shake_128(f"{seed}".encode()).digest(16), "big")
    contents = {
        "data.pkl": pickle_state_dict(stored),
        **CONTENTS,
        ".data/serialization_id": f"{identity:040d}".encode(),
    }
    spare = per_book * ITEM
    sizes = {name: len(content) for name, content in contents.items()}
    sizes |= {key: stored[name].nbytes for key, name in storages.items()}
    order = ["data.pkl", "byteorder", *sorted(storages), "version", ".data/serialization_id"]
    records = layout_records(FOLDER, {name: sizes[name] for name in order})
    tensors = {name: (key, spare if name == HEAD else 0) for key, name in storages.items()}
    tensors[SPARE] = (tensors[HEAD][0], 0)
    return CheckpointLayout(records, contents, tensors)


class CheckpointWriter:
    """A ckpt.pt under way: blocks in any order, then headers and the directory."""

    def __init__(self, file: BinaryIO, config: CsmConfig, seed: int) -> None:
        self.layout = checkpoint_layout(config, seed)
        self.file = file
        self.crcs = dict.fromkeys(self.layout.records, 0)

    def write(self, name: str, at: int, block: memoryview) -> int:
        record, offset = self.layout.tensors[name]
        self.crcs[record] = zlib.crc32(block, self.crcs[record])
        self.file.seek(self.layout.records[record].data + offset + at)
        return self.file.write(block)

    def finish(self) -> None:
        for name, content in self.layout.contents.items():
            self.crcs[name] = zlib.crc32(content)
        for name, record in self.layout.records.items():
            self.file.seek(record.header)
            self.file.write(record.local + self.layout.contents.get(name, b""))
            self.file.seek(record.data + record.size)
            self.file.write(record.descriptor(self.crcs[name]))
        ends = [(record, self.crcs[name]) for name, record in self.layout.records.items()]
        self.file.seek(max(record.end for record, _ in ends))
        self.file.write(directory(ends))

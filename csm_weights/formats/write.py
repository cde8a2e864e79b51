"""Write weights: the bytes of a safetensors file or a torch checkpoint, in the order of the file.

Nothing is written here: a file is its size and its blocks, so that whoever
writes them can hash and compare them on the way. The same tensors give the same
bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from csm_weights.formats.dtypes import FLOATS, converted
from csm_weights.formats.strided import read_elements
from csm_weights.formats.tensor_index import ITEM_BITS
from csm_weights.formats.torch_writer import CONTENTS, Stored, archive, pickle_state_dict
from csm_weights.formats.transformers_layout import NamedTensor

#: Bytes of a block.
BLOCK = 1 << 20

#: The folder inside a torch checkpoint.
FOLDER = "model"


class NewFile(NamedTuple):
    """A file to be written: its size in bytes, and its blocks in order, once."""

    size: int
    blocks: Iterator[bytes | bytearray]


def safetensors_file(
    tensors: Mapping[str, NamedTensor], dtype: str | None, metadata: Mapping[str, str]
) -> NewFile:
    """Return a safetensors file as its own library writes it.

    `dtype` is what floats become, one of safetensors' words, None to keep each
    tensor's. Tensors are sorted: those of wider dtypes first, then by name.
    """
    kinds = {name: _kind(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ITEM_BITS[kinds[name]], name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        begin, shape = end, tensors[name].shape
        end += math.prod(shape) * ITEM_BITS[kinds[name]] // 8
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[bytes | bytearray]:
        yield struct.pack("<Q", len(text)) + text
        for name in order:
            yield from elements(tensors[name], kinds[name])

    return NewFile(8 + len(text) + end, blocks())


def torch_file(tensors: Mapping[str, NamedTensor], dtype: str | None) -> NewFile:
    """Return a torch checkpoint, a plain state dict, as torch 2.5 saves it; `dtype` as above."""
    kinds = {name: _kind(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors)
    stored = {name: Stored(kinds[name], tensors[name].shape) for name in order}
    whole = {"data.pkl": pickle_state_dict(stored), **CONTENTS}
    contents: dict[str, tuple[int, Iterator[bytes | bytearray]]] = {
        name: (len(content), iter([content])) for name, content in whole.items()
    }
    for index, name in enumerate(order):
        data = elements(tensors[name], kinds[name])
        contents[f"data/{index}"] = (stored[name].nbytes, data)
    return NewFile(*archive(FOLDER, contents))


def nbytes_as(tensor: NamedTensor, dtype: str | None) -> int:
    """Return how many bytes the elements of a tensor take in a file of that dtype."""
    return math.prod(tensor.shape) * ITEM_BITS[_kind(tensor, dtype)] // 8


def _kind(tensor: NamedTensor, dtype: str | None) -> str:
    return dtype if dtype and tensor.dtype in FLOATS.values() else tensor.dtype


def elements(tensor: NamedTensor, dtype: str) -> Iterator[bytearray]:
    """Yield the elements of a tensor in row-major order, converted to a dtype, by blocks.

    A block is overwritten by the next one.
    """
    item, total = tensor.info.itemsize, math.prod(tensor.info.shape)
    step = tensor.block_elements(BLOCK)
    raw = bytearray(min(step, total) * item)
    for start in range(0, total, step):
        if start + step > total:
            raw = bytearray((total - start) * item)
        read_elements(tensor.source, tensor.info, start, raw)
        yield converted(raw, tensor.dtype, dtype)

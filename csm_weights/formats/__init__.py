"""Weight files read as data: where each tensor lies, and whether two files are the same model.

Promises: a file of any content is read or refused, in bounded time and
memory; every format gives the same `TensorIndex`. Never: executes a pickle,
extracts an archive, imports torch, or writes.

    from csm_weights.formats.weights_file import open_weights

    with open_weights(["models/csm-1b/ckpt.pt"]) as weights:
        for info in weights.index.tensors.values():
            print(info.name, info.dtype, info.shape, info.offset)

This module is the registry. A further format is one new module with a
`FORMAT`, one entry in `FORMATS`, and a line of `WEIGHT_FORMATS` in
`manifest/types.py`.
"""

from __future__ import annotations

from csm_weights.formats import safetensors, torch_checkpoint
from csm_weights.formats.tensor_index import Format

#: The weight formats, in the order in which a folder's files are preferred.
FORMATS: tuple[Format, ...] = (safetensors.FORMAT, torch_checkpoint.FORMAT)


def format_named(name: str) -> Format:
    """Return the format that a manifest calls `name`; raises KeyError for another word."""
    return {one.name: one for one in FORMATS}[name]


def sniff(head: bytes, name: str = "") -> Format | None:
    """Return the format of a file by its first bytes, or else by the ending of its name, if any."""
    by_name = (one for one in FORMATS if name.endswith(one.suffixes))
    return next((one for one in FORMATS if one.sniff(head)), next(by_name, None))

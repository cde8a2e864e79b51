"""The safetensors format: a JSON header that names byte ranges, then the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from csm_weights.formats.multipart import MultipartFile, read_at
from csm_weights.formats.tensor_index import (
    ITEM_SIZES,
    MAX_DIMS,
    Findings,
    Format,
    TensorIndex,
    TensorInfo,
    reading,
    row_major,
)
from csm_weights.untrusted import Malformed, are_sizes, is_text, show

#: Ceiling of a header, bytes. The format allows 100 MB, but JSON grows about
#: twentyfold in memory; CSM-1B's header is 20,576 bytes.
MAX_HEADER = 1 << 20


def read_safetensors(path: Path | str | MultipartFile) -> TensorIndex:
    """Read the header of a safetensors file, or of one that lies in parts.

    Raises MissingInput when there is no such file, and WrongContent when it
    breaks a rule of the format: a header that is not JSON, a shape that does
    not fit its bytes, bytes that belong to no tensor or to two.
    """
    tensors = {}
    with reading(path, "safetensors") as (file, size, found):
        length = _header_length(file, size)
        for name, entry in _parse_header(read_at(file, 8, length)).items():
            with found.collecting(show(name)):
                tensors[name] = _read_entry(name, entry, 8 + length)
        if not found.count:
            _check_tiling(tensors, 8 + length, size, found)
    return TensorIndex(tensors, size)


FORMAT = Format(
    name="safetensors",
    choice="safetensors",
    filename="model.safetensors",
    suffixes=(".safetensors",),
    sniff=lambda head: head[8:9] == b"{",
    read_index=read_safetensors,
)


def _header_length(file: MultipartFile, size: int) -> int:
    if size < 8:
        raise Malformed("8 bytes of header length", f"a file of {size} bytes")
    length = int.from_bytes(read_at(file, 0, 8), "little")
    ceiling = min(MAX_HEADER, size - 8)
    if not 2 <= length <= ceiling:
        raise Malformed(f"2 to {ceiling} bytes", f"{length}", "header length")
    return length


def _parse_header(text: bytes) -> dict[str, Any]:
    """Return the header without `__metadata__`, which must be text to text."""
    if not text.startswith(b"{"):
        raise Malformed("a header that starts with '{'", show(text[:16]), "header")
    try:
        header: dict[str, Any] = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON", show(f"{type(error).__name__}: {error}"), "header") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(is_text, metadata.values())):
        raise Malformed("text to text", "something else", "header: __metadata__")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in pairs:
        if not is_text(key) or key in items:
            raise ValueError(f"the name {show(key)} twice, or not UTF-8")
        items[key] = value
    return items


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _read_entry(name: str, entry: Any, start: int) -> TensorInfo:
    """Read one tensor of a header whose data begin at byte `start` of the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed("dtype, shape and data_offsets", "something else")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEM_SIZES:
        raise Malformed("a known dtype", show(dtype))
    if not are_sizes(shape) or len(shape) > MAX_DIMS:
        raise Malformed(f"a shape of at most {MAX_DIMS} sizes", "something else")
    if not are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise Malformed("data_offsets [begin, end]", "something else")
    info = TensorInfo(name, dtype, tuple(shape), start + span[0], row_major(tuple(shape)))
    if info.nbytes != span[1] - span[0]:
        expected = f"{info.nbytes} bytes for {info.signature}"
        raise Malformed(expected, f"{span[1] - span[0]} bytes")
    return info


def _check_tiling(tensors: dict[str, TensorInfo], start: int, size: int, found: Findings) -> None:
    """Check that the tensors cover `[start, size)` of the file with no hole and no overlap."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "a hole" if info.offset > end else "an overlap"
            text = f"{what}: from byte {info.offset}"
            found.add(Malformed(f"data from byte {end}", text, show(info.name)))
        end = max(end, info.offset + info.nbytes)
    if end != size:
        found.add(Malformed(f"data up to the end, byte {size}", f"up to byte {end}", "data"))

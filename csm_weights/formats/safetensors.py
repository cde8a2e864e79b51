"""The safetensors format: a JSON header that names byte ranges, then the data."""

from __future__ import annotations

import heapq
import math
from typing import Any

from csm_weights.errors import Kind
from csm_weights.formats.json_stream import JsonStream
from csm_weights.formats.multipart import MultipartFile, read_at
from csm_weights.formats.tensor_index import (
    ITEM_BITS,
    MAX_DIMS,
    MAX_INDEX,
    Findings,
    Format,
    TensorIndex,
    TensorInfo,
    index_cost,
    reading,
    row_major,
)
from csm_weights.untrusted import Malformed, Unsupported, are_sizes, show

#: Ceiling of a header, bytes: the format's own. CSM-1B's is 20,576 bytes.
MAX_HEADER = 100_000_000


def read_safetensors(file: MultipartFile) -> TensorIndex:
    """Read the header of a safetensors file.

    Raises WrongContent when it breaks a rule of the format: a header that is
    not JSON, a shape that does not fit its bytes, bytes that belong to no
    tensor or to two.
    """
    tensors: dict[str, TensorInfo] = {}
    unread: list[tuple[int, int, str]] = []
    size = file.size
    with reading(file, "safetensors") as found:
        if size < 8:
            raise Malformed("8 bytes of header length", f"a file of {size} bytes")
        length, ceiling = int.from_bytes(read_at(file, 0, 8), "little"), min(MAX_HEADER, size - 8)
        if not 2 <= length <= ceiling:
            raise Malformed(f"2 to {ceiling} bytes", f"{length}", "header length")
        try:
            _read_header(file, 8 + length, tensors, unread, found)
        except (ValueError, RecursionError) as error:
            raise Malformed("JSON", show(f"{type(error).__name__}: {error}"), "header") from None
        if found.kind is Kind.UNSUPPORTED:  # nothing is malformed so far
            # they must cover the rest of the file with no hole and no overlap
            end = 8 + length
            known = sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes))
            places = ((info.offset, info.offset + info.nbytes, info.name) for info in known)
            for begin, after, name in heapq.merge(places, sorted(unread)):
                if begin != end:
                    what = "a hole" if begin > end else "an overlap"
                    words = f"data from byte {end}", f"{what}: from byte {begin}"
                    found.add(Malformed(*words, show(name)))
                end = max(end, after)
            if end != size:
                words = f"data up to the end, byte {size}", f"up to byte {end}"
                found.add(Malformed(*words, "data"))
    return TensorIndex(tensors, size)


FORMAT = Format(
    name="safetensors",
    choice="safetensors",
    filename="model.safetensors",
    suffixes=(".safetensors",),
    sniff=lambda head: head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER,
    read_index=read_safetensors,
)


def _read_header(
    file: MultipartFile,
    start: int,
    tensors: dict[str, TensorInfo],
    unread: list[tuple[int, int, str]],
    found: Findings,
) -> None:
    """Read the tensors of a header; it ends at byte `start`, where their data begin.

    `unread` gets the first byte, the end and the name of each that is not supported.
    """
    stream = JsonStream(lambda at, size: file.read(8 + at, min(size, start - 8 - at)))
    if (head := file.read(8, 1)) != b"{":
        raise Malformed("a header that starts with '{'", show(head), "header")
    names: set[str] = set()
    room = MAX_INDEX
    for name in stream.read_keys():
        if name in names:
            raise ValueError(f"the name {show(name)} twice")
        if name == "__metadata__":
            try:
                stream.skip_texts()
            except ValueError as error:
                raise Malformed("text to text", show(str(error)), "header: __metadata__") from None
            continue
        names.add(name)
        entry = stream.read_value()
        with found.collecting(show(name)):
            tensors[name] = _read_entry(name, entry, start, unread)
        room -= index_cost(name, len(tensors[name].shape) if name in tensors else 0)
        if room < 0:
            raise Unsupported("an index of about 100,000 tensors", "a larger one", "header")
    stream.finish()


def _read_entry(
    name: str, entry: Any, start: int, unread: list[tuple[int, int, str]]
) -> TensorInfo:
    """Read one tensor of a header whose data begin at byte `start` of the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed("dtype, shape and data_offsets", "something else")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str:
        raise Malformed("a known dtype", show(dtype))
    if not are_sizes(shape):
        raise Malformed("a shape of whole numbers", "something else")
    if not are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise Malformed("data_offsets [begin, end]", "something else")
    if dtype not in ITEM_BITS:  # of a later safetensors: the size of an element is not known
        unread.append((start + span[0], start + span[1], name))
        raise Unsupported("a known dtype", show(dtype))
    if len(shape) > MAX_DIMS:
        unread.append((start + span[0], start + span[1], name))
        raise Unsupported(f"at most {MAX_DIMS} dimensions", f"{len(shape)}")
    info = TensorInfo(name, dtype, tuple(shape), start + span[0], row_major(tuple(shape)))
    if math.prod(shape) * ITEM_BITS[dtype] != 8 * (span[1] - span[0]):
        expected = f"{info.nbytes} bytes for {info.signature}"
        raise Malformed(expected, f"{span[1] - span[0]} bytes")
    return info

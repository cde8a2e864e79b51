"""The two weight formats read as data: names, dtypes, shapes, byte ranges.

Nothing here loads a tensor, imports torch or runs a pickle. Both readers are
bounded in time and memory by stated ceilings, whatever the file holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from csm_weights.errors import Finding, Kind, error_for
from csm_weights.formats.architecture import CsmConfig
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.torch_pickle import MAX_DIMS, MAX_PICKLE, View, read_state_dict
from csm_weights.formats.torch_zip import Record, read_at, read_content, read_records
from csm_weights.untrusted import Malformed, are_sizes, is_text, show

#: Bytes of one element, by the word safetensors uses for the dtype.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
#: Ceiling of a safetensors header, bytes. The format allows 100 MB, but JSON
#: grows about twentyfold in memory; CSM-1B's header is 20,576 bytes.
MAX_HEADER = 1 << 20
#: Ceiling of a small record of a torch zip, bytes.
MAX_NOTE = 40
#: What the small records of a torch zip may say, by their names.
_NOTES = {
    "version": rb"[0-9]{1,9}\n?",
    "byteorder": rb"little",
    ".format_version": rb"[0-9]{1,9}\n?",
    ".storage_alignment": rb"[0-9]{1,9}\n?",
    ".data/serialization_id": rb"[0-9]{1,40}",
}
#: Most findings of one file that are spelled out; the rest are counted.
MAX_FINDINGS = 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file.

    `dtype` is safetensors' word ("F32"), `offset` the absolute byte offset of
    element 0, `stride` the distance between neighbours along each dimension,
    in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; fewer than the bytes they span where there are gaps."""
        return math.prod(self.shape) * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether `[offset, offset + nbytes)` holds the elements in row-major order."""
        dimensions = zip(self.shape, self.stride, row_major(self.shape), strict=True)
        return self.nbytes == 0 or all(n == 1 or has == wants for n, has, wants in dimensions)


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of one file, by name; `file_size` in bytes."""

    tensors: Mapping[str, TensorInfo]
    file_size: int


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def check_against(table: TensorIndex, config: CsmConfig, where: str) -> list[Finding]:
    """A finding for every tensor that is missing, not expected, or of another dtype or shape.

    Empty when the table holds exactly the F32 tensors of the architecture. At
    most 20 findings are spelled out; one more counts the others.
    """
    found = _Findings(where)
    expected = config.tensor_shapes()
    for name, shape in expected.items():
        info = table.tensors.get(name)
        if info is None:
            found.add(Malformed(_signature("F32", shape), "no such tensor", name))
        elif (info.dtype, info.shape) != ("F32", shape):
            text = _signature(info.dtype, info.shape)
            found.add(Malformed(_signature("F32", shape), text, name))
    for name, info in table.tensors.items():
        if name not in expected:
            text = _signature(info.dtype, info.shape)
            found.add(Malformed("no such tensor", text, show(name)))
    return found.listed()


def read_safetensors(path: Path | str | MultipartFile) -> TensorIndex:
    """Reads the header of a safetensors file, or of one that lies in parts.

    Raises MissingInput when there is no such file, and WrongContent when it
    breaks a rule of the format: a header that is not JSON, a shape that does
    not fit its bytes, bytes that belong to no tensor or to two.
    """
    tensors = {}
    with _reading(path, "safetensors") as (file, size, found):
        length = _header_length(file, size)
        for name, entry in _parse_header(read_at(file, 8, length)).items():
            with found.collecting(show(name)):
                tensors[name] = _header_entry(name, entry, 8 + length)
        if not found.count:
            _check_tiling(tensors, 8 + length, size, found)
    return TensorIndex(tensors, size)


def read_checkpoint(path: Path | str | MultipartFile) -> TensorIndex:
    """Reads the tensor table of a torch checkpoint: a zip that holds a plain state dict.

    It may lie in parts.

    The pickle inside is never executed. A tensor that is a view of a larger
    storage gets the offset and stride of the view. Raises MissingInput when
    there is no such file, and WrongContent when the file is not laid out as
    torch.save lays it out, or its pickle does more than name tensors.
    """
    tensors = {}
    with _reading(path, "a torch checkpoint") as (file, size, found):
        records = read_records(file, size)
        for name, pattern in _NOTES.items():
            with found.collecting(name):
                _check_note(file, records.get(name), pattern)
        state = read_state_dict(read_content(file, records["data.pkl"], MAX_PICKLE))
        for name, view in state.views.items():
            with found.collecting(show(name)):
                tensors[name] = _placed(name, view, records)
        for name in records:
            if name.startswith("data/") and name[5:] not in state.storage_keys:
                found.add(Malformed("a storage of some tensor", "nothing refers to it", name))
    return TensorIndex(tensors, size)


def _header_length(file: MultipartFile, size: int) -> int:
    if size < 8:
        raise Malformed("8 bytes of header length", f"a file of {size} bytes")
    length = int.from_bytes(read_at(file, 0, 8), "little")
    ceiling = min(MAX_HEADER, size - 8)
    if not 2 <= length <= ceiling:
        raise Malformed(f"2 to {ceiling} bytes", f"{length}", "header length")
    return length


def _parse_header(text: bytes) -> dict[str, Any]:
    """The header without `__metadata__`, which must be text to text."""
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


def _header_entry(name: str, entry: Any, start: int) -> TensorInfo:
    """One tensor of a header whose data begin at byte `start` of the file."""
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
        expected = f"{info.nbytes} bytes for {_signature(dtype, info.shape)}"
        raise Malformed(expected, f"{span[1] - span[0]} bytes")
    return info


def _check_tiling(tensors: dict[str, TensorInfo], start: int, size: int, found: _Findings) -> None:
    """The tensors must cover `[start, size)` of the file with no hole and no overlap."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "a hole" if info.offset > end else "an overlap"
            text = f"{what}: from byte {info.offset}"
            found.add(Malformed(f"data from byte {end}", text, show(info.name)))
        end = max(end, info.offset + info.nbytes)
    if end != size:
        found.add(Malformed(f"data up to the end, byte {size}", f"up to byte {end}", "data"))


def _check_note(file: MultipartFile, record: Record | None, pattern: bytes) -> None:
    """A small text record, where there is one, must match the pattern."""
    if record is None:
        return
    text = read_content(file, record, MAX_NOTE)
    if re.fullmatch(pattern, text) is None:
        raise Malformed(f"text like {show(pattern)}", show(text))


def _placed(name: str, view: View, records: Mapping[str, Record]) -> TensorInfo:
    """A view's place in the file; it must not leave its storage, nor the storage its record."""
    storage = view.storage
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise Malformed(f"a record data/{show(storage.key)}", "none")
    item = ITEM_SIZES[storage.dtype]
    if storage.elements * item != record.size:
        expected = f"{storage.elements * item} bytes in {record.name}"
        raise Malformed(expected, f"{record.size} bytes")
    elements = math.prod(view.shape)
    steps = zip(view.shape, view.stride, strict=True)
    last = view.offset + sum((size - 1) * step for size, step in steps)
    end = last + 1 if elements else view.offset
    # more elements than the storage has means repeats: a small file that loads huge
    if max(end, elements) > storage.elements:
        found = f"{elements} elements up to element {end}"
        raise Malformed(f"a view of {storage.elements} elements", found)
    offset = record.data + view.offset * item
    return TensorInfo(name, storage.dtype, view.shape, offset, view.stride)


def _signature(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


@dataclass
class _Findings:
    """What is wrong with one file: the first few findings, and the count of all."""

    where: str
    items: list[Finding] = field(default_factory=list)
    count: int = 0

    def add(self, error: Malformed) -> None:
        self.count += 1
        if self.count <= MAX_FINDINGS:
            where = f"{self.where}: {error.at}" if error.at else self.where
            self.items.append(Finding(Kind.MALFORMED, where, error.expected, error.found))

    @contextmanager
    def collecting(self, at: str) -> Iterator[None]:
        """Adds what the body finds wrong with `at`, and carries on after the body."""
        try:
            yield
        except Malformed as error:
            self.add(Malformed(error.expected, error.found, at))

    def listed(self) -> list[Finding]:
        """The findings; a last one counts those that are not spelled out."""
        rest = self.count - len(self.items)
        if not rest:
            return list(self.items)
        more = Finding(Kind.MALFORMED, self.where, "nothing else wrong", f"{rest} more findings")
        return [*self.items, more]


@contextmanager
def _reading(
    source: Path | str | MultipartFile, format_: str
) -> Iterator[tuple[MultipartFile, int, _Findings]]:
    """Yields a source, its size in bytes and findings, raised at the end if any."""
    path = Path(source.paths[0] if isinstance(source, MultipartFile) else source)
    found = _Findings(source.where if isinstance(source, MultipartFile) else str(path))
    title = f"{path.name} cannot be read as {format_}"
    try:
        if isinstance(source, MultipartFile):
            yield source, source.size, found
        else:
            with MultipartFile([path]) as file:
                yield file, file.size, found
    except Malformed as error:
        found.add(error)
    except FileNotFoundError:
        raise error_for(title, [Finding.missing(path, "a file")]) from None
    except OSError as error:
        raise error_for(title, [Finding.unreadable(path, error)]) from None
    if found.count:
        raise error_for(title, found.listed())

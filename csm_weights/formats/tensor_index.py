"""Where the tensors of a weight file lie: names, dtypes, shapes, byte ranges.

Every format's reader gives a `TensorIndex`. Reading one loads no tensor,
imports no torch and runs no pickle; its time and memory are bounded whatever
the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from csm_weights.errors import GET_AGAIN, Finding, Kind, error_for
from csm_weights.formats.multipart import MultipartFile
from csm_weights.untrusted import Malformed

#: Bits of one element, by safetensors' word for the dtype; C32, C128 and F4_X2 only torch has.
ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4_X2"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32", "C32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "C128": 128,
}
#: Most dimensions of a tensor that are read; CSM-1B's have at most 3.
MAX_DIMS = 64

#: Ceiling of the memory for one file's index, bytes, as `index_cost` counts it: enough for
#: 100,000 tensors. The largest published shards have about 20,000.
MAX_INDEX = 48 << 20

#: Most findings of one file that are spelled out; the rest are counted.
MAX_FINDINGS = 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Place of one tensor in its file.

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
        """Bytes of one element; 1 where elements are smaller than a byte."""
        return max(1, ITEM_BITS[self.dtype] // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements; fewer than the bytes they span where there are gaps."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    @property
    def contiguous(self) -> bool:
        """True where `[offset, offset + nbytes)` holds the elements in row-major order."""
        dimensions = zip(self.shape, self.stride, row_major(self.shape), strict=True)
        return self.nbytes == 0 or all(n == 1 or has == wants for n, has, wants in dimensions)

    @property
    def signature(self) -> str:
        """Dtype and shape in words: `F32 [2, 3]`."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TensorIndex:
    """All tensors of one file, by name; `file_size` in bytes."""

    tensors: Mapping[str, TensorInfo]
    file_size: int


@dataclass(frozen=True)
class Format:
    """One weight format, as the registry in `formats/__init__.py` lists it.

    `name` is the manifest's word for it; `choice` is people's (`--only ckpt`),
    and the name of the folder below chunks/; `filename` is a model's file of
    it. `suffixes` are its endings, `shared_suffixes` those that other kinds of
    files have too. `sniff` tells by the first `HEAD` bytes whether a file is of
    the format. `read_index` raises WrongContent.
    """

    name: str
    choice: str
    filename: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes], bool]
    read_index: Callable[[MultipartFile], TensorIndex]
    shared_suffixes: tuple[str, ...] = ()


#: Bytes from the beginning of a file that `Format.sniff` is given.
HEAD = 512


def index_cost(name: str, dims: int) -> int:
    """Return about how many bytes of memory a tensor takes in an index, at the most."""
    return 400 + len(name) + 32 * dims


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass
class Findings:
    """Findings of one file: the first few, and the count of all.

    An Unsupported one says that the reader does not read something that the
    format allows, any other that the file breaks a rule of the format.
    """

    where: str
    items: list[Finding] = field(default_factory=list)
    count: int = 0
    kind: Kind = Kind.UNSUPPORTED

    def add(self, error: Malformed) -> None:
        """Count a finding, and keep it while there are few."""
        self.count += 1
        if error.kind is Kind.MALFORMED:
            self.kind = Kind.MALFORMED
        if self.count <= MAX_FINDINGS:
            where = f"{self.where}: {error.at}" if error.at else self.where
            mend = GET_AGAIN if error.kind is Kind.MALFORMED else ""
            self.items.append(Finding(error.kind, where, error.expected, error.found, mend))

    @contextmanager
    def collecting(self, at: str) -> Iterator[None]:
        """Add what the body finds wrong with `at`, and carry on after the body."""
        try:
            yield
        except Malformed as error:
            self.add(type(error)(error.expected, error.found, at))

    def listed(self) -> list[Finding]:
        """Return the findings; a last one counts those that are not spelled out."""
        rest = self.count - len(self.items)
        if not rest:
            return list(self.items)
        more = Finding(self.kind, self.where, "nothing else wrong", f"{rest} more findings")
        return [*self.items, more]


@contextmanager
def reading(file: MultipartFile, format_: str) -> Iterator[Findings]:
    """Yield findings about a file that is read as a format; they are raised at the end, if any."""
    title, found = f"{file.paths[0].name} cannot be read as {format_}", Findings(file.where)
    try:
        yield found
    except Malformed as error:
        found.add(error)
    if found.count:
        raise error_for(title, found.listed())

"""Elements of tensors, contiguous or not, against torch's own idea of them."""

from __future__ import annotations

import math
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.errors import WrongContent
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements, to_number
from csm_weights.formats.tensor_index import TensorInfo, row_major
from tests.support import hostile

#: Bytes before the tensors of a test, so that an offset is not zero.
LEAD = 24
ELEMENTS = 5000
DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "F32": torch.float32,
    "I64": torch.int64,
    "C128": torch.complex128,
}
MiB = 1 << 20


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A file of random bytes after a lead, and those bytes."""
    path = tmp_path_factory.mktemp("noise") / "data"
    data = torch.randint(0, 256, (16 * ELEMENTS,), dtype=torch.uint8)
    path.write_bytes(bytes(LEAD) + data.numpy().tobytes())
    return path, data


def read(
    source: MultipartFile, info: TensorInfo, start: int = 0, count: int | None = None
) -> bytes:
    count = math.prod(info.shape) - start if count is None else count
    room = bytearray(count * info.itemsize)
    read_elements(source, info, start, room)
    return bytes(room)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes and strides of views of at most ELEMENTS elements, broadcast ones too."""
    dims = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(0, 7)) for _ in range(dims))
    usual = draw(st.permutations(row_major(shape)))
    strides = tuple(draw(st.one_of(st.just(step), st.integers(0, 150))) for step in usual)
    return shape, strides


@settings(max_examples=300, deadline=None)
@given(
    view=views(),
    dtype=st.sampled_from(sorted(DTYPES)),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_view_reads_as_torch_has_it(
    noise: tuple[Path, torch.Tensor],
    view: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: str,
    cuts: tuple[float, float],
) -> None:
    """Any range of elements, of any shape, stride and offset, is that of as_strided."""
    path, data = noise
    shape, stride = view
    info = TensorInfo("t", dtype, shape, LEAD + 3 * 16, stride)
    typed = data.view(DTYPES[dtype])
    expected = typed.as_strided(shape, stride, 3 * 16 // info.itemsize).contiguous().flatten()
    start, stop = sorted(int(cut * expected.numel()) for cut in cuts)
    with MultipartFile([path]) as source:
        assert expected.numpy().tobytes() == read(source, info)
        part = expected[start:stop].numpy().tobytes()
        assert part == read(source, info, start, stop - start)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3000, 700), (1, 3000)),
        ((3000, 700), (1, 40_000)),
        ((60, 50, 700), (50, 1, 40_000)),
        ((2, 3, 70_000), (70_000, 140_000, 1)),
        ((30_000,), (90,)),
        ((3, 500, 2), (9_000_000, 2, 1)),
        ((100_000, 2), (0, 1)),
    ],
)
def test_large_views_that_are_far_apart(
    shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    """Elements too far apart to be read together are found one by one, or run by run."""
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    data = torch.randint(0, 2**31, (size,), dtype=torch.int32)
    path = tmp_path / "data"
    data.numpy().tofile(path)
    expected = data.as_strided(shape, stride).contiguous().flatten().numpy().tobytes()
    info = TensorInfo("t", "I32", shape, 0, stride)
    with MultipartFile([path]) as source:
        assert expected == read(source, info)
        # From the middle of one row to the middle of another.
        assert expected[4 * 555 : -4 * 777] == read(source, info, 555, len(expected) // 4 - 1332)


class Recorded(MultipartFile):
    """A file that records the bytes of each read."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        self.reads: list[int] = []

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.reads.append(len(buffer))
        super().read_into(buffer, offset)


@pytest.mark.parametrize(
    ("shape", "stride", "reads"),
    [
        ((9000, 2), (2, 1), [18_000]),
        ((8193,), (2,), [16_385]),
        ((5462,), (3,), [16_384]),
        ((5463,), (3,), [8194, 8191]),
        ((10_923,), (3,), [16_384, 16_381]),
        ((4, 10), (20_000, 1), [10, 10, 10, 10]),
        ((3, 2), (20_000, 20_000), [1, 1, 1, 1, 1, 1]),
        ((300, 100), (1, 300), [30_000]),
        ((30, 1000), (1, 60), [59_970]),
        ((30, 1000), (1, 61), [15_219, 15_219, 15_219, 15_219]),
        ((3, 5463), (0, 3), [16_387]),
        ((2, 5000), (15_000, 1), [20_000]),
        ((2, 5000), (15_001, 1), [5000, 5000]),
    ],
)
def test_elements_that_are_close_are_read_together(
    noise: tuple[Path, torch.Tensor],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    reads: list[int],
) -> None:
    """At once are read 16 KiB, or twice the bytes that are wanted; what spans more is halved."""
    path, data = noise
    with Recorded(path) as source:
        found = read(source, TensorInfo("t", "U8", shape, LEAD, stride))
    assert found == data.as_strided(shape, stride).contiguous().numpy().tobytes()
    assert source.reads == reads


@pytest.mark.parametrize(
    ("stride", "most"),
    [
        ((2048, 1), MiB // 16),
        ((1, 2048), 6 * MiB),
        ((0, 1), 6 * MiB),
        ((8192, 4), 6 * MiB),
        ((40_000, 1), 6 * MiB),
    ],
)
def test_memory_is_bounded(stride: tuple[int, int], most: int, tmp_path: Path) -> None:
    """Whatever the strides, a read needs little more than its result; where it can, nothing."""
    path = tmp_path / "data"
    shape = (2048, 2048)
    elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    with path.open("wb") as file:
        file.truncate(4 * elements)
    info = TensorInfo("t", "F32", shape, 0, stride)
    room = bytearray(MiB)
    with MultipartFile([path]) as source:
        tracemalloc.start()
        read_elements(source, info, 1000, room)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < most


def test_chunk_files_are_read_as_one(noise: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """A tensor may begin in one chunk file and end in another."""
    path, _ = noise
    content = path.read_bytes()
    parts = [tmp_path / name for name in "abc"]
    for part, begin in zip(parts, (0, 5_001, 7_003), strict=True):
        part.write_bytes(content[begin : {0: 5_001, 5_001: 7_003}.get(begin)])
    info = TensorInfo("t", "F32", (40, 60), LEAD, (1, 41))
    with MultipartFile([path]) as whole, MultipartFile(parts) as joined:
        assert read(whole, info) == read(joined, info)


@pytest.mark.parametrize(("start", "count"), [(0, 7), (6, 1), (-1, 1)])
def test_only_elements_of_the_tensor_are_read(
    noise: tuple[Path, torch.Tensor], start: int, count: int
) -> None:
    """A range that leaves the tensor is refused."""
    path, _ = noise
    info = TensorInfo("t", "F32", (2, 3), LEAD, (3, 1))
    said = re.escape(f"elements [{start}, {start + count}) of [2, 3]")
    with MultipartFile([path]) as source, pytest.raises(ValueError, match=said):
        read_elements(source, info, start, bytearray(4 * count))


@pytest.mark.parametrize(("shape", "stride"), [((2, 3), (3, 1)), ((3, 2), (1, 3))])
def test_a_tensor_beyond_the_end_of_its_files_is_not_read(
    shape: tuple[int, int], stride: tuple[int, int], tmp_path: Path
) -> None:
    """One that ends with the last chunk file is read, and one that ends a byte later is not."""
    parts = [hostile.written(tmp_path, bytes(range(20)), name) for name in "ab"]
    info = TensorInfo("t", "F32", shape, 16, stride)
    with MultipartFile(parts) as source:
        assert sorted(read(source, info)) == sorted([*range(16, 20), *range(20)])
        with pytest.raises(WrongContent, match="ended early") as caught:
            read(source, replace(info, offset=17))
    (finding,) = caught.value.findings
    assert (finding.where, finding.found) == (source.where, "its end before byte 41")


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("BOOL", torch.bool),
        ("U8", torch.uint8),
        ("I8", torch.int8),
        ("I16", torch.int16),
        ("U16", torch.uint16),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E8M0", torch.float8_e8m0fnu),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("I32", torch.int32),
        ("U32", torch.uint32),
        ("F32", torch.float32),
        ("I64", torch.int64),
        ("U64", torch.uint64),
        ("F64", torch.float64),
        ("C32", torch.complex32),
        ("C64", torch.complex64),
        ("C128", torch.complex128),
    ],
)
def test_numbers_are_those_of_torch(dtype: str, kind: torch.dtype) -> None:
    """The value of an element is torch's, for every dtype and all bits of the small ones."""
    item = kind.itemsize
    raw = torch.randint(0, 256, (256, item), dtype=torch.uint8)
    raw[:, -1] = torch.arange(256)
    if kind is torch.bool:
        raw %= 2
    for row in raw:
        found, expected = to_number(dtype, bytes(row.tolist())), row.view(kind).item()
        assert found == expected or (found != found and expected != expected)
        assert math.copysign(1, found.real) == math.copysign(1, complex(expected).real) or (
            found != found
        )

"""Places of tensors, and the findings about a file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.formats.tensor_index import (
    MAX_INDEX,
    Findings,
    TensorInfo,
    index_cost,
    reading,
    row_major,
)
from csm_weights.untrusted import Malformed, Unsupported


@pytest.mark.parametrize(
    ("shape", "stride", "is_contiguous"),
    [
        ((), (), True),
        ((3,), (1,), True),
        ((3,), (2,), False),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((2, 3), (4, 1), False),
        ((2, 3), (0, 1), False),
        ((1, 3), (99, 1), True),
        ((3, 1), (1, 0), True),
        ((1, 1), (7, 7), True),
        ((0, 3), (7, 7), True),
        ((3, 0), (7, 7), True),
    ],
)
def test_elements_without_gaps_are_told_from_others(
    shape: tuple[int, ...], stride: tuple[int, ...], is_contiguous: bool
) -> None:
    """The stride of a dimension of one element, or of no elements at all, does not matter."""
    assert TensorInfo("w", "F32", shape, 0, stride).contiguous is is_contiguous


@pytest.mark.parametrize(
    ("dtype", "shape", "itemsize", "nbytes"),
    [
        ("F32", (2, 3), 4, 24),
        ("C128", (8,), 16, 128),
        ("U8", (), 1, 1),
        ("F4", (4, 6), 1, 12),
        ("F6_E2M3", (8,), 1, 6),
        ("F64", (0, 9), 8, 0),
    ],
)
def test_bytes_are_counted(dtype: str, shape: tuple[int, ...], itemsize: int, nbytes: int) -> None:
    """Elements that are smaller than a byte are packed."""
    info = TensorInfo("w", dtype, shape, 0, row_major(shape))
    assert (info.itemsize, info.nbytes) == (itemsize, nbytes)
    assert info.signature == f"{dtype} {list(shape)}"


def test_strides_of_contiguous_tensors() -> None:
    assert [row_major(shape) for shape in ((), (5,), (2, 3, 4), (2, 0, 4))] == [
        (),
        (1,),
        (12, 4, 1),
        (0, 4, 1),
    ]


def test_an_index_has_room_for_100_000_tensors() -> None:
    """So many of two dimensions fit, with names as large models have."""
    assert 100_000 * index_cost("model.layers.10.self_attn.q_proj.weight", 2) <= MAX_INDEX
    assert MAX_INDEX < 64 << 20


def test_each_dimension_and_letter_takes_room_in_an_index() -> None:
    """A tensor never counts for less than one with a shorter name, or fewer dimensions."""
    costs = [index_cost(letters * "w", dims) for dims in range(65) for letters in range(32)]
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("count", [1, 20, 21, 50])
@pytest.mark.parametrize("broken", [None, 0, 19, 20, 49])
def test_findings_beyond_twenty_are_counted(count: int, broken: int | None) -> None:
    """The count of the others is malformed if any finding is."""
    found = Findings("file")
    for number in range(count):
        kind = Malformed if number == broken else Unsupported
        found.add(kind("some", f"other {number}", "" if number == 1 else f"at {number}"))
    expected = [
        Finding(Kind.MALFORMED, f"file: at {n}", "some", f"other {n}", GET_AGAIN)
        if n == broken
        else Finding(Kind.UNSUPPORTED, "file" if n == 1 else f"file: at {n}", "some", f"other {n}")
        for n in range(min(count, 20))
    ]
    worst = Kind.UNSUPPORTED if broken is None or broken >= count else Kind.MALFORMED
    if count > 20:
        expected.append(Finding(worst, "file", "nothing else wrong", f"{count - 20} more findings"))
    assert found.listed() == expected
    assert (found.count, found.kind) == (count, worst)


def test_a_file_without_findings_is_read() -> None:
    """Each that is collected is raised in the end, with the last one; else nothing is."""
    file: Any = SimpleNamespace(where="folder/w.pt", paths=[SimpleNamespace(name="w.pt")])
    with reading(file, "some format") as found:
        assert found.listed() == []
    with (
        pytest.raises(WrongContent, match=r"w\.pt cannot be read as some format") as caught,
        reading(file, "some format") as found,
    ):
        with found.collecting("a"):
            raise Unsupported("x", "y", "elsewhere")
        with found.collecting("b"):
            pass
        raise Malformed("v", "w", "c")
    assert caught.value.findings == (
        Finding(Kind.UNSUPPORTED, "folder/w.pt: a", "x", "y"),
        Finding(Kind.MALFORMED, "folder/w.pt: c", "v", "w", GET_AGAIN),
    )

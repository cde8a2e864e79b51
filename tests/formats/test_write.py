"""The bytes of new weight files, against those of the libraries that people load them with."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from csm_weights.formats import write
from csm_weights.formats.transformers_layout import NamedTensor, name_tensors
from csm_weights.formats.weights_file import open_weights
from csm_weights.formats.write import elements, nbytes_as, safetensors_file, torch_file
from tests.support import hostile

#: Tensors of several widths, in no order, one empty and one scalar.
STATE = {
    "z": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "b": torch.arange(3, dtype=torch.int64),
    "a": torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8),
    "h": torch.tensor([0.5, -3.0]).half(),
    "c": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "m": torch.arange(4, dtype=torch.float64),
}
NAMES = {None: None, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def rounded(dtype: str | None) -> dict[str, Tensor]:
    """Return the state with its floats of at most 32 bits in another dtype."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    to = NAMES[dtype]
    return {n: t.to(to) if to and t.dtype in floats else t for n, t in STATE.items()}


@pytest.fixture
def tensors(tmp_path: Path) -> Iterator[Mapping[str, NamedTensor]]:
    """The state, read from a checkpoint whose tensors are views."""
    path = tmp_path / "w.pt"
    views = {n: torch.stack((t, t), -1)[..., 1] if t.numel() else t for n, t in STATE.items()}
    torch.save(views, path)
    with open_weights([path]) as file:
        yield name_tensors([file], ()).tensors


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "pt", "of": "csm é"}])
@pytest.mark.parametrize("block", [8, 24, 1 << 20])
def test_a_safetensors_file_is_that_of_its_library(
    dtype: str | None,
    metadata: dict[str, str],
    block: int,
    tensors: Mapping[str, NamedTensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, and as many as were told before."""
    monkeypatch.setattr(write, "BLOCK", block)
    file = safetensors_file(tensors, dtype, metadata)
    content = b"".join(bytes(block) for block in file.blocks)
    assert len(content) == file.size
    expected = save(rounded(dtype), metadata or None)
    if "of" in metadata:  # the order of its keys is the library's, and so are its escapes
        head = int.from_bytes(expected[:8], "little") + 8
        own = int.from_bytes(content[:8], "little") + 8
        assert own % 8 == 0
        assert content[own:] == expected[head:]
    else:
        assert content == expected


@pytest.mark.parametrize("dtype", NAMES)
def test_a_checkpoint_is_read_by_torch(
    dtype: str | None, tensors: Mapping[str, NamedTensor]
) -> None:
    """Names are sorted, and all tensors are contiguous."""
    file = torch_file(tensors, dtype)
    content = b"".join(bytes(block) for block in file.blocks)
    assert len(content) == file.size
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert list(found) == sorted(STATE)
    for name, tensor in rounded(dtype).items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor)


def test_a_file_without_tensors_is_written() -> None:
    content = b"".join(bytes(block) for block in safetensors_file({}, None, {}).blocks)
    assert content == save({})


def test_bytes_are_counted_in_the_dtype_of_the_file(tensors: Mapping[str, NamedTensor]) -> None:
    """Only floats of at most 32 bits change."""
    sizes = {name: [nbytes_as(t, dtype) for dtype in NAMES] for name, t in tensors.items()}
    assert sizes == {
        "z": [24, 12, 12, 24],
        "b": [24, 24, 24, 24],
        "a": [5, 5, 5, 5],
        "h": [4, 4, 4, 8],
        "c": [4, 2, 2, 4],
        "none": [0, 0, 0, 0],
        "m": [32, 32, 32, 32],
    }


@pytest.mark.parametrize(
    ("shape", "block", "sizes"),
    [
        ((4, 3), 48, [48]),
        ((4, 3), 47, [36, 12]),
        ((4, 3), 24, [24, 24]),
        ((4, 3), 8, [8] * 6),
        ((7,), 12, [12, 12, 4]),
        ((), 12, [4]),
        ((0,), 12, []),
    ],
)
def test_elements_come_in_blocks_of_whole_rows(
    shape: tuple[int, ...],
    block: int,
    sizes: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one is shorter; rows that are too long are cut."""
    monkeypatch.setattr(write, "BLOCK", block)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    with open_weights([hostile.written(tmp_path, save({"w": values}))]) as file:
        tensor = name_tensors([file], ()).tensors["w"]
        blocks = [bytes(block) for block in elements(tensor, "I32")]
    assert [len(block) for block in blocks] == sizes
    assert b"".join(blocks) == values.numpy().tobytes()


def test_a_block_has_a_mebibyte(tmp_path: Path) -> None:
    """More would be memory that is in use for nothing."""
    header = {"w": hostile.entry(0, 3 << 20, [3 << 20], "U8")}
    path = hostile.written(tmp_path, hostile.safetensors(header))
    with path.open("r+b") as sparse:
        sparse.truncate(path.stat().st_size + (3 << 20))
    with open_weights([path]) as file:
        tensor = name_tensors([file], ()).tensors["w"]
        assert [len(block) for block in elements(tensor, "U8")] == [1 << 20] * 3

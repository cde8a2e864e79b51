"""Files of torch in all their variety, read bit by bit as torch.load reads them."""

from __future__ import annotations

import enum
import io
import itertools
import pickle
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csm_weights.commands.compare import compare
from csm_weights.errors import Kind, WrongContent
from csm_weights.formats.strided import read_elements
from csm_weights.formats.torch_names import DTYPES
from csm_weights.formats.weights_file import open_weights
from csm_weights.pipeline.request import Request
from tests.support import hostile
from tests.support.clone import REPOSITORY

TORCH = {word: getattr(torch, name.split()[1]) for name, word in DTYPES.items()}

#: The dtypes whose numbers torch can make; the others are views of bytes.
PLAIN = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
PLAIN += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]


class Mode(enum.Enum):
    """A class that no list knows, as a key."""

    FAST = 1


@dataclass
class Config:
    """A class that no list knows."""

    words: dict[Any, int]


def flattened(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a loaded value with the keys on their way."""
    if isinstance(value, Tensor):
        yield name or "tensor", value
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from flattened(item, f"{name}.{key}" if depth else str(key), depth + 1)


def assert_read_as(path: Path, loaded: Any) -> None:
    """Check names, dtypes, shapes and all bits of a file against what torch has loaded."""
    expected = dict(flattened(loaded))
    with open_weights([path]) as weights:
        infos = weights.index.tensors
        assert list(infos) == list(expected)
        for name, info in infos.items():
            tensor = expected[name].detach().contiguous()
            assert (TORCH[info.dtype], info.shape) == (tensor.dtype, tuple(tensor.shape)), name
            found = bytearray(info.nbytes)
            read_elements(weights.source, info, 0, found)
            raw = tensor.flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
            assert bytes(found) == bytes(raw.to(torch.uint8).tolist()), name


def numbers(dtype: torch.dtype, count: int = 24) -> Tensor:
    """Return numbers of any dtype, with bits set everywhere."""
    generator = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw % 2 == 1 if dtype is torch.bool else raw.view(dtype)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "part of a storage": lambda t: t.view(4, 6)[1:3],
    "transposed": lambda t: t.view(4, 6).T,
    "every second column": lambda t: t.view(4, 6)[:, ::2],
    "expanded": lambda t: t[:3].expand(5, 3),
    "nothing": lambda t: t[:0],
    "scalar": lambda t: t[7],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", TORCH.values(), ids=TORCH)
def test_every_dtype_and_view_is_read(dtype: torch.dtype, view: str, tmp_path: Path) -> None:
    """A view of any dtype has the elements that torch gives it."""
    path = tmp_path / "file.pt"
    torch.save({"w": VIEWS[view](numbers(dtype))}, path)
    assert_read_as(path, torch.load(path, weights_only=True))


def _module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def _trained() -> dict[str, Any]:
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "loss": [0.5, 0.25, float("nan")],
        "name": "a run",
        "rng": torch.get_rng_state(),
        "best": None,
    }


class Unseekable(io.RawIOBase):
    """A stream that only takes bytes, as a pipe does."""

    written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += bytes(data)
        return len(data)


VALUES: dict[str, Callable[[], Any]] = {
    "state dict": lambda: _module().state_dict(),
    "dict of parameters": lambda: dict(_module().named_parameters()),
    "training checkpoint": _trained,
    "floats beside tensors": lambda: {"w": torch.ones(3), "lr": 1e-3, "step": 10**30, "x": -5},
    "keys that are numbers": lambda: {0: torch.ones(3), 1: {2.5: torch.zeros(2), None: {}}},
    "list": lambda: [torch.ones(3), [torch.zeros(2), {"a": torch.ones(1)}]],
    "tuple": lambda: (torch.ones(3), (torch.zeros(2),)),
    "one tensor": lambda: torch.arange(9),
    "ordered dict of pairs": lambda: OrderedDict([("b", torch.ones(2)), ("a", torch.zeros(3))]),
    "sizes, devices, dtypes": lambda: {
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "w": torch.ones(2),
    },
    "sets, counters, bytes": lambda: {
        "set": {1, 2},
        "counter": Counter("aab"),
        "bytes": b"\x00\xff",
        "array": bytearray(b"xy"),
        "complex": 1 + 2j,
        "w": torch.ones(2),
    },
    "tied": lambda: dict.fromkeys("abc", torch.ones(4)),
    "views of one storage": lambda: dict(enumerate(torch.arange(12.0).view(3, 4))),
    "nothing": dict,
    "a parameter with an attribute": lambda: {"w": _with_attribute()},
    "2,000 tensors": lambda: {str(n): torch.tensor([n]) for n in range(2_000)},
}


def _with_attribute() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.kind = "bias"  # type: ignore[attr-defined]
    return parameter


#: How a file may be written: any pickle protocol, in a zip or as before torch 1.6.
WAYS = [
    pytest.param({"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip},
                 id=f"{'zip' if is_zip else 'legacy'}-{protocol}")
    for protocol, is_zip in itertools.product((2, 3, 4, 5), (True, False))
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", VALUES)
def test_every_value_is_read(value: str, way: dict[str, Any], tmp_path: Path) -> None:
    """Nested values, numbers and lists are read as data, in every protocol and layout."""
    made = VALUES[value]()
    path = tmp_path / "file.pt"
    torch.save(made, path, **way)
    # torch.load(weights_only=True) itself stops at the opcodes of the later protocols
    assert_read_as(path, torch.load(path, weights_only=way["pickle_protocol"] < 3))


@pytest.mark.parametrize("name", ["file.pt", "file.pth", "file.ckpt", "pytorch_model.bin", "file"])
def test_the_ending_of_a_name_says_nothing(name: str, tmp_path: Path) -> None:
    """A zip of a state dict is read and compared whatever it is called."""
    path, other = tmp_path / name, tmp_path / "other.pt"
    torch.save(VALUES["state dict"](), path)
    torch.save(torch.load(path, weights_only=True), other)
    assert compare(Request(REPOSITORY, "csm-tiny"), path, other).error is None


def test_crcs_that_were_not_computed_are_not_checked(tmp_path: Path) -> None:
    """torch writes 0 for every CRC if its option says not to compute them."""
    path = tmp_path / "file.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(VALUES["state dict"](), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_read_as(path, torch.load(path, weights_only=True))


def test_keys_of_torch_1_6_are_read(tmp_path: Path) -> None:
    """The first zips called each storage by its address."""
    key = "94340341200128"
    state = hostile.state_dict(hostile.text("w"), hostile.tensor(of=hostile.storage(key)))
    contents = {"data.pkl": state, f"data/{key}": bytes(range(24)), "version": b"3\n"}
    entries = [hostile.Entry(f"archive/{name}", content) for name, content in contents.items()]
    path = hostile.written(tmp_path, hostile.zip_of(entries), "file.pt")
    assert_read_as(path, torch.load(path, weights_only=True))


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Its text is bytes, it counts memorized objects from 1, and makes an OrderedDict of pairs."""
    names = b"U\1w", b"T\3\0\0\0\xc3\xa9x"
    lists = [b"](" + name + b"q%c" % n + hostile.tensor() + b"e" for n, name in enumerate(names, 3)]
    pairs = [*lists, hostile.text("v") + hostile.tensor() + b"\x86"]
    pickled = b"\x80\x02ccollections\nOrderedDict\nq\1]q\2(" + b"".join(pairs) + b"e\x85R."
    path = hostile.written(tmp_path, hostile.checkpoint(pickled), "file.pt")
    # torch.load(weights_only=True) itself stops at long text of Python 2
    loaded = torch.load(path, weights_only=False)
    assert list(loaded) == ["w", "éx", "v"]
    assert_read_as(path, loaded)


@pytest.mark.parametrize(
    ("is_stream", "is_wide"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_zip_that_python_has_written_anew_is_read(
    is_stream: bool, is_wide: bool, tmp_path: Path
) -> None:
    """Flags are others than torch's, a stream has descriptors, sizes may take 64 bits."""
    path, new, stream = tmp_path / "file.pt", tmp_path / "new.pt", Unseekable()
    torch.save(VALUES["state dict"](), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream if is_stream else new, "w") as to:
        for info in old.infolist():
            content = old.read(info)
            with to.open(info, "w", force_zip64=is_wide) as record:
                record.write(content)
    if is_stream:
        new.write_bytes(stream.written)
    assert_read_as(new, torch.load(path, weights_only=True))
    torch.load(new, weights_only=True)


def test_the_last_record_may_leave_its_numbers_to_the_one_before(tmp_path: Path) -> None:
    """What does not fit the end record of a zip is all ones there, and stands in the wide one."""
    path = tmp_path / "file.pt"
    torch.save(VALUES["state dict"](), path)
    content = path.read_bytes()
    path.write_bytes(content[:-14] + b"\xff" * 12 + content[-2:])
    assert_read_as(path, torch.load(path, weights_only=True))


def test_a_tensor_subclass_is_its_tensor(tmp_path: Path) -> None:
    """A tensor with attributes of its own is read as the tensor it is."""
    tensor = torch.arange(6.0)
    tensor.note = "made by hand"  # type: ignore[attr-defined]
    path = tmp_path / "file.pt"
    torch.save({"w": tensor}, path)
    assert_read_as(path, torch.load(path, weights_only=True))


UNREAD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
    "quantized": (
        lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        "_rebuild_qtensor",
    ),
    "without elements": (lambda: {"w": torch.ones(3, device="meta")}, "_rebuild_meta_tensor"),
    "storage": (lambda: {"w": torch.ones(3).untyped_storage()}, "a storage"),
    "one name": (lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a.b twice"),
    "a number": (lambda: 3, "a number"),
    "conjugated": (lambda: {"w": numbers(torch.complex64).conj()}, "with metadata"),
    "negated": (lambda: {"w": numbers(torch.complex64).conj().imag}, "with metadata"),
    "deep": (lambda: _deep(200), "at most 100 containers"),
}


def _deep(levels: int) -> Any:
    value: Any = torch.ones(1)
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNREAD)
def test_a_value_that_only_torch_reads_is_not_supported(name: str, tmp_path: Path) -> None:
    """A value that only torch.load reads is not supported, rather than malformed."""
    make, reason = UNREAD[name]
    path = tmp_path / "file.pt"
    torch.save(make(), path)
    torch.load(path, weights_only=True)
    with pytest.raises(WrongContent, match="cannot be read") as caught:
        open_weights([path])
    assert {finding.kind for finding in caught.value.findings} == {Kind.UNSUPPORTED}
    assert reason in str(caught.value)


@pytest.mark.parametrize("value", ["state dict", "training checkpoint"])
def test_a_legacy_file_that_is_cut_or_longer_is_refused(value: str, tmp_path: Path) -> None:
    """The storages of a file from before torch 1.6 must fill it to its end."""
    buffer = io.BytesIO()
    torch.save(VALUES[value](), buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for changed in (content[:-1], content + b"\0", content[: len(content) // 2], content[:300]):
        with pytest.raises(WrongContent) as caught:
            open_weights([hostile.written(tmp_path, changed, "file.pt")])
        assert {finding.kind for finding in caught.value.findings} == {Kind.MALFORMED}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: _module(), r"torch\.nn\.modules\.container Sequential"),
        (lambda: torch.nn.Linear(2, 3), r"torch\.nn\.modules\.linear Linear"),
        (lambda: {"w": torch.ones(2), "args": Namespace(lr=1)}, "argparse Namespace"),
        (lambda: {"w": torch.ones(2), "a": torch.ones(3).numpy()}, r"numpy\._core\S* \w+"),
        (
            lambda: {"w": torch.ones(2), "config": Config({Mode.FAST: 1})},
            r"test_torch_files Config",
        ),
        (lambda: {Mode.FAST: torch.ones(2)}, r"test_torch_files Mode"),
        (lambda: torch.optim.Adam([torch.ones(2)]), r"torch\.optim\.adam Adam"),
        (lambda: {"w": torch.ones(2), "when": deque([Decimal(1)])}, r"collections deque"),
    ],
)
def test_an_object_of_a_class_is_not_read(
    make: Callable[[], Any], name: str, is_zip: bool, protocol: int, tmp_path: Path
) -> None:
    """An object would run its class's code: it is named, and only a digest accepts it."""
    path = tmp_path / "file.pt"
    way: dict[str, Any] = {"_use_new_zipfile_serialization": is_zip, "pickle_protocol": protocol}
    torch.save(make(), path, **way)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with pytest.raises(WrongContent, match=rf"global .*{name}: torch\.load would run") as caught:
        open_weights([path])
    assert {finding.kind for finding in caught.value.findings} == {Kind.UNSUPPORTED}


_LEAVES = st.sampled_from(PLAIN).flatmap(
    lambda dtype: st.integers(0, 5).map(lambda n: numbers(dtype, 8)[:n])
)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_NESTED = st.recursive(
    _LEAVES | _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_0", min_size=1, max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=_NESTED, protocol=st.integers(2, 5), is_zip=st.booleans())
def test_any_value_is_read_as_torch_reads_it(
    value: Any, protocol: int, is_zip: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is saved, the tensors found are those of torch, or the file is refused as none."""
    path = tmp_path_factory.getbasetemp() / "any.pt"
    options: dict[str, Any] = {"pickle_protocol": protocol}
    torch.save(value, path, _use_new_zipfile_serialization=is_zip, **options)
    if not isinstance(value, dict | list | Tensor):
        with pytest.raises(WrongContent, match="not supported"):
            open_weights([path])
        return
    assert_read_as(path, torch.load(path, weights_only=False))

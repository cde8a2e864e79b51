"""The two weight formats, read as data: files accepted, and files refused with the reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.errors import Kind, MissingInput, WrongContent
from csm_weights.formats import format_named, sniff, torch_checkpoint, torch_pickle, torch_zip
from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.formats.identify import check_network
from csm_weights.formats.tensor_index import TensorIndex, TensorInfo, row_major
from csm_weights.formats.torch_writer import directory, layout_records
from csm_weights.formats.torch_zip import PADDING
from csm_weights.formats.transformers_layout import Layout, NamedTensors, Summary, name_tensors
from csm_weights.formats.weights_file import WeightsFile, locate
from tests.support import hostile
from tests.support.readers import read_checkpoint, read_safetensors

TINY = CsmConfig(
    FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], text_vocab=512, audio_vocab=35, codebooks=32
)
READERS = {"safetensors": read_safetensors, "checkpoint": read_checkpoint}
MiB = 1 << 20


def _message(reader: Any, path: Path) -> str:
    with pytest.raises(WrongContent) as caught:
        reader(path)
    assert caught.value.exit_code == 4
    return str(caught.value)


def assert_refused(reader: Any, path: Path, name: str, reason: str) -> None:
    """Check the reason, and whether the file breaks a rule or is only beyond what is read."""
    with pytest.raises(WrongContent) as caught:
        reader(path)
    assert caught.value.exit_code == 4
    assert reason in str(caught.value)
    kinds = {finding.kind for finding in caught.value.findings}
    assert (kinds == {Kind.UNSUPPORTED}) is (name in hostile.UNREAD)


# --- safetensors


def test_an_unknown_dtype_is_all_that_is_told_of_its_tensor(tmp_path: Path) -> None:
    """Its bytes are known from the header: they are no hole, and the digest may decide."""
    content, _ = hostile.BAD_SAFETENSORS["dtype_unknown"]
    with pytest.raises(WrongContent) as caught:
        read_safetensors(hostile.written(tmp_path, content))
    assert [finding.kind for finding in caught.value.findings] == [Kind.UNSUPPORTED]


def test_safetensors_table(tmp_path: Path) -> None:
    """A sound file gives each tensor's dtype, shape and absolute place, without its metadata."""
    content = hostile.good_safetensors()
    start = len(content) - 20
    table = read_safetensors(hostile.written(tmp_path, content))
    expected = {
        "a": TensorInfo("a", "F32", (2,), start, (1,)),
        "b": TensorInfo("b", "F32", (1, 3), start + 8, (3, 1)),
    }
    assert (expected, len(content)) == (dict(table.tensors), table.file_size)
    assert [info.nbytes for info in table.tensors.values()] == [8, 12]


def test_safetensors_of_another_order_and_odd_shapes(tmp_path: Path) -> None:
    """Tensors may lie in another order than they are named, be scalar, or be empty."""
    header = {
        "late": hostile.entry(4, 8, []),
        "none": hostile.entry(4, 4, [0, 7]),
        "early": hostile.entry(0, 4, [4], "U8"),
    }
    table = read_safetensors(hostile.written(tmp_path, hostile.safetensors(header, bytes(8))))
    start = table.file_size - 8
    assert [((), start + 4, 4), ((0, 7), start + 4, 0), ((4,), start, 4)] == [
        (info.shape, info.offset, info.nbytes) for info in table.tensors.values()
    ]


@pytest.mark.parametrize("name", hostile.BAD_SAFETENSORS)
def test_safetensors_refused(name: str, tmp_path: Path) -> None:
    """Each broken rule of the format is refused as wrong content, and named."""
    content, reason = hostile.BAD_SAFETENSORS[name]
    assert_refused(read_safetensors, hostile.written(tmp_path, content), name, reason)


def test_safetensors_findings_are_collected(tmp_path: Path) -> None:
    """All wrong tensors are reported at once; of very many, 20 are spelled out."""
    for count, listed in ((3, 3), (20, 20), (500, 21)):
        header = {f"t{index}": 0 for index in range(count)}
        with pytest.raises(WrongContent) as caught:
            read_safetensors(hostile.written(tmp_path, hostile.safetensors(header)))
        assert listed == len(caught.value.findings)
    assert caught.value.findings[-1].found == "480 more findings"


@pytest.mark.parametrize("is_broken", [False, True])
def test_findings_beyond_those_listed_keep_their_kind(is_broken: bool, tmp_path: Path) -> None:
    """One broken tensor after thirty that are only not supported is not lost among them."""
    header = {f"t{n}": hostile.entry(n, n + 1, [1] * 65, "U8") for n in range(30)}
    header["last"] = hostile.entry(30, 31, [2 if is_broken else 1], "U8")
    with pytest.raises(WrongContent) as caught:
        read_safetensors(hostile.written(tmp_path, hostile.safetensors(header, bytes(31))))
    kinds = {finding.kind for finding in caught.value.findings}
    assert kinds == {Kind.UNSUPPORTED} | ({Kind.MALFORMED} if is_broken else set())


def test_safetensors_overlap_is_one_finding(tmp_path: Path) -> None:
    """A tensor inside another is one finding: the data still reach the end of the file."""
    content, _ = hostile.BAD_SAFETENSORS["one_tensor_inside_another"]
    with pytest.raises(WrongContent) as caught:
        read_safetensors(hostile.written(tmp_path, content))
    assert len(caught.value.findings) == 1


def test_safetensors_library_agrees(tmp_path: Path) -> None:
    """A file of the safetensors library reads back with the bytes of its tensors."""
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        "b": numpy.arange(6, dtype=numpy.float32).reshape(2, 3),
        "a": numpy.arange(4, dtype=numpy.int64),
        "h": numpy.ones((2, 2), dtype=numpy.float16),
    }
    path = tmp_path / "model.safetensors"
    library.save_file(arrays, path, metadata={"format": "np"})
    content = path.read_bytes()
    table = read_safetensors(path)
    assert {n: i.dtype for n, i in table.tensors.items()} == {"a": "I64", "b": "F32", "h": "F16"}
    for name, info in table.tensors.items():
        assert arrays[name].shape == info.shape
        assert arrays[name].tobytes() == content[info.offset : info.offset + info.nbytes]


def _tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of each tensor, as our index places them."""
    content = path.read_bytes()
    tensors = read_safetensors(path).tensors
    return {
        name: (info.dtype, list(info.shape), content[info.offset : info.offset + info.nbytes])
        for name, info in tensors.items()
    }


def assert_read_as_by_the_library(content: bytes, tmp_path: Path) -> None:
    """Check that the safetensors library finds the same tensors in the same file."""
    library = pytest.importorskip("safetensors")
    expected = {
        name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"]))
        for name, entry in library.deserialize(content)
    }
    assert _tensors(hostile.written(tmp_path, content)) == expected
    assert expected


#: Every dtype of the format, and the bytes of 24 elements.
SAFETENSORS_DTYPES = {
    "BOOL": 24,
    "F4": 12,
    "F6_E2M3": 18,
    "F6_E3M2": 18,
    "U8": 24,
    "I8": 24,
    "F8_E5M2": 24,
    "F8_E4M3": 24,
    "F8_E8M0": 24,
    "F8_E4M3FNUZ": 24,
    "F8_E5M2FNUZ": 24,
    "I16": 48,
    "U16": 48,
    "F16": 48,
    "BF16": 48,
    "I32": 96,
    "U32": 96,
    "F32": 96,
    "C64": 192,
    "F64": 192,
    "I64": 192,
    "U64": 192,
}


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES)
def test_safetensors_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    """All dtypes of the current safetensors are read, those smaller than a byte too."""
    size = SAFETENSORS_DTYPES[dtype]
    header = {"w": hostile.entry(0, size, [4, 6], dtype)}
    assert_read_as_by_the_library(hostile.safetensors(header, bytes(range(size))), tmp_path)


@pytest.mark.parametrize("dims", [9, 30, 64])
def test_safetensors_of_many_dimensions(dims: int, tmp_path: Path) -> None:
    """The format sets no limit to the dimensions of a tensor."""
    header = {"w": hostile.entry(0, 4, [1] * dims)}
    assert_read_as_by_the_library(hostile.safetensors(header, bytes(4)), tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        "null",
        "{}",
        json.dumps({"ss_tag_frequency": json.dumps({'a "tag"': 1}) * 200_000}),
        json.dumps({str(number): "x" * 40 for number in range(60_000)}),
        json.dumps({"a": "\u00e9\n\\" * 700_000}),
        json.dumps({"a": "\u4e2d" * 1_200_000}, ensure_ascii=False),
    ],
    ids=["null", "empty", "tags", "many", "escapes", "not ASCII"],
)
def test_safetensors_with_any_metadata(metadata: str, tmp_path: Path) -> None:
    """Metadata may be null, or megabytes of text, before or after the tensors."""
    tensor = json.dumps(hostile.entry())
    for header in (
        f'{{"__metadata__":{metadata},"w":{tensor}}}',
        f'{{"w":{tensor},"__metadata__":{metadata}}}   ',
    ):
        assert_read_as_by_the_library(hostile.safetensors(header, bytes(8)), tmp_path)


def test_safetensors_of_18432_experts(tmp_path: Path) -> None:
    """A header of some megabytes is read to its last tensor."""
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight_scale_inverse"
    entries = (hostile.entry(n, n + 1, [1], "U8") for n in range(18_432))
    header = {name.format(n // 256, n % 256): entry for n, entry in enumerate(entries)}
    content = hostile.safetensors(header, bytes(n % 251 for n in range(18_432)))
    assert_read_as_by_the_library(content, tmp_path)


# --- checkpoints


def test_checkpoint_table(tmp_path: Path) -> None:
    """A sound checkpoint gives the tensor's place inside the zip."""
    content = hostile.good_checkpoint()
    table = read_checkpoint(hostile.written(tmp_path, content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        header = archive.getinfo("archive/data/0").header_offset
    expected = TensorInfo("w", "F32", (2, 3), header + 30 + len("archive/data/0") + 4, (3, 1))
    assert {"w": expected} == dict(table.tensors)


def test_checkpoint_honours_offset_and_stride(tmp_path: Path) -> None:
    """A view begins at its storage offset; a transposed one is known not to be contiguous."""
    views = hostile.state_dict(
        hostile.text("all"),
        hostile.tensor(),
        hostile.text("row"),
        hostile.tensor(offset=3, shape=(3,), stride=(1,)),
        hostile.text("turned"),
        hostile.tensor(shape=(3, 2), stride=(1, 3)),
    )
    table = read_checkpoint(hostile.written(tmp_path, hostile.checkpoint(views)))
    start = table.tensors["all"].offset
    assert [start, start + 12, start] == [info.offset for info in table.tensors.values()]
    assert [info.contiguous for info in table.tensors.values()] == [True, True, False]
    assert [info.nbytes for info in table.tensors.values()] == [24, 12, 24]


@pytest.mark.parametrize("name", hostile.BAD_ZIPS)
def test_zip_refused(name: str, tmp_path: Path) -> None:
    """A zip that is not laid out exactly as torch lays it out is refused."""
    content, reason = hostile.BAD_ZIPS[name]
    assert_refused(read_checkpoint, hostile.written(tmp_path, content), name, reason)


@pytest.mark.parametrize("name", hostile.BAD_PICKLES)
def test_pickle_refused(name: str, tmp_path: Path) -> None:
    """A pickle that does anything but hold data is refused, with the opcode or global."""
    content, reason = hostile.BAD_PICKLES[name]
    path = hostile.written(tmp_path, hostile.checkpoint(content))
    assert_refused(read_checkpoint, path, name, reason)


@pytest.mark.parametrize("name", hostile.BAD_LEGACY)
def test_legacy_file_refused(name: str, tmp_path: Path) -> None:
    """A file from before torch 1.6 whose five pickles and storages do not fit is refused."""
    content, reason = hostile.BAD_LEGACY[name]
    assert_refused(read_checkpoint, hostile.written(tmp_path, content), name, reason)


@pytest.mark.parametrize(("most", "is_read"), [(3, False), (4, True)])
def test_repeated_elements_are_counted_by_the_byte(
    most: int, is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that has less than its storage makes no room for one that has 4 bytes more."""
    monkeypatch.setattr(torch_checkpoint, "MAX_REPEATED", most)
    views = (hostile.tensor(shape=(1,), stride=(1,)), hostile.tensor(shape=(7,), stride=(0,)))
    content = hostile.state_dict(hostile.text("v"), views[0], hostile.text("w"), views[1])
    path = hostile.written(tmp_path, hostile.checkpoint(content))
    if is_read:
        assert set(read_checkpoint(path).tensors) == {"v", "w"}
    else:
        assert "at most 3 bytes of repeated elements" in _message(read_checkpoint, path)


def _nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + hostile.tensor() + b"a" * levels + b"."


_MARKS = _nested(1)[:-1] + b"(" * 15 + b"t" * 15 + b"a."


@pytest.mark.parametrize(
    ("module", "name", "limit", "pickled", "reason"),
    [
        (torch_zip, "MAX_DIRECTORY", 246, hostile.GOOD_PICKLE, "a directory of at most 245 bytes"),
        (
            torch_checkpoint,
            "MAX_PICKLE",
            len(hostile.GOOD_PICKLE),
            hostile.GOOD_PICKLE,
            f"at most {len(hostile.GOOD_PICKLE) - 1} bytes",
        ),
        (torch_checkpoint, "MAX_NOTE", 6, hostile.GOOD_PICKLE, "at most 5 bytes, found 6"),
        (torch_pickle, "MAX_OBJECTS", 8, hostile.GOOD_PICKLE, "at most 7 objects"),
        (torch_pickle, "MAX_STACK", 10, hostile.GOOD_PICKLE, "at most 9 objects at once"),
        (torch_pickle, "MAX_STACK", 15, _MARKS, "at most 14 marks at once"),
        (torch_pickle, "MAX_VALUES", 1, hostile.GOOD_PICKLE, "at most 0 values"),
        (torch_pickle, "MAX_DEPTH", 4, _nested(5), "at most 3 containers"),
        (torch_pickle, "MAX_DIMS", 2, hostile.GOOD_PICKLE, "at most 1 dimensions"),
        (torch_pickle, "MAX_INDEX", 465, hostile.GOOD_PICKLE, "a name for each tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_what_is_at_a_limit_is_read(
    module: Any,
    name: str,
    limit: int,
    pickled: bytes,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit is the most that is read, and one more is refused."""
    path = hostile.written(tmp_path, hostile.checkpoint(pickled))
    monkeypatch.setattr(module, name, limit)
    assert len(read_checkpoint(path).tensors) == 1
    monkeypatch.setattr(module, name, limit - 1)
    assert reason in _message(read_checkpoint, path)


def test_a_storage_without_a_record_is_one_finding(tmp_path: Path) -> None:
    """It is told of its tensor, and not of the storage once more."""
    content, _ = hostile.BAD_ZIPS["storage_record_missing"]
    with pytest.raises(WrongContent) as caught:
        read_checkpoint(hostile.written(tmp_path, content))
    assert [finding.expected for finding in caught.value.findings] == ["a record data/0"]


def test_numbers_too_long_to_print_are_data(tmp_path: Path) -> None:
    """A name of an attribute, or of a value, may be a number of 12,000 digits."""
    long = hostile.number(1 << 40_000) + b"K\1"
    ordered = hostile.HOOKS + b"(" + hostile.text("w") + hostile.tensor() + long + b"u"
    pickled = b"\x80\x02" + ordered + b"}" + long + b"sb."
    path = hostile.written(tmp_path, hostile.checkpoint(pickled))
    assert set(read_checkpoint(path).tensors) == {"w"}


def test_a_memo_may_be_put_anew(tmp_path: Path) -> None:
    """An object takes the place of the one before it, and the later ones stay."""
    puts = {"a": b"q\0", "b": b"q\1", "c": b"q\2", "d": b"q\1"}
    words = b"](" + b"".join(hostile.text(name) + put for name, put in puts.items()) + b"e"
    tensors = b"}(h\1" + hostile.tensor() + b"h\2" + hostile.tensor() + b"u"
    path = hostile.written(tmp_path, hostile.checkpoint(b"\x80\x02" + words + tensors + b"\x86."))
    assert list(read_checkpoint(path).tensors) == ["1.d", "1.c"]


def test_pickle_position_is_in_the_finding(tmp_path: Path) -> None:
    """The finding has the byte of the pickle at which the refused opcode stands."""
    path = hostile.written(tmp_path, hostile.checkpoint(b"\x80\x02}K\1\x93."))
    assert "data.pkl byte 5: malformed" in _message(read_checkpoint, path)


def test_the_first_object_of_a_class_is_told_by_its_position(tmp_path: Path) -> None:
    """A later one does not take its place."""
    content, _ = hostile.BAD_PICKLES["two_objects_of_classes"]
    message = _message(read_checkpoint, hostile.written(tmp_path, hostile.checkpoint(content)))
    assert "data.pkl byte 13: not supported: expected plain tensors, found global arg" in message


@pytest.mark.parametrize("name", hostile.running_pickles(""))
def test_pickle_never_runs(name: str, tmp_path: Path) -> None:
    """A pickle that any unpickler would run does nothing here but get refused."""
    target = tmp_path / "was-run"
    content, reason = hostile.running_pickles(str(target))[name]
    path = hostile.written(tmp_path, hostile.checkpoint(content))
    assert reason in _message(read_checkpoint, path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["global_and_reduce", "stack_global", "inst", "obj"])
def test_pickle_would_run(name: str, tmp_path: Path) -> None:
    """The payloads of the test above are live: the standard unpickler does run them."""
    target = tmp_path / "was-run"
    content, _ = hostile.running_pickles(str(target))[name]
    pickle.loads(content).close()
    assert target.exists()


# --- checkpoints written by torch


def _saved(tmp_path: Path, value: Any, **options: Any) -> Path:
    torch = pytest.importorskip("torch")
    path = tmp_path / "ckpt.pt"
    torch.save(value, path, **options)
    return path


def _loaded(path: Path) -> dict[str, Any]:
    """The tensors by our table, as torch tensors."""
    torch = pytest.importorskip("torch")
    words = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "F16": torch.float16}
    content = bytearray(path.read_bytes())
    tensors = {}
    for name, info in read_checkpoint(path).tensors.items():
        if not info.nbytes:
            tensors[name] = torch.zeros(info.shape, dtype=words[info.dtype])
            continue
        span = 1 + sum((n - 1) * s for n, s in zip(info.shape, info.stride, strict=True))
        flat = torch.frombuffer(content, dtype=words[info.dtype], count=span, offset=info.offset)
        tensors[name] = flat.as_strided(info.shape, info.stride)
    return tensors


def _state_dict(variant: str) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    big = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    variants: dict[str, dict[str, Any]] = {
        "plain": {"w": big, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)},
        "ordered": OrderedDict(w=big, v=big[0].clone()),
        "of a module": model.state_dict(),
        "of parameters": dict(model.named_parameters()),
        "view of a larger storage": {"head": big[1:], "column": big[:, 2]},
        "transposed": {"w": big.T, "v": big.reshape(7, 5).T[1:]},
        "shared storage": {"w": big, "tied": big},
        "other dtypes": {"b": big.bfloat16(), "h": big.half(), "i": torch.arange(9)},
        "1200 tensors": {f"{index}": torch.full((3,), index) * 1.0 for index in range(1200)},
        "an empty column": {"w": big, "x": torch.zeros(0, 4, 2)[..., 1]},
        "nothing": {},
    }
    return variants[variant]


VARIANTS = (
    "plain",
    "ordered",
    "of a module",
    "of parameters",
    "view of a larger storage",
    "transposed",
    "shared storage",
    "other dtypes",
    "1200 tensors",
    "an empty column",
    "nothing",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_checkpoint(variant: str, tmp_path: Path) -> None:
    """Any plain state dict that torch saves reads back equal to the one that torch loads."""
    torch = pytest.importorskip("torch")
    path = _saved(tmp_path, _state_dict(variant))
    expected = torch.load(path, weights_only=True)
    actual = _loaded(path)
    assert list(expected) == list(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_torch_checkpoint_to_a_buffer(tmp_path: Path) -> None:
    """A checkpoint saved to a buffer, whose folder torch names itself, is read too."""
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    table = read_checkpoint(hostile.written(tmp_path, buffer.getvalue()))
    assert list(table.tensors) == ["w"]


def test_torch_checkpoint_beyond_4_gib(tmp_path: Path) -> None:
    """Sizes and offsets beyond 32 bits are read from the zip64 fields."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "big.pt"
    wide = {"big": torch.empty((1 << 30) + 5), "none": torch.empty(0), "last": torch.empty(16)}
    with torch.serialization.skip_data():  # a sparse file
        torch.save(wide, path)
    try:
        tensors = read_checkpoint(path).tensors
        assert tensors["big"].nbytes == (1 << 32) + 20
        loaded = torch.load(path, mmap=True, weights_only=True)
        places = {name: loaded[name].data_ptr() - loaded["big"].data_ptr() for name in wide}
        assert places["last"] == tensors["last"].offset - tensors["big"].offset
    finally:
        path.unlink()


#: What a size or place of 32 bits cannot be: it stands for one of 64 bits.
FULL = (1 << 32) - 1


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Saves tensors of so many bytes, which take no room on the disk."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "sparse.pt"

    def save(*sizes: int) -> Path:
        with torch.serialization.skip_data():
            torch.save([torch.empty(size, dtype=torch.uint8) for size in sizes], path)
        return path

    yield save
    path.unlink()


@pytest.mark.parametrize("size", [FULL - 1, FULL, FULL + 1])
@pytest.mark.parametrize("is_place", [False, True])
def test_an_archive_is_written_as_torch_writes_it(
    size: int, is_place: bool, sparse: Callable[..., Path]
) -> None:
    """Sizes and places on either side of 32 bits, and an empty record, give torch's very bytes."""
    first = size
    if is_place:  # of the second record, after the first one's data and their descriptor
        first -= read_checkpoint(sparse(size - 4096, 0, 16)).tensors["0"].offset + 16
    path = sparse(first, 0, 16)
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    folder = infos[0].filename.partition("/")[0]
    names = {info.filename.partition("/")[2]: info.file_size for info in infos}
    assert size in ({info.header_offset for info in infos} if is_place else names.values())
    records = list(zip(layout_records(folder, names).values(), infos, strict=True))
    with path.open("rb") as file:
        for record, info in records:
            assert record.header == info.header_offset
            file.seek(record.header)
            assert file.read(len(record.local)) == record.local
            file.seek(record.data + record.size)
            assert file.read(record.end - file.tell()) == record.descriptor(info.CRC)
        assert file.read() == directory([(record, info.CRC) for record, info in records])


def test_a_large_record_behind_another_is_read(sparse: Callable[..., Path]) -> None:
    """Its size and its place take 64 bits each, in one field."""
    tensors = read_checkpoint(sparse(FULL, FULL)).tensors
    assert [tensors[name].nbytes for name in "01"] == [FULL, FULL]
    assert tensors["1"].offset > tensors["0"].offset + FULL


@pytest.mark.parametrize(
    ("size", "reason"), [(FULL + 1, "zip64 sizes, found none"), (FULL, "a data descriptor like")]
)
def test_a_size_of_64_bits_stands_before_the_data_too(
    size: int, reason: str, sparse: Callable[..., Path]
) -> None:
    """A record without the size in its own header is refused, unless 32 bits can hold it."""
    path = sparse(size)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("sparse/data/0")
    with path.open("r+b") as file:
        at = info.header_offset + 28
        file.seek(at)
        (extras,) = struct.unpack("<H", file.read(2))
        file.seek(at + 2 + len(info.filename))
        file.write(struct.pack("<2H", PADDING, extras - 4))
    assert reason in _message(read_checkpoint, path)


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        ("sparse", {}, "global torch._utils _rebuild_sparse_tensor"),
        ("module", {}, "global torch.nn.modules.linear Linear"),
    ],
)
def test_torch_checkpoint_refused(
    value: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """A value that torch.load(weights_only=True) refuses, or only torch reads, is refused."""
    torch = pytest.importorskip("torch")
    values = {
        "sparse": {"w": torch.eye(3).to_sparse()},
        "module": torch.nn.Linear(2, 2),
    }
    assert reason in _message(read_checkpoint, _saved(tmp_path, values[value], **options))


# --- bounds


GOOD_FILES = {
    "safetensors": hostile.good_safetensors(),
    "checkpoint": hostile.good_checkpoint(),
}


@pytest.mark.parametrize("format_", READERS)
@settings(deadline=timedelta(seconds=1), max_examples=400)
@given(data=st.data())
def test_mutated_file(format_: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    """A damaged file is read or refused as wrong content, within a second: nothing else."""
    content = bytearray(GOOD_FILES[format_])
    positions = st.integers(0, len(content) - 1)
    for at, byte in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), max_size=4)):
        content[at] = byte
    start, end = sorted(data.draw(st.tuples(positions, positions)))
    content[start:end] = data.draw(st.sampled_from([b"", b"\xff" * 8, bytes(content[start:end])]))
    path = hostile.written(tmp_path_factory.getbasetemp(), bytes(content), format_)
    try:
        table = READERS[format_](path)
    except WrongContent as error:
        assert error.findings
    else:
        for info in table.tensors.values():
            assert 0 <= info.offset <= info.offset + info.nbytes <= table.file_size


@pytest.mark.parametrize("format_", READERS)
def test_truncation_is_refused(format_: str, tmp_path: Path) -> None:
    """A file cut off anywhere is refused."""
    content = GOOD_FILES[format_]
    for size in {*range(0, len(content), 5), len(content) - 1}:
        _message(READERS[format_], hostile.written(tmp_path, content[:size]))


@settings(deadline=timedelta(seconds=1), max_examples=300)
@given(code=st.binary(max_size=60))
def test_any_pickle(code: bytes, tmp_path_factory: Any) -> None:
    """Any bytes in place of the pickle are read as a table or refused: nothing else."""
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(hostile.checkpoint(b"\x80\x02" + code))
    with pytest.raises(WrongContent):
        read_checkpoint(path)


_MANY_NAMES = "{" + ",".join(f'"{i}":0' for i in range(60_000)) + "}"
HEAVY = {
    "deep JSON": hostile.safetensors("{" + '"a":{' * 150_000),
    "wide JSON": hostile.safetensors('{"a":[' + "[]," * 340_000 + "[]]}"),
    "names": hostile.safetensors(_MANY_NAMES),
    "dicts in memo": hostile.checkpoint(
        b"\x80\x02" + b"".join(b"}r" + struct.pack("<I", i) + b"\x85" for i in range(9_999))
    ),
    "dicts in dicts": hostile.checkpoint(
        b"\x80\x02}" + b"".join(hostile.text(f"{i}") + b"}s" for i in range(50_000)) + b"."
    ),
    "long numbers": hostile.checkpoint(
        b"\x80\x02" + (b"\x8a\xff" + b"\x7f" * 255 + b"\x85" * 3) * 4_000
    ),
    "zip entries": hostile.zip_of([hostile.Entry(f"a/data/{i}", b"") for i in range(17_000)]),
}


@pytest.mark.parametrize("name", HEAVY)
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    """A file made to be costly takes less than 64 MiB to refuse."""
    path = hostile.written(tmp_path, HEAVY[name])
    reader = read_safetensors if name in ("deep JSON", "wide JSON", "names") else read_checkpoint
    tracemalloc.start()
    try:
        _message(reader, path)
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()


# --- no file to read


@pytest.mark.parametrize("reader", READERS.values())
def test_missing_file(reader: Any, tmp_path: Path) -> None:
    """A file that does not exist is a missing input, not wrong content."""
    with pytest.raises(MissingInput) as caught:
        reader(tmp_path / "none")
    assert [finding.kind for finding in caught.value.findings] == [Kind.MISSING]


@pytest.mark.parametrize("reader", READERS.values())
def test_not_a_file(reader: Any, tmp_path: Path) -> None:
    """A directory or a pipe is refused at once, without waiting for a writer."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        assert "a regular file" in _message(reader, path)


# --- against an architecture


def _named(**changes: TensorInfo | None) -> NamedTensors:
    shapes = TINY.tensor_shapes()
    tensors = {n: TensorInfo(n, "F32", s, 0, row_major(s)) for n, s in shapes.items()}
    for name, info in changes.items():
        if info is None:
            del tensors[name]
        else:
            tensors[name] = info
    source: Any = SimpleNamespace(where="model")
    return name_tensors([WeightsFile(source, TensorIndex(tensors, 0), "safetensors")], ())


def test_architecture_agrees() -> None:
    """Exactly the tensors of the architecture leave nothing to find."""
    assert check_network(_named(), TINY).listed() == []


def test_architecture_differs() -> None:
    """A missing, an extra, a misshapen and a mistyped tensor are each named."""
    name = "projection.weight"
    wide = TensorInfo("audio_head", "F32", (32, 32, 35), 0, (1120, 35, 1))
    half = TensorInfo(name, "F16", TINY.tensor_shapes()[name], 0, (64, 1))
    more = TensorInfo("more\n", "F32", (1,), 0, (1,))
    changes = {"audio_head": wide, name: half, "more\n": more, "decoder.norm.scale": None}
    findings = check_network(_named(**changes), TINY).listed()
    assert [(finding.where, finding.expected, finding.found) for finding in findings] == [
        ("model: audio_head", "[31, 32, 35]", "F32 [32, 32, 35]"),
        ("model: decoder.norm.scale", "[32]", "no such tensor"),
        ("model: 'more\\n'", "no such tensor", "F32 [1]"),
        ("model: projection.weight", "F32", "F16 [32, 64]"),
    ]


def test_architecture_of_another_model() -> None:
    """Of very many findings 20 are spelled out, and the rest are counted."""
    nothing = NamedTensors(Summary("model", "safetensors", Layout.OWN, 0), {})
    findings = check_network(nothing, TINY).listed()
    assert len(findings) == 21
    assert f"{len(TINY.tensor_shapes()) - 20} more findings" == findings[-1].found


def test_other_bytes_are_no_safetensors_file() -> None:
    """A brace where a header would begin does not make a file one, if no header is so long."""
    assert sniff(b"\xff" * 8 + b"{") is None
    assert sniff((100).to_bytes(8, "little") + b"{") is format_named("safetensors")


def test_the_folder_of_several_files_is_that_of_the_first() -> None:
    """There the other files of the model are looked for."""
    paths = [Path("a/model.safetensors.part-aa"), Path("b/model.safetensors.part-ab")]
    assert locate(paths) == ([paths], Path("a"))


@pytest.mark.parametrize(
    "head", [b"\x80\x02}q\x00.", b"P" + torch_checkpoint.MAGIC.to_bytes(10, "little")]
)
def test_a_pickle_of_another_program_is_no_weights(head: bytes) -> None:
    """A file of torch before 1.6 begins as a pickle, and has torch's magic number."""
    assert sniff(head.ljust(64, b"."), "some") is None

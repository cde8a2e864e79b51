"""Pairs of weights, and the first element in which two tensors differ."""

from __future__ import annotations

import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from csm_weights.concurrency import run_all
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats import compare as stage
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.formats.compare import (
    Comparison,
    Difference,
    WeightsPair,
    What,
    first_difference,
    open_pair,
    tied_findings,
)
from csm_weights.formats.model_files import transformers_config
from csm_weights.formats.transformers_layout import (
    AUDIO,
    TIED,
    Layout,
    NamedTensors,
    Summary,
    name_tensors,
)
from csm_weights.formats.weights_file import WeightsFile, open_weights
from tests.support import hostile

Tensors = dict[str, tuple[str, list[int], bytes]]
Opened = Callable[..., WeightsFile]

#: What transformers calls the audio embeddings.
THEIRS = "backbone_model.embed_tokens.embed_audio_tokens.weight"
SOME = Summary("some", "safetensors", Layout.OWN, 1)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens a new safetensors file of these tensors, each as dtype, shape and bytes."""
    with ExitStack() as stack:

        def make(name: str = "w", /, **tensors: tuple[str, list[int], bytes]) -> WeightsFile:
            header, data = {}, b""
            for key, (dtype, shape, content) in tensors.items():
                header[key] = hostile.entry(len(data), len(data) + len(content), shape, dtype)
                data += content
            path = hostile.written(tmp_path, hostile.safetensors(header, data), name)
            return stack.enter_context(open_weights([path]))

        yield make


def floats(*values: float) -> tuple[str, list[int], bytes]:
    return "F32", [len(values)], struct.pack(f"<{len(values)}f", *values)


def bytes_of(*values: int) -> tuple[str, list[int], bytes]:
    return "U8", [len(values)], bytes(values)


def pair_of(first: WeightsFile, second: WeightsFile, rounded: bool = False) -> WeightsPair:
    named = name_tensors([first], ()), name_tensors([second], ())
    sources = [first.source, second.source]
    return WeightsPair(*named, sources, True) if rounded else WeightsPair(*named, sources)


def compared(first: WeightsFile, second: WeightsFile, rounded: bool = False) -> Comparison:
    return pair_of(first, second, rounded).compare(lambda _: None)


# ---- the result in words


@pytest.mark.parametrize("count", [1, 2, 20, 21, 50])
def test_differences_are_an_error_that_lists_twenty(count: int) -> None:
    """The others are counted; the message has the place of the first."""
    differences = tuple(
        Difference(f"t{n}", What.ELEMENTS, f"{n}", f"{n + 1}", (n, 3) if n else ())
        for n in range(count)
    )
    error = Comparison(SOME, Summary("b", "", Layout.OWN, 1), 5, 9, differences).error
    assert isinstance(error, WrongContent)
    words = f"{count} tensors differ" if count > 1 else "1 tensor differs"
    assert error.message == f"{words}, the first at t0[]; 5 are equal"
    expected = [
        Finding(Kind.DIFFERENT, f"t{n}[{n}, 3]" if n else "t0[]", f"{n}", f"{n + 1}")
        for n in range(min(count, 20))
    ]
    if count > 20:
        more = f"{count - 20} more tensors that differ"
        expected.append(Finding(Kind.DIFFERENT, "b", "no other", more))
    assert error.findings == tuple(expected)


def test_equal_weights_have_to_have_tensors() -> None:
    """Nothing to compare is an error, one tensor that is equal is none."""
    assert Comparison(SOME, SOME, 1, 4, ()).error is None
    error = Comparison(SOME, SOME, 0, 0, ()).error
    assert str(error) == "there are no tensors to compare in either file"


def test_a_place_is_the_tensor_and_the_element() -> None:
    """A name that cannot be shown is escaped, and a tensor that is missing has no element."""
    assert Difference("a\n", What.MISSING, "", "").where == r"'a\n'"
    assert Difference("a", What.ELEMENTS, "", "", ()).where == "a[]"
    assert Difference("a", What.ELEMENTS, "", "", (0, 12)).where == "a[0, 12]"


# ---- pairs


@pytest.mark.parametrize("rounded", [False, True])
def test_tensors_are_paired_by_name(rounded: bool, opened: Opened) -> None:
    """Each kind of difference once, in the order of names; only floats can be rounded."""
    half = ("F16", [2], struct.pack("<2e", 1, 2))
    first = opened(
        "a",
        g=bytes_of(1, 2, 3),
        b=floats(1, 2),
        c=floats(1, 2),
        d=("I32", [2], bytes(8)),
        e=floats(1, 2),
        f=floats(1, 2),
        h=half,
    )
    second = opened(
        "b",
        a=bytes_of(7),
        c=half,
        d=floats(0, 0),
        e=("F16", [2, 1], half[2]),
        f=("F32", [1, 2], bytes(8)),
        g=bytes_of(1, 2, 4),
        h=floats(1, 2),
    )
    found = compared(first, second, rounded)
    dtype = What.SHAPE if rounded else What.DTYPE
    expected = [
        ("a", What.MISSING, "no such tensor", "U8 [1]", None),
        ("b", What.MISSING, "F32 [2]", "no such tensor", None),
        ("c", What.DTYPE, "F32 [2]", "F16 [2]", None),
        ("d", What.DTYPE, "I32 [2]", "F32 [2]", None),
        ("e", dtype, "F32 [2]", "F16 [2, 1]", None),
        ("f", What.SHAPE, "F32 [2]", "F32 [1, 2]", None),
        ("g", What.ELEMENTS, "3 (0x03)", "4 (0x04)", (2,)),
        ("h", What.DTYPE, "F16 [2]", "F32 [2]", None),
    ]
    if rounded:
        del expected[7], expected[2]
    assert [(d.name, d.what, d.first, d.second, d.index) for d in found.differences] == expected
    assert (found.equal, found.nbytes) == ((2, 12) if rounded else (0, 0))


def test_the_bytes_of_both_are_told_while_they_are_read(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors come first, and of those that cannot be equal nothing is read."""
    monkeypatch.setattr(stage, "workers", lambda: 1)
    tensors = {"a": bytes_of(1), "b": bytes_of(*range(9)), "c": bytes_of(1, 2, 3)}
    first, second = (opened(n, **tensors, d=bytes_of(*range(x))) for n, x in (("a", 1), ("b", 2)))
    pair = pair_of(first, second)
    told: list[int] = []
    assert pair.nbytes == 26
    found = pair.compare(told.append)
    assert told == [9, 9, 3, 3, 1, 1]
    assert (found.equal, found.nbytes, len(found.differences)) == (3, 13, 1)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (8, 8), (64, 8)])
def test_at_most_eight_threads_compare(
    cores: int, threads: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are cores, but for the memory that each takes."""
    started: list[int] = []

    def counted(works: list[Callable[[], None]], cancel: threading.Event) -> None:
        started.append(len(works))
        run_all(works, cancel)

    monkeypatch.setattr(stage, "workers", lambda: cores)
    monkeypatch.setattr(stage, "run_all", counted)
    file = opened("a", w=bytes_of(1))
    assert compared(file, file).equal == 1
    assert started == [threads]


def test_a_tied_copy_is_held_against_the_embeddings(opened: Opened) -> None:
    """On either side, and on both; without embeddings it has nothing to be held against."""
    own = opened("a", **{AUDIO: floats(1, 2)})
    both = opened("b", **{THEIRS: floats(1, 2), TIED: floats(1, 3)})
    none = opened("c", w=floats(1))
    for first, second, index in ((own, both, 1), (both, own, 0)):
        found = compared(first, second)
        assert [(d.name, d.index) for d in found.differences] == [(TIED, (1,))]
        assert found.differences[0].values is not None
        assert [v.number for v in found.differences[0].values][index] == 3
        assert (found.equal, found.nbytes) == (1, 8)
    assert [(d.name, d.what, d.first, d.second) for d in compared(both, none).differences] == [
        (AUDIO, What.MISSING, "F32 [2]", "no such tensor"),
        (TIED, What.MISSING, "F32 [2]", "no such tensor"),
        ("w", What.MISSING, "no such tensor", "F32 [1]"),
    ]
    assert [d.what for d in compared(none, both).differences] == [What.MISSING] * 3


def test_names_that_are_not_csms_never_are_equal(opened: Opened) -> None:
    """They are differences although both have them."""
    odd = {TIED: floats(1), "x": floats(1)}
    files = opened("a", **odd), opened("b", **odd, y=floats(2))
    assert [(d.name, d.what, d.first, d.second) for d in compared(*files).differences] == [
        ("x", What.UNKNOWN, "F32 [1]", "F32 [1]"),
        ("y", What.UNKNOWN, "no such tensor", "F32 [1]"),
    ]
    assert [(d.first, d.second) for d in compared(files[1], files[0]).differences][1] == (
        "F32 [1]",
        "no such tensor",
    )


@pytest.mark.parametrize("rounded", [None, False, True])
def test_two_models_are_opened_and_closed(
    rounded: bool | None, opened: Opened, tmp_path: Path
) -> None:
    """Tensors are rounded only if that is asked for."""
    half = ("F16", [2], struct.pack("<2e", 1, 2))
    opened("a", w=floats(1, 2))
    opened("b", w=half)
    files = [[tmp_path / "a"]], [[tmp_path / "b"]]
    before = len(list(Path("/proc/self/fd").iterdir()))
    default = open_pair(*files)
    with default if rounded is None else open_pair(*files, rounded=rounded) as pair:
        found = pair.compare(lambda _: None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert (found.first.where, found.second.where) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert [d.what for d in found.differences] == ([] if rounded else [What.DTYPE])


def test_each_model_has_the_heads_of_its_own_config(opened: Opened, tmp_path: Path) -> None:
    """That of the folder of its first file; without one it is the other model's."""
    name = "backbone_model.layers.0.self_attn.{}_proj.weight"
    rows = bytes(row for row in range(12) for _ in range(12))
    q, k = ("U8", [12, 12], rows), ("U8", [6, 12], rows[:72])
    opened("q", **{name.format("q"): q, name.format("k"): k})
    opened("rest", **{THEIRS: bytes_of(1)})
    models: list[list[list[Path]]] = []
    for heads, folder in ((2, "a"), (6, "b"), (0, "c")):
        paths = [tmp_path / folder / "first" / "q", tmp_path / folder / "rest"]
        paths[0].parent.mkdir(parents=True)
        for path in paths:
            shutil.copy(tmp_path / path.name, path)
        if heads:
            stack = TransformerConfig(layers=1, dim=12, heads=heads, kv_heads=heads // 2, ffn=5)
            text = transformers_config(CsmConfig(stack, stack, 40, 9, 3), "F32", {}, {})
            (paths[0].parent / "config.json").write_text(text)
        models.append([[path] for path in paths])
    for first, second, values in (
        (models[0], models[1], ("3 (0x03)", "1 (0x01)")),
        (models[1], models[0], ("1 (0x01)", "3 (0x03)")),
        (models[0], models[2], None),
        (models[2], models[0], None),
        (models[1], models[2], None),
    ):
        with open_pair(first, second) as pair:
            found = pair.compare(lambda _: None).differences
        told = [(d.index, d.first, d.second) for d in found]
        assert told == ([((1, 0), *values)] * 2 if values else [])


# ---- the first element


@pytest.mark.parametrize("block", [2, 12, 1000])
@pytest.mark.parametrize("shape", [[12], [2, 1, 6]])
def test_the_first_element_that_differs_is_the_first_in_the_file(
    block: int, shape: list[int], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is, whichever bit differs, and however few elements are compared at a time."""
    monkeypatch.setattr(stage, "BLOCK", block)
    values = [0x0101] * 12
    apart = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        apart[axis - 1] = apart[axis] * shape[axis]
    for at, bit in product(range(12), (0x0001, 0x0200, 0x8000)):
        other = values[:at] + [0x0101 ^ bit] * (12 - at)
        content = [struct.pack("<12H", *numbers) for numbers in (values, other)]
        first, second = (opened(n, w=("U16", shape, c)) for n, c in zip("ab", content, strict=True))
        (difference,) = compared(first, second).differences
        expected = tuple(at // step % n for step, n in zip(apart, shape, strict=True))
        assert difference.index == expected
        changed = 0x0101 ^ bit
        assert difference.second == f"{changed} (0x{changed:04x})"


def test_blocks_fit_a_cache(opened: Opened) -> None:
    """They are half a mebibyte; of tensors that are not in row-major order a whole one."""
    rows, columns = 1536, 1024
    file = opened("w", w=("U8", [rows, columns], bytes(rows * columns)))
    plain = name_tensors([file], ()).tensors["w"]
    turned = replace(plain, info=replace(plain.info, stride=(1, rows)))
    for first, second, sizes in (
        (plain, plain, [1 << 19] * 3),
        (turned, plain, [1 << 20, 1 << 19]),
        (plain, turned, [1 << 20, 1 << 19]),
    ):
        told: list[int] = []
        assert first_difference("w", first, second, told.append, threading.Event()) is None
        assert told[::2] == told[1::2] == sizes


@pytest.mark.parametrize("is_first_wide", [False, True])
def test_a_wider_dtype_is_rounded_to_the_other(is_first_wide: bool, opened: Opened) -> None:
    """The values that are told are those of the files."""
    wide = opened("a", w=floats(1.0, 1.0 + 2**-12, 2.0), v=floats(1.0 + 2**-12))
    narrow = struct.pack("<3e", 1.0, 1.0, 4.0)
    other = opened("b", w=("F16", [3], narrow), v=("F16", [1], narrow[:2]))
    files = (wide, other) if is_first_wide else (other, wide)
    found = compared(*files, rounded=True)
    (difference,) = found.differences
    assert (difference.name, difference.index, found.equal) == ("w", (2,), 1)
    assert sorted((difference.first, difference.second)) == ["2.0 (0x40000000)", "4.0 (0x4400)"]
    assert (difference.first == "2.0 (0x40000000)") is is_first_wide


@pytest.mark.parametrize("at", range(12))
def test_packed_elements_are_counted_by_bytes(at: int, opened: Opened) -> None:
    """The index of an element smaller than a byte is that of its byte."""
    content = [bytes(12), bytes(at) + b"\x10" + bytes(11 - at)]
    first, second = (opened(n, w=("F4", [4, 6], c)) for n, c in zip("ab", content, strict=True))
    (difference,) = compared(first, second).differences
    assert (difference.index, difference.second) == ((at,), "16 (0x10)")


# ---- the two tensors that transformers ties


@pytest.mark.parametrize(
    ("audio", "tied", "found"),
    [
        (floats(1, 2, 3), floats(1, 2, 3), None),
        (floats(1, 2, 3), floats(1, 2, 4), "F32 [3], other elements from [2] on"),
        (floats(1, 2, 3), floats(0, 2, 3), "F32 [3], other elements from [0] on"),
        (floats(1, 2), floats(1, 2, 3), "F32 [3]"),
        (floats(1), ("I32", [1], floats(1)[2]), "I32 [1]"),
        (("F32", [2, 1], bytes(8)), ("F32", [2, 1], floats(0, 1)[2]),
         "F32 [2, 1], other elements from [1, 0] on"),
        (("F32", [], bytes(4)), ("F32", [], floats(1)[2]), "F32 [], other elements from [] on"),
    ],
)  # fmt: skip
def test_the_two_that_are_tied_have_to_be_equal(
    audio: tuple[str, list[int], bytes],
    tied: tuple[str, list[int], bytes],
    found: str | None,
    opened: Opened,
) -> None:
    """They are where dtype, shape and bits are; the finding has the first element."""
    file = opened("w", **{THEIRS: audio, TIED: tied})
    findings = tied_findings(name_tensors([file], ()))
    where = f"{file.source.where}: {TIED}"
    expected = [Finding(Kind.DIFFERENT, where, f"what {THEIRS} has", found or "")]
    assert findings == (expected if found else [])


def test_one_of_the_two_alone_is_enough(opened: Opened) -> None:
    for name in (THEIRS, TIED):
        assert tied_findings(name_tensors([opened("w", **{name: floats(1)})], ())) == []
    assert tied_findings(NamedTensors(SOME, {})) == []


def test_nothing_is_read_of_tensors_without_elements(opened: Opened) -> None:
    """They are equal."""
    file = opened("w", w=("F32", [0, 3], b""))
    tensor = name_tensors([file], ()).tensors["w"]
    told: list[int] = []
    assert first_difference("w", tensor, tensor, told.append, threading.Event()) is None
    assert told == []

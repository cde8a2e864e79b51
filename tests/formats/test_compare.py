"""Two files of weights against each other: equal, or which tensor differs first and where."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from csm_weights.commands.compare import compare
from csm_weights.commands.render import blocks
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.concurrency import Cancelled
from csm_weights.errors import Kind, MissingInput, UsageError, WrongContent
from csm_weights.formats import compare as stage
from csm_weights.formats import strided
from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.formats.compare import Comparison, Difference, What
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.transformers_layout import TIED, NamedTensor
from csm_weights.formats.weights_file import open_weights
from csm_weights.pipeline.request import Request
from tests.support import hostile
from tests.support.clone import REPOSITORY, copy_tiny
from tests.support.networks import TINY
from tests.support.oracles import transformers_config, transformers_model

Q_PROJ = "backbone.layers.1.attn.q_proj.weight"
K_PROJ = "decoder.layers.0.attn.k_proj.weight"
AUDIO = "audio_embeddings.weight"
MiB = 1 << 20


def tiny_state(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = TINY.tensor_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compared_paths(first: Path, second: Path) -> Comparison:
    """Compare two paths."""
    return compare(Request(REPOSITORY, "csm-tiny"), first, second)


def only(comparison: Comparison) -> Difference:
    """The one difference there is."""
    assert len(comparison.differences) == 1
    return comparison.differences[0]


Compared = Callable[[dict[str, Tensor], dict[str, Tensor]], Comparison]


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    """Compares two state dicts: the first as safetensors, the second as a checkpoint."""

    def run(first: dict[str, Tensor], second: dict[str, Tensor]) -> Comparison:
        save_file(first, tmp_path / "a.safetensors")
        torch.save(second, tmp_path / "b.pt")
        return compared_paths(tmp_path / "a.safetensors", tmp_path / "b.pt")

    return run


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """The tiny model as model.safetensors, with nothing beside it."""
    folder = tmp_path / "ours"
    folder.mkdir()
    save_file(tiny_state(), folder / "model.safetensors")
    return folder / "model.safetensors"


def transformers_state(codec: bool = True) -> dict[str, Tensor]:
    """Return the state that transformers' own tiny model saves, the tied copy included."""
    model = transformers_model(TINY, tiny_state())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {n: t for n, t in state.items() if codec or not n.startswith("codec_model.")}


def sharded(folder: Path, state: dict[str, Tensor], count: int = 2) -> list[Path]:
    """Saves a state dict in shards, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    where: dict[str, str] = {}
    paths = [folder / f"transformers-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for number, path in enumerate(paths):
        own = {name: state[name].clone().contiguous() for name in names[number::count]}
        save_file(own, path)
        where |= dict.fromkeys(own, path.name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "transformers.safetensors.index.json").write_text(json.dumps(index))
    return paths


# ---- equal


def test_two_formats_of_one_model_are_equal(compared: Compared) -> None:
    """All tensors of equal files are counted, with their bytes, and nothing differs."""
    state = tiny_state()
    comparison = compared(state, state)

    assert comparison.differences == ()
    assert comparison.error is None
    assert len(TINY.tensor_shapes()) == comparison.equal
    assert sum(tensor.nbytes for tensor in state.values()) == comparison.nbytes
    assert (comparison.first.format, comparison.second.format) == ("safetensors", "torch-zip")


@pytest.mark.parametrize("name", ["", "model.safetensors", "model.safetensors.part-ac"])
def test_a_file_is_compared_with_parts(name: str, tmp_path: Path) -> None:
    """Chunk files are named by their folder, by the file they make, or by any one of them."""
    parts = REPOSITORY / "chunks" / "csm-tiny"
    checkpoint = tmp_path / "ckpt.pt"
    pieces = sorted((parts / "ckpt").glob("*.part-*"))
    checkpoint.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    comparison = compared_paths(parts / "safetensors" / name, checkpoint)

    assert (len(TINY.tensor_shapes()), ()) == (comparison.equal, comparison.differences)
    assert comparison.first.where.endswith("part-aa and 5 more chunk files")


def test_bits_of_nan_are_bits(compared: Compared) -> None:
    """Equal NaNs are equal, and NaNs of other bits are not."""
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)

    assert compared({"a": quiet}, {"a": quiet}).error is None
    difference = only(compared({"a": quiet[[0, 0]]}, {"a": quiet}))
    assert (difference.index, difference.second) == ((1,), "nan (0x7fc00001)")


def test_zeros_of_two_signs_differ(compared: Compared) -> None:
    """Minus zero is another bit pattern than zero."""
    difference = only(compared({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}))

    assert (difference.index, difference.what) == ((), What.ELEMENTS)
    assert (difference.first, difference.second) == ("0.0 (0x00000000)", "-0.0 (0x80000000)")


@pytest.mark.parametrize(("dtype", "size"), [("F4", 12), ("F6_E3M2", 18)])
def test_elements_smaller_than_a_byte_are_compared_by_bytes(
    dtype: str, size: int, tmp_path: Path
) -> None:
    """Packed elements that differ are found by their byte."""
    header = {"w": hostile.entry(0, size, [4, 6], dtype)}
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, last in zip(paths, (0, 7), strict=True):
        path.write_bytes(hostile.safetensors(header, bytes(size - 1) + bytes([last])))
    assert compared_paths(paths[0], paths[0]).nbytes == size
    difference = only(compared_paths(*paths))
    assert (difference.index, difference.what) == ((size - 1,), What.ELEMENTS)


def test_empty_tensors_are_equal(compared: Compared) -> None:
    """A tensor without elements has none that differ."""
    state = {"a": torch.zeros(3, 0), "b": torch.tensor(1, dtype=torch.int64)}
    assert (compared(state, state).equal, compared(state, state).nbytes) == (2, 8)


def test_views_of_a_checkpoint_are_read_as_they_are(compared: Compared) -> None:
    """Transposed, sliced and shared tensors of a checkpoint equal their contiguous copies."""
    base = torch.randn(300, 517)
    views = {
        "turned": base.T,
        "column": base[:, 5],
        "slice": base[7:90, 3:500:2],
        "row": base[2],
        "cube": base.view(30, 10, 517).permute(2, 0, 1),
    }
    copies = {
        name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()
    }
    assert compared(copies, views).error is None
    copies["cube"][516, 29, 9] += 1
    copies["turned"][300, 200] += 1
    found = compared(copies, views).differences
    assert [(d.name, d.index) for d in found] == [("cube", (516, 29, 9)), ("turned", (300, 200))]


def test_two_files_without_tensors_are_an_error(compared: Compared) -> None:
    """Two files without tensors are an error, although nothing differs."""
    error = compared({}, {}).error
    assert error
    assert error.exit_code == 4


# ---- different


BORDER = stage.BLOCK // 4


@pytest.mark.parametrize("at", [0, 1, BORDER - 1, BORDER, 2 * BORDER, 3 * BORDER + 16])
def test_the_first_element_that_differs_is_found(at: int, compared: Compared) -> None:
    """First, last, and on either side of a block's border: its index, both values, both bits."""
    first = torch.zeros(3 * BORDER + 17)
    second = first.clone()
    second[at:] = 1.5
    difference = only(compared({"a": first}, {"a": second}))

    assert (What.ELEMENTS, (at,)) == (difference.what, difference.index)
    assert difference.values
    assert [(value.number, value.bits) for value in difference.values] == [
        (0.0, "0x00000000"),
        (1.5, "0x3fc00000"),
    ]


@pytest.mark.parametrize("index", [(0, 0, 0), (2, 3, 4), (29, 69, 89), (15, 0, 89)])
def test_an_index_has_all_dimensions(index: tuple[int, int, int], compared: Compared) -> None:
    """The index is that of torch, with as many figures as the tensor has dimensions."""
    first = torch.randn(30, 70, 90)
    second = first.clone()
    second[index] += 1
    difference = only(compared({"a": first}, {"a": second}))

    assert index == difference.index
    assert f"a{list(index)}" == difference.where
    assert difference.values
    assert first[index].item() == difference.values[0].number
    assert second[index].item() == difference.values[1].number


def test_each_kind_of_difference_is_listed_in_the_order_of_names(compared: Compared) -> None:
    """Missing here, missing there, another dtype, another shape, other elements; the rest equal."""
    first = tiny_state()
    second = dict(first)
    first["audio_head.more"] = torch.zeros(2)
    del second["backbone.norm.scale"]
    second["audio_embeddings.weight"] = first["audio_embeddings.weight"].half()
    second["projection.weight"] = first["projection.weight"].T.contiguous()
    second["text_embeddings.weight"] = first["text_embeddings.weight"] + 1
    second["zzz"] = torch.zeros(1, dtype=torch.int64)
    comparison = compared(first, second)

    expected = [
        ("audio_embeddings.weight", What.DTYPE, "F32 [1120, 64]", "F16 [1120, 64]"),
        ("audio_head.more", What.MISSING, "F32 [2]", "no such tensor"),
        ("backbone.norm.scale", What.MISSING, "F32 [64]", "no such tensor"),
        ("projection.weight", What.SHAPE, "F32 [32, 64]", "F32 [64, 32]"),
    ]
    found = [(d.name, d.what, d.first, d.second) for d in comparison.differences]
    assert expected == found[:4]
    assert [pair[:2] for pair in found[4:]] == [
        ("text_embeddings.weight", What.ELEMENTS),
        ("zzz", What.MISSING),
    ]
    assert len(tiny_state()) - 4 == comparison.equal


def test_a_difference_is_wrong_content(compared: Compared) -> None:
    """The error has the count of differences and the place of the first; it lists at most 20."""
    first = {f"t{number:02}": torch.zeros(4) for number in range(30)}
    second = {name: tensor + (name != "t00") for name, tensor in first.items()}
    error = compared(first, second).error

    assert error
    assert error.exit_code == 4
    assert error.message == "29 tensors differ, the first at t01[0]; 1 are equal"
    assert [finding.kind for finding in error.findings] == [Kind.DIFFERENT] * 21
    assert error.findings[-1].found == "9 more tensors that differ"


# ---- transformers' layout


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """The tiny model as transformers saves it, in two shards."""
    return sharded(tmp_path / "theirs", transformers_state())


def test_transformers_shards_are_the_same_model(ours: Path, shards: list[Path]) -> None:
    """All tensors are equal once renamed and reordered; the tied copy counts, the codec not."""
    comparison = compared_paths(ours, shards[0])

    assert comparison.differences == ()
    assert len(TINY.tensor_shapes()) + 1 == comparison.equal
    codec = [t for n, t in transformers_state().items() if n.startswith("codec_model.")]
    assert (len(codec), sum(t.nbytes for t in codec)) == (
        comparison.second.left_out,
        comparison.second.left_out_bytes,
    )
    assert codec
    assert "and 1 more shard" in comparison.second.where


@pytest.mark.parametrize("name", ["shard", "folder", "index", "checkpoint", "one file"])
def test_a_transformers_checkpoint_may_come_in_any_form(
    name: str, ours: Path, shards: list[Path], tmp_path: Path
) -> None:
    """Any shard, their folder, their index, one file, or a zip; on either side."""
    path = shards[0].parent
    if name == "shard":
        path = shards[1]
    elif name == "index":
        path = path / "transformers.safetensors.index.json"
    elif name == "checkpoint":
        path = tmp_path / "theirs.pt"
        torch.save(transformers_state(), path)
    elif name == "one file":
        path = tmp_path / "theirs.safetensors"
        save_file(transformers_state(codec=False), path)

    assert compared_paths(path, ours).differences == ()
    assert compared_paths(path, path).differences == ()


@pytest.mark.parametrize("name", [Q_PROJ, K_PROJ])
def test_an_element_of_q_or_k_is_found_in_our_order(name: str, ours: Path, tmp_path: Path) -> None:
    """The index of an element in a permuted projection is that of our own file."""
    state = tiny_state()
    state[name][5, 7] += 1
    model = transformers_model(TINY, state)
    shard = sharded(tmp_path / "other", dict(model.state_dict()))[0]
    difference = only(compared_paths(ours, shard))

    assert (name, (5, 7)) == (difference.name, difference.index)
    assert difference.values
    assert state[name][5, 7].item() == difference.values[1].number


def test_a_projection_in_the_wrong_order_differs(ours: Path, tmp_path: Path) -> None:
    """Our own rows under transformers' name are another model."""
    state = transformers_state()
    theirs = "backbone_model.layers.1.self_attn.q_proj.weight"
    state[theirs] = tiny_state()[Q_PROJ]
    difference = only(compared_paths(ours, sharded(tmp_path / "other", state)[0]))

    assert (difference.name, difference.index) == (Q_PROJ, (1, 0))


def test_a_tied_copy_that_differs_is_a_difference(ours: Path, tmp_path: Path) -> None:
    """The copy of the audio embeddings is compared under its own name."""
    state = transformers_state()
    state[TIED][1119, 63] += 1
    difference = only(compared_paths(ours, sharded(tmp_path / "other", state)[0]))

    assert (difference.name, difference.index) == (TIED, (1119, 63))


def test_the_tied_copy_alone_is_enough(ours: Path, tmp_path: Path) -> None:
    """If only one of the two tied names is saved, it is the audio embeddings."""
    state = transformers_state()
    del state["backbone_model.embed_tokens.embed_audio_tokens.weight"]

    comparison = compared_paths(ours, sharded(tmp_path / "other", state)[0])
    assert (len(TINY.tensor_shapes()), None) == (comparison.equal, comparison.error)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled in parts": lambda state: {
        name.replace(".layers.", "._orig_mod.layers."): tensor for name, tensor in state.items()
    },
    "model and optimizer": lambda state: {
        "model": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
}


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_a_training_loop_wraps_around_a_model_is_left_out(
    name: str, layout: str, ours: Path, tmp_path: Path
) -> None:
    """Keys, prefixes and the state of an optimizer do not make it another model."""
    state = tiny_state() if layout == "original" else transformers_state(codec=False)
    torch.save(WRAPPED[name](state), tmp_path / "run.pt")

    comparison = compared_paths(ours, tmp_path / "run.pt")
    assert comparison.differences == ()
    assert comparison.equal == len(state)


def test_a_name_that_is_not_csms_is_a_difference(ours: Path, tmp_path: Path) -> None:
    """A tensor of transformers' layout that maps to none of ours differs by its name."""
    name = "backbone_model.layers.0.self_attn.q_proj.bias"
    path = sharded(tmp_path / "other", transformers_state() | {name: torch.zeros(64)})[0]
    difference = only(compared_paths(ours, path))

    assert (name, What.UNKNOWN, "F32 [64]") == (difference.name, difference.what, difference.second)
    assert [name] == [d.name for d in compared_paths(path, path).differences]


def test_heads_come_from_the_config(tmp_path: Path) -> None:
    """A network of unknown shape is compared by the config.json beside it, not by a guess."""
    stack = FLAVORS["tiny-backbone"]
    odd = CsmConfig(
        type(stack)(layers=1, dim=48, heads=2, kv_heads=1, ffn=40), TINY.decoder, 512, 35, 32
    )
    state = {name: torch.randn(shape) for name, shape in odd.tensor_shapes().items()}
    save_file(state, tmp_path / "model.safetensors")
    shard = sharded(tmp_path / "theirs", dict(transformers_model(odd, state).state_dict()))[0]
    with pytest.raises(WrongContent, match=r"put the model's config.json beside the file"):
        compared_paths(tmp_path / "model.safetensors", shard)
    transformers_config(odd).to_json_file(tmp_path / "theirs" / "config.json")
    assert compared_paths(tmp_path / "model.safetensors", shard).differences == ()


@pytest.mark.parametrize("shape", [(63, 64), (64,), (16, 4, 64)])
def test_a_projection_that_is_no_whole_heads_is_refused(
    shape: tuple[int, ...], ours: Path, tmp_path: Path
) -> None:
    """A projection of another layer tells the rows of a head, and this one has not those."""
    name = "backbone_model.layers.1.self_attn.q_proj.weight"
    state = transformers_state(codec=False) | {name: torch.zeros(shape)}
    save_file(state, tmp_path / "theirs.safetensors")
    with pytest.raises(WrongContent, match="cannot be split into heads") as caught:
        compared_paths(ours, tmp_path / "theirs.safetensors")
    (finding,) = caught.value.findings
    assert finding.where.endswith(f"theirs.safetensors: {name}")
    assert (finding.expected, finding.found) == ("whole heads of 16 rows", f"F32 {list(shape)}")


def test_a_projection_of_other_heads_has_another_shape(ours: Path, tmp_path: Path) -> None:
    """A projection of one head less is compared, and differs by its shape."""
    name = "backbone_model.layers.1.self_attn.q_proj.weight"
    state = transformers_state(codec=False) | {name: torch.zeros(48, 64)}
    save_file(state, tmp_path / "theirs.safetensors")
    difference = only(compared_paths(ours, tmp_path / "theirs.safetensors"))
    assert (difference.name, difference.second) == (Q_PROJ, "F32 [48, 64]")


def test_missing_shards_are_named(ours: Path, tmp_path: Path) -> None:
    """Without all of its shards a checkpoint is not compared, whichever way it is named."""
    shards = sharded(tmp_path / "theirs", transformers_state(), count=3)
    lost = [shards[0], shards[2]]
    for path in lost:
        path.unlink()
    index = shards[0].parent / "transformers.safetensors.index.json"
    for path in (*shards, shards[0].parent, index):
        with pytest.raises(MissingInput) as caught:
            compared_paths(ours, path)
        assert [finding.where for finding in caught.value.findings] == list(map(str, lost))


def numbered(folder: Path, *names: str) -> Path:
    """A folder with a shard of one tensor under each name; no two have the same tensor."""
    folder.mkdir()
    for number, name in enumerate(names):
        state = {f"t{number}": torch.full((3,), float(number))}
        torch.save(state, folder / name) if name.endswith(".bin") else save_file(
            state, folder / name
        )
    return folder


@pytest.mark.parametrize(
    ("names", "tensors"),
    [
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], 2),
        (["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"], 2),
        (["m-1-of-2.safetensors", "m-2-of-2.safetensors"], 2),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], 2),
    ],
)
def test_every_shard_of_a_set_is_read(names: list[str], tensors: int, tmp_path: Path) -> None:
    """Shards are numbered from 1 or from 0, in either format; each counts, named or by folder."""
    folder = numbered(tmp_path / "shards", *names)
    for path in (folder, *sorted(folder.iterdir())):
        assert compared_paths(path, path).equal == tensors
        assert compared_paths(path, path).error is None


@pytest.mark.parametrize(
    "names",
    [
        ["m-00000-of-00002", "m-00001-of-00002", "m-00002-of-00002"],
        ["m-00001-of-00002", "m-00002-of-00002", "m-00003-of-00002"],
        ["m-00001-of-00002", "m-00002-of-00002", "m-2-of-2"],
    ],
)
def test_a_shard_too_many_is_refused(names: list[str], tmp_path: Path) -> None:
    """A shard with a number that the set does not have is never left out of a comparison."""
    folder = numbered(tmp_path / "shards", *(f"{name}.safetensors" for name in names))
    other = numbered(tmp_path / "other", *(f"{name}.safetensors" for name in names))
    (folder / f"{names[0]}.safetensors").write_bytes(b"")
    for path in (folder, *sorted(folder.iterdir())):
        with pytest.raises(WrongContent, match="do not fit together"):
            compared_paths(path, other)


def test_an_index_and_the_shards_must_agree(tmp_path: Path) -> None:
    """A shard that the index does not list, and one that only it lists, are refused."""
    paths = sharded(tmp_path / "theirs", tiny_state(), count=3)
    index = paths[0].parent / "transformers.safetensors.index.json"
    whole = json.loads(index.read_text())
    assert compared_paths(index, paths[0].parent).error is None
    listed = {n: f for n, f in whole["weight_map"].items() if f != paths[2].name}
    index.write_text(json.dumps({"weight_map": listed}))
    for path in (index, paths[0], paths[0].parent):
        with pytest.raises(WrongContent, match=f"{paths[2].name}.*another shard"):
            compared_paths(path, path)
    more = whole["weight_map"] | {"more": "extra.safetensors"}
    index.write_text(json.dumps({"weight_map": more}))
    with pytest.raises(MissingInput, match=r"extra\.safetensors"):
        compared_paths(paths[0], paths[0])


@pytest.mark.parametrize(
    ("names", "listed", "found"),
    [
        (["model.safetensors", "extra.safetensors"], None, 2),
        (["pytorch_model.bin", "heads.bin"], None, 2),
        (["model.safetensors"], ["model.safetensors"], 1),
        (["first.safetensors", "extra.safetensors"], None, 2),
        (["model.safetensors"], ["model.safetensors", "lost.safetensors"], r"lost\.safetensors"),
        (["model.safetensors", "first.safetensors"], ["first.safetensors"], "name one of them"),
        (
            ["m-00001-of-00001.safetensors", "M-00002-of-00001.SAFETENSORS"],
            [],
            r"M-00002-of-00001\.SAFETENSORS",
        ),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["other.safetensors"],
            r"other\.safetensors",
        ),
    ],
)
def test_all_that_an_index_lists_is_read_or_refused(
    names: list[str], listed: list[str] | None, found: int | str, tmp_path: Path
) -> None:
    """A file counts whatever it is called; so does a shard in capitals that no index lists."""
    folder = numbered(tmp_path / "some", *names)
    if listed != []:
        stem = "pytorch_model.bin" if names[0].endswith(".bin") else "model.safetensors"
        listed = names if listed is None else listed
        index = {"weight_map": {f"t{n}": name for n, name in enumerate(listed)}}
        (folder / f"{stem}.index.json").write_text(json.dumps(index))
    if isinstance(found, str):
        with pytest.raises((MissingInput, WrongContent, UsageError), match=found):
            compared_paths(folder, folder)
        return
    for path in (folder, folder / names[0]):
        assert compared_paths(path, folder).equal == found


@pytest.mark.parametrize("index", ["pytorch_model.bin", "model.pt"])
def test_an_index_of_another_format_says_nothing(index: str, ours: Path) -> None:
    """What it lists, or that it is broken, does not matter to a safetensors file beside it."""
    (ours.parent / f"{index}.index.json").write_text("[]")
    assert compared_paths(ours, ours.parent).error is None


def test_an_index_may_be_large(tmp_path: Path) -> None:
    """An index of many megabytes is read: large models have a hundred thousand tensors."""
    paths = sharded(tmp_path / "theirs", tiny_state())
    index = paths[0].parent / "transformers.safetensors.index.json"
    names = {f"{'layer.' * 12}{n}": paths[n % 2].name for n in range(60_000)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert index.stat().st_size > 6 * MiB
    assert compared_paths(index, index).error is None


def test_a_file_and_its_shards_in_one_folder_are_not_guessed_at(ours: Path) -> None:
    """A folder with model.safetensors and shards of the same name needs a word which is meant."""
    shutil.copy(ours, ours.with_name("model-00001-of-00001.safetensors"))
    with pytest.raises(UsageError, match="name one of them"):
        compared_paths(ours.parent, ours)


# ---- bad input


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "../theirs/transformers-00001-of-00002.safetensors"}}',
        b'{"weight_map": {"a": 7}}',
        b'{"weight_map": ["a"]}',
    ],
)
def test_a_hostile_index_is_refused(content: bytes, ours: Path, shards: list[Path]) -> None:
    """An index names shards beside it, and nothing else."""
    index = shards[0].parent / "transformers.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(WrongContent, match="shards"):
        compared_paths(ours, index)


def test_absurdly_many_shards_are_refused(ours: Path, tmp_path: Path) -> None:
    """A name of one of 99,999 shards is refused."""
    path = tmp_path / "model-00001-of-99999.safetensors"
    shutil.copy(ours, path)
    with pytest.raises(WrongContent, match="1 to 200 shards"):
        compared_paths(ours, path)


def test_a_tensor_in_two_shards_is_refused(ours: Path, shards: list[Path]) -> None:
    """A tensor that two shards have is refused."""
    shutil.copy(shards[0], shards[1])
    with pytest.raises(WrongContent, match="each tensor once"):
        compared_paths(ours, shards[0])


def test_shards_of_several_models_are_not_guessed_at(ours: Path, shards: list[Path]) -> None:
    """A folder with two sets of shards needs a word which are meant."""
    shutil.copy(shards[0], shards[0].with_name("other-00001-of-00001.safetensors"))
    with pytest.raises(UsageError, match="several models"):
        compared_paths(ours, shards[0].parent)


@pytest.mark.parametrize("name", ["one_tensor_inside_another", "header_not_json", "access_page"])
def test_a_hostile_file_is_refused(name: str, ours: Path, tmp_path: Path) -> None:
    """A file that the readers refuse is not compared."""
    content, _ = hostile.BAD_SAFETENSORS[name]
    with pytest.raises(WrongContent, match="cannot be read"):
        compared_paths(ours, hostile.written(tmp_path, content))


def test_a_pickle_that_runs_something_is_not_run(ours: Path, tmp_path: Path) -> None:
    """A checkpoint that would run code is refused, and the code does not run."""
    mark = tmp_path / "ran"
    pickles = hostile.running_pickles(str(mark))
    for pickle, _ in pickles.values():
        path = hostile.written(tmp_path, hostile.checkpoint(pickle))
        with pytest.raises(WrongContent):
            compared_paths(ours, path)
    assert not mark.exists()


def test_a_path_to_nothing_is_missing_input(ours: Path, tmp_path: Path) -> None:
    """A file that is not there, and a folder without weights, are missing inputs."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "none.pt", empty, tmp_path / "none.safetensors.index.json"):
        with pytest.raises(MissingInput) as caught:
            compared_paths(ours, path)
        # a command that gets a model helps where a folder lacks it, not with a misspelt path
        assert (caught.value.findings[0].help == "check the path") is (path != empty)


def test_what_cannot_be_opened_is_named(ours: Path) -> None:
    """The operating system's own reason is told of the file, under its whole name."""
    for name, reason in {
        "x.pt": "Not a directory",
        "x" * 300 + ".pt": "File name too long",
    }.items():
        path = ours / name if len(name) < 300 else ours.with_name(name)
        with pytest.raises(WrongContent, match="the operating system") as caught:
            open_weights([path])
        (finding,) = caught.value.findings
        assert (finding.kind, finding.where) == (Kind.UNREADABLE, str(path))
        assert finding.found == reason


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_disk_that_fails_is_named_by_its_file(
    reads: int, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that fails is told with the very chunk file, at the first read and at a later one."""
    content, left = ours.read_bytes(), iter(range(reads))
    parts = [hostile.written(ours.parent, content[:4], "a")]
    parts.append(hostile.written(ours.parent, content[4:], "b"))
    preadv = os.preadv
    second = parts[1].stat().st_ino

    def failing(fd: int, *arguments: Any) -> int:
        if os.fstat(fd).st_ino == second and next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, *arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(WrongContent) as caught:
        open_weights(parts)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.UNREADABLE, str(parts[1]))
    assert finding.found == "Input/output error"


def test_a_file_that_is_cut_while_it_is_opened_is_refused(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that ends early, though the file was long enough, is a change of the file."""
    preadv = os.preadv

    def cutting(*arguments: Any) -> int:
        os.truncate(ours, 600)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(WrongContent, match="the weights ended early") as caught:
        open_weights([ours])
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.CHANGED, str(ours))
    assert finding.found == "a shorter one"


def test_a_cancelled_comparison_reads_no_more(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that compares a tensor ends before its next block once another has failed."""
    cancel = threading.Event()
    read: list[int] = []

    def progress(nbytes: int) -> None:
        read.append(nbytes)
        cancel.set()

    monkeypatch.setattr(stage, "BLOCK", 4096)
    with open_weights([ours]) as weights:
        tensor = NamedTensor.of(weights.source, weights.index.tensors[Q_PROJ])
        assert stage.first_difference(Q_PROJ, tensor, tensor, read.append, cancel) is None
        assert sum(read) == 2 * tensor.info.nbytes
        read.clear()
        with pytest.raises(Cancelled):
            stage.first_difference(Q_PROJ, tensor, tensor, progress, cancel)
    assert read == [4096, 4096]


def test_a_file_that_is_written_to_meanwhile_is_refused(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write during the comparison is an error, whatever the result."""
    other = tmp_path / "other.safetensors"
    shutil.copy(ours, other)
    read = strided.read_elements

    def disturbed(source: MultipartFile, *arguments: Any) -> None:
        read(source, *arguments)
        with other.open("r+b") as file:
            file.write(other.read_bytes()[:1])
            os.utime(other, ns=(1, 1))

    monkeypatch.setattr(stage, "read_elements", disturbed)
    with pytest.raises(WrongContent) as caught:
        compared_paths(ours, other)
    assert [(Kind.CHANGED, str(other))] == [(f.kind, f.where) for f in caught.value.findings]


def test_a_file_that_is_cut_meanwhile_is_refused(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends early while it is read has changed too."""
    other = tmp_path / "other.safetensors"
    shutil.copy(ours, other)
    read = strided.read_elements

    def cutting(source: MultipartFile, *arguments: Any) -> None:
        os.truncate(other, 10_000)
        read(source, *arguments)

    monkeypatch.setattr(stage, "read_elements", cutting)
    with pytest.raises(WrongContent, match="found a shorter one"):
        compared_paths(ours, other)


# ---- the files of a model


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with csm-tiny's manifest and chunk files."""
    return copy_tiny(tmp_path / "repository")


def joined(root: Path, name: str, folder: str) -> Path:
    parts = sorted((root / "chunks" / "csm-tiny").rglob(f"{name}.part-*"))
    path = root / folder / "csm-tiny" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_the_two_formats_are_found_wherever_they_are(repository: Path) -> None:
    """Installed files come before staged ones, and these before chunk files."""
    request = Request(repository, "csm-tiny")
    assert "part-aa" in compare(request).first.where
    staged = joined(repository, "model.safetensors", "output")
    assert str(staged) == compare(request).first.where
    placed = joined(repository, "model.safetensors", "models")
    comparison = compare(request)
    assert str(placed) == comparison.first.where
    assert "ckpt.pt.part-aa" in comparison.second.where
    assert (len(TINY.tensor_shapes()), None) == (comparison.equal, comparison.error)


def test_one_file_is_compared_with_an_installed_one(repository: Path) -> None:
    """That is the safetensors, unless it is the very file that was named."""
    request = Request(repository, "csm-tiny")
    placed = joined(repository, "model.safetensors", "models")
    checkpoint = joined(repository, "ckpt.pt", "models")

    assert str(placed) == compare(request, checkpoint).second.where
    assert str(checkpoint) == compare(request, placed).second.where


def test_a_missing_file_is_named_with_the_command_for_it(repository: Path) -> None:
    """A format without a file and without all of its chunk files is a missing input."""
    (repository / "chunks/csm-tiny/ckpt/ckpt.pt.part-ab").unlink()
    with pytest.raises(MissingInput) as caught:
        compare(Request(repository, "csm-tiny"))
    (finding,) = caught.value.findings
    assert finding.where.endswith("models/csm-tiny/ckpt.pt")
    assert finding.help == "inv fetch --model csm-tiny --only=ckpt"


# ---- reports


def test_the_text_has_a_verdict(ours: Path, shards: list[Path]) -> None:
    """The text has both files, the tensors left out, and OK."""
    text = as_text.render(compared_paths(ours, shards[0]))
    assert "safetensors, transformers' names" in text
    assert "left out of" in text
    assert text.splitlines()[-1].startswith("OK: 53 tensors, ")


def test_the_text_of_a_difference_says_where(compared: Compared) -> None:
    """The table has the element and both values, the error the first of them."""
    first = {"a": torch.zeros(2, 3), "b\n\x1b[31m": torch.zeros(1)}
    second = {"a": torch.zeros(2, 3), "b\n\x1b[31m": torch.zeros(1)}
    second["a"][1, 2] = 0.5
    second["b\n\x1b[31m"][0] = float("nan")
    comparison = compared(first, second)
    text = as_text.render(comparison)

    assert "a[1, 2]" in text
    assert "0.0 (0x00000000) against 0.5 (0x3f000000)" in text
    assert "\x1b" not in text
    assert comparison.error is not None
    message = blocks.error(comparison.error).splitlines()[0]
    assert message == "error: 2 tensors differ, the first at a[1, 2]; 0 are equal"
    data = json.loads(
        as_json.render(comparison),
        parse_constant=lambda word: pytest.fail(f"{word} is not JSON"),
    )
    assert (data["ok"], data["exit_code"], data["differences"][0]["index"]) == (False, 4, [1, 2])
    assert data["differences"][0]["values"][1] == {"number": 0.5, "bits": "0x3f000000"}
    assert data["differences"][1]["values"][1] == {"number": "nan", "bits": "0x7fc00000"}


# ---- memory


MEASURED = """
import sys
from pathlib import Path
from csm_weights import concurrency
from csm_weights.commands import compare as command
from csm_weights.commands.render import blocks
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.formats import compare
from csm_weights.pipeline import request
compare.workers = concurrency.workers = lambda: 64
found = command.compare(request.Request(Path.cwd(), "csm-tiny"), *map(Path, sys.argv[1:]))
as_json.render(found)
status = Path("/proc/self/status").read_text()
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(found.equal, peak, bool({"torch", "numpy", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Large tensors, most of them turned, take below 100 MiB on 64 cores, and no torch."""
    files = [tmp_path / "a.safetensors", tmp_path / "b.pt"]
    state = {str(n): torch.randint(0, 99, (2048, 2048), dtype=torch.int32).T for n in range(8)}
    state |= {"large": torch.zeros(3 * 2**23, dtype=torch.int32)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, files[0])
    torch.save(state, files[1])
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    equal, peak, heavy = done.stdout.split()

    assert (equal, heavy) == ("9", "False")
    assert int(peak) < 100 << 10

"""Names of tensors in transformers' layout and ours, and the order of rows."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.formats.model_files import transformers_config
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements
from csm_weights.formats.tensor_index import TensorIndex, TensorInfo, row_major
from csm_weights.formats.transformers_layout import (
    AUDIO,
    TIED,
    Layout,
    NamedTensor,
    NamedTensors,
    Summary,
    Value,
    in_transformers_layout,
    name_tensors,
    own_name,
    read_configs,
)
from csm_weights.formats.weights_file import WeightsFile, open_weights
from tests.support import hostile
from tests.support.networks import TINY

THEIRS = "backbone_model.embed_tokens.embed_audio_tokens.weight"
Q_PROJ = "backbone_model.layers.0.self_attn.q_proj.weight"
K_PROJ = "backbone_model.layers.0.self_attn.k_proj.weight"


def weights(*infos: TensorInfo, where: str = "w") -> WeightsFile:
    """A file of tensors that are never read."""
    source: Any = type("Source", (), {"where": where})()
    return WeightsFile(source, TensorIndex({info.name: info for info in infos}, 0), "safetensors")


def info(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, row_major(shape))


def named(names: Iterable[str]) -> NamedTensors:
    return name_tensors([weights(*(info(name, 2) for name in names))], ())


# ---- names


def test_every_tensor_has_a_name_of_each_layout() -> None:
    """Every name goes there and back, with the tied copy more."""
    shapes = TINY.tensor_shapes()
    own = name_tensors([weights(*(info(name, *shape) for name, shape in shapes.items()))], ())
    theirs = in_transformers_layout(own.tensors, TINY)
    assert len(theirs) == len(shapes) + 1
    assert theirs[TIED] is own.tensors[AUDIO]
    assert {own_name(name) for name in theirs} == {*shapes, None}
    assert own_name(TIED) is None
    back = name_tensors(
        [weights(*(info(name, *tensor.shape) for name, tensor in theirs.items()))], ()
    )
    assert {name: tensor.shape for name, tensor in back.tensors.items()} == shapes
    assert {name: back.name_in_file(name) for name in shapes} == {
        own_name(name): name for name in theirs if name != TIED
    }
    assert back.name_in_file("other") == "other"
    assert own.name_in_file("projection.weight") == "projection.weight"


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        (Q_PROJ, "backbone.layers.0.attn.q_proj.weight"),
        (Q_PROJ.replace(".0.", ".9999."), "backbone.layers.9999.attn.q_proj.weight"),
        (Q_PROJ.replace(".0.", ".10000."), None),
        (Q_PROJ.replace(".0.", ".x."), None),
        (Q_PROJ.replace(".0.", "..", 1), None),
        (Q_PROJ.replace("backbone_model", "backbone"), None),
        (Q_PROJ.replace("weight", "bias"), None),
        ("lm_head.weight", "codebook0_head.weight"),
        ("codebook0_head.weight", None),
        ("", None),
    ],
)
def test_a_name_that_is_not_csms_has_no_other(theirs: str, own: str | None) -> None:
    assert own_name(theirs) == own


@pytest.mark.parametrize(
    ("names", "wrapper", "found"),
    [
        (["projection.weight"], "", ["projection.weight"]),
        (["model.projection.weight"], "model.", ["projection.weight"]),
        (["model.projection.weight", "epoch"], "model.", ["projection.weight"]),
        (["model.x", "model.y", "z"], "", ["model.x", "model.y", "z"]),
        (
            ["state_dict.module._orig_mod.audio_head", "state_dict.x"],
            "state_dict.module._orig_mod.",
            ["audio_head"],
        ),
        (
            ["module.audio_head", "module._orig_mod.layers", "other.weight"],
            "module.",
            ["audio_head", "_orig_mod.layers"],
        ),
        (
            ["model.audio_head", "module.audio_head", "module.projection.weight"],
            "module.",
            ["audio_head", "projection.weight"],
        ),
        (
            ["backbone._orig_mod.layers.0.attn.q_proj.weight", "a._orig_mod._orig_mod.b"],
            "",
            ["backbone.layers.0.attn.q_proj.weight", "a._orig_mod.b"],
        ),
        (["models.audio_head"], "", ["models.audio_head"]),
    ],
)
def test_what_stands_before_most_names_is_left_out(
    names: list[str], wrapper: str, found: list[str]
) -> None:
    """It is told by the names that only CSM has; what is not in it is counted."""
    result = named(names)
    assert (result.wrapper, list(result.tensors)) == (wrapper, found)
    assert result.beside == len(names) - len(found)
    assert result.summary == Summary("w", "safetensors", Layout.OWN, len(found), 0, 0)
    assert result.name_in_file("audio_head") == f"{wrapper}audio_head"


# ---- what is told of some weights


@pytest.mark.parametrize(
    ("count", "where"), [(1, "w0"), (2, "w0 and 1 more shard"), (3, "w0 and 2 more shards")]
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_shards_are_one_model(count: int, where: str, prefix: str) -> None:
    """The summary counts the model's tensors, the tied copy too, and the codec's apart."""
    files = [weights(info(f"{prefix}lm_head.weight", 2), where="w0")]
    files += [
        weights(info(f"{prefix}codec_model.t{n}", n, 3), where=f"w{n}") for n in range(1, count)
    ]
    files[-1] = replace(
        files[-1],
        index=TensorIndex(
            {**files[-1].index.tensors, prefix + THEIRS: info(prefix + THEIRS, 2),
             prefix + TIED: info(prefix + TIED, 4), prefix + "x": info(prefix + "x", 5)},
            0,
        ),
    )  # fmt: skip
    found = name_tensors(files, ())
    size = sum(12 * n for n in range(1, count))
    assert found.summary == Summary(where, "safetensors", Layout.TRANSFORMERS, 4, count - 1, size)
    assert list(found.tensors) == ["codebook0_head.weight", AUDIO]
    assert (found.tied or pytest.fail("not tied")).shape == (4,)
    assert [tensor.shape for tensor in found.unknown] == [(5,)]
    assert list(found.codec) == [f"t{n}" for n in range(1, count)]
    assert (found.wrapper, found.beside) == (prefix, 0)
    assert found.name_in_file("codebook0_head.weight") == f"{prefix}lm_head.weight"


@pytest.mark.parametrize("name", ["audio_head", THEIRS])
def test_the_format_is_that_of_the_first_shard(name: str) -> None:
    other = replace(weights(info("x", 1)), format="torch-zip")
    assert name_tensors([weights(info(name, 2)), other], ()).summary.format == "safetensors"


@pytest.mark.parametrize("names", [[THEIRS, TIED], [TIED], [THEIRS]])
def test_either_of_the_tied_tensors_is_the_embeddings(names: list[str]) -> None:
    """A second one is kept apart."""
    found = named(names)
    assert found.tensors[AUDIO].name == names[0]
    assert (found.tied is not None) is (len(names) == 2)
    assert (found.unknown, found.summary.tensors) == ((), len(names))


def test_a_layout_is_told_by_its_own_names() -> None:
    """A decoder or the embeddings are enough; a name of another model is not."""
    signs = {
        "depth_decoder.x": Layout.TRANSFORMERS,
        THEIRS: Layout.TRANSFORMERS,
        "backbone_model.norm.weight": Layout.OWN,
        "lm_head.weight": Layout.OWN,
        "codec_model.x": Layout.OWN,
    }
    assert {name: named([name]).summary.layout for name in signs} == signs


def test_a_tensor_of_two_shards_is_refused() -> None:
    """The finding has the second one, by its name in the file."""
    files = [weights(info("audio_head", 1), where="a"), weights(info("audio_head", 1), where="b")]
    with pytest.raises(WrongContent, match="the shards of a and 1 more shard do not fit") as caught:
        name_tensors(files, ())
    words = ("each tensor once", "a second one", GET_AGAIN)
    assert caught.value.findings == (Finding(Kind.MALFORMED, "b: audio_head", *words),)


# ---- elements


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "expected"),
    [
        ("F32", (4, 3), 40, 9),
        ("F32", (4, 3), 12, 3),
        ("F32", (4, 3), 11, 2),
        ("F32", (4, 3), 48, 12),
        ("F32", (4, 0), 40, 10),
        ("F32", (), 44, 11),
        ("C128", (9,), 40, 2),
        ("F32", (2, 1), 20, 5),
    ],
)
def test_blocks_are_whole_rows(
    dtype: str, shape: tuple[int, ...], size: int, expected: int
) -> None:
    """If a row fits; else they are as many elements as fit."""
    tensor = NamedTensor.of(weights().source, info("w", *shape, dtype=dtype))
    assert tensor.block_elements(size) == expected


def test_an_element_has_a_number_and_bits(tmp_path: Path) -> None:
    """The bits are in the order of a number, the highest first."""
    content = struct.pack("<3f", 1.0, -2.5, 3.0) + bytes([0x12, 0x34, 0xB8])
    header = {"w": hostile.entry(0, 12, [3]), "p": hostile.entry(12, 14, [2, 2], "F4")}
    header["f"] = hostile.entry(14, 15, [1], "F8_E4M3")
    with open_weights([hostile.written(tmp_path, hostile.safetensors(header, content))]) as file:
        tensors = name_tensors([file], ()).tensors
        assert tensors["w"].value(1) == Value(-2.5, "0xc0200000")
        assert str(tensors["w"].value(0)) == "1.0 (0x3f800000)"
        assert str(tensors["p"].value(1)) == "52 (0x34)"
        assert tensors["f"].value(0) == Value(-1.0, "0xb8")
        assert (tensors["p"].signature, tensors["p"].info.shape) == ("F4 [2, 2]", (2,))
        assert tensors["w"].signature == "F32 [3]"


# ---- the order of rows

#: A network of no published flavor: heads of 6 rows in the backbone, of 4 in the decoder.
ODD = CsmConfig(
    TransformerConfig(layers=1, dim=12, heads=2, kv_heads=1, ffn=5),
    TransformerConfig(layers=1, dim=8, heads=2, kv_heads=2, ffn=5),
    *(40, 9, 3),
)


def rows_of(tensor: NamedTensor) -> list[int]:
    """Return the first element of each row."""
    room = bytearray(2 * tensor.shape[0] * tensor.shape[1])
    read_elements(tensor.source, tensor.info, 0, room)
    return list(memoryview(room).cast("H")[:: tensor.shape[1]])


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """The odd network in our layout, with the number of each row in its elements."""
    header, data = {}, b""
    for name, shape in ODD.tensor_shapes().items():
        if "_proj" in name:
            content = b"".join(struct.pack("<H", row) * shape[1] for row in range(shape[0]))
            header[name] = hostile.entry(len(data), len(data) + len(content), shape, "U16")
            data += content
    header[AUDIO] = hostile.entry(len(data), len(data), [0], "U16")
    return hostile.written(tmp_path, hostile.safetensors(header, data))


def test_rows_go_from_one_order_to_the_other_and_back(odd: Path) -> None:
    """transformers has the first rows of all pairs of a head, then the second."""
    with open_weights([odd]) as file:
        own = name_tensors([file], ()).tensors
        theirs = in_transformers_layout(own, ODD)
        q, k = theirs[Q_PROJ], theirs[K_PROJ]
        assert rows_of(q) == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
        assert rows_of(k) == [0, 2, 4, 1, 3, 5]
        decoder = theirs["depth_decoder.model.layers.0.self_attn.k_proj.weight"]
        assert rows_of(decoder) == [0, 2, 1, 3, 4, 6, 5, 7]
        assert rows_of(theirs[Q_PROJ.replace("q_", "v_")]) == list(range(6))


@pytest.mark.parametrize("told_by", ["network", "config", "second config"])
def test_heads_are_told_by_a_network(told_by: str, odd: Path, tmp_path: Path) -> None:
    """The one that is given, or else that of a config.json whose projections fit."""
    folders = [tmp_path / name for name in ("none", "a", "b")]
    for folder in folders[1:]:
        folder.mkdir()
    if told_by == "second config":
        (folders[1] / "config.json").write_text(transformers_config(TINY, "F32", {}, {}))
    if told_by != "network":
        (folders[2] / "config.json").write_text(transformers_config(ODD, "F32", {}, {}))
    header_of = odd.read_bytes()
    with open_weights([odd]) as file:
        renamed = {
            name: replace(tensor.info, name=name, shape=tensor.shape)
            for name, tensor in in_transformers_layout(
                name_tensors([file], ()).tensors, ODD
            ).items()
            if len(tensor.info.shape) != 4 or name in (Q_PROJ, K_PROJ)
        }
        plain = {name: replace(one, stride=row_major(one.shape)) for name, one in renamed.items()}
        again = WeightsFile(file.source, TensorIndex(plain, len(header_of)), file.format)
        found = name_tensors([again], folders, ODD if told_by == "network" else None)
        assert rows_of(found.tensors["backbone.layers.0.attn.q_proj.weight"]) == [
            *(0, 3, 1, 4, 2, 5),
            *(6, 9, 7, 10, 8, 11),
        ]
        assert rows_of(found.tensors["backbone.layers.0.attn.k_proj.weight"]) == [0, 3, 1, 4, 2, 5]
    assert read_configs(folders) == ([TINY] if told_by == "second config" else []) + (
        [] if told_by == "network" else [ODD]
    )


@pytest.mark.parametrize(
    ("shapes", "help_text"),
    [
        ({Q_PROJ: (12, 12), K_PROJ: (6, 12)}, "put the model's config.json beside the file"),
        ({Q_PROJ: (64, 64)}, "put the model's config.json beside the file"),
        ({K_PROJ: (32, 64)}, "put the model's config.json beside the file"),
        ({Q_PROJ: (64, 64), K_PROJ: (31, 64)}, "put the model's config.json beside the file"),
    ],
)
def test_heads_of_an_unknown_size_are_refused(
    shapes: dict[str, tuple[int, ...]], help_text: str
) -> None:
    """A published network has to have both projections."""
    infos = [info(name, *shape) for name, shape in shapes.items()]
    with pytest.raises(WrongContent, match="order of the rows of q and k cannot be told") as caught:
        name_tensors([weights(*infos, info(THEIRS, 2))], ())
    name, shape = next(iter(shapes.items()))
    words = ("heads of a known size", f"F32 {list(shape)}", help_text)
    assert caught.value.findings == (Finding(Kind.MALFORMED, f"w: {name}", *words),)


def test_mapped_files_have_the_rows_too(odd: Path) -> None:
    """A tensor keeps its source, so that it can be read later."""
    with MultipartFile([odd]) as source, open_weights([odd]) as file:
        own = name_tensors([replace(file, source=source)], ()).tensors
        assert {tensor.source for tensor in own.values()} == {source}

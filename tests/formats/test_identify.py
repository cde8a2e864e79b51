"""Weights told by the names and shapes of their tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.formats.architecture import CSM_1B, FLAVORS, CsmConfig, TransformerConfig
from csm_weights.formats.identify import (
    Identity,
    check_network,
    describe,
    identify,
    network_of,
)
from csm_weights.formats.tensor_index import TensorInfo, row_major
from csm_weights.formats.transformers_layout import Layout, NamedTensor, NamedTensors, Summary
from tests.support import hostile
from tests.support.networks import TINY

#: Networks of published stacks with other vocabularies, and one of no published stack.
SMALL = replace(TINY, text_vocab=9, audio_vocab=7, codebooks=5)
ODD = replace(TINY, decoder=TransformerConfig(layers=5, dim=24, heads=2, kv_heads=1, ffn=7))

Shapes = dict[str, tuple[int, ...]]


def tensor(name: str, shape: tuple[int, ...], dtype: str = "F32") -> NamedTensor:
    source: Any = None
    return NamedTensor.of(source, TensorInfo(name, dtype, shape, 0, row_major(shape)))


def named(shapes: Shapes, dtype: str = "F32", **fields: Any) -> NamedTensors:
    tensors = {name: tensor(name, shape, dtype) for name, shape in shapes.items()}
    summary = Summary("w", "safetensors", fields.pop("layout", Layout.OWN), len(tensors))
    return NamedTensors(summary, tensors, **fields)


# ---- the network


@pytest.mark.parametrize("network", [CSM_1B, TINY, SMALL])
def test_a_network_of_published_stacks_is_known(network: CsmConfig) -> None:
    """Its vocabularies are told by the shapes, even if a tensor that tells one is damaged."""
    shapes = network.tensor_shapes()
    assert network_of(named(shapes)) == network
    for name in ("codebook0_head.weight", "audio_embeddings.weight"):
        for shape in ((), (1,), (1, 1), (1, 1, 1)):
            assert network_of(named(shapes | {name: shape})) == network
    found = network_of(named(shapes | {"audio_head": ()}))
    assert found == replace(network, codebooks=32)
    found = network_of(named(shapes | {"text_embeddings.weight": ()}))
    assert found == replace(network, text_vocab=128256)


@pytest.mark.parametrize("stacks", [(a, b) for a in FLAVORS for b in FLAVORS])
def test_any_two_published_stacks_are_a_network(stacks: tuple[str, str]) -> None:
    network = CsmConfig(FLAVORS[stacks[0]], FLAVORS[stacks[1]], 30, 20, 10)
    assert network_of(named(network.tensor_shapes())) == network


def test_a_network_has_most_of_the_tensors() -> None:
    """Half of them are not enough, one more is; and a network that fits better is preferred."""
    shapes = TINY.tensor_shapes()
    half = len(shapes) // 2
    assert len(shapes) == 2 * half
    heads = ("audio_head", "codebook0_head.weight", "text_embeddings.weight")
    first = sorted(shapes, key=lambda name: name not in heads)
    assert network_of(named({name: shapes[name] for name in first[:half]})) is None
    assert network_of(named({name: shapes[name] for name in first[: half + 1]})) == TINY
    deep = replace(TINY, backbone=replace(TINY.backbone, layers=4))
    for configs in ([TINY, deep], [deep, TINY]):
        assert network_of(named(shapes), configs) == TINY


def test_a_config_tells_a_network_of_no_published_stack() -> None:
    """Without it the dimensions are unknown."""
    weights = named(ODD.tensor_shapes())
    assert network_of(weights, [CSM_1B, ODD]) == ODD
    assert network_of(weights, [CSM_1B]) != ODD


# ---- what is not right


def test_each_tensor_that_is_not_right_is_named() -> None:
    """Missing and misshapen ones first, then what is too many, then dtypes."""
    shapes = TINY.tensor_shapes()
    del shapes["decoder.norm.scale"]
    shapes |= {"audio_head": (31, 32), "codebook0_head.weight": (36, 64), "more\n": (1,)}
    weights = named(shapes, unknown=(tensor("odd", (3,), "I8"),), wrapper="model.")
    tensors = dict(weights.tensors)
    tensors["projection.weight"] = tensor("their.name", (32, 64), "F16")
    found = check_network(replace(weights, tensors=tensors), TINY)
    assert [(f.where, f.expected, f.found) for f in found.listed()] == [
        ("w: audio_head", "[31, 32, 35]", "F32 [31, 32]"),
        ("w: codebook0_head.weight", "[35, 64]", "F32 [36, 64]"),
        ("w: model.decoder.norm.scale", "[32]", "no such tensor"),
        ("w: odd", "no such tensor", "I8 [3]"),
        (r"w: 'more\n'", "no such tensor", "F32 [1]"),
        ("w: their.name", "F32", "F16 [32, 64]"),
    ]
    assert found.count == 6


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "I32"])
@pytest.mark.parametrize("other", ["F32", "BF16", "F16", "F64", "I32"])
@pytest.mark.parametrize("mixed", [False, True])
def test_all_have_one_dtype_or_are_mixed(dtype: str, other: str, mixed: bool) -> None:
    """It is that of most, of float32, bfloat16 and float16."""
    shapes = TINY.tensor_shapes()
    tensors = dict(named(shapes, dtype).tensors)
    last = list(shapes)[-1]
    tensors[last] = tensor(last, shapes[last], other)
    found = check_network(replace(named({}), tensors=tensors), TINY, mixed=mixed)
    floats = ("F32", "BF16", "F16")
    if dtype in floats:
        wrong = 0 if dtype == other or (mixed and other in floats) else 1
        assert [f.expected for f in found.listed()] == [dtype] * wrong
    else:
        wrong = len(shapes) - (other in floats)
        assert {f.expected for f in found.listed()[:20]} == {
            other if other in floats else "F32 or BF16 or F16"
        }
    assert found.count == wrong


# ---- in words


@pytest.mark.parametrize(
    ("shapes", "model"),
    [
        (CSM_1B.tensor_shapes(), "CSM-1B"),
        (TINY.tensor_shapes(), "another CSM"),
        ({n: (*s, 7) for n, s in TINY.tensor_shapes().items()}, "a CSM of unknown dimensions"),
        (
            {n: (7,) for n in TINY.tensor_shapes() if "layers" not in n and n != "audio_head"},
            "not CSM",
        ),
        ({"x": (3,)}, "not CSM"),
        ({}, "not CSM"),
    ],
)
def test_weights_are_called_by_their_network(shapes: Shapes, model: str) -> None:
    found = identify(named(shapes))
    assert found.model == model
    assert (found.network is None) is (model not in ("CSM-1B", "another CSM"))
    assert (found.wrong, found.wrong_count) == ((), 0)
    assert (found.codec_tensors, found.wrapper, found.beside) == (0, "", 0)
    assert found.layout == "original"


def test_an_identity_has_all_figures() -> None:
    """The tied copy and unknown tensors count for dtypes, and only the latter's elements."""
    shapes = SMALL.tensor_shapes()
    size = sum(math.prod(shape) for shape in shapes.values())
    found = identify(
        replace(
            named(
                shapes,
                layout=Layout.TRANSFORMERS,
                unknown=(tensor("odd", (2, 3), "I8"),),
                tied=tensor("tied", (4,), "F16"),
                wrapper="model.",
                beside=2,
            ),
            summary=Summary("w", "torch-zip", Layout.TRANSFORMERS, 60, 7, 99),
        )
    )
    assert found == Identity(
        model="another CSM",
        network=SMALL,
        format="torch-zip",
        layout="transformers",
        dtypes=("F16", "F32", "I8"),
        tensors=60,
        parameters=size + 6,
        codec_tensors=7,
        wrapper="model.",
        beside=2,
        wrong=found.wrong,
        wrong_count=1,
    )
    assert [finding.where for finding in found.wrong] == ["w: odd"]
    assert str(found) == (
        "another CSM in transformers' layout, with Mimi's 7 tensors, inside model, "
        f"with 2 other tensors beside it, torch-zip, F16 and F32 and I8, {size + 6:,} parameters, "
        "1 of its tensors not as they should be"
    )
    plain = replace(found, layout="original", codec_tensors=0, wrapper="", beside=0)
    assert str(replace(plain, wrong_count=0, dtypes=("F32",))) == (
        f"another CSM in the original layout, torch-zip, F32, {size + 6:,} parameters"
    )
    assert str(replace(plain, network=None, dtypes=(), model="not CSM", wrong_count=1200)) == (
        f"not CSM, torch-zip, {size + 6:,} parameters, 1,200 of its tensors not as they should be"
    )


def test_a_file_is_described_if_it_can_be_read(tmp_path: Path) -> None:
    """Of another file, and of none, nothing is said."""
    path = hostile.written(tmp_path, hostile.good_safetensors())
    assert describe(path) == "not CSM, safetensors, F32, 5 parameters"
    for other in (hostile.written(tmp_path, b"some", "x"), tmp_path / "none", tmp_path):
        assert describe(other) == ""
    name = "depth_decoder.model.layers.0.self_attn.q_proj.weight"
    odd = hostile.safetensors({name: hostile.entry()}, bytes(8))
    assert describe(hostile.written(tmp_path, odd)) == ""

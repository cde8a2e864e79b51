"""Networks by their config.json: which are possible, and what their tensors are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.formats.architecture import (
    CSM_1B,
    FLAVORS,
    CsmConfig,
    TransformerConfig,
    parse_config,
    read_config,
)
from tests.support import hostile

STACK = TransformerConfig(layers=2, dim=64, heads=4, kv_heads=2, ffn=160)


def of_layers(key: str, value: Any, is_decoder: bool = False) -> bytes:
    """A config.json in transformers' layout with another value, in one of its two stacks."""
    data = json.loads(hostile.config_of_layers())
    (data["depth_decoder_config"] if is_decoder else data)[key] = value
    return json.dumps(data).encode()


def refused(content: bytes) -> Finding:
    with pytest.raises(WrongContent, match=r"config\.json cannot be used") as caught:
        parse_config(content, "some/config.json")
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where, finding.help) == (
        Kind.MALFORMED,
        "some/config.json",
        GET_AGAIN,
    )
    return finding


def test_both_editions_are_read() -> None:
    """By flavors or by figures, of either stack."""
    expected = CsmConfig(FLAVORS["tiny-decoder"], FLAVORS["tiny-backbone"], 40, 41, 42)
    flavors = {"backbone_flavor": "tiny-decoder", "decoder_flavor": "tiny-backbone"}
    sizes = {"text_vocab_size": 40, "audio_vocab_size": 41, "audio_num_codebooks": 42}
    assert parse_config(hostile.config(**flavors, **sizes), "") == expected
    expected = CsmConfig(STACK, replace(STACK, ffn=7), 512, 35, 32)
    assert parse_config(of_layers("intermediate_size", 7, True), "") == expected


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("num_hidden_layers", 1, 1 << 10),
        ("intermediate_size", 1, 1 << 24),
        ("hidden_size", 8, 1 << 24),
        ("num_attention_heads", 2, 32),
        ("num_key_value_heads", 1, 4),
    ],
)
def test_a_figure_of_a_stack_has_its_bounds(
    key: str, least: int, most: int, is_decoder: bool
) -> None:
    """The least and the largest are read, and nothing beyond them."""
    for value in (least, most):
        config = parse_config(of_layers(key, value, is_decoder), "")
        assert value in vars(config.decoder if is_decoder else config.backbone).values()
    for odd in (least - 1, most + 1, 0, -1, True, 2.0, "2", None):
        refused(of_layers(key, odd, is_decoder))


@pytest.mark.parametrize(
    ("key", "least"), [("text_vocab_size", 1), ("vocab_size", 1), ("num_codebooks", 2)]
)
def test_a_vocabulary_has_its_bounds(key: str, least: int) -> None:
    """The least and the largest are read, and nothing beyond them."""
    for value in (least, 1 << 24):
        assert value in vars(parse_config(of_layers(key, value), "")).values()
    for odd in (least - 1, (1 << 24) + 1, 0, -1, True, 2.0, "2", None):
        refused(of_layers(key, odd))


@pytest.mark.parametrize(
    ("content", "expected", "found"),
    [
        (b"{", "JSON", "JSONDecodeError: Expecting property name"),
        (b"7", "a JSON object", "int"),
        (b"{}", "the key 'depth_decoder_config'", "no such key"),
        (hostile.config(backbone_flavor="x"), "the dimensions", "backbone_flavor 'x'; known are"),
        (hostile.config(decoder_flavor="y"), "the dimensions", "decoder_flavor 'y'; known are"),
        (
            of_layers("text_vocab_size", 0),
            "the dimensions of a CSM network",
            "text_vocab = 0, not an integer from 1 to 16777216",
        ),
        (of_layers("vocab_size", 0), "the dimensions", "audio_vocab = 0, not an integer"),
        (of_layers("num_codebooks", 0), "the dimensions", "codebooks = 0, not an integer"),
        (of_layers("num_codebooks", 1), "the dimensions", "fewer than 2 codebooks"),
        (
            of_layers("num_hidden_layers", 1025),
            "the dimensions",
            "backbone.layers = 1025, not an integer from 1 to 1024",
        ),
        (of_layers("hidden_size", 0, True), "the dimensions", "decoder.dim = 0, not an"),
        (of_layers("hidden_size", 66), "the dimensions", "4 heads, 2 kv heads on 66 features"),
        (of_layers("hidden_size", 60), "the dimensions", "4 heads, 2 kv heads on 60 features"),
        (
            of_layers("num_key_value_heads", 3, True),
            "the dimensions",
            "4 heads, 3 kv heads on 64 features",
        ),
    ],
)
def test_what_is_wrong_with_a_config_is_said(content: bytes, expected: str, found: str) -> None:
    """The finding has the figure, its name and its bounds."""
    finding = refused(content)
    assert finding.expected.startswith(expected)
    assert finding.found.startswith(found)


def test_what_was_found_is_cut() -> None:
    """A long value is told by its first 200 characters."""
    finding = refused(of_layers("text_vocab_size", "x" * 400))
    assert finding.found == f"text_vocab = '{'x' * 186}"
    assert len(finding.found) == 200


@pytest.mark.parametrize(("size", "is_read"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_a_config_has_at_most_a_mebibyte(size: int, is_read: bool, tmp_path: Path) -> None:
    """Of a larger file only the beginning is read, which is no JSON then."""
    config = hostile.config()
    path = hostile.written(tmp_path, config[:-1] + b" " * (size - len(config)) + b"}")
    if is_read:
        assert read_config(path).codebooks == 32
        return
    with pytest.raises(WrongContent) as caught:
        read_config(path)
    assert caught.value.findings[0].where == str(path)


def test_the_published_network() -> None:
    """CSM-1B has 187 tensors of 1.55 billion elements, in the order of names."""
    shapes = CSM_1B.tensor_shapes()
    assert len(shapes) == 187
    assert sum(map(math.prod, shapes.values())) == 1_552_791_552
    assert list(shapes) == sorted(shapes)
    assert shapes["audio_head"] == (31, 1024, 2051)
    assert shapes["audio_embeddings.weight"] == (65632, 2048)
    assert shapes["backbone.layers.15.attn.k_proj.weight"] == (512, 2048)
    assert shapes["decoder.layers.3.mlp.w2.weight"] == (1024, 8192)


def test_the_committed_network() -> None:
    """csm-tiny has 52 tensors of 296,640 elements."""
    network = CsmConfig(FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], 512, 35, 32)
    shapes = network.tensor_shapes()
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (52, 296_640)
    assert [stack.head_dim for stack in FLAVORS.values()] == [64, 128, 16, 8]


def test_rope_is_that_of_llama_3_2() -> None:
    """The figures are those of torchtune's Llama 3.2; every network has them unless told."""
    figures = {key: value for key, value in vars(CSM_1B).items() if key.startswith("rope")}
    assert figures == {
        "rope_base": 500_000.0,
        "rope_factor": 32.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_old_context": 8192,
    }
    assert (CSM_1B.max_positions, CSM_1B.norm_eps) == (2048, 1e-5)


def test_q_k_and_v_are_one_product_and_w1_and_w3_another() -> None:
    """Each layer of either stack has two groups, in the order in which they lie together."""
    network = CsmConfig(STACK, replace(STACK, layers=1), 512, 35, 32)
    groups = network.fused_tensors()
    assert groups[:2] == [
        tuple(f"backbone.layers.0.attn.{x}_proj.weight" for x in ("q", "k", "v")),
        ("backbone.layers.0.mlp.w1.weight", "backbone.layers.0.mlp.w3.weight"),
    ]
    assert [group[0].partition(".attn")[0] for group in groups[::2]] == [
        "backbone.layers.0",
        "backbone.layers.1",
        "decoder.layers.0",
    ]
    assert len(groups) == 6


def test_networks_that_are_alike_are_one() -> None:
    """Networks are keys of tables, so that nothing changes one."""
    assert {replace(CSM_1B): 1}[CSM_1B] == 1
    assert {replace(STACK): 1}[STACK] == 1

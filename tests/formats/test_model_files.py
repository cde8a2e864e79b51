"""The small files beside weights, as transformers and torchtune's edition have them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from csm_weights.formats.architecture import CSM_1B, parse_config
from csm_weights.formats.model_files import (
    generation_config,
    original_config,
    shard_index,
    transformers_config,
)
from tests.support.networks import TINY, TINY_CONFIG
from tests.support.oracles import BACKBONE_ROPE, DECODER_ROPE

#: The first vocabularies without and with the last of CSM's own tokens, 128003.
WITHOUT, WITH = (replace(CSM_1B, text_vocab=size) for size in (128003, 128004))


def laid_out(text: str) -> Any:
    """Parse JSON; check that it is written as transformers does, with sorted keys."""
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    return data


def test_a_config_describes_the_network_for_transformers() -> None:
    """Each stack has its own figures, RoPE's among them."""
    data = laid_out(transformers_config(TINY, "F32", {}, {}))
    decoder = data["depth_decoder_config"]
    assert parse_config(json.dumps(data).encode(), "") == TINY
    assert (data["rope_parameters"], decoder["rope_parameters"]) == (BACKBONE_ROPE, DECODER_ROPE)
    assert (data["head_dim"], decoder["head_dim"]) == (16, 8)
    assert (data["max_position_embeddings"], decoder["max_position_embeddings"]) == (2048, 33)
    assert (decoder["backbone_hidden_size"], decoder["vocab_size"]) == (64, 35)
    assert (data["architectures"], data["model_type"]) == (["CsmForConditionalGeneration"], "csm")
    assert decoder["model_type"] == "csm_depth_decoder_model"
    flags = ("attention_bias", "mlp_bias", "tie_word_embeddings", "tie_codebooks_embeddings")
    assert [data[flag] for flag in flags] == [False, False, True, True]
    assert [data[f"codebook_{word}_token_id"] for word in ("eos", "pad")] == [0, 34]


@pytest.mark.parametrize(
    ("dtype", "word"),
    [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("I64", "float32")],
)
@pytest.mark.parametrize("known", [{}, {"mine": 1, "torch_dtype": "x", "codec_config": {"a": 1}}])
def test_a_config_has_the_dtype(dtype: str, word: str, known: dict[str, Any]) -> None:
    """A file that was there stays but for it, under the key that transformers reads today."""
    data = laid_out(transformers_config(TINY, dtype, {}, known))
    assert data["dtype"] == word
    assert not known or data == {"mine": 1, "codec_config": {"a": 1}, "dtype": word}


@pytest.mark.parametrize("known", [{}, {"codec_config": {"a": 1}}])
def test_a_config_has_the_codec_that_is_added(known: dict[str, Any]) -> None:
    """Without one it is the published Mimi, or the one in the file that was there."""
    for codec in ({"b": 2}, {"b": 2, "model_type": "other"}):
        data = laid_out(transformers_config(TINY, "F32", codec, known))
        assert data["codec_config"] == {"model_type": "mimi", **codec}
    data = laid_out(transformers_config(TINY, "F32", {}, known))
    assert data["codec_config"] == (known.get("codec_config") or {"model_type": "mimi"})


def test_tokens_are_those_that_the_vocabulary_has() -> None:
    """A vocabulary without CSM's own tokens has none of them."""
    tokens = {"bos_token_id": 128000, "pad_token_id": 128002}
    audio = {"audio_token_id": 128002, "audio_eos_token_id": 128003}
    files = {
        network.text_vocab: (
            laid_out(transformers_config(network, "F32", {}, {})),
            laid_out(generation_config(network)),
        )
        for network in (WITHOUT, WITH)
    }
    config, generation = files[WITH.text_vocab]
    assert config.items() >= (tokens | audio).items()
    assert generation.items() >= tokens.items()
    others = {key: value for key, value in generation.items() if key not in tokens}
    config, generation = files[WITHOUT.text_vocab]
    assert config.items() >= (dict.fromkeys(tokens | audio) | {"audio_token_id": 0}).items()
    assert generation == others


def test_the_original_edition_has_flavors() -> None:
    """It has no line end, as the published file; a stack without a flavor is described."""
    text = original_config(TINY)
    assert text == json.dumps(TINY_CONFIG, indent=2, sort_keys=True)
    for stack in ("backbone", "decoder"):
        odd = replace(TINY, **{stack: replace(getattr(TINY, stack), layers=7)})
        assert original_config(odd) == transformers_config(odd, "F32", {}, {})


def test_the_index_of_shards_is_sorted() -> None:
    """The tensors are in the order of names, whatever the order of files."""
    text = shard_index({"b": "1.safetensors", "a": "2.safetensors"}, 12)
    data = {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "2.safetensors", "b": "1.safetensors"},
    }
    assert text == json.dumps(data, indent=2) + "\n"

"""The small files beside weights, which the loader of each layout reads: config.json and others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from csm_weights.formats.architecture import FLAVORS, TRANSFORMERS_KEYS, CsmConfig
from csm_weights.formats.dtypes import FLOATS

#: RoPE's scaling as transformers counts it: relative to the positions of each stack, while
#: torchtune's figures are relative to 8,192. Source: config.json of sesame/csm-1b.
_ROPE = {"backbone": (1024, 0.125, 0.5), "decoder": (16, 0.001953125, 0.0078125)}

#: generation_config.json of sesame/csm-1b, word for word.
_GENERATION = {
    "bos_token_id": 128000,
    "depth_decoder_do_sample": True,
    "depth_decoder_temperature": 0.9,
    "depth_decoder_top_k": 50,
    "do_sample": True,
    "max_new_tokens": 125,
    "pad_token_id": 128002,
    "temperature": 0.9,
    "transformers_version": "4.52.0.dev0",
}

#: Tokens of Llama's vocabulary that CSM gives a meaning; a smaller vocabulary has none of them.
_TOKENS = {"bos_token_id": 128000, "pad_token_id": 128002, "audio_token_id": 128002}
_TOKENS |= {"audio_eos_token_id": 128003}


def original_config(network: CsmConfig) -> str:
    """Return config.json as the edition of March 2025 has it.

    A network of no published flavor is described by its figures, as transformers does.
    """
    flavors = {stack: name for name, stack in FLAVORS.items()}
    if network.backbone not in flavors or network.decoder not in flavors:
        return transformers_config(network, "F32", {}, {})
    data = {
        "audio_num_codebooks": network.codebooks,
        "audio_vocab_size": network.audio_vocab,
        "backbone_flavor": flavors[network.backbone],
        "decoder_flavor": flavors[network.decoder],
        "text_vocab_size": network.text_vocab,
    }
    return json.dumps(data, indent=2, sort_keys=True)


def transformers_config(
    network: CsmConfig, dtype: str, codec: Mapping[str, Any], known: Mapping[str, Any]
) -> str:
    """Return config.json for transformers' CsmForConditionalGeneration.

    `codec` is Mimi's own, empty for the published one. `known` is the file that
    the weights had in this layout, if any: all of it but the dtype stays.
    """
    word = next((word for word, name in FLOATS.items() if name == dtype), "float32")
    if known:
        kept = {key: value for key, value in known.items() if key != "torch_dtype"}
        kept |= {"dtype": word}
        kept |= {"codec_config": {"model_type": "mimi", **codec}} if codec else {}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"
    stacks = {"backbone": network.backbone, "decoder": network.decoder}
    figures = {}
    for name, stack in stacks.items():
        positions, low, high = _ROPE[name]
        rope = {"rope_type": "llama3", "rope_theta": network.rope_base}
        rope |= {"factor": network.rope_factor, "original_max_position_embeddings": positions}
        rope |= {"low_freq_factor": low, "high_freq_factor": high}
        figures[name] = dict(zip(TRANSFORMERS_KEYS, vars(stack).values(), strict=True)) | {
            "attention_bias": False,
            "head_dim": stack.head_dim,
            "hidden_act": "silu",
            "mlp_bias": False,
            "num_codebooks": network.codebooks,
            "rms_norm_eps": network.norm_eps,
            "rope_parameters": rope,
            "vocab_size": network.audio_vocab,
        }
    decoder = figures["decoder"] | {
        "backbone_hidden_size": network.backbone.dim,
        "max_position_embeddings": network.codebooks + 1,
        "model_type": "csm_depth_decoder_model",
    }
    has_tokens = network.text_vocab > max(_TOKENS.values())
    tokens = _TOKENS if has_tokens else dict.fromkeys(_TOKENS) | {"audio_token_id": 0}
    data = figures["backbone"] | tokens
    data |= {
        "architectures": ["CsmForConditionalGeneration"],
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": network.audio_vocab - 1,
        "codec_config": {"model_type": "mimi"} | dict(codec),
        "depth_decoder_config": decoder,
        "dtype": word,
        "max_position_embeddings": network.max_positions,
        "model_type": "csm",
        "text_vocab_size": network.text_vocab,
        "tie_codebooks_embeddings": True,
        "tie_word_embeddings": True,
    }
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def generation_config(network: CsmConfig) -> str:
    """Return generation_config.json for transformers."""
    has_tokens = network.text_vocab > max(_TOKENS.values())
    kept = {key: value for key, value in _GENERATION.items() if has_tokens or key not in _TOKENS}
    return json.dumps(kept, indent=2, sort_keys=True) + "\n"


def shard_index(files: Mapping[str, str], nbytes: int) -> str:
    """Return the index of shards: the file of each tensor, and the bytes of all tensors."""
    data = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(files.items()))}
    return json.dumps(data, indent=2) + "\n"

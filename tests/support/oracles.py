"""CSM as others implement it, with our weights: transformers' model and torchtune's stacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from csm_weights.formats.architecture import CsmConfig, TransformerConfig

#: The scaling of CSM's RoPE in today's config.json: relative to 1,024 and 16 positions, while
#: torchtune's is relative to 8,192.
BACKBONE_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
}
DECODER_ROPE = BACKBONE_ROPE | {
    "low_freq_factor": 0.001953125,
    "high_freq_factor": 0.0078125,
    "original_max_position_embeddings": 16,
}
UNSCALED_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}

#: transformers always builds the Mimi codec; this one is tiny.
_TINY_CODEC = {
    "model_type": "mimi",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_filters": 8,
    "codebook_size": 2,
    "codebook_dim": 2,
    "vector_quantization_hidden_dimension": 2,
    "upsample_groups": 8,
    "num_quantizers": 2,
}

_FIXED_NAMES = {
    "text_embeddings.weight": "embed_text_tokens.weight",
    "audio_embeddings.weight": "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "codebook0_head.weight": "lm_head.weight",
    "audio_head": "depth_decoder.codebooks_head.weight",
    "projection.weight": "depth_decoder.model.inputs_embeds_projector.weight",
    "backbone.norm.scale": "backbone_model.norm.weight",
    "decoder.norm.scale": "depth_decoder.model.norm.weight",
}
_STACK_NAMES = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}
_LAYER_NAMES = {
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.output_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}


def transformers_config(config: CsmConfig, **changes: Any) -> Any:
    """Return a CsmConfig that describes `config`; `changes` replace its own keys."""
    from transformers import CsmConfig

    decoder = _stack_config(config.decoder, DECODER_ROPE) | {
        "backbone_hidden_size": config.backbone.dim,
        "vocab_size": config.audio_vocab,
        "num_codebooks": config.codebooks,
        "max_position_embeddings": config.codebooks + 1,
    }
    settings = _stack_config(config.backbone, BACKBONE_ROPE) | {
        "text_vocab_size": config.text_vocab,
        "vocab_size": config.audio_vocab,
        "num_codebooks": config.codebooks,
        "max_position_embeddings": config.max_positions,
        "depth_decoder_config": decoder,
        "codec_config": _TINY_CODEC,
        "pad_token_id": None,
        "bos_token_id": None,
        "codebook_pad_token_id": None,
        "audio_token_id": 0,
        "audio_eos_token_id": None,
    }
    return CsmConfig(**(settings | changes))


def transformers_model(config: CsmConfig, state: Mapping[str, Tensor]) -> Any:
    """Return transformers' CSM with the tensors of `state`; only the codec's may be missing."""
    from transformers import CsmForConditionalGeneration

    model = CsmForConditionalGeneration(transformers_config(config)).eval()
    renamed = _renamed(config, state)
    renamed["depth_decoder.model.embed_tokens.weight"] = state["audio_embeddings.weight"]
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert [name for name in missing if not name.startswith("codec_model.")] == []
    assert unexpected == []
    return model


def torchtune_stack(stack: TransformerConfig, positions: int) -> Any:
    """Return torchtune's Llama 3.2 for one stack, without embeddings and head."""
    from torch import nn
    from torchtune.models.llama3_2 import llama3_2

    model = llama3_2(
        vocab_size=1,
        num_layers=stack.layers,
        num_heads=stack.heads,
        num_kv_heads=stack.kv_heads,
        embed_dim=stack.dim,
        max_seq_len=positions,
        intermediate_dim=stack.ffn,
        norm_eps=1e-5,
        scale_factor=32,
    )
    model.tok_embeddings = nn.Identity()
    model.output = nn.Identity()
    return model.eval()


def _stack_config(stack: TransformerConfig, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": stack.dim,
        "intermediate_size": stack.ffn,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "rope_parameters": rope,
    }


def _renamed(config: CsmConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stacks = {"backbone": config.backbone, "decoder": config.decoder}
    renamed = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(backbone|decoder)\.(layers\.\d+)\.(.+)", name)
        if match is None:
            renamed[_FIXED_NAMES[name]] = tensor
            continue
        side, layer, rest = match.groups()
        if rest in ("attn.q_proj.weight", "attn.k_proj.weight"):
            tensor = _half_rotated(tensor, stacks[side].head_dim)
        renamed[f"{_STACK_NAMES[side]}.{layer}.{_LAYER_NAMES[rest]}"] = tensor
    return renamed


def _half_rotated(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k projection from interleaved pairs to transformers' halves."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)

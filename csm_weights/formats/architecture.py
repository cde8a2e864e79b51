"""The network that a CSM config.json describes: dimensions, and the tensors they imply.

Two published editions of the file are read: the 155-byte one of March 2025
(torchtune flavor names) and today's transformers layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.files import read_bounded

#: Most bytes read of a config.json: it has a few thousand.
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class TransformerConfig:
    """Dimensions of one Llama stack; `dim` and `ffn` count features."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn: int

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.heads


#: Stacks by their flavor name in config.json: CSM-1B's and csm-tiny's.
FLAVORS = {
    "llama-1B": TransformerConfig(layers=16, dim=2048, heads=32, kv_heads=8, ffn=8192),
    "llama-100M": TransformerConfig(layers=4, dim=1024, heads=8, kv_heads=2, ffn=8192),
    "tiny-backbone": TransformerConfig(layers=3, dim=64, heads=4, kv_heads=2, ffn=160),
    "tiny-decoder": TransformerConfig(layers=2, dim=32, heads=4, kv_heads=1, ffn=96),
}

#: transformers' keys for the fields of a TransformerConfig, in their order.
TRANSFORMERS_KEYS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    "intermediate_size",
)

#: Ceilings that keep a hostile config.json from asking for shapes that overflow, or for
#: millions of tensors. CSM-1B's largest dimension is its text vocabulary, 128,256.
MAX_DIMENSION = 1 << 24
MAX_LAYERS = 1 << 10


@dataclass(frozen=True)
class CsmConfig:
    """A CSM network: backbone, depth decoder, vocabularies, RoPE.

    The RoPE figures are torchtune's for Llama 3.2.
    """

    backbone: TransformerConfig
    decoder: TransformerConfig
    text_vocab: int
    audio_vocab: int
    codebooks: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    rope_factor: float = 32.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_old_context: int = 8192

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor (187 for CSM-1B), sorted by name."""
        backbone, decoder = self.backbone, self.decoder
        shapes: dict[str, tuple[int, ...]] = {
            "text_embeddings.weight": (self.text_vocab, backbone.dim),
            "audio_embeddings.weight": (self.audio_vocab * self.codebooks, backbone.dim),
            "projection.weight": (decoder.dim, backbone.dim),
            "codebook0_head.weight": (self.audio_vocab, backbone.dim),
            "audio_head": (self.codebooks - 1, decoder.dim, self.audio_vocab),
        }
        for name, stack in (("backbone", backbone), ("decoder", decoder)):
            kv_dim = stack.kv_heads * stack.head_dim
            layer: dict[str, tuple[int, ...]] = {
                "attn.q_proj.weight": (stack.dim, stack.dim),
                "attn.k_proj.weight": (kv_dim, stack.dim),
                "attn.v_proj.weight": (kv_dim, stack.dim),
                "attn.output_proj.weight": (stack.dim, stack.dim),
                "mlp.w1.weight": (stack.ffn, stack.dim),
                "mlp.w2.weight": (stack.dim, stack.ffn),
                "mlp.w3.weight": (stack.ffn, stack.dim),
                "sa_norm.scale": (stack.dim,),
                "mlp_norm.scale": (stack.dim,),
            }
            shapes[f"{name}.norm.scale"] = (stack.dim,)
            for index in range(stack.layers):
                shapes |= {f"{name}.layers.{index}.{key}": shape for key, shape in layer.items()}
        return dict(sorted(shapes.items()))

    def fused_tensors(self) -> list[tuple[str, ...]]:
        """Return groups of names that one product can use as one: q, k and v, and w1 and w3."""
        groups: list[tuple[str, ...]] = []
        for name, stack in (("backbone", self.backbone), ("decoder", self.decoder)):
            for layer in (f"{name}.layers.{index}" for index in range(stack.layers)):
                groups.append(tuple(f"{layer}.attn.{x}_proj.weight" for x in "qkv"))
                groups.append(tuple(f"{layer}.mlp.{x}.weight" for x in ("w1", "w3")))
        return groups


#: The published network.
CSM_1B = CsmConfig(FLAVORS["llama-1B"], FLAVORS["llama-100M"], 128256, 2051, 32)


def read_config(path: Path) -> CsmConfig:
    """Read a config.json; raises OSError, and WrongContent as `parse_config` does."""
    return parse_config(read_bounded(path, MAX_CONFIG), str(path))


def parse_config(text: bytes, where: str) -> CsmConfig:
    """Read the bytes of a config.json; `where` is its name in findings.

    Raises WrongContent when it is not JSON, not one of the two editions, or
    describes no possible network.
    """

    def malformed(expected: str, found: str) -> WrongContent:
        finding = Finding(Kind.MALFORMED, where, expected, found[:200], GET_AGAIN)
        return WrongContent("config.json cannot be used", [finding])

    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise malformed("JSON", f"{type(error).__name__}: {error}") from None
    if not isinstance(data, dict):
        raise malformed("a JSON object", type(data).__name__)
    try:
        if "backbone_flavor" in data:
            for key in ("backbone_flavor", "decoder_flavor"):
                if data[key] not in FLAVORS:
                    raise ValueError(f"{key} {data[key]!r}; known are {', '.join(FLAVORS)}")
            stacks = FLAVORS[data["backbone_flavor"]], FLAVORS[data["decoder_flavor"]]
            figures = ("text_vocab_size", "audio_vocab_size", "audio_num_codebooks")
        else:
            sides = data, data["depth_decoder_config"]
            backbone, decoder = ([side[key] for key in TRANSFORMERS_KEYS] for side in sides)
            stacks = TransformerConfig(*backbone), TransformerConfig(*decoder)
            figures = ("text_vocab_size", "vocab_size", "num_codebooks")
        config = CsmConfig(*stacks, *(data[key] for key in figures))
        _check(config)
    except KeyError as error:
        raise malformed(f"the key {error}", "no such key") from None
    except (TypeError, ValueError) as error:
        raise malformed("the dimensions of a CSM network", str(error)) from None
    return config


def _check(config: CsmConfig) -> None:
    """Raise ValueError for figures of no possible network."""
    figures = {"text_vocab": config.text_vocab, "audio_vocab": config.audio_vocab}
    figures["codebooks"] = config.codebooks
    for name, stack in (("backbone", config.backbone), ("decoder", config.decoder)):
        figures |= {f"{name}.{key}": value for key, value in vars(stack).items()}
    for key, value in figures.items():
        most = MAX_LAYERS if key.endswith(".layers") else MAX_DIMENSION
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(f"{key} = {value!r}, not an integer from 1 to {most}")
    if config.codebooks < 2:
        raise ValueError("fewer than 2 codebooks")
    for stack in (config.backbone, config.decoder):
        if stack.dim % stack.heads or stack.head_dim % 2 or stack.heads % stack.kv_heads:
            heads = f"{stack.heads} heads, {stack.kv_heads} kv heads"
            raise ValueError(f"{heads} on {stack.dim} features")

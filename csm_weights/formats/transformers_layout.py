"""The tensors of some weights under our names, whichever layout they were saved in.

Weights whose tensors have transformers' names are read as if they had ours:
renamed, and with the rows of q and k projections in our order.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.formats.architecture import FLAVORS, parse_config
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements, to_number
from csm_weights.formats.tensor_index import ITEM_BITS, TensorInfo
from csm_weights.formats.weights_file import WeightsFile
from csm_weights.untrusted import show

#: Most bytes of a config.json that are read; real ones have a few thousand.
MAX_CONFIG = 1 << 20

#: transformers' names of CSM's tensors, and ours. Source: CsmForConditionalGeneration.
_NAMES = {
    "embed_text_tokens.weight": "text_embeddings.weight",
    "backbone_model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
    "lm_head.weight": "codebook0_head.weight",
    "depth_decoder.codebooks_head.weight": "audio_head",
    "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
    "backbone_model.norm.weight": "backbone.norm.scale",
    "depth_decoder.model.norm.weight": "decoder.norm.scale",
}
_STACKS = {"backbone_model": "backbone", "depth_decoder.model": "decoder"}
_LAYER_NAMES = {
    "self_attn.q_proj.weight": "attn.q_proj.weight",
    "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight",
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
_PERMUTED = re.compile(r"(backbone|decoder)\.layers\.[0-9]+\.attn\.([qk])_proj\.weight")

#: How names begin that only transformers' layout of CSM has.
_SIGNS = ("depth_decoder.", "backbone_model.embed_tokens.embed_audio_tokens.")

AUDIO = "audio_embeddings.weight"

#: What transformers ties to the audio embeddings, and may save as well.
TIED = "depth_decoder.model.embed_tokens.weight"

#: How the names of the audio codec's tensors begin, another model in the same file.
CODEC = "codec_model."


class Layout(enum.StrEnum):
    """Whose names the tensors have."""

    OWN = "own"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Value:
    """One element: its number, and its bits in hex, the highest first."""

    number: int | float | complex
    bits: str

    def __str__(self) -> str:
        return f"{self.number!r} ({self.bits})"


@dataclass(frozen=True)
class Summary:
    """Facts about some weights: their file, its format, the layout of their names.

    `tensors` counts those of the model, `left_out` those of the codec, with their bytes.
    """

    where: str
    format: str
    layout: Layout
    tensors: int
    left_out: int = 0
    left_out_bytes: int = 0


@dataclass(frozen=True)
class NamedTensor:
    """A tensor by its name in the file: its dtype, its shape, and where its elements are.

    The shape of `info` may be a finer one, of the same elements in the same
    order, or its bytes where elements are smaller than a byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: MultipartFile
    info: TensorInfo

    @classmethod
    def of(cls, source: MultipartFile, info: TensorInfo) -> NamedTensor:
        """Make one of a tensor as it is in its file."""
        read = info
        if ITEM_BITS[info.dtype] < 8:
            read = replace(info, dtype="U8", shape=(info.nbytes,), stride=(1,))
        return cls(info.name, info.dtype, info.shape, source, read)

    @property
    def signature(self) -> str:
        """Dtype and shape in words."""
        return f"{self.dtype} {list(self.shape)}"

    def value(self, number: int) -> Value:
        """Read the element of that number, counted in row-major order."""
        raw = bytearray(self.info.itemsize)
        read_elements(self.source, self.info, number, raw)
        return Value(to_number(self.info.dtype, bytes(raw)), f"0x{raw[::-1].hex()}")


@dataclass(frozen=True)
class NamedTensors:
    """All tensors of some weights by our names, those that have none, and the tied copy."""

    summary: Summary
    tensors: Mapping[str, NamedTensor]
    unknown: tuple[NamedTensor, ...] = ()
    tied: NamedTensor | None = None


def name_tensors(files: Sequence[WeightsFile], folders: Iterable[Path]) -> NamedTensors:
    """Name the tensors of a model's files as ours.

    The config.json of one of `folders` gives the sizes of heads that no
    published network has. Raises WrongContent where two files have one tensor,
    or the order of rows cannot be known.
    """
    where = files[0].source.where
    if more := len(files) - 1:
        where += f" and {more} more shard{'s' if more > 1 else ''}"
    tensors: dict[str, NamedTensor] = {}
    for file in files:
        for name, info in file.index.tensors.items():
            if name in tensors:
                at = f"{file.source.where}: {show(name)}"
                finding = Finding(Kind.MALFORMED, at, "each tensor once", "a second one")
                raise WrongContent(f"the shards of {where} do not fit together", [finding])
            tensors[name] = NamedTensor.of(file.source, info)
    if any(name.startswith(_SIGNS) for name in tensors):
        return _from_transformers(tensors, where, files[0].format, folders)
    return NamedTensors(Summary(where, files[0].format, Layout.OWN, len(tensors)), tensors)


def _from_transformers(
    theirs: Mapping[str, NamedTensor], where: str, format_: str, folders: Iterable[Path]
) -> NamedTensors:
    codec = [t.info.nbytes for name, t in theirs.items() if name.startswith(CODEC)]
    named = {name: t for name, t in theirs.items() if not name.startswith(CODEC)}
    tied = named.pop(TIED, None)
    ours = {own: t for name, t in named.items() if (own := own_name(name))}
    unknown = tuple(t for name, t in named.items() if not own_name(name))
    if tied and AUDIO not in ours:
        # one name of the two that are tied says it all
        ours[AUDIO], tied = tied, None
    summary = Summary(
        where, format_, Layout.TRANSFORMERS, len(theirs) - len(codec), len(codec), sum(codec)
    )
    return NamedTensors(summary, _in_our_order(ours, where, folders), unknown, tied)


def own_name(theirs: str) -> str | None:
    """Return our name of a tensor of transformers' CSM; None where there is none."""
    stack, _, rest = theirs.partition(".layers.")
    layer, _, part = rest.partition(".")
    if stack in _STACKS and part in _LAYER_NAMES and re.fullmatch("[0-9]{1,4}", layer):
        return f"{_STACKS[stack]}.layers.{layer}.{_LAYER_NAMES[part]}"
    return _NAMES.get(theirs)


def _in_our_order(
    tensors: Mapping[str, NamedTensor], where: str, folders: Iterable[Path]
) -> dict[str, NamedTensor]:
    """Return q and k with their rows in torchtune's order, and the others as they are.

    The size of a head is that of the first network that has such projections.
    """
    configs = []
    for path in (folder / "config.json" for folder in folders):
        if path.is_file():
            with path.open("rb") as file:
                configs.append(parse_config(file.read(MAX_CONFIG), str(path)))
    known = {
        "backbone": [*(config.backbone for config in configs), *FLAVORS.values()],
        "decoder": [*(config.decoder for config in configs), *FLAVORS.values()],
    }
    permuted = {name: match for name in tensors if (match := _PERMUTED.fullmatch(name))}
    shapes = {(match[1], match[2], tensors[name].shape) for name, match in permuted.items()}
    ordered = dict(tensors)
    for name, match in permuted.items():
        stack = match[1]
        head_dims = (
            network.head_dim
            for network in known[stack]
            if (stack, "q", (network.dim, network.dim)) in shapes
            and (stack, "k", (network.kv_heads * network.head_dim, network.dim)) in shapes
        )
        ordered[name] = _interleaved(tensors[name], next(head_dims, None), where)
    return ordered


def _interleaved(tensor: NamedTensor, head_dim: int | None, where: str) -> NamedTensor:
    """Return the rows in torchtune's order, with the pairs that RoPE rotates side by side.

    transformers has the first halves of all pairs of a head, then the second.
    """
    place, found = f"{where}: {show(tensor.name)}", tensor.signature
    if head_dim is None:
        help_text = "put the model's config.json beside the file"
        finding = Finding(Kind.MALFORMED, place, "heads of a known size", found, help_text)
        raise WrongContent("the order of the rows of q and k cannot be told", [finding])
    if len(tensor.shape) != 2 or tensor.shape[0] % head_dim:
        finding = Finding(Kind.MALFORMED, place, f"whole heads of {head_dim} rows", found)
        raise WrongContent("the rows of q and k are no heads", [finding])
    (rows, width), (down, right) = tensor.shape, tensor.info.stride
    half = head_dim // 2
    shape = (rows // head_dim, half, 2, width)
    stride = (head_dim * down, down, half * down, right)
    return replace(tensor, info=replace(tensor.info, shape=shape, stride=stride))

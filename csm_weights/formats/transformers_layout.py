"""The tensors of some weights under our names, and under transformers'.

Weights whose tensors have transformers' names are read as if they had ours:
renamed, and with the rows of q and k projections in our order. What a training
loop puts before every name (`model.`, `module.`, `_orig_mod.`) is left out.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.formats.architecture import FLAVORS, CsmConfig, read_config
from csm_weights.formats.multipart import MultipartFile
from csm_weights.formats.strided import read_elements, to_number
from csm_weights.formats.tensor_index import ITEM_BITS, TensorInfo
from csm_weights.formats.weights_file import WeightsFile
from csm_weights.untrusted import show

AUDIO = "audio_embeddings.weight"

#: What transformers ties to the audio embeddings, and may save as well, or in their place.
TIED = "depth_decoder.model.embed_tokens.weight"

#: How the names of the audio codec's tensors begin, another model in the same file.
CODEC = "codec_model."

#: transformers' names of CSM's tensors, and ours. Source: CsmForConditionalGeneration.
_NAMES = {
    "embed_text_tokens.weight": "text_embeddings.weight",
    "backbone_model.embed_tokens.embed_audio_tokens.weight": AUDIO,
    "lm_head.weight": "codebook0_head.weight",
    "depth_decoder.codebooks_head.weight": "audio_head",
    "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
    "backbone_model.norm.weight": "backbone.norm.scale",
    "depth_decoder.model.norm.weight": "decoder.norm.scale",
}
_STACKS = {"backbone_model": "backbone", "depth_decoder.model": "decoder"}
_PARTS = {
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
#: The same the other way round.
_THEIRS = [{own: theirs for theirs, own in table.items()} for table in (_NAMES, _STACKS, _PARTS)]

_PERMUTED = re.compile(r"(backbone|decoder)\.layers\.[0-9]+\.attn\.([qk])_proj\.weight")

#: How names begin that only transformers' layout of CSM has.
_SIGNS = ("depth_decoder.", "backbone_model.embed_tokens.embed_audio_tokens.")

#: What stands before the names of a model's tensors in the checkpoints of training loops.
_WRAPPERS = re.compile(r"((model|state_dict|module|_orig_mod)\.)*")


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

    def block_elements(self, size: int) -> int:
        """Return how many elements fit `size` bytes: whole rows, for parts of views are slow."""
        most = size // self.info.itemsize
        row = self.shape[-1] if self.shape else 1
        return most - most % row if 0 < row <= most else most

    def value(self, number: int) -> Value:
        """Read the element of that number, counted in row-major order."""
        raw = bytearray(self.info.itemsize)
        read_elements(self.source, self.info, number, raw)
        return Value(to_number(self.info.dtype, bytes(raw)), f"0x{raw[::-1].hex()}")


@dataclass(frozen=True)
class NamedTensors:
    """All tensors of some weights: those of the model by our names, and the others.

    `unknown` have no name of ours, `tied` is the copy of the audio embeddings
    that transformers may save. `codec` are Mimi's, by their names there.
    `wrapper` stands before the names in the file, and `beside` are tensors
    that are not in it, such as those of an optimizer.
    """

    summary: Summary
    tensors: Mapping[str, NamedTensor]
    unknown: tuple[NamedTensor, ...] = ()
    tied: NamedTensor | None = None
    codec: Mapping[str, NamedTensor] = field(default_factory=dict)
    wrapper: str = ""
    beside: int = 0

    def name_in_file(self, name: str) -> str:
        """Return what the file calls, or would call, a tensor that we call `name`."""
        is_own = self.summary.layout is Layout.OWN
        return self.wrapper + ((not is_own and _renamed(name, *_THEIRS)) or name)


def name_tensors(
    files: Sequence[WeightsFile], folders: Iterable[Path], network: CsmConfig | None = None
) -> NamedTensors:
    """Name the tensors of a model's files as ours.

    `network`, or the config.json of one of `folders`, gives the sizes of heads
    that no published network has. Raises WrongContent where two files have one
    tensor, or the order of rows cannot be known.
    """
    where = files[0].source.where
    if more := len(files) - 1:
        where += f" and {more} more shard{'s' if more > 1 else ''}"
    infos = [(file.source, info) for file in files for info in file.index.tensors.values()]
    wrapper = _wrapper(info.name for _, info in infos)
    found: dict[str, NamedTensor] = {}
    for source, info in infos:
        if not info.name.startswith(wrapper):
            continue
        name = _unwrapped(info.name, wrapper)
        if name in found:
            at = f"{source.where}: {show(info.name)}"
            finding = Finding(Kind.MALFORMED, at, "each tensor once", "a second one", GET_AGAIN)
            raise WrongContent(f"the shards of {where} do not fit together", [finding])
        found[name] = NamedTensor.of(source, info)
    beside = len(infos) - len(found)
    if not any(name.startswith(_SIGNS) for name in found):
        summary = Summary(where, files[0].format, Layout.OWN, len(found))
        return NamedTensors(summary, found, wrapper=wrapper, beside=beside)
    codec = {n[len(CODEC) :]: found.pop(n) for n in list(found) if n.startswith(CODEC)}
    size = sum(tensor.info.nbytes for tensor in codec.values())
    format_, count = files[0].format, len(found)
    summary = Summary(where, format_, Layout.TRANSFORMERS, count, len(codec), size)
    tied = found.pop(TIED, None)
    ours = {own: t for name, t in found.items() if (own := own_name(name))}
    known = {tensor.name for tensor in ours.values()}
    unknown = tuple(tensor for tensor in found.values() if tensor.name not in known)
    if tied and AUDIO not in ours:
        # one name of the two that are tied says it all
        ours[AUDIO], tied = tied, None
    ordered = _in_our_order(ours, where, folders, network)
    return NamedTensors(summary, ordered, unknown, tied, codec, wrapper, beside)


def _unwrapped(name: str, wrapper: str) -> str:
    return name[len(wrapper) :].replace("._orig_mod.", ".")


def _wrapper(names: Iterable[str]) -> str:
    """Return what stands before the names of most of CSM's tensors; mostly an empty string."""
    counts = Counter({"": 0})
    for name in names:
        wrapper = _WRAPPERS.match(name)[0]  # type: ignore[index]
        inner = _unwrapped(name, wrapper)
        counts[wrapper] += bool(own_name(inner) or _renamed(inner, *_THEIRS))
    return max(counts, key=lambda wrapper: counts[wrapper])


def in_transformers_layout(
    tensors: Mapping[str, NamedTensor], network: CsmConfig
) -> dict[str, NamedTensor]:
    """Return the tensors of a network by transformers' names, the tied copy among them.

    `tensors` are all those of the network, by our names.
    """
    head_dims = {"backbone": network.backbone.head_dim, "decoder": network.decoder.head_dim}
    theirs = {TIED: tensors[AUDIO]}
    for name, tensor in tensors.items():
        if match := _PERMUTED.fullmatch(name):
            head_dim = head_dims[match[1]]
            tensor = _regrouped(tensor, head_dim, head_dim // 2)
        theirs[_renamed(name, *_THEIRS) or name] = tensor
    return theirs


def own_name(theirs: str) -> str | None:
    """Return our name of a tensor of transformers' CSM; None where there is none."""
    return _renamed(theirs, _NAMES, _STACKS, _PARTS)


def _renamed(
    name: str, names: Mapping[str, str], stacks: Mapping[str, str], parts: Mapping[str, str]
) -> str | None:
    """Return the other name of a tensor by three tables; None where there is none."""
    stack, _, rest = name.partition(".layers.")
    layer, _, part = rest.partition(".")
    if stack in stacks and part in parts and re.fullmatch("[0-9]{1,4}", layer):
        return f"{stacks[stack]}.layers.{layer}.{parts[part]}"
    return names.get(name)


def _in_our_order(
    tensors: Mapping[str, NamedTensor],
    where: str,
    folders: Iterable[Path],
    network: CsmConfig | None,
) -> dict[str, NamedTensor]:
    """Return q and k with their rows in torchtune's order, and the others as they are.

    The size of a head is that of the first network that has such projections.
    """
    configs = [network] if network else read_configs(folders)
    permuted = {name: match for name in tensors if (match := _PERMUTED.fullmatch(name))}
    shapes = {(match[1], match[2], tensors[name].shape) for name, match in permuted.items()}
    ordered = dict(tensors)
    for name, match in permuted.items():
        stack, tensor = match[1], tensors[name]
        place, found = f"{where}: {show(tensor.name)}", tensor.signature
        networks = (*(getattr(config, stack) for config in configs), *FLAVORS.values())
        head_dims = (
            one.head_dim
            for one in networks
            if (stack, "q", (one.dim, one.dim)) in shapes
            and (stack, "k", (one.kv_heads * one.head_dim, one.dim)) in shapes
        )
        if not (head_dim := next(head_dims, 0)):
            help_text = "put the model's config.json beside the file"
            finding = Finding(Kind.MALFORMED, place, "heads of a known size", found, help_text)
            raise WrongContent("the order of the rows of q and k cannot be told", [finding])
        if len(tensor.info.shape) != 2 or tensor.shape[0] % head_dim:
            words = (f"whole heads of {head_dim} rows", found, GET_AGAIN)
            finding = Finding(Kind.MALFORMED, place, *words)
            raise WrongContent("the rows of q and k cannot be split into heads", [finding])
        ordered[name] = _regrouped(tensor, head_dim, 2)
    return ordered


def read_configs(folders: Iterable[Path]) -> list[CsmConfig]:
    """Return the networks that the config.json in each of some folders describes."""
    paths = [folder / "config.json" for folder in folders]
    return [read_config(path) for path in paths if path.is_file()]


def _regrouped(tensor: NamedTensor, head_dim: int, groups: int) -> NamedTensor:
    """Return the rows of each head in another order: the first of each of its groups, and so on.

    torchtune has the pairs that RoPE rotates side by side, half as many groups
    as a head has rows. transformers has the first rows of all pairs, then the
    second: two groups.
    """
    info = tensor.info
    if len(info.shape) == 4:  # regrouped before
        (heads, groups, of, width), (apart, outer, inner, right) = info.shape, info.stride
    else:
        (rows, width), (down, right) = info.shape, info.stride
        heads, of = rows // head_dim, head_dim // groups
        apart, outer, inner = head_dim * down, of * down, down
    shape, stride = (heads, of, groups, width), (apart, inner, outer, right)
    return replace(tensor, info=replace(info, shape=shape, stride=stride))

"""One side of a comparison: where each tensor of some weights lies, under our names.

A side is one file, a file in parts, or shards; of either format. One whose
tensors have transformers' names is read as if it had ours: renamed, and with
the rows of q and k projections in our order.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent, printable
from csm_weights.formats.architecture import FLAVORS, CsmConfig, TransformerConfig, parse_config
from csm_weights.formats.multipart import MultipartFile, find_chunk_files
from csm_weights.formats.strided import read_elements, to_number
from csm_weights.formats.tensor_index import TensorInfo
from csm_weights.formats.weights_file import WeightsFile, find_weights, missing
from csm_weights.untrusted import show

#: Most bytes of an index of shards, or of a config.json, that are read.
MAX_JSON = 1 << 20
MAX_SHARDS = 200

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors", re.DOTALL)
_INDEX = ".safetensors.index.json"

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
_IN_LAYER = re.compile(r"(backbone_model|depth_decoder\.model)\.layers\.([0-9]{1,4})\.(.+)")
_PERMUTED = re.compile(r"(backbone|decoder)\.layers\.[0-9]+\.attn\.[qk]_proj\.weight")

#: How names begin by which transformers' layout of CSM is known.
_SIGNS = ("depth_decoder.", "backbone_model.embed_tokens.embed_audio_tokens.")

AUDIO = "audio_embeddings.weight"

#: What transformers ties to the audio embeddings, and may save as well.
TIED = "depth_decoder.model.embed_tokens.weight"

#: How the names of tensors begin that are another model's, in the same file.
CODEC = "codec_model."

#: The files of one side, each in its parts.
Files = Sequence[Sequence[Path]]


class Layout(enum.StrEnum):
    """Whose names the tensors of a side have."""

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
class SideView:
    """What one side is: its file, the format of it, whose names it has.

    `tensors` counts those of the model, `left_out` those of the codec, with their bytes.
    """

    where: str
    format: str
    layout: Layout
    tensors: int
    left_out: int = 0
    left_out_bytes: int = 0


@dataclass(frozen=True)
class SideTensor:
    """A tensor in our layout: its name and shape, and where its elements are.

    The shape of `info` may be a finer one, of the same elements in the same order.
    """

    name: str
    shape: tuple[int, ...]
    source: MultipartFile
    info: TensorInfo

    @property
    def signature(self) -> str:
        return f"{self.info.dtype} {list(self.shape)}"

    def value(self, number: int) -> Value:
        """The element of that number, counted in row-major order."""
        raw = bytearray(self.info.itemsize)
        read_elements(self.source, self.info, number, raw)
        return Value(to_number(self.info.dtype, bytes(raw)), f"0x{raw[::-1].hex()}")


@dataclass(frozen=True)
class Side:
    view: SideView
    tensors: Mapping[str, SideTensor]
    unknown: tuple[SideTensor, ...] = ()
    tied: SideTensor | None = None


# ---- finding the files


def find(path: Path) -> Files:
    """The files that a path means, each in its parts.

    `path` is a file of weights, or what it would be called if it were not in
    parts; the first part of one; a folder with any of these; a shard, a folder
    of shards, or their index. Raises MissingInput, with every shard that is
    not there, WrongContent, and UsageError for a folder of several models.
    """
    if path.name.endswith(_INDEX):
        return _alone(_listed(path))
    if match := _SHARD.fullmatch(path.name):
        return _alone(_shards(path.parent, match))
    whole = path.parent / path.name.rpartition(".part-")[0] if ".part-" in path.name else path
    if (whole != path or not path.exists()) and (
        parts := find_chunk_files(path.parent, whole.name)
    ):
        return [parts]
    try:
        return [find_weights(path)]
    except MissingInput:
        if not path.is_dir():
            raise
        return _alone(_shards_in(path))


def _alone(paths: Iterable[Path]) -> Files:
    return [[path] for path in paths]


def _shards_in(folder: Path) -> list[Path]:
    matches = [m for path in folder.iterdir() if (m := _SHARD.fullmatch(path.name))]
    sets = {(m[1], m[3]): m for m in matches}
    if not sets:
        raise missing(folder, "weights, or shards NAME-00001-of-0000N.safetensors", "neither")
    if len(sets) > 1:
        names = ", ".join(sorted(show(match[0]) for match in sets.values()))
        raise UsageError(printable(f"{folder} has the shards of several models: {names}"))
    return _shards(folder, next(iter(sets.values())))


def _shards(folder: Path, match: re.Match[str]) -> list[Path]:
    name, total = match[1], int(match[3])
    _check_count(folder / match[0], total)
    return _all_here(
        [folder / f"{name}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )


def _listed(index: Path) -> list[Path]:
    """The shards that an index names: files beside it, and nowhere else."""
    if not index.is_file():
        raise missing(index, "an index of shards", "no such file")
    try:
        names = set(json.loads(_read_small(index))["weight_map"].values())
        names_are_plain = all(_SHARD.fullmatch(name) and "/" not in name for name in names)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        names_are_plain = False
    if not names_are_plain:
        expected = "a weight_map from tensors to NAME-0000x-of-0000N.safetensors"
        finding = Finding(Kind.MALFORMED, str(index), expected, "something else")
        raise WrongContent("the index of the shards cannot be used", [finding])
    _check_count(index, len(names))
    return _all_here([index.parent / name for name in sorted(names)])


def _check_count(where: Path, count: int) -> None:
    if not 1 <= count <= MAX_SHARDS:
        finding = Finding(Kind.MALFORMED, str(where), f"1 to {MAX_SHARDS} shards", str(count))
        raise WrongContent("these are no shards", [finding])


def _all_here(paths: list[Path]) -> list[Path]:
    findings = [
        Finding.missing(path, f"one of {len(paths)} shards") for path in paths if not path.is_file()
    ]
    if findings:
        raise MissingInput("not all shards are here", findings)
    return paths


def _read_small(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_JSON)


# ---- reading where the tensors lie


def read_side(checkpoints: Sequence[WeightsFile], folders: Iterable[Path]) -> Side:
    where = checkpoints[0].source.where
    if more := len(checkpoints) - 1:
        where += f" and {more} more shard{'s' if more > 1 else ''}"
    tensors = _united(checkpoints, where)
    if any(name.startswith(_SIGNS) for name in tensors):
        return _from_transformers(tensors, where, checkpoints[0].format, folders)
    view = SideView(where, checkpoints[0].format, Layout.OWN, len(tensors))
    return Side(view, tensors)


def _united(checkpoints: Sequence[WeightsFile], where: str) -> dict[str, SideTensor]:
    tensors: dict[str, SideTensor] = {}
    for checkpoint in checkpoints:
        for name, info in checkpoint.table.tensors.items():
            if name in tensors:
                place = f"{checkpoint.source.where}: {show(name)}"
                finding = Finding(Kind.MALFORMED, place, "each tensor once", "a second one")
                raise WrongContent(f"the shards of {where} do not fit together", [finding])
            tensors[name] = SideTensor(name, info.shape, checkpoint.source, info)
    return tensors


# ---- transformers' layout


def _from_transformers(
    theirs: Mapping[str, SideTensor], where: str, format_: str, folders: Iterable[Path]
) -> Side:
    codec = [t.info.nbytes for name, t in theirs.items() if name.startswith(CODEC)]
    named = {name: t for name, t in theirs.items() if not name.startswith(CODEC)}
    tied = named.pop(TIED, None)
    ours = {own: t for name, t in named.items() if (own := _own_name(name))}
    unknown = tuple(t for name, t in named.items() if not _own_name(name))
    if tied and AUDIO not in ours:
        # one name of the two that are tied says it all
        ours[AUDIO], tied = tied, None
    view = SideView(
        where, format_, Layout.TRANSFORMERS, len(theirs) - len(codec), len(codec), sum(codec)
    )
    return Side(view, _in_our_order(ours, where, folders), unknown, tied)


def _own_name(theirs: str) -> str | None:
    """Our name of a tensor of transformers' CSM, None where there is none."""
    match = _IN_LAYER.fullmatch(theirs)
    if not match:
        return _NAMES.get(theirs)
    stack, layer, rest = match.groups()
    return f"{_STACKS[stack]}.layers.{layer}.{_LAYER_NAMES[rest]}" if rest in _LAYER_NAMES else None


def _in_our_order(
    tensors: Mapping[str, SideTensor], where: str, folders: Iterable[Path]
) -> dict[str, SideTensor]:
    configs = [_config(folder) for folder in folders]
    sizes = {}
    for stack in _STACKS.values():
        known = [c.backbone if stack == "backbone" else c.decoder for c in configs if c]
        sizes[stack] = _head_dim(stack, tensors, [*known, *FLAVORS.values()])
    ordered = {}
    for name, tensor in tensors.items():
        match = _PERMUTED.fullmatch(name)
        ordered[name] = _interleaved(tensor, sizes[match[1]], where) if match else tensor
    return ordered


def _config(folder: Path) -> CsmConfig | None:
    path = folder / "config.json"
    return parse_config(_read_small(path), str(path)) if path.is_file() else None


def _head_dim(
    stack: str, tensors: Mapping[str, SideTensor], known: Sequence[TransformerConfig]
) -> int | None:
    """Features of one head: those of the first network that has such projections."""
    shapes = {
        kind: {t.shape for name, t in tensors.items() if _is_projection(name, stack, kind)}
        for kind in "qk"
    }
    for network in known:
        q, k = network.dim, network.kv_heads * network.head_dim
        if (q, network.dim) in shapes["q"] and (k, network.dim) in shapes["k"]:
            return network.head_dim
    return None


def _is_projection(name: str, stack: str, kind: str) -> bool:
    return name.startswith(f"{stack}.layers.") and name.endswith(f".attn.{kind}_proj.weight")


def _interleaved(tensor: SideTensor, head_dim: int | None, where: str) -> SideTensor:
    """The same rows in torchtune's order: the pairs that RoPE turns side by side.

    transformers has the first halves of all pairs of a head, then the second.
    """
    if head_dim is None:
        place, found = f"{where}: {show(tensor.name)}", tensor.signature
        help_text = "put the model's config.json beside the file"
        finding = Finding(Kind.MALFORMED, place, "heads of a known size", found, help_text)
        raise WrongContent("the order of the rows of q and k cannot be told", [finding])
    if len(tensor.shape) != 2 or tensor.shape[0] % head_dim:
        place = f"{where}: {show(tensor.name)}"
        expected = f"whole heads of {head_dim} rows"
        raise WrongContent(
            "the rows of q and k are no heads",
            [Finding(Kind.MALFORMED, place, expected, tensor.signature)],
        )
    (rows, width), (down, right) = tensor.shape, tensor.info.stride
    half = head_dim // 2
    shape = (rows // head_dim, half, 2, width)
    stride = (head_dim * down, down, half * down, right)
    return replace(tensor, info=replace(tensor.info, shape=shape, stride=stride))

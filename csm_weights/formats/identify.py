"""Tell what some weights are: which network, in which layout and dtype, and what is not right."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from csm_weights.errors import CsmWeightsError, Finding
from csm_weights.formats.architecture import CSM_1B, FLAVORS, CsmConfig
from csm_weights.formats.dtypes import FLOATS
from csm_weights.formats.tensor_index import Findings
from csm_weights.formats.transformers_layout import Layout, NamedTensors, name_tensors
from csm_weights.formats.weights_file import open_weights
from csm_weights.untrusted import Malformed, show


@dataclass(frozen=True)
class Identity:
    """What some weights are.

    `network` is None for weights of another model, and for a CSM of dimensions
    that no config.json tells. `wrong` are the tensors that the network misses,
    does not have, or has in another shape. `parameters` are the model's own,
    without the codec's.
    """

    model: str
    network: CsmConfig | None
    format: str
    layout: str
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    codec_tensors: int
    wrapper: str
    beside: int
    wrong: tuple[Finding, ...]
    wrong_count: int

    def __str__(self) -> str:
        words = [self.model]
        if self.network:
            whose = "the original" if self.layout == "original" else "transformers'"
            words[0] += f" in {whose} layout"
        if self.codec_tensors:
            words.append(f"with Mimi's {self.codec_tensors:,} tensors")
        if self.wrapper:
            words.append(f"inside {show(self.wrapper.rstrip('.'))}")
        if self.beside:
            words.append(f"with {self.beside:,} other tensors beside it")
        words += [self.format, " and ".join(self.dtypes), f"{self.parameters:,} parameters"]
        if self.wrong_count:
            words.append(f"{self.wrong_count:,} of its tensors not as they should be")
        return ", ".join(filter(None, words))


def identify(named: NamedTensors, configs: Iterable[CsmConfig] = ()) -> Identity:
    """Tell what some weights are by the names and shapes of their tensors.

    `configs` are networks that a config.json beside them describes.
    """
    tensors, summary = named.tensors, named.summary
    network = network_of(named, configs)
    tied = [named.tied] if named.tied else []
    wrong = check_network(named, network) if network else Findings(summary.where)
    model = "CSM-1B" if network == CSM_1B else "another CSM"
    if network is None:
        is_csm = all(name in tensors for name in _EVERY_CSM)
        model = "a CSM of unknown dimensions" if is_csm else "not CSM"
    return Identity(
        model=model,
        network=network,
        format=summary.format,
        layout="original" if summary.layout is Layout.OWN else "transformers",
        dtypes=tuple(sorted({t.dtype for t in [*tensors.values(), *named.unknown, *tied]})),
        tensors=summary.tensors,
        parameters=sum(math.prod(t.shape) for t in [*tensors.values(), *named.unknown]),
        codec_tensors=summary.left_out,
        wrapper=named.wrapper,
        beside=named.beside,
        wrong=tuple(wrong.listed()),
        wrong_count=wrong.count,
    )


def describe(path: Path) -> str:
    """Return what a file of weights is, in words; empty where it cannot be read as one."""
    with contextlib.suppress(CsmWeightsError, OSError), open_weights([path]) as weights:
        return str(identify(name_tensors([weights], [path.parent])))
    return ""


#: Tensors that every CSM has.
_EVERY_CSM = (
    *("text_embeddings.weight", "audio_embeddings.weight", "projection.weight", "audio_head"),
    *("codebook0_head.weight", "backbone.norm.scale", "decoder.norm.scale"),
)


def network_of(named: NamedTensors, configs: Iterable[CsmConfig] = ()) -> CsmConfig | None:
    """Return the network that has most of some tensors by name and shape; None below half.

    Networks that are known are those of `configs`, and of the published
    flavors with vocabularies of any size.
    """
    shapes = {name: tensor.shape for name, tensor in named.tensors.items()}

    def size(name: str, at: int, otherwise: int) -> int:
        shape = shapes.get(name, ())
        return shape[at] if len(shape) > at else otherwise

    # of the two tensors that tell the vocabulary of codes either may be damaged
    text = size("text_embeddings.weight", 0, CSM_1B.text_vocab)
    codebooks = size("audio_head", 0, CSM_1B.codebooks - 1) + 1
    audio = {
        size("codebook0_head.weight", 0, CSM_1B.audio_vocab),
        size("audio_head", 2, CSM_1B.audio_vocab),
    }
    flavors = (
        CsmConfig(backbone, decoder, text, vocabulary, codebooks)
        for backbone, decoder, vocabulary in product(FLAVORS.values(), FLAVORS.values(), audio)
    )
    best, most = None, 0.5
    for network in (*configs, *flavors):
        expected = network.tensor_shapes()
        share = sum(shapes.get(n) == shape for n, shape in expected.items()) / len(expected)
        if share > most:
            best, most = network, share
    return best


def check_network(named: NamedTensors, network: CsmConfig, mixed: bool = False) -> Findings:
    """Return a finding for each tensor that is missing, one too many, misshapen or of odd dtype.

    All must have one dtype: float32, bfloat16 or float16; with `mixed` any of
    these. Tensors are called as in their file.
    """
    found = Findings(named.summary.where)
    expected, floats = network.tensor_shapes(), FLOATS.values()
    for name, shape in expected.items():
        tensor = named.tensors.get(name)
        if tensor is None:
            found.add(Malformed(str(list(shape)), "no such tensor", named.name_in_file(name)))
        elif tensor.shape != shape:
            found.add(Malformed(str(list(shape)), tensor.signature, show(tensor.name)))
    for tensor in (*named.unknown, *(t for n, t in named.tensors.items() if n not in expected)):
        found.add(Malformed("no such tensor", tensor.signature, show(tensor.name)))
    counts = Counter(t.dtype for t in named.tensors.values() if t.dtype in floats)
    common = max(counts, key=lambda dtype: counts[dtype], default=" or ".join(floats))
    for tensor in named.tensors.values():
        if tensor.dtype != common and not (mixed and tensor.dtype in floats):
            found.add(Malformed(common, tensor.signature, show(tensor.name)))
    return found

"""A CSM of tiny dimensions, as csm-tiny is, and networks with random weights."""

from __future__ import annotations

import torch

from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.model.csm import Model

TINY = CsmConfig(FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], 512, 35, 32)

#: Its config.json.
TINY_CONFIG = {
    "audio_num_codebooks": 32,
    "audio_vocab_size": 35,
    "backbone_flavor": "tiny-backbone",
    "decoder_flavor": "tiny-decoder",
    "text_vocab_size": 512,
}


def random_model(config: CsmConfig) -> Model:
    """A model whose attention is sharp enough that every position matters."""
    torch.manual_seed(1)
    model = Model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.uniform_(0.5, 1.5)
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(3)
    return model

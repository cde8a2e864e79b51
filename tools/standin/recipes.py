"""The stand-ins that can be made, and their manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csm_weights.hashing import sha256
from csm_weights.manifest.pin import PIECE_SIZE
from csm_weights.manifest.types import Artifact, Manifest


@dataclass(frozen=True)
class Recipe:
    """The ingredients of a stand-in: the text of its config.json and a seed.

    `piece_size` is in bytes.
    """

    description: str
    config: str
    seed: int
    piece_size: int
    golden: str | None = None
    codec: str | None = None


def _config(text_vocab: int, audio_vocab: int, backbone: str, decoder: str) -> str:
    """Return a config.json as the edition of March 2025 writes it."""
    data = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": audio_vocab,
        "backbone_flavor": backbone,
        "decoder_flavor": decoder,
        "text_vocab_size": text_vocab,
    }
    return json.dumps(data, indent=2, sort_keys=True)


#: All stand-ins. csm-tiny is committed, chunk files and all.
RECIPES = {
    "csm-1b-standin": Recipe(
        description="Names, shapes and byte counts of CSM-1B, random values: for rehearsals.",
        config=_config(128256, 2051, "llama-1B", "llama-100M"),
        seed=1,
        piece_size=PIECE_SIZE,
    ),
    "csm-tiny": Recipe(
        description="A network like CSM-1B with 296,640 random parameters, for tests.",
        config=_config(512, 35, "tiny-backbone", "tiny-decoder"),
        seed=2,
        piece_size=200 << 10,
        golden="csm-tiny.golden.json",
        codec="mimi-tiny",
    ),
}


def standin_manifest(name: str, recipe: Recipe, artifacts: Sequence[Artifact]) -> Manifest:
    """Return the manifest of a stand-in, with folders of its own, apart from the real model's.

    As with CSM-1B, ckpt.pt is pinned by its pieces and Hub blob id alone.
    """
    config = recipe.config.encode()
    digest = sha256()
    digest.update(memoryview(config))
    weights = [a if a.format == "safetensors" else _without_sha256(a) for a in artifacts]
    return Manifest(
        name=name,
        description=recipe.description,
        staging=f"output/{name}",
        destination=f"models/{name}",
        golden=recipe.golden,
        codec=recipe.codec,
        artifacts=(
            *weights,
            Artifact(
                path="config.json",
                group="config",
                format="config",
                size=len(config),
                sha256=digest.hexdigest(),
                text=recipe.config,
                evidence={"size": "A", "sha256": "A"},
            ),
        ),
    )


def _without_sha256(artifact: Artifact) -> Artifact:
    marks = {name: mark for name, mark in artifact.evidence.items() if name != "sha256"}
    return replace(artifact, sha256=None, evidence=marks)

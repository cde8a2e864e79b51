"""What each stand-in is made of, and its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.commands import split
from csm_weights.errors import Finding, Kind, UsageError, error_for
from csm_weights.formats.architecture import parse_config
from csm_weights.hashing import sha256
from csm_weights.manifest import pin
from csm_weights.manifest.pin import PIECE_SIZE
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.progress import Progress
from csm_weights.store import atomic
from tools.standin import recipes
from tools.standin.standin import sizes, write_standin


@dataclass(frozen=True)
class Recipe:
    """What a stand-in is made of: the text of its config.json and a seed.

    `piece_size` is in bytes.
    """

    description: str
    config: str
    seed: int
    piece_size: int
    golden: str | None = None


def _config(text_vocab: int, audio_vocab: int, backbone: str, decoder: str) -> str:
    """A config.json as the edition of March 2025 writes it."""
    data = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": audio_vocab,
        "backbone_flavor": backbone,
        "decoder_flavor": decoder,
        "text_vocab_size": text_vocab,
    }
    return json.dumps(data, indent=2, sort_keys=True)


#: The stand-ins there are. csm-tiny is committed, parts and all.
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
    ),
}


def standin_manifest(name: str, recipe: Recipe, artifacts: Sequence[Artifact]) -> Manifest:
    """The manifest of a stand-in, with its own places, apart from the real model's.

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


def standin(root: Path, name: str, dry: bool) -> str:
    """Writes the parts and the manifest of a stand-in; returns what is there now.

    The files are made whole below output/ first, so twice their size is needed.
    """
    recipe = recipes.RECIPES.get(name)
    if recipe is None:
        raise UsageError(f"no stand-in called {name!r}; there are {', '.join(recipes.RECIPES)}")
    config = parse_config(recipe.config.encode(), "config.json")
    total = sum(sizes(config).values())
    free = shutil.disk_usage(root).free
    if dry:
        return f"would write {total:,} bytes of parts to chunks/{name}/, and as many meanwhile"
    if free < 2 * total:
        finding = Finding(Kind.NO_SPACE, str(root), f"{2 * total:,} bytes free", f"{free:,}")
        raise error_for("a stand-in needs room for its files and for their parts", [finding])
    folder = root / "output" / f"{name}.unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = []
    try:
        with Progress("writing", total) as progress:
            write_standin(config, recipe.seed, folder, progress=progress.advance)
        with Progress("splitting", total) as progress:
            for file in (folder / "model.safetensors", folder / "ckpt.pt"):
                chunks = f"chunks/{name}/{pin.group_of(file.name)}"
                size = recipe.piece_size
                artifacts.append(split.split_file(file, root, chunks, size, progress.advance))
                file.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = root / "manifests" / f"{name}.toml"
    atomic.write_manifest(path, recipes.standin_manifest(name, recipe, artifacts))
    return f"{total:,} bytes in chunks/{name}/; now run inv weights --model {name}"

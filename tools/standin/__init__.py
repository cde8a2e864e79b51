"""Stand-in weights: files of the published layout and size, full of made-up numbers.

The real weights are gated, so tests and benchmarks run on these. For CSM-1B
they are 6,211,186,784 and 6,219,618,714 bytes, as published. Never: imports
torch, or writes over a chunk file that differs.

    from tools.standin import make_standin

    print(make_standin(Path.cwd(), "csm-tiny", dry=False))
"""

from __future__ import annotations

import shutil
from pathlib import Path

from csm_weights.commands.split import split_file, write_chunk_list
from csm_weights.errors import Finding, Kind, UsageError, error_for
from csm_weights.formats.architecture import parse_config
from csm_weights.manifest import pin
from csm_weights.pipeline.session import Summary
from csm_weights.progress import Progress
from csm_weights.store.manifest_file import write_manifest
from tools.standin.recipes import RECIPES, standin_manifest
from tools.standin.write import sizes, write_standin


def make_standin(root: Path, name: str, dry: bool) -> Summary:
    """Write the chunk files and the manifest of a stand-in; return what is there now.

    The files are made whole below output/ first, so twice their size is needed.
    """
    recipe = RECIPES.get(name)
    if recipe is None:
        raise UsageError(f"no stand-in called {name!r}; there are {', '.join(RECIPES)}")
    config = parse_config(recipe.config.encode(), "config.json")
    total = sum(sizes(config).values())
    free = shutil.disk_usage(root).free
    values = {"dry": dry, "folder": f"chunks/{name}", "size": total}
    if dry:
        would = f"would write {total:,} bytes to chunks/{name}/; needs twice that meanwhile"
        return Summary(name, [would], values)
    if free < 2 * total:
        finding = Finding(Kind.NO_SPACE, str(root), f"{2 * total:,} bytes free", f"{free:,}")
        raise error_for("a stand-in needs room for its files and their chunk files", [finding])
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
                artifacts.append(split_file(file, root, chunks, size, progress.advance))
                file.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    manifest = standin_manifest(name, recipe, artifacts)
    for artifact in manifest.artifacts:
        if artifact.pieces:
            write_chunk_list(root, artifact)
    write_manifest(root / "manifests" / f"{name}.toml", manifest)
    done = f"{total:,} bytes in chunks/{name}/; now run inv weights --model {name}"
    return Summary(name, [done], values)

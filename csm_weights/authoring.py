"""The other side: making parts, manifests and stand-ins, for those who publish.

Like `pipeline`, this module knows an order and does nothing by itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from csm_weights import files, publish
from csm_weights.architecture import parse_config
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, error_for
from csm_weights.locks import are_real, lock
from csm_weights.manifest import Manifest, load, path_problem, render_artifact
from csm_weights.progress import Progress
from csm_weights.proving import SUMS
from csm_weights.standin import sizes, write_standin

#: The name of the lock in output/ that one split holds at a time.
SPLIT_LOCK = ".split.lock"


def split(root: Path, file: Path, chunks: str, size: str, manifest: str, dry: bool) -> str:
    """Cuts `file` into parts below `root` and returns its manifest entry, or what was written.

    `size` is in bytes, or with a unit: MiB, GB, ... With `manifest`, a path,
    the entry is written there.
    """
    if not file.is_file():
        found = "not a plain file" if file.exists() else "no such file"
        finding = Finding(Kind.MISSING, str(file), "a file to split", found)
        raise MissingInput("there is nothing to split", [finding])
    folder = chunks or f"chunks/{file.stem}"
    if problem := path_problem(folder):
        raise UsageError(f"--chunks {folder!r}: {problem}")
    piece_size, total = publish.parse_size(size), file.stat().st_size
    ranges = publish.tiling(total, piece_size)
    if dry:
        return f"would write {len(ranges)} parts of at most {piece_size:,} bytes to {folder}/"
    path = Path(manifest)
    current = _manifest_to_extend(path) if manifest else None
    locks = root / "output"
    with lock(locks, SPLIT_LOCK), Progress("splitting", total) as progress:
        if are_real(locks / SPLIT_LOCK):
            publish.remove_unfinished(root / folder, file.name)
        artifact = publish.split(file, root, folder, piece_size, progress.tick)
        sums = {Path(p.part).name: p.sha256 for p in artifact.pieces}
        files.write_whole(root / folder / SUMS, publish.render_sums(sums))
    if current is None:
        return "\n".join(["[[artifact]]", *render_artifact(artifact)])
    publish.write_manifest(path, publish.with_artifact(current, artifact))
    return f"{len(ranges)} parts in {folder}/, entry in {path}"


def _manifest_to_extend(path: Path) -> Manifest:
    """The manifest at `path`, or an empty one of that name."""
    if path.exists():
        return load(path)
    if problem := publish.name_problem(path.stem):
        raise UsageError(f"--manifest {path}: {problem}")
    return Manifest(path.stem, f"output/{path.stem}", f"models/{path.stem}", (), where=str(path))


def standin(root: Path, name: str, dry: bool) -> str:
    """Writes the parts and the manifest of a stand-in; returns what is there now.

    The files are made whole below output/ first, so twice their size is needed.
    """
    recipe = publish.RECIPES.get(name)
    if recipe is None:
        raise UsageError(f"no stand-in called {name!r}; there are {', '.join(publish.RECIPES)}")
    architecture = parse_config(recipe.config.encode(), "config.json")
    total = sum(sizes(architecture).values())
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
            write_standin(architecture, recipe.seed, folder, progress=progress.tick)
        with Progress("splitting", total) as progress:
            for file in (folder / "model.safetensors", folder / "ckpt.pt"):
                chunks = f"chunks/{name}/{publish.group_of(file.name)}"
                size = recipe.piece_size
                artifacts.append(publish.split(file, root, chunks, size, progress.tick))
                file.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = root / "manifests" / f"{name}.toml"
    publish.write_manifest(path, publish.standin_manifest(name, recipe, artifacts))
    return f"{total:,} bytes in chunks/{name}/; now run inv weights --model {name}"

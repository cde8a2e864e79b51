"""Find every file of one model's weights: one file, its chunk files, or shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent, printable
from csm_weights.formats.multipart import find_chunk_files
from csm_weights.formats.weights_file import find_weights, missing
from csm_weights.untrusted import show

#: Most bytes of an index of shards, or of a config.json, that are read.
MAX_JSON = 1 << 20
MAX_SHARDS = 200

_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors", re.DOTALL)
_INDEX = ".safetensors.index.json"

#: The files of one model, each as its chunk files in order; one path where it is whole.
Files = Sequence[Sequence[Path]]


def find(path: Path) -> Files:
    """Find the files that a path means.

    `path` is a file of weights, or what it would be called if it were not in
    chunk files; any of these; a folder with any of these; a shard, a folder of
    shards, or their index. Raises MissingInput, with every shard that is not
    there, WrongContent, and UsageError for a folder of several models.
    """
    if path.name.endswith(_INDEX):
        return _alone(_listed(path))
    if match := _SHARD.fullmatch(path.name):
        return _alone(_numbered(path.parent, match))
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
        return _alone(_in_folder(path))


def read_small(path: Path) -> bytes:
    """Read a JSON file up to its ceiling."""
    with path.open("rb") as file:
        return file.read(MAX_JSON)


def _alone(paths: Iterable[Path]) -> Files:
    return [[path] for path in paths]


def _in_folder(folder: Path) -> list[Path]:
    matches = [m for path in folder.iterdir() if (m := _SHARD.fullmatch(path.name))]
    sets = {(m[1], m[3]): m for m in matches}
    if not sets:
        raise missing(folder, "weights, or shards NAME-00001-of-0000N.safetensors", "neither")
    if len(sets) > 1:
        names = ", ".join(sorted(show(match[0]) for match in sets.values()))
        raise UsageError(printable(f"{folder} has the shards of several models: {names}"))
    return _numbered(folder, next(iter(sets.values())))


def _numbered(folder: Path, match: re.Match[str]) -> list[Path]:
    """Find the shards of the set that one shard's name speaks of."""
    name, total = match[1], int(match[3])
    _check_count(folder / match[0], total)
    return _all_here(
        [folder / f"{name}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )


def _listed(index: Path) -> list[Path]:
    """Find the shards that an index names: files beside it, and nowhere else."""
    if not index.is_file():
        raise missing(index, "an index of shards", "no such file")
    try:
        names = set(json.loads(read_small(index))["weight_map"].values())
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

"""Which files are held against each other: named ones, or what is here of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import CsmWeightsError, Finding, Kind, UsageError, error_for
from csm_weights.formats import compare as stage
from csm_weights.formats.compare import Comparison
from csm_weights.formats.shards import Files, find
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin
from csm_weights.progress import Progress
from csm_weights.store.inspect import ArtifactState, FileState

#: Conditions of a file whose bytes can be read.
_READABLE = (FileState.VERIFIED, FileState.UNVERIFIED)


def compare(request: Request, first: Path | None = None, second: Path | None = None) -> Comparison:
    """Compare two files of weights; see `shards.find` for what a path may be.

    Without paths these are the model's two formats, wherever they are here;
    with one, that file and what is here of the model. Raises MissingInput,
    WrongContent where a file cannot be read, and UsageError.
    """
    sides = _chosen(request, [path for path in (first, second) if path])
    with stage.open_pair(*sides) as pair, Progress("comparing", pair.nbytes) as progress:
        return pair.compare(progress.advance)


def _chosen(request: Request, paths: Sequence[Path]) -> tuple[Files, Files]:
    found = [find(path) for path in paths]
    if len(found) == 2:
        return found[0], found[1]
    items = _weights(request)
    if not found:
        if [item.artifact.format for item in items] != ["safetensors", "torch-zip"]:
            raise UsageError(f"{request.model} has not one file of each format; name two files")
        return _both(request, items)
    others = [here for item in items if (here := _here(item)) and not _is_same(here, found[0])]
    if not others:
        raise _missing(request, [item for item in items if not _here(item)])
    return found[0], others[0]


def _weights(request: Request) -> list[ArtifactState]:
    """Return the model's files of weights, safetensors first."""
    state = begin(replace(request, only=("all",))).inspect()
    some = [item for item in state.artifacts if item.artifact.is_weights]
    return sorted(some, key=lambda item: item.artifact.format)


def _both(request: Request, items: Sequence[ArtifactState]) -> tuple[Files, Files]:
    found = [_here(item) for item in items]
    if found[0] and found[1]:
        return found[0], found[1]
    raise _missing(request, [i for i, here in zip(items, found, strict=True) if not here])


def _here(item: ArtifactState) -> Files | None:
    """Return the installed file, or else the staged one, the Hub cache's, or the chunk files."""
    for look in (item.installed, item.staged, item.cached):
        if look and look.state in _READABLE:
            return [[look.path]]
    if item.chunks and all(part.state in _READABLE for part in item.chunks):
        return [[part.path for part in item.chunks]]
    return None


def _is_same(some: Files, others: Files) -> bool:
    """Check whether both are the very same files."""
    pairs = [[path.resolve() for paths in files for path in paths] for files in (some, others)]
    return pairs[0] == pairs[1]


def _missing(request: Request, items: Iterable[ArtifactState]) -> CsmWeightsError:
    """Return the error for weights that are not here, or not whole."""
    findings = []
    for item in items:
        wrong = [look.finding for look in (item.installed, item.staged) if look.finding]
        command = f"inv fetch --model {request.model} --only {item.artifact.group}"
        size = f"{item.artifact.size:,} bytes, or all of its chunk files"
        absent = Finding(Kind.MISSING, str(item.installed.path), size, "neither", command)
        findings += wrong or [absent]
    return error_for("there is nothing to compare with", findings)

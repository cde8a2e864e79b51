"""Which files are held against each other: named ones, or what is here of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import CsmWeightsError, Finding, UsageError, error_for
from csm_weights.formats import compare as stage
from csm_weights.formats.compare import Comparison
from csm_weights.formats.weights_file import Files, find
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin
from csm_weights.progress import Progress
from csm_weights.store.inspect import ArtifactState, FileState

#: States of a file whose bytes can be read.
_READABLE = (FileState.VERIFIED, FileState.UNVERIFIED)


def compare(request: Request, first: Path | None = None, second: Path | None = None) -> Comparison:
    """Compare two files of weights; see `weights_file.find` for what a path may be.

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
    state = begin(replace(request, only=("all",))).inspect()
    items = [item for item in state.artifacts if item.artifact.is_weights]
    items.sort(key=lambda item: item.artifact.format)
    formats = {item.artifact.format for item in items}
    if not found and (len(items), len(formats)) != (2, 2):
        raise UsageError(f"{request.model} has not one file of each format; name two files")
    here = [_here(item) for item in items]
    others = [files for files in here if files and not (found and _is_same(files, found[0]))]
    if len(found + others) < 2:
        absent = [item for item, files in zip(items, here, strict=True) if not files]
        raise _missing(request, absent)
    first, second, *_ = found + others
    return first, second


def _here(item: ArtifactState) -> Files | None:
    """Return the installed file, or else the staged one, the Hub cache's, or the chunk files."""
    for file in (item.installed, item.staged, item.cached):
        if file and file.state in _READABLE:
            return [[file.path]]
    if item.chunks and all(chunk.state in _READABLE for chunk in item.chunks):
        return [[chunk.path for chunk in item.chunks]]
    return None


def _is_same(some: Files, others: Files) -> bool:
    """Check whether both are the very same files."""
    pairs = [[path.resolve() for paths in files for path in paths] for files in (some, others)]
    return pairs[0] == pairs[1]


def _missing(request: Request, items: Iterable[ArtifactState]) -> CsmWeightsError:
    """Return the error for weights that are not here, or not whole."""
    findings = []
    for item in items:
        wrong = [file.finding for file in (item.installed, item.staged) if file.finding]
        command = f"inv fetch --model {request.model} --only={item.artifact.group}"
        size = f"{item.artifact.size:,} bytes, or all of its chunk files"
        findings += wrong or [Finding.missing(item.installed.path, size, command)]
    return error_for("there is nothing to compare with", findings)

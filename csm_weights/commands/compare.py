"""Which files are held against each other: named ones, or what is here of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import Finding, UsageError, error_for
from csm_weights.formats import compare as stage
from csm_weights.formats.compare import Comparison
from csm_weights.formats.weights_file import Files, find
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin
from csm_weights.progress import Progress
from csm_weights.store.inspect import ArtifactState, FileState

#: States of a file whose bytes can be read.
_READABLE = (FileState.VERIFIED, FileState.UNVERIFIED)


def compare(request: Request, *paths: Path) -> Comparison:
    """Compare two files of weights; see `weights_file.find` for what a path may be.

    Without paths these are the model's two formats, wherever they are here;
    with one, that file and what is here of the model. Raises MissingInput,
    WrongContent where a file cannot be read, and UsageError.
    """
    if len(paths) > 2:
        raise UsageError("compare takes two files: give --file at most twice")
    sides = [find(path) for path in paths]
    if len(sides) < 2:
        sides = [*sides, *here_of_model(request, sides)][:2]
    with stage.open_pair(*sides) as pair, Progress("comparing", pair.nbytes) as progress:
        return pair.compare(progress.advance)


def here_of_model(request: Request, named: Sequence[Files]) -> list[Files]:
    """Return what is here of a model's weights, but for what was named; two with that at least."""
    state = begin(replace(request, only=("all",))).inspect()
    items = [item for item in state.artifacts if item.artifact.is_weights]
    items.sort(key=lambda item: item.artifact.format)
    if not named and [len(items), len({item.artifact.format for item in items})] != [2, 2]:
        name = request.model
        raise UsageError(f"{name} does not have one file of each format; give two with --file")
    known = {path.resolve() for files in named for paths in files for path in paths}
    found, findings = [], []
    for item in items:
        files = _here(item)
        if files and not (named and {path.resolve() for paths in files for path in paths} == known):
            found.append(files)
        elif not files:
            wrong = [file.finding for file in (item.installed, item.staged) if file.finding]
            command = f"inv fetch --model {request.model} --only={item.artifact.group}"
            size = f"{item.artifact.size:,} bytes, or all of its chunk files"
            findings += wrong or [Finding.missing(item.installed.path, size, command)]
    if len(named) + len(found) < 2:
        raise error_for("there is nothing to compare with", findings)
    return found


def _here(item: ArtifactState) -> Files | None:
    """Return the installed file, or else the staged one, the Hub cache's, or the chunk files."""
    for file in (item.installed, item.staged, item.cached):
        if file and file.state in _READABLE:
            return [[file.path]]
    if item.chunks and all(chunk.state in _READABLE for chunk in item.chunks):
        return [[chunk.path for chunk in item.chunks]]
    return None

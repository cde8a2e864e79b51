"""Find what interrupted runs have left behind."""

import os
from collections.abc import Iterator
from pathlib import Path

from csm_weights.store.inspect import ArtifactState, FileState, State
from csm_weights.store.journal import is_unfinished, journal_path, partial_path
from csm_weights.store.receipts import receipt_path


def unfinished(state: State) -> list[Path]:
    """Return the partials, journals and the stand-in's folder that interrupted runs have left.

    Without those that hold the bytes of consumed chunk files.
    """
    files = [item.staged.path for item in state.artifacts if not holds_consumed(item)]
    files += [item.installed.path for item in state.artifacts]
    files += [chunk.path for item in state.artifacts for chunk in item.chunks]
    known = set(files)
    left = {
        path
        for folder in {file.parent for file in files}
        if folder.is_dir()
        for path in folder.iterdir()
        if is_unfinished(name := path.name)
        and any(folder / name[:end] in known for end in range(1, len(name)))
    }
    standin = state.paths.root / "output" / f"{state.manifest.name}.unfinished"
    return sorted(left | ({standin} if standin.exists() else set()))


def holds_consumed(item: ArtifactState) -> bool:
    """Check whether the unfinished file has bytes that are nowhere else."""
    is_whole = FileState.VERIFIED in (item.installed.state, item.staged.state)
    return bool(item.stranded or item.journal.consumed) and not is_whole


def leftovers(state: State, goal_is_staged: bool) -> list[Path]:
    """Return what a run that was killed at its very end has left of verified files.

    Journals of partials that have got their names, receipts of files that
    were moved on or half written, and, unless files are wanted there, the
    staged copies of files that went to another disk.
    """
    return [path for item in state.artifacts for path in _leftovers(state, item, goal_is_staged)]


def _leftovers(state: State, item: ArtifactState, goal_is_staged: bool) -> Iterator[Path]:
    files = (item.staged, item.installed)
    verified = [file for file in files if file.state is FileState.VERIFIED]
    if not verified:
        return
    for file in files:
        journal = journal_path(file.path)
        if journal.is_file() and not os.path.lexists(partial_path(file.path)):
            yield journal
    for folder in (state.paths.staging, state.paths.destination):
        unfinished_receipt = partial_path(receipt_path(folder, item.artifact.path))
        if unfinished_receipt.is_file():
            yield unfinished_receipt
    if item.installed not in verified or item.installed.path == item.staged.path:
        return
    receipt = receipt_path(state.paths.staging, item.artifact.path)
    if item.staged in verified and not goal_is_staged:
        if item.staged.path.samefile(item.installed.path):
            return
        yield item.staged.path
        yield receipt
    elif item.staged.state is FileState.ABSENT and receipt.is_file():
        yield receipt

"""Find what interrupted runs have left behind."""

import os
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
    names: dict[Path, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    left = {
        path
        for folder, known in names.items()
        if folder.is_dir()
        for path in folder.iterdir()
        if is_unfinished(name := path.name)
        and any(name[:end] in known for end in range(1, len(name)))
    }
    standin = state.paths.root / "output" / f"{state.manifest.name}.unfinished"
    return sorted(left | ({standin} if standin.exists() else set()))


def holds_consumed(item: ArtifactState) -> bool:
    """Check whether the unfinished file has bytes that are nowhere else."""
    return bool(item.stranded or item.journal.consumed) and item.verified is None


def leftovers(state: State, goal_is_staged: bool) -> list[Path]:
    """Return what a run that was killed at its very end has left of verified files.

    Journals of partials that have got their names, receipts of files that
    were moved on or half written, and, unless files are wanted there, the
    staged copies of files that went to another disk.
    """
    left = []
    for item in state.artifacts:
        files = (item.staged, item.installed)
        verified = [file for file in files if file.state is FileState.VERIFIED]
        if not verified:
            continue
        named = [f.path for f in files if not os.path.lexists(partial_path(f.path))]
        moved_on = receipt_path(state.paths.staging, item.artifact.path)
        receipts = (moved_on, receipt_path(state.paths.destination, item.artifact.path))
        left += [
            f for f in (*map(journal_path, named), *map(partial_path, receipts)) if f.is_file()
        ]
        if item.installed not in verified:
            continue
        if item.staged in verified and not goal_is_staged:
            if not item.staged.path.samefile(item.installed.path):
                left += [item.staged.path, moved_on]
        elif item.staged.state is FileState.ABSENT and moved_on.is_file():
            left.append(moved_on)
    return left

"""Clean: remove what interrupted runs have left unfinished."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from csm_weights.commands.split import SPLIT_LOCK
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Session, Summary, begin
from csm_weights.store import atomic
from csm_weights.store.journal import partial_path
from csm_weights.store.leftovers import holds_consumed, unfinished
from csm_weights.store.lock import lock, locked


def clean(request: Request, dry: bool) -> Summary:
    """Remove partials, journals and the like; return what that was.

    What is removed is decided once no other run is at work. The unfinished
    file that has the bytes of consumed chunk files stays: it is the only copy.
    """
    session = begin(request)
    left, kept = _find(session)
    if left and not dry:
        with ExitStack() as locks:
            if not atomic.why_read_only(output := session.paths.root / "output"):
                locks.enter_context(lock(output, SPLIT_LOCK))
            locks.enter_context(locked(session.paths, with_destination=True))
            left, kept = _find(session)
            for path in left:
                with atomic.writing(path):
                    is_folder = path.is_dir() and not path.is_symlink()
                    shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
    why = "it holds the bytes of consumed chunk files; inv weights continues it"
    lines = [*map(str, left), *(f"kept: {path}: {why}" for path in kept)] or ["nothing to remove"]
    return Summary(session.manifest.name, lines, {"dry": dry, "removed": left, "kept": kept})


def _find(session: Session) -> tuple[list[Path], list[Path]]:
    """Return what may be removed, and the unfinished files that are kept."""
    state = session.inspect()
    held = [partial_path(i.staged.path) for i in state.artifacts if holds_consumed(i)]
    return unfinished(state), held

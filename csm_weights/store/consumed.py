"""Chunk files whose bytes have moved to an unfinished file, or may move there."""

import os
from pathlib import Path, PurePosixPath

from csm_weights.errors import Finding, Kind
from csm_weights.files import opened
from csm_weights.manifest.types import Artifact
from csm_weights.store.journal import Journal, partial_path

#: Bytes free that consuming begins with: a step of it, and as much for the disk's own books.
CONSUMING_ROOM = 64 << 20

#: Bytes of a file system block, at most: only ranges that begin at one can be shared.
BLOCK = 4096


def why_stranded(artifact: Artifact, staged: Path, journal: Journal, root: Path) -> Finding | None:
    """Return why the unfinished form of `staged` cannot be continued, if so.

    It may hold the only copy of bytes that were moved out of chunk files below `root`.
    """
    if not journal.is_begun:
        return None
    partial, found = partial_path(staged), ""
    if journal.foreign:
        found = f"chunk files that {artifact.path} no longer has"
    elif journal.consumed:
        found = "more hard links to it" if partial.lstat().st_nlink > 1 else ""
    else:
        # Copied as it is, the hole would go over what may be the only copy.
        holes = (p.part for p in artifact.pieces if _begins_with_hole(root / p.part, p.size))
        if hole := next(holes, None):
            found = f"no journal, and {hole} begins with a hole"
    if not found:
        return None
    expected = "the bytes of its consumed chunk files, and no others"
    mend = "bring the journal back, or move the unfinished file away and keep it"
    return Finding(Kind.STRANDED, str(partial), expected, found, mend)


def held_twice(artifact: Artifact, staged: Path, journal: Journal, root: Path) -> int:
    """Return the bytes of disk that a killed run holds twice, which the next one gives back first.

    They are in chunk files though the journal says that they have moved, or in
    the unfinished file though it does not say so yet.
    """
    if not journal.is_begun:
        return 0
    moved = journal.moved
    known = (moved | journal.kept).total() + sum(arrival.size for arrival in journal.arrived)
    held = max(0, _allocated(partial_path(staged)) - known)
    for piece in artifact.pieces:
        if gone := moved[piece.offset]:
            held += max(0, _allocated(root / piece.part) - (piece.size - gone))
    return held


def _allocated(path: Path) -> int:
    """Return the bytes of disk that a file takes; 0 where there is none, or that is not known."""
    try:
        return getattr(path.stat(), "st_blocks", 0) * 512
    except OSError:
        return 0


def _begins_with_hole(path: Path, size: int) -> bool:
    """Check whether the first block of a file of that size was given back to the disk."""
    if not hasattr(os, "SEEK_HOLE") or size < BLOCK:
        return False
    try:
        # The stat alone is enough for most chunk files.
        if path.stat().st_size != size or _allocated(path) >= size:
            return False
        with opened(path) as fd:
            return os.lseek(fd, 0, os.SEEK_HOLE) == 0
    except OSError:
        return False


def why_unfit(chunk: Path, where: str, artifact: Artifact) -> Finding | None:
    """Return why a chunk file that is here cannot be consumed, by its name and its stat."""
    if not os.path.lexists(chunk):
        return None
    if not chunk.name.startswith(f"{PurePosixPath(artifact.path).name}.part-"):
        found = f"a name that no chunk file of {artifact.path} has"
    elif chunk.is_symlink():
        found = "a symbolic link"
    elif (links := chunk.lstat().st_nlink) > 1:
        found = f"{links} hard links to it"
    elif not (os.access(chunk, os.W_OK) and os.access(chunk.parent, os.W_OK)):
        found = "no permission to write"
    else:
        return None
    expected = "a regular file without other links, that may be removed"
    mend = "leave --consume out, or replace it by a copy"
    return Finding(Kind.NOT_CONSUMABLE, where, expected, found, mend)

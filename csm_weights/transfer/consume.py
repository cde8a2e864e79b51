"""Consume chunk files: move their bytes to a file on a disk that cannot hold both.

Nothing is freed before every chunk file has been hashed and found right. Then a
step is copied, compared with what was hashed, made durable, journaled, and only
then freed in the chunk file; so at each instant each byte is in the chunk file,
or durable in the unfinished file with a journal that says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from csm_weights.concurrency import OnProgress, run_all
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.files import Fingerprint, opened
from csm_weights.hashing import Hasher, ShortRead, feed, sha256
from csm_weights.manifest.paths import CHUNKS
from csm_weights.manifest.types import Piece
from csm_weights.progress import took
from csm_weights.store.atomic import stay_inside, sync, writing
from csm_weights.store.block_io import Extent, can_punch, punch
from csm_weights.store.inspect import ArtifactState
from csm_weights.store.journal import partial_path
from csm_weights.transfer.assemble import PartialWriter
from csm_weights.transfer.source import SourceError

#: Bytes copied before they are freed in the chunk file: what is on the disk twice.
STEP = 32 << 20


@dataclass(frozen=True)
class Subject:
    """A file to make of chunk files below `root`: of the pieces that begin at these offsets."""

    item: ArtifactState
    offsets: frozenset[int]
    root: Path

    @property
    def partial(self) -> Path:
        """The unfinished file."""
        return partial_path(self.item.staged.path)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces to consume."""
        return [piece for piece in self.item.artifact.pieces if piece.offset in self.offsets]


@dataclass(frozen=True)
class Stake:
    """What was hashed of a piece: its first bytes in the partial, the rest in the chunk file.

    `marks` are pairs `(end, digest)`: the sha256 of the piece up to byte
    `end`, first of what has moved and then of each step that is left. `seen`
    is the chunk file as it was then, None where there is none.
    """

    marks: tuple[tuple[int, str], ...]
    seen: Fingerprint | None


@dataclass(frozen=True)
class Proof:
    """What may be consumed, by offset, or else what is wrong, by the file it is about."""

    stakes: Mapping[int, Stake]
    findings: Mapping[Path, Finding]


def require_punching(subjects: Sequence[Subject]) -> None:
    """Raise NoSpace where a folder of chunk files is on a file system that frees nothing.

    Raises WrongContent where a link on the way to one leads out of chunks/.
    """
    folders = {(s.root / p.part).parent: s.root for s in subjects for p in s.pieces}
    for folder, root in folders.items():
        stay_inside(folder, root / CHUNKS)
    words = ("a file system that frees parts of a file", "one that does not")
    help_text = "leave --consume out, and have room for the whole file"
    wrong = [str(f) for f in sorted(folders) if f.is_dir() and not can_punch(f)]
    if findings := [Finding(Kind.NOT_CONSUMABLE, f, *words, help_text) for f in wrong]:
        raise error_for("the chunk files cannot be consumed; none was touched", findings)


def verify(subjects: Sequence[Subject], on_progress: OnProgress) -> list[Proof]:
    """Hash every chunk file to be consumed, and every whole file that they make up.

    `on_progress` gets bytes. Nothing is written.
    """
    cancel = Event()
    return run_all([partial(_verify, subject, on_progress, cancel) for subject in subjects], cancel)


def _verify(subject: Subject, on_progress: OnProgress, cancel: Event) -> Proof:
    """Hash all pieces, and hold the whole against the manifest where all are consumed."""
    item, whole = subject.item, sha256()
    kept, gone = item.journal.kept, item.journal.moved
    stakes: dict[int, Stake] = {}
    findings: dict[Path, Finding] = {}
    for piece in subject.pieces:
        wrong: list[Finding] = []
        # So many of its first bytes may be in the partial; the likeliest number first.
        at = piece.offset
        for moved in sorted({kept[at], gone[at], 0}, reverse=True):
            both = whole.copy()
            try:
                stake = _hash(subject, piece, moved, both, on_progress, cancel)
            except (OSError, ShortRead) as error:
                wrong.append(Finding.unreadable(piece.part, error))
                continue
            digest = stake.marks[-1][1]
            if digest == piece.sha256:
                stakes[at], whole = stake, both
                break
            where = f"{moved:,} bytes of it in {subject.partial}: " if moved else ""
            words = (f"sha256 {piece.sha256}", f"{where}{digest}")
            help_text = "get the chunk file again: restore it from git, or copy it there"
            wrong.append(Finding(Kind.WRONG_DIGEST, piece.part, *words, help_text))
        else:
            findings[subject.root / piece.part] = wrong[0]
    if len(stakes) == len(item.artifact.pieces):
        made = (whole.hexdigest(), None, subject.partial)
        for finding in item.artifact.digest_findings(item.artifact.editions[0], *made):
            findings[subject.partial] = finding
    return Proof(stakes, findings)


def _hash(
    subject: Subject,
    piece: Piece,
    moved: int,
    whole: Hasher,
    on_progress: OnProgress,
    cancel: Event,
) -> Stake:
    """Hash a piece: in the partial up to byte `moved`, and in its chunk file from there."""
    digest = sha256()
    if moved:
        with opened(subject.partial, os.O_NOFOLLOW) as fd:
            feed(fd, piece.offset, moved, [digest, whole], on_progress, cancel)
    marks = [(moved, digest.hexdigest())]
    chunk = subject.root / piece.part
    if moved == piece.size and not chunk.exists():
        return Stake(tuple(marks), None)
    with opened(chunk, os.O_NOFOLLOW) as fd:
        before = Fingerprint.of(os.fstat(fd))
        for start in range(moved, piece.size, STEP):
            size = min(STEP, piece.size - start)
            feed(fd, start, size, [digest, whole], on_progress, cancel)
            marks.append((start + size, digest.hexdigest()))
        if before != Fingerprint.of(os.fstat(fd)):
            raise OSError(None, "a change in the meantime")
    return Stake(tuple(marks), before)


def consume(root: Path, stakes: Mapping[int, Stake], writer: PartialWriter) -> str:
    """Move a piece out of its chunk file below `root`, which `verify` has found right.

    Returns the chunk file's path relative to the root; raises SourceError.
    """
    piece = writer.piece
    stake = stakes[piece.offset]
    (at, moved), seen = stake.marks[0], stake.seen
    if writer.rehash(at) != moved:
        raise SourceError([Finding.changed(f"the unfinished file, where {piece.part} has moved")])
    # Also where nothing has moved: the journal may say of a chunk file that is whole again
    # that it was consumed.
    writer.secure(at)
    if seen is None:
        return piece.part
    changed = SourceError([Finding.changed(piece.part)])
    try:
        with opened(root / piece.part, os.O_RDWR | os.O_NOFOLLOW) as fd:
            for end, digest in stake.marks:
                if end > at:
                    if writer.copy(Extent(fd, at, end - at), at) != digest:
                        raise changed
                    took("chunk", end - at)
                    writer.secure(end)
                if Fingerprint.of(os.fstat(fd)) != seen:
                    raise changed
                if end:
                    # From the start: a run that was killed here has left the last hole undone.
                    punch(fd, 0, end)
                seen, at = Fingerprint.of(os.fstat(fd)), end
    except (OSError, EOFError) as error:
        raise SourceError([Finding.unreadable(piece.part, error)]) from None
    return piece.part


def remove_chunk_files(root: Path, partial: Path, pieces: Iterable[Piece]) -> None:
    """Remove chunk files whose pieces are all in a partial that has been verified.

    Before the file gets its name, so that while a chunk file of zeros is here
    there is a journal that says what it is. Raises NoSpace.
    """
    sync(partial)
    paths = [root / piece.part for piece in pieces]
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        if folder.is_dir():
            sync(folder)

"""Parts into a file on a disk that cannot hold both: copied, made durable, punched out.

Nothing is punched before every part has been hashed and found right. Then a
step is copied, compared with what was hashed, made durable, journaled, and only
then freed in the part; so at each instant each byte is in the part, or durable
in the unfinished file with a journal that says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from threading import Event

from csm_weights.concurrency import OnProgress, run_all
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.files import Fingerprint
from csm_weights.hashing import Hasher, ShortRead, feed, sha256
from csm_weights.manifest.digests import digest_findings
from csm_weights.manifest.paths import CHUNKS
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.atomic import stay_inside, sync, writing
from csm_weights.store.block_io import can_punch, punch
from csm_weights.store.inspect import ArtifactState
from csm_weights.store.journal import partial_path
from csm_weights.transfer.assemble import Steps
from csm_weights.transfer.source import SourceError

#: Bytes copied before they are freed in the part: what is on the disk twice.
STEP = 32 << 20


@dataclass(frozen=True)
class Subject:
    """One file to make of parts below `root`, `partial` while it is unfinished.

    `moved` has, by the offset of each piece to consume, how many of its first
    bytes may be in the partial already; the likeliest number first.
    """

    artifact: Artifact
    partial: Path
    root: Path
    moved: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, item: ArtifactState, offsets: Iterable[int], root: Path) -> Subject:
        """Return what is to be consumed of an artifact, by the offsets of its pieces."""
        kept = {record.offset: record.size for record in item.partial}
        gone = {record.offset: record.consumed for record in item.consumed}
        moved = {o: {kept.get(o, 0), gone.get(o, 0), 0} for o in offsets}
        known = {offset: tuple(sorted(sizes, reverse=True)) for offset, sizes in moved.items()}
        return cls(item.artifact, partial_path(item.staged.path), root, known)


@dataclass(frozen=True)
class Stake:
    """What was hashed of a piece: its first `moved` bytes in the partial, the rest in the part.

    `marks` are pairs `(end, digest)`: the sha256 of the piece up to byte
    `end`, of each step that is left and, first, of what has moved.
    `seen` is the part as it was then, None where there is none.
    """

    piece: Piece
    moved: int
    marks: tuple[tuple[int, str], ...]
    seen: Fingerprint | None


@dataclass(frozen=True)
class Proof:
    """What may be consumed, by offset, or else what is wrong, by the part it is about."""

    stakes: Mapping[int, Stake]
    findings: Mapping[Path, Finding]


def require_punching(subjects: Sequence[Subject]) -> None:
    """Raise NoSpace where a folder of chunk files is on a file system that frees nothing.

    Raises WrongContent where a link on the way to one leads out of chunks/.
    """
    folders = set()
    for subject in subjects:
        for piece in subject.artifact.pieces:
            if piece.offset in subject.moved:
                folder = (subject.root / piece.part).parent
                stay_inside(folder, subject.root / CHUNKS)
                folders.add(folder)
    findings = [
        Finding(
            Kind.NOT_CONSUMABLE,
            str(folder),
            "a file system that frees parts of a file",
            "one that does not",
            "leave --consume out, and have room for the whole file",
        )
        for folder in sorted(folders)
        if folder.is_dir() and not can_punch(folder)
    ]
    if findings:
        raise error_for("the chunk files cannot be consumed; none was touched", findings)


def verify(subjects: Sequence[Subject], on_progress: OnProgress) -> list[Proof]:
    """Hashes every part to be consumed, and every whole file that they make up.

    `on_progress` gets bytes. Nothing is written.
    """
    cancel = Event()
    return run_all([bind(_verify, subject, on_progress, cancel) for subject in subjects], cancel)


def _verify(subject: Subject, on_progress: OnProgress, cancel: Event) -> Proof:
    stakes: dict[int, Stake] = {}
    findings: dict[Path, Finding] = {}
    whole = sha256()
    for piece in subject.artifact.pieces:
        if piece.offset not in subject.moved:
            continue
        found = _verify_piece(subject, piece, whole, on_progress, cancel)
        if isinstance(found, Finding):
            findings[subject.root / piece.part] = found
        else:
            stakes[piece.offset], whole = found
    artifact = subject.artifact
    if len(stakes) == len(artifact.pieces):
        made = (whole.hexdigest(), None, subject.partial)
        for wrong in digest_findings(artifact, artifact.editions[0], *made):
            findings[subject.partial] = wrong
    return Proof(stakes, findings)


def _verify_piece(
    subject: Subject, piece: Piece, whole: Hasher, on_progress: OnProgress, cancel: Event
) -> tuple[Stake, Hasher] | Finding:
    """The stake of a piece, and the whole file's digest after it."""
    finding: Finding | None = None
    for moved in subject.moved[piece.offset]:
        both = whole.copy()
        try:
            stake = _hash(subject, piece, moved, both, on_progress, cancel)
        except (OSError, ShortRead) as error:
            problem = Finding.unreadable(piece.part, error)
        else:
            if stake.marks[-1] == (piece.size, piece.sha256):
                return stake, both
            problem = _wrong(subject, piece, moved, stake)
        finding = finding or problem
    assert finding is not None, "a piece to consume may be somewhere"
    return finding


def _wrong(subject: Subject, piece: Piece, moved: int, stake: Stake) -> Finding:
    where = f"{moved:,} bytes of it in {subject.partial}: " if moved else ""
    help_text = "get the part again (`git lfs checkout`, or copy it there)"
    expected = f"sha256 {piece.sha256}"
    return Finding(
        Kind.WRONG_DIGEST, piece.part, expected, f"{where}{stake.marks[-1][1]}", help_text
    )


def _hash(
    subject: Subject,
    piece: Piece,
    moved: int,
    whole: Hasher,
    on_progress: OnProgress,
    cancel: Event,
) -> Stake:
    """A piece as it lies, in the partial up to byte `moved` and in its part from there."""
    digest = sha256()
    marks: list[tuple[int, str]] = []
    if moved:
        with _open(subject.partial, os.O_RDONLY) as fd:
            feed(fd, piece.offset, moved, [digest, whole], on_progress, cancel)
    marks.append((moved, digest.hexdigest()))
    part = subject.root / piece.part
    if moved == piece.size and not part.exists():
        return Stake(piece, moved, tuple(marks), None)
    with _open(part, os.O_RDONLY) as fd:
        before = Fingerprint.of(os.fstat(fd))
        for start in range(moved, piece.size, STEP):
            size = min(STEP, piece.size - start)
            feed(fd, start, size, [digest, whole], on_progress, cancel)
            marks.append((start + size, digest.hexdigest()))
        if before != Fingerprint.of(os.fstat(fd)):
            raise OSError(None, "a write meanwhile")
    return Stake(piece, moved, tuple(marks), before)


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    """A plain file, never through a link."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "not a plain file")
        yield fd
    finally:
        os.close(fd)


class Consuming:
    """Moves pieces out of the parts below `root` that `verify` has found right."""

    def __init__(self, root: Path, stakes: Mapping[int, Stake]) -> None:
        self._root = root
        self._stakes = stakes

    def consume(self, writer: Steps) -> str:
        """See `Consumer`; the place is the part's path relative to the root."""
        piece = writer.piece
        stake = self._stakes[piece.offset]
        if writer.rehash(stake.moved) != stake.marks[0][1]:
            where = f"the unfinished file, where {piece.part} has moved"
            raise SourceError([Finding.changed(where)])
        # Also where nothing has moved: the journal may say of a part that is whole again
        # that it was consumed.
        writer.secure(stake.moved)
        if stake.seen is None:
            return piece.part
        try:
            with _open(self._root / piece.part, os.O_RDWR) as fd:
                _move(fd, stake, stake.seen, writer)
        except (OSError, EOFError) as error:
            raise SourceError([Finding.unreadable(piece.part, error)]) from None
        return piece.part


def _move(fd: int, stake: Stake, seen: Fingerprint, writer: Steps) -> None:
    """Moves what is left of a part, step by step."""
    piece = stake.piece
    at = stake.moved
    for end, digest in stake.marks:
        if end > at:
            if writer.copy_step(fd, at, end - at) != digest:
                raise SourceError([Finding.changed(piece.part)])
            writer.secure(end)
        if Fingerprint.of(os.fstat(fd)) != seen:
            raise SourceError([Finding.changed(piece.part)])
        if end:
            # From the start: a run that was killed here has left the last hole undone.
            punch(fd, 0, end)
        seen, at = Fingerprint.of(os.fstat(fd)), end


def remove_chunk_files(root: Path, partial: Path, pieces: Sequence[Piece]) -> None:
    """Removes parts whose pieces are all in a partial that has been proven.

    Before the file gets its name, so that while a part of zeros has a part's
    name there is a journal that says what it is. Raises NoSpace.
    """
    sync(partial)
    for piece in pieces:
        with writing(root / piece.part):
            (root / piece.part).unlink(missing_ok=True)
    for folder in {(root / piece.part).parent for piece in pieces}:
        if folder.is_dir():
            sync(folder)

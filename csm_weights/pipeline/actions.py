"""Actions: what can be done with one artifact, what it costs in bytes, and how it is done.

A further kind of action is one class here, its place in `ORDER`, and the
branch of `plan.py` that chooses it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as bind
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from csm_weights.byte_ranges import Ranges
from csm_weights.errors import CsmWeightsError, Finding, Kind, NoSpace, error_for
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.progress import Progress, count, format_size, label_for
from csm_weights.store import atomic, install
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus
from csm_weights.store.journal import partial_path
from csm_weights.store.lock import NAME, are_real
from csm_weights.store.receipts import Receipt, VerifiedFile
from csm_weights.transfer import consume
from csm_weights.transfer.assemble import Assembly, assemble, write_text
from csm_weights.transfer.local import WholeFile
from csm_weights.transfer.policy import PieceOrigin, PieceSource, RemoteSources, SourcePolicy

if TYPE_CHECKING:
    from csm_weights.pipeline.session import Session

ActionT = TypeVar("ActionT", bound="Action")


@dataclass(frozen=True)
class Cost:
    """Bytes that an action takes.

    Read from disks of this machine, written to the disk of `writes_to`, fetched
    from remote sources, and given back to that disk while it is written to.
    """

    read: int = 0
    written: int = 0
    fetched: int = 0
    freed: int = 0


@dataclass(frozen=True)
class Action:
    """One act on one artifact; `file` is the one that is read, or the staged one that results.

    `verb` and `detail` are the words for a person. `reads_file` says whether
    `file` is read. `writes_to` is the folder that gets the bytes: the name of a
    field of `Paths`, or empty.
    """

    item: ArtifactState
    file: FileStatus

    verb: ClassVar[str]
    reads_file: ClassVar[bool] = False
    writes_to: ClassVar[str] = ""

    @property
    def artifact(self) -> Artifact:
        """The artifact that is acted on."""
        return self.item.artifact

    @property
    def detail(self) -> str:
        """The origin of the bytes, in words, or empty."""
        return ""

    @property
    def cost(self) -> Cost:
        """The bytes that it takes."""
        return Cost(read=(self.file.size or self.artifact.size) if self.reads_file else 0)

    @property
    def replaced(self) -> list[FileStatus]:
        """Files that others take the place of."""
        files = {"staging": [self.item.staged], "destination": [self.item.installed]}
        return files.get(self.writes_to, [])

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """Take actions of this kind, on all their files at once.

        Raises the error of what stands in the way; what is done by then is kept.
        """
        raise NotImplementedError


class Keep(Action):
    """Leave a verified file where it is."""

    verb = "keep"

    @property
    def detail(self) -> str:
        """The other name that the file has, as files that were linked to the Hub's cache have."""
        words = "(linked to another file, as in the Hub's cache: chmod a-w protects both)"
        return words if self.file.is_shared else ""


class Verify(Action):
    """Hash a file that lies where it should; a right one gets its receipt."""

    verb, reads_file = "verify", True

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`; a wrong file is planned around from now on."""
        for action, verified in _verified(actions, session):
            depth = action.artifact.path.count("/")
            receipt = session.receipt(action.artifact, verified)
            install.record(action.file.path.parents[depth], receipt)


class WriteText(Action):
    """Write a small file whose text the manifest has."""

    verb, writes_to = "write", "staging"

    @property
    def detail(self) -> str:
        """The origin of the bytes."""
        return "from its known text"

    @property
    def cost(self) -> Cost:
        """Bytes of the text."""
        return Cost(written=len((known_text(self.artifact) or "").encode()))

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`."""
        for action in actions:
            made = write_text(action.file.path, known_text(action.artifact) or "")
            session.install_staged(action.artifact, made)


@dataclass(frozen=True)
class Assemble(Action):
    """Put a file together in staging, each piece from where `origins` say.

    `remark` says why chunk files stay though `policy` lets them go.
    """

    origins: tuple[PieceOrigin, ...]
    policy: SourcePolicy
    shares_blocks: bool
    remark: str = ""

    verb, writes_to = "assemble", "staging"

    def pieces_from(self, *kinds: PieceSource) -> list[Piece]:
        """Return the pieces that come from places of these kinds."""
        return [origin.piece for origin in self.origins if origin.source in kinds]

    def size_from(self, *kinds: PieceSource) -> int:
        """Return the bytes that come from places of these kinds."""
        return sum(piece.size for piece in self.pieces_from(*kinds))

    @property
    def remote(self) -> frozenset[int]:
        """Offsets of the pieces that come from remote sources."""
        return frozenset(piece.offset for piece in self.pieces_from(PieceSource.REMOTE))

    @property
    def cost(self) -> Cost:
        """Nothing that an earlier run wrote is fetched again; shared blocks are not written."""
        here = Ranges([(a.offset, a.offset + a.size) for a in self.item.journal.arrived])
        remote = self.pieces_from(PieceSource.REMOTE)
        gaps = [gap for piece in remote for gap in here.missing(piece.offset, piece.end)]
        fetched = sum(end - start for start, end in gaps)
        nowhere = self.size_from(PieceSource.NOWHERE)
        there = self.size_from(PieceSource.KEPT, PieceSource.REMOTE) + nowhere
        copied = 0 if self.shares_blocks else self.artifact.size - there
        return Cost(self.artifact.size - fetched - nowhere, fetched + copied, fetched)

    @property
    def replaced(self) -> list[FileStatus]:
        """Files that others take the place of, such as wrong chunk files."""
        parts = zip(self.origins, self.item.chunks, strict=False)
        kinds = (PieceSource.CACHED, PieceSource.REMOTE)
        wrong = [p for o, p in parts if o.source in kinds and p.state is FileState.INVALID]
        return [*super().replaced, *wrong]

    @property
    def detail(self) -> str:
        """The number of pieces from each origin."""
        counts = {kind: len(self.pieces_from(kind)) for kind in PieceSource}
        pieces = {kind: count(number, "piece") for kind, number in counts.items()}
        remote = next((o.where for o in self.origins if o.source is PieceSource.REMOTE), "")
        if len(self.origins) > counts[PieceSource.REMOTE]:
            remote += f" ({pieces[PieceSource.REMOTE]})"
        consumed = count(counts[PieceSource.CONSUMED], "chunk file")
        words = {
            PieceSource.SALVAGED: f"{pieces[PieceSource.SALVAGED]} of the damaged file",
            PieceSource.CHUNK: count(counts[PieceSource.CHUNK], "chunk file"),
            PieceSource.CONSUMED: f"{consumed} consumed in an earlier run",
            PieceSource.CACHED: "the Hub's cache",
            PieceSource.SHELF: f"{pieces[PieceSource.SHELF]} of other folders",
            PieceSource.REMOTE: remote,
        }
        texts = [text for kind, text in words.items() if counts[kind]]
        if lacking := counts[PieceSource.NOWHERE]:
            texts.append(f"{lacking} more that no source has yet")
        if kept := len(self.item.journal.pieces):
            texts.append(f"{count(kept, 'piece')} verified in an earlier run")
        return f"from {' and '.join(texts) or 'nothing, as it is empty'}{self.remark}"

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`."""
        _assemble(actions, session, {})


class Consume(Assemble):
    """Put a file together in staging while its chunk files go."""

    verb = "assemble, consuming its chunk files,"

    @property
    def consumed(self) -> frozenset[int]:
        """Offsets of the pieces whose chunk files go: those moved, and those of kept pieces."""
        moved = self.pieces_from(PieceSource.CHUNK, PieceSource.CONSUMED)
        parts = zip(self.origins, self.item.chunks, strict=True)
        kept = [o.piece for o, p in parts if o.source is PieceSource.KEPT and p.is_usable]
        return frozenset(piece.offset for piece in (*moved, *kept))

    @property
    def cost(self) -> Cost:
        """Each chunk file is hashed before it goes, and read again as it is copied.

        What an earlier run has moved out of them is neither written nor given back again.
        """
        plain = super().cost
        hashed = sum(p.size for p in self.artifact.pieces if p.offset in self.consumed)
        kinds = (PieceSource.CHUNK, PieceSource.CONSUMED)
        offsets = {piece.offset for piece in self.pieces_from(*kinds)}
        moved = sum(c.consumed for c in self.item.journal.consumed if c.offset in offsets)
        return replace(
            plain,
            read=plain.read + hashed,
            written=max(0, plain.written - moved),
            freed=self.size_from(*kinds) - moved,
        )

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`: one file after the other, once all their chunk files are verified."""
        root = session.paths.root
        # A file that was begun goes first: it gives back what a killed run holds twice.
        actions = sorted(actions, key=lambda action: not action.item.held_twice)
        subjects = [consume.Subject(a.item, a.consumed, root) for a in actions]
        consume.require_punching(subjects)
        if not are_real(session.paths.staging / NAME):
            # Two that consume at once would destroy bytes.
            words = ("a file system with locks that keep others out", "locks that do nothing")
            help_text = "leave --consume out, or put the checkout on a local disk"
            where = str(session.paths.staging)
            finding = Finding(Kind.NOT_CONSUMABLE, where, *words, help_text)
            name = session.manifest.name
            raise error_for(f"{name}: its chunk files cannot be consumed there", [finding])
        total = sum(piece.size for subject in subjects for piece in subject.pieces)
        with Progress("verifying the chunk files", total) as progress:
            proofs = consume.verify(subjects, progress.advance)
        wrong = {path: f for proof in proofs for path, f in proof.findings.items()}
        whole = {subject.partial for subject in subjects}
        # What cannot be read may be the only copy, so nothing is fetched over it.
        if stuck := [f for p, f in wrong.items() if p in whole or f.kind is Kind.UNREADABLE]:
            raise error_for(f"{session.manifest.name}: cannot be completed", stuck)
        session.known_bad.update(wrong)
        if not wrong:
            for action, proof in zip(actions, proofs, strict=True):
                _assemble([action], session, proof.stakes)


class Move(Action):
    """Rename a staged file to its place in the destination, on one file system."""

    verb, writes_to = "install", "destination"

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`; between two mounts of one device, as containers have them, copy."""
        for action in actions:
            receipt = _receipt(action)
            try:
                session.install(action.file.path, session.paths.destination, receipt)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                Copy.apply([Copy(action.item, action.file)], session)
            else:
                install.forget(session.paths.staging, receipt.path)


class Copy(Action):
    """Copy a staged file to the destination on another file system; the staged one goes."""

    verb, reads_file, writes_to = "install a copy", True, "destination"

    @property
    def cost(self) -> Cost:
        """Nothing that an earlier run has copied is written again."""
        read = super().cost.read
        return Cost(read, read - sum(record.size for record in self.item.copied))

    @classmethod
    def apply(cls, actions: Sequence[Self], session: Session) -> None:
        """See `Action`: each is verified as written there, and then removed here."""
        staging, destination = session.paths.staging, session.paths.destination
        jobs = []
        for action in actions:
            artifact, receipt = action.artifact, _receipt(action)
            # The artifact as it was verified in staging, in the pieces of that time.
            pieces = tuple(Piece(r.source, r.offset, r.size, r.sha256) for r in receipt.pieces)
            whole = Piece(receipt.path, 0, receipt.size, receipt.sha256)
            as_staged = replace(
                artifact,
                size=receipt.size,
                sha256=receipt.sha256,
                # That of the pinned edition; another one may have been accepted.
                blob_id=artifact.blob_id if receipt.size == artifact.size else None,
                pieces=pieces or (whole,),
            )
            target = destination / artifact.path
            source = WholeFile(action.file.path)
            jobs.append(Assembly(as_staged, target, source, action.item.copied))
        label = label_for("copying", [job.artifact.path for job in jobs])
        with Progress(label, sum(job.artifact.size for job in jobs)) as progress:
            done = assemble(jobs, progress.advance)
        for action, copied in zip(actions, done, strict=True):
            receipt = replace(_receipt(action), fingerprint=copied.fingerprint)
            session.install(copied.path, destination, receipt)
            action.file.path.unlink()
            # A file that came back after a power cut should find its receipt.
            atomic.sync(action.file.path.parent)
            install.forget(staging, receipt.path)


#: The kinds of actions, cheapest first: what one finds out may change what is left to do.
ORDER: tuple[type[Action], ...] = (Verify, WriteText, Assemble, Consume, Move, Copy)


def total(steps: Iterable[Action], name: str) -> int:
    """Return the sum of a field of the costs of actions, in bytes."""
    return sum(getattr(step.cost, name) for step in steps)


def costs(actions: Iterable[Action]) -> str:
    """Return in words what actions fetch, read and write."""
    read, written, fetched = (total(actions, name) for name in ("read", "written", "fetched"))
    over_network = f"{format_size(fetched)} to fetch, " if fetched else ""
    return f"{over_network}{format_size(read)} to read, {format_size(written)} to write"


def known_text(artifact: Artifact) -> str | None:
    """Return the text of a file, where the manifest has it."""
    return next((e.text for e in artifact.editions if e.text is not None), None)


def way_around(artifacts: Iterable[Artifact]) -> str:
    """Return how to go on with these files alone, where weights are among them."""
    by_path = {artifact.path: artifact for artifact in artifacts}
    if not any(artifact.is_weights for artifact in by_path.values()):
        return ""
    return f"No file was installed. To install the others: --only={','.join(by_path)}"


def _verified(actions: Sequence[ActionT], session: Session) -> list[tuple[ActionT, VerifiedFile]]:
    """Hash the files of actions; return those that are right, and their actions."""
    found = session.verify([(action.artifact, action.file) for action in actions])
    return [(action, file) for action, file in zip(actions, found, strict=True) if file]


def _receipt(action: Action) -> Receipt:
    assert action.file.receipt is not None, "only what has a receipt is moved"
    return action.file.receipt


def _assemble(
    actions: Sequence[Assemble], session: Session, stakes: Mapping[int, consume.Stake]
) -> None:
    """Assemble files and install them in staging; `stakes` are pieces that are consumed."""
    paths, request, cancel = session.paths, session.request, threading.Event()
    verb = "fetching" if any(action.remote for action in actions) else "assembling"
    label = label_for(verb, [action.artifact.path for action in actions])
    names, limits = session.policy.remote, (request.patience, request.limit_rate)
    try:
        with (
            Progress(label, sum(action.artifact.size for action in actions)) as progress,
            RemoteSources(names, session.manifest, cancel, progress.log, *limits) as remote,
        ):
            jobs = [
                Assembly(
                    action.artifact,
                    action.item.staged.path,
                    action.policy.source(action.item, paths.root, remote),
                    action.item.journal.pieces,
                    action.item.journal.arrived,
                    action.remote,
                    bind(consume.consume, paths.root, stakes),
                    frozenset(stakes),
                    request.block_digests,
                )
                for action in actions
            ]
            done = assemble(jobs, progress.advance, cancel)
    except CsmWeightsError as error:
        bad = {finding.where for finding in error.findings}
        here = [
            {*(p.part for p in a.artifact.pieces), str(partial_path(a.item.staged.path))}
            for a in actions
        ]
        # A finding about a remote source does not say which file to leave out.
        if bad <= set[str]().union(*here) and not isinstance(error, NoSpace):
            wrong = [a.artifact for a, names in zip(actions, here, strict=True) if bad & names]
            error.advice = way_around(a for a in session.chosen if a not in wrong)
        raise
    for action, assembled in zip(actions, done, strict=True):
        session.notes += assembled.notes
        # A chunk file that was begun and found wrong goes as well: it is full of holes.
        begun = {record.offset for record in action.item.journal.consumed}
        if gone := [p for p in action.artifact.pieces if p.offset in begun | stakes.keys()]:
            consume.remove_chunk_files(paths.root, assembled.path, gone)
        session.install_staged(action.artifact, assembled)

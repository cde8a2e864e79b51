"""Pieces into one unfinished file, every byte hashed as written.

The partial keeps its name until someone else renames it: nothing here knows
the final name's folder rules. The journal beside it has a line for each
proven piece, and for each block that arrived of others; a later run hashes
those again where they lie and does only the rest, so neither a crash nor a
power cut can make a wrong byte count.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Protocol

from csm_weights.concurrency import OnProgress, run_all
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.files import Fingerprint
from csm_weights.hashing import Hasher, feed, git_sha1, sha256
from csm_weights.manifest.digests import digest_findings
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.atomic import create, sync, unlink_shared, write_all, writing
from csm_weights.store.block_io import Extent, OutputFile, copy_hashed
from csm_weights.store.journal import Arrival, Consumed, PieceRecord, journal_path, partial_path
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer.reorder import Buffer, BufferPool, InOrderDigest, ReorderBuffer
from csm_weights.transfer.source import NotAvailable, Source, SourceError
from csm_weights.untrusted import dump_record

#: Files that are brought over a network at the same time.
FILES_AT_ONCE = 8


#: Files that are open at the same time, three descriptors each.
OPEN_FILES = 64


class Steps(Protocol):
    """Takes one piece step by step, each of them durable before the next."""

    piece: Piece

    def rehash(self, size: int) -> str:
        """Takes the piece's first `size` bytes from where they lie in the unfinished file.

        Returns the hex sha256 of what was taken so far, as `copy_step` does.
        """

    def copy_step(self, fd: int, start: int, size: int) -> str:
        """Takes the bytes `[start, start + size)` of the piece, from just there in `fd`.

        Raises OSError or EOFError where `fd` cannot be read that far.
        """

    def secure(self, size: int) -> None:
        """Makes the first `size` bytes durable, and then a line of the journal that says so."""


class Consumer(Protocol):
    """Moves pieces out of their parts."""

    def consume(self, writer: Steps) -> str:
        """Moves one piece into the sink and returns the place it came from; raises Broken."""


@dataclass(frozen=True)
class Assembly:
    """One file to assemble: `target` is its name once proven, elsewhere renamed.

    `journaled` are pieces that an earlier run proved in the partial, and
    `arrived` ranges of others that it wrote. `far` are the offsets of the
    pieces that are to come over a network, `consuming` of those that the
    `consumer` moves, one after the other, once all others are there.
    """

    artifact: Artifact
    target: Path
    source: Source
    journaled: tuple[PieceRecord, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    far: frozenset[int] = frozenset()
    consumer: Consumer | None = None
    consuming: frozenset[int] = frozenset()


def assemble(
    jobs: Sequence[Assembly], on_progress: OnProgress, cancel: threading.Event | None = None
) -> list[VerifiedFile]:
    """Assembles all files at once, in parallel over their pieces.

    Pieces of one file that come over a network come one after the other, each
    by many lines: so they arrive in the order in which they are hashed.

    `on_progress` gets bytes as they are proven; `cancel` is set when the work is given
    up. Every piece is tried before the findings are raised, so one run tells
    all that is wrong; what was proven stays in the partials. Raises
    MissingInput, WrongContent, AccessRefused, NetworkFailed or NoSpace.
    """
    cancel, buffers = cancel or threading.Event(), BufferPool()
    findings: dict[Finding, None] = {}
    done: list[VerifiedFile] = []
    for start in range(0, len(jobs), OPEN_FILES):
        some = _assemble_some(jobs[start : start + OPEN_FILES], on_progress, cancel, buffers)
        findings |= dict.fromkeys(some[0])
        done += some[1]
    if findings:
        raise error_for("no file was assembled; what was proven is kept", list(findings))
    return done


def _assemble_some(
    jobs: Sequence[Assembly], on_progress: OnProgress, cancel: threading.Event, buffers: BufferPool
) -> tuple[list[Finding], list[VerifiedFile]]:
    """What is wrong with some of the files, or else the files."""
    partials: list[_Partial] = []
    try:
        partials.extend(_Partial(job, on_progress, cancel, buffers) for job in jobs)
        lanes = sorted(
            (lane, number)
            for number, partial in enumerate(partials)
            for lane in _lanes(partial.job)
        )
        far = sum(partials[number].is_far(lane) for lane, number in lanes)
        tasks = [bind(partials[number].run_lane, lane) for lane, number in lanes]
        run_all(tasks, cancel, waiting=min(FILES_AT_ONCE, far))
        findings = [f for partial in partials for f in partial.all_findings()]
        return findings, [] if findings else [partial.assembled() for partial in partials]
    finally:
        for partial in partials:
            partial.close()


def _lanes(job: Assembly) -> list[tuple[int, ...]]:
    """The pieces by index: those from afar in one lane, each other in one of its own.

    A file whose parts are consumed has one lane, and they come last.
    """
    offsets = [piece.offset for piece in job.artifact.tiles]
    if job.consuming:
        order = sorted(range(len(offsets)), key=lambda i: (offsets[i] in job.consuming, i))
        return [tuple(order)]
    far = tuple(i for i, offset in enumerate(offsets) if offset in job.far)
    near = [(i,) for i, offset in enumerate(offsets) if offset not in job.far]
    return [*([far] if far else []), *near]


class _Partial:
    """The unfinished file of one job, with its journal and whole-file digest."""

    def __init__(
        self, job: Assembly, on_progress: OnProgress, cancel: threading.Event, buffers: BufferPool
    ) -> None:
        self.job = job
        self.tiles = job.artifact.tiles
        self.buffers = buffers
        self.path = partial_path(job.target)
        self.on_progress = on_progress
        self.cancel = cancel
        self._lock = threading.Lock()
        self._kept = {record.offset: record for record in job.journaled}
        self._records: dict[int, PieceRecord] = {}
        self._findings: dict[int, tuple[Finding, ...]] = {}
        self._git_sha1: str | None = None
        self.notes: list[Finding] = []
        unlink_shared(self.path)
        # A journal whose partial has got its name says nothing of the next one.
        is_new = not self.path.exists()
        self._journal = create(journal_path(job.target), os.O_APPEND | (os.O_TRUNC * is_new))
        self.target = OutputFile(self.path)
        with writing(self.path):
            os.ftruncate(self.target.fd, job.artifact.size)
        self._device, self._is_named = os.fstat(self.target.fd).st_dev, False
        starts = [piece.offset for piece in self.tiles] + [job.artifact.size]
        self._whole = InOrderDigest(self.target.fd, starts, cancel)

    def close(self) -> None:
        self.target.close()
        os.close(self._journal)

    def is_far(self, lane: tuple[int, ...]) -> bool:
        """Whether the pieces of a lane are to come over a network."""
        return self.tiles[lane[0]].offset in self.job.far

    def run_lane(self, lane: tuple[int, ...]) -> None:
        """Brings some pieces, one after the other.

        No part is touched while another piece is known not to come.
        """
        for index in lane:
            if not (self._findings and self.is_consumed(index)):
                self.run_piece(index)

    def is_consumed(self, index: int) -> bool:
        """Whether piece `index` is moved out of its part."""
        return self.tiles[index].offset in self.job.consuming

    def run_piece(self, index: int) -> None:
        """Proves piece `index` where it lies, or else has it delivered."""
        writer = _PieceWriter(self, index, self._whole.claim(index))
        record: PieceRecord | None = None
        try:
            record = self._consume(writer) or self._reverify(writer) or self._deliver(writer)
        except NotAvailable:
            self._findings[index] = (_missing(writer.piece),)
        except SourceError as broken:
            self._findings[index] = broken.findings
        finally:
            writer.close()
        self._whole.finish(index, writer.whole, verified=record is not None)
        if record:
            self._records[index] = record
            self._git_sha1 = writer.git_sha1

    def _consume(self, writer: _PieceWriter) -> PieceRecord | None:
        if not self.job.consumer or writer.piece.offset not in self.job.consuming:
            return None
        writer.reset()
        return self._verified(writer, self.job.consumer.consume(writer))

    def _reverify(self, writer: _PieceWriter) -> PieceRecord | None:
        record = self._kept.get(writer.piece.offset)
        if record is None:
            return None
        writer.reset()
        writer.rehash(writer.piece.size)
        try:
            writer.verify(str(self.path))
        except SourceError:
            return None
        return record

    def _deliver(self, writer: _PieceWriter) -> PieceRecord:
        piece = writer.piece
        writer.reset()
        writer.arrived = self._arrived(piece)
        place = self.job.source.deliver(self.job.artifact, piece, writer)
        return self._verified(writer, place)

    def _verified(self, writer: _PieceWriter, place: str) -> PieceRecord:
        piece = writer.piece
        writer.verify(place)
        record = PieceRecord(piece.offset, piece.size, piece.sha256, place)
        self.journal(record)
        return record

    def _arrived(self, piece: Piece) -> tuple[tuple[int, int], ...]:
        """The half-open ranges of a piece that an earlier run has written."""
        return tuple(
            (a.offset, a.offset + a.size)
            for a in self.job.arrived
            if piece.offset <= a.offset and a.offset + a.size <= piece.end
        )

    def secure(self, record: Consumed) -> None:
        """Makes what was written durable, then a line of the journal, each under its name."""
        with writing(self.path):
            os.fdatasync(self.target.fd)
            self.journal(record)
            os.fsync(self._journal)
        if not self._is_named:
            for folder in self.path.parents:
                if not os.access(folder, os.R_OK) or folder.stat().st_dev != self._device:
                    break
                sync(folder)
            self._is_named = True

    def journal(self, record: PieceRecord | Arrival | Consumed) -> None:
        """Writes a line of the journal."""
        with self._lock:
            # A line may follow one that a crash has torn, so it brings its own start.
            write_all(self._journal, f"\n{dump_record(record)}\n".encode(), self.path)

    def all_findings(self) -> list[Finding]:
        """What is wrong with the pieces, or, if nothing, with the whole; each thing once."""
        findings = [f for index in sorted(self._findings) for f in self._findings[index]]
        if not findings:
            artifact, digests = self.job.artifact, (self._sha256(), self._git_sha1)
            findings = digest_findings(artifact, artifact.editions[0], *digests, self.path)
        return list(dict.fromkeys(findings))

    def _sha256(self) -> str:
        digest = self._whole.hexdigest()
        assert digest is not None, "every piece is proven, so the chain is complete"
        return digest

    def assembled(self) -> VerifiedFile:
        records = tuple(self._records[index] for index in sorted(self._records))
        fingerprint = Fingerprint.of(os.fstat(self.target.fd))
        pieces = records if self.job.artifact.pieces else ()
        notes = tuple(dict.fromkeys(self.notes))
        return VerifiedFile(self.path, self._sha256(), pieces, fingerprint, self._git_sha1, notes)


class _PieceWriter:
    """Writes one piece into the partial and hashes it as it stands there."""

    def __init__(self, partial: _Partial, index: int, claimed: Hasher | None) -> None:
        self.piece: Piece = partial.tiles[index]
        self.arrived: tuple[tuple[int, int], ...] = ()
        self.whole = claimed
        self._partial = partial
        self._before = claimed
        self._digest = sha256()
        self._git: Hasher | None = None
        self._arriving: ReorderBuffer | None = None

    def reset(self) -> None:
        self.close()
        self.arrived = ()
        self._digest = sha256()
        self.whole = self._before.copy() if self._before else None
        if self.whole is not None and self.piece.offset == 0:
            # The whole file's digest begins as its first piece's does.
            self.whole = self._digest
        if self._partial.job.artifact.is_git_proven:
            self._git = git_sha1(self.piece.size)

    def close(self) -> None:
        """Ends what goes on in the background."""
        if self._arriving:
            self._arriving.close()
        self._arriving = None

    @property
    def is_empty(self) -> bool:
        return not self.arrived and (self._arriving is None or self._arriving.is_empty)

    @property
    def git_sha1(self) -> str | None:
        """The git blob id of what was taken, where that is what proves it."""
        return self._git.hexdigest() if self._git else None

    def copy_from(self, fd: int, offset: int) -> None:
        self.reset()
        partial, piece = self._partial, self.piece
        # A piece that runs ahead of the whole digest is read again for it, so
        # it stays in the page cache; nobody needs the others there.
        copy_hashed(
            Extent(fd, offset, piece.size),
            partial.target,
            piece.offset,
            self._sinks(),
            self.whole is not None,
            partial.on_progress,
            partial.cancel,
        )

    def wanted(self) -> list[tuple[int, int]]:
        return self._reorder().wanted()

    def acquire_buffer(self) -> Buffer:
        return self._partial.buffers.acquire()

    def write(self, buffer: Buffer, offset: int, size: int) -> None:
        self._reorder().write(buffer, offset, size)

    def _reorder(self) -> ReorderBuffer:
        partial, piece = self._partial, self.piece
        if self._arriving is None:
            # A file that broke off has left its bytes in the digests.
            arrived = self.arrived
            self.reset()
            self.arrived = arrived
            self._arriving = ReorderBuffer(
                partial.target,
                piece.offset,
                piece.end,
                self._sinks(),
                partial.buffers,
                self.arrived,
                self._journal_arrival,
                partial.on_progress,
                partial.cancel,
            )
        return self._arriving

    def _journal_arrival(self, offset: int, size: int) -> None:
        self._partial.journal(Arrival(offset, size, self.piece.sha256))

    def rehash(self, size: int) -> str:
        """Takes the piece's first `size` bytes from where they lie in the partial."""
        partial, fd = self._partial, self._partial.target.fd
        feed(fd, self.piece.offset, size, self._sinks(), partial.on_progress, partial.cancel)
        return self._digest.hexdigest()

    def copy_step(self, fd: int, start: int, size: int) -> str:
        """Writes a range of the piece; returns the digest of the piece so far."""
        partial, at = self._partial, self.piece.offset + start
        extent, direct = Extent(fd, start, size), self.whole is not None
        copy_hashed(
            extent, partial.target, at, self._sinks(), direct, partial.on_progress, partial.cancel
        )
        return self._digest.hexdigest()

    def secure(self, size: int) -> None:
        """Makes the piece's first `size` bytes durable, and a line that says so."""
        self._partial.secure(Consumed(self.piece.offset, size, self.piece.sha256))

    def _sinks(self) -> list[Hasher]:
        sinks = [self._digest, self._git]
        if self.whole is not self._digest:
            sinks.append(self.whole)
        return [sink for sink in sinks if sink is not None]

    def add_notes(self, findings: Sequence[Finding]) -> None:
        self._partial.notes += findings

    def verify(self, where: str) -> None:
        if self._arriving and not self._arriving.finish():
            short = f"{self.piece.size:,} bytes of the piece at byte {self.piece.offset:,}"
            raise SourceError([Finding(Kind.WRONG_SIZE, where, short, "fewer")])
        pinned, found = self.piece.sha256, self._digest.hexdigest()
        what, git = "sha256", self._partial.job.artifact.git_sha1
        if not pinned and git and self.git_sha1:
            what, pinned, found = "git blob id", git, self.git_sha1
        if found != pinned:
            help_text = "its content is damaged or not the published one; get it again"
            finding = Finding(Kind.WRONG_DIGEST, where, f"{what} {pinned}", found, help_text)
            raise SourceError([finding])


def _missing(piece: Piece) -> Finding:
    return Finding(Kind.MISSING, piece.part, f"{piece.size:,} bytes", "in no source")


def write_text(target: Path, text: str) -> VerifiedFile:
    """The partial of a file whose content is `text`, whole at once."""
    content = text.encode()
    unlink_shared(partial_path(target))
    fd = create(partial_path(target), os.O_TRUNC)
    try:
        write_all(fd, content, target)
        digest = sha256()
        feed(fd, 0, len(content), [digest], lambda _: None)
        fingerprint = Fingerprint.of(os.fstat(fd))
    finally:
        os.close(fd)
    return VerifiedFile(partial_path(target), digest.hexdigest(), (), fingerprint)

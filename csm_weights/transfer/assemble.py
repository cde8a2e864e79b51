"""Assemble a file from pieces: copy or receive each, hash it as it is written, journal it.

The result keeps the name of a partial: `store.install` gives a file its final
name. The journal beside it has a line for each verified piece, and for each
block of others that arrived; a later run hashes those again where they lie and
does only the rest, so neither a crash nor a power cut can make a wrong byte
count.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial as bind
from operator import itemgetter
from pathlib import Path

from csm_weights.byte_ranges import ByteRange
from csm_weights.concurrency import OnProgress, run_all
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.files import Fingerprint
from csm_weights.hashing import BlockHasher, Hasher, Sink, feed, git_sha1, sha256
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.atomic import created, sync, write_all, writing
from csm_weights.store.block_io import Extent, copy_hashed
from csm_weights.store.journal import (
    Arrival,
    Consumed,
    PieceRecord,
    Refuted,
    partial_path,
)
from csm_weights.store.partial_file import PartialFile
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer.reorder import BufferPool, InOrderDigest, ReorderBuffer
from csm_weights.transfer.source import NEXT_SOURCE, NotAvailable, Source, SourceError

#: Files that are open at the same time, three descriptors each.
OPEN_FILES = 64


@dataclass(frozen=True)
class Assembly:
    """One file to assemble: `target` is the name that it gets once it is verified.

    `journaled` are pieces that an earlier run verified in the partial, and
    `arrived` ranges of others that it wrote. `remote` are the offsets of the
    pieces that come over a network, `consuming` of those that `consume` moves
    out of their chunk files, one after the other, once all others are there;
    it returns where the piece came from, or raises SourceError. `blocks` asks for
    the digests of blocks as well.
    """

    artifact: Artifact
    target: Path
    source: Source
    journaled: tuple[PieceRecord, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    remote: frozenset[int] = frozenset()
    consume: Callable[[PartialWriter], str] | None = None
    consuming: frozenset[int] = frozenset()
    blocks: bool = False


def assemble(
    jobs: Sequence[Assembly], on_progress: OnProgress, cancel: threading.Event | None = None
) -> list[VerifiedFile]:
    """Assemble all files at once, in parallel over their pieces.

    The remote pieces of one file come one after the other, each by many
    streams: so they arrive in the order in which they are hashed.

    `on_progress` gets bytes as they come, and a negative number for those that
    must come again; `cancel` is set when the work is given up. Every piece is
    tried before the findings are raised, so one run reports all that is wrong;
    what was verified stays in the partials. Raises MissingInput, WrongContent,
    AccessRefused, NetworkFailed or NoSpace.
    """
    cancel, buffers = cancel or threading.Event(), BufferPool()
    findings: dict[Finding, None] = {}
    done: list[VerifiedFile] = []
    for start in range(0, len(jobs), OPEN_FILES):
        with ExitStack() as open_files:
            partials: list[_Partial] = []
            for job in jobs[start : start + OPEN_FILES]:
                partial = _Partial(job, on_progress, cancel, buffers)
                open_files.callback(partial.close)
                partials.append(partial)
            queues = sorted(((q, p) for p in partials for q in p.queues()), key=itemgetter(0))
            remote = sum(bool(partial.job.remote) for partial in partials)
            tasks = [bind(p.run, q) for q, p in queues]
            run_all(tasks, cancel, waiting=min(8, remote))  # files that are fetched at once
            wrong = [finding for partial in partials for finding in partial.findings()]
            findings |= dict.fromkeys(wrong)
            done += [] if wrong else [partial.verified() for partial in partials]
    if findings:
        raise error_for("no file was assembled; what was verified is kept", list(findings))
    return done


class _Partial(PartialFile):
    """The unfinished file of one job, with its journal and whole-file digest."""

    def __init__(
        self, job: Assembly, on_progress: OnProgress, cancel: threading.Event, buffers: BufferPool
    ) -> None:
        super().__init__(job.target, job.artifact.size)
        self.job = job
        self.tiles = job.artifact.tiles
        self.buffers = buffers
        self.on_progress = on_progress
        self.cancel = cancel
        self.notes: list[Finding] = []
        self.is_named = False
        self._kept = {record.offset: record for record in job.journaled}
        self._records: dict[int, PieceRecord] = {}
        self._blocks: dict[int, tuple[ByteRange, ...]] = {}
        self._findings: dict[int, tuple[Finding, ...]] = {}
        self._git_sha1: str | None = None
        starts = [piece.offset for piece in self.tiles] + [job.artifact.size]
        self._whole = InOrderDigest(self.target.fd, starts, cancel)

    def queues(self) -> list[tuple[int, ...]]:
        """Return which pieces, by index, are done one after the other by one worker.

        The remote ones, and each other by itself; where chunk files are consumed,
        all of them, and those last.
        """
        job, offsets = self.job, [piece.offset for piece in self.tiles]
        indices = range(len(offsets))
        if job.consuming:
            return [tuple(sorted(indices, key=lambda i: offsets[i] in job.consuming))]
        remote = tuple(i for i in indices if offsets[i] in job.remote)
        return [*filter(None, [remote]), *((i,) for i in indices if i not in remote)]

    def run(self, queue: Sequence[int]) -> None:
        """Do some pieces, one after the other."""
        for index in queue:
            is_consumed = self.tiles[index].offset in self.job.consuming
            # No chunk file is touched while another piece is known not to come.
            if is_consumed and self._findings:
                return
            writer, record = PartialWriter(self, index, self._whole.claim(index)), None
            try:
                record = self._fill(writer, is_consumed)
            except NotAvailable:
                words = (f"{writer.piece.size:,} bytes", "no source has it", NEXT_SOURCE)
                self._findings[index] = (Finding(Kind.MISSING, writer.piece.part, *words),)
            except SourceError as error:
                self._findings[index] = error.findings
            finally:
                writer.close()
            self._whole.finish(index, writer.whole, verified=bool(record))
            if record:
                self._records[index], self._blocks[index] = record, writer.blocks
                self._git_sha1 = writer.git_sha1

    def _fill(self, writer: PartialWriter, is_consumed: bool) -> PieceRecord:
        """Return the record of a piece once its bytes are there and right."""
        piece, kept = writer.piece, self._kept.get(writer.piece.offset)
        writer.reset()
        if is_consumed and self.job.consume:
            place = self.job.consume(writer)
        else:
            if kept:
                writer.rehash(piece.size)
                with suppress(SourceError):
                    writer.verify(str(self.path))
                    return kept
                writer.reset()
            ranges = [(a.offset, a.offset + a.size) for a in self.job.arrived]
            writer.arrived = tuple(r for r in ranges if piece.offset <= r[0] < piece.end)
            place = self.job.source.deliver(self.job.artifact, piece, writer)
        writer.verify(place)
        record = PieceRecord(piece.offset, piece.size, piece.sha256, place)
        self.journal(record)
        return record

    def findings(self) -> list[Finding]:
        """Return what is wrong with the pieces, or else with the whole."""
        if self._findings:
            return [f for index in sorted(self._findings) for f in self._findings[index]]
        digests = self._whole.hexdigest(), self._git_sha1
        artifact = self.job.artifact
        return artifact.digest_findings(artifact.editions[0], *digests, self.path)

    def verified(self) -> VerifiedFile:
        """Return the file, once there are no findings."""
        return VerifiedFile(
            self.path,
            self._whole.hexdigest(),
            tuple(self._records[i] for i, _ in enumerate(self.job.artifact.pieces)),
            Fingerprint.of(os.fstat(self.target.fd)),
            self._git_sha1,
            tuple(dict.fromkeys(self.notes)),
            tuple(one for i in sorted(self._blocks) for one in self._blocks[i]),
        )


class PartialWriter:
    """The `PieceWriter` of one piece: it writes to the partial and hashes what stands there.

    `rehash`, `copy` and `secure` are for pieces that are moved step by
    step; the first two return the hex sha256 of the piece so far.
    """

    def __init__(self, partial: _Partial, index: int, claimed: Hasher | None) -> None:
        self.piece: Piece = partial.tiles[index]
        self.arrived: tuple[tuple[int, int], ...] = ()
        self.whole = claimed
        self.notes = partial.notes
        self.acquire_buffer = partial.buffers.acquire
        self._partial = partial
        self._before = claimed
        self._digest = sha256()
        self._git: Hasher | None = None
        self._blocks: BlockHasher | None = None
        self._arriving: ReorderBuffer | None = None
        self._counted = 0
        self._lock = threading.Lock()

    def reset(self) -> None:
        """See `PieceWriter`."""
        self.close()
        self.advance(-self._counted)
        self.arrived = ()
        self._digest = sha256()
        self.whole = self._before.copy() if self._before else None
        if not self.piece.offset:
            # The whole file's digest begins as its first piece's does.
            self.whole = self._digest
        if self._partial.job.artifact.is_pinned_by_git:
            self._git = git_sha1(self.piece.size)
        if self._partial.job.blocks:
            self._blocks = BlockHasher(self.piece.offset)

    def advance(self, count: int) -> None:
        """See `PieceWriter`."""
        with self._lock:
            self._counted += count
        if count:
            self._partial.on_progress(count)

    def close(self) -> None:
        """End the hashing in the background."""
        if self._arriving:
            self._arriving.close()
        self._arriving = None

    @property
    def is_empty(self) -> bool:
        """True where nothing was written yet, in this run or in one before."""
        return not self.arrived and (not self._arriving or self._arriving.is_empty)

    @property
    def git_sha1(self) -> str | None:
        """The git blob id of what was written, where that is what the manifest pins."""
        return self._git.hexdigest() if self._git else None

    @property
    def blocks(self) -> tuple[ByteRange, ...]:
        """The blocks of the piece with their digests, where they are asked for."""
        return self._blocks.blocks() if self._blocks else ()

    def copy_from(self, fd: int, offset: int) -> None:
        """See `PieceWriter`."""
        self.reset()
        self.copy(Extent(fd, offset, self.piece.size), 0)

    def copy(self, extent: Extent, at: int) -> str:
        """Copy bytes of a file to byte `at` of the piece.

        Raises OSError or EOFError where they cannot be read that far.
        """
        # A piece whose turn it is not is read again for the whole digest, so it stays in
        # the page cache; nobody needs the others there.
        partial, direct = self._partial, self.whole is not None
        rest = (self._sinks(), direct, self.advance, partial.cancel)
        copy_hashed(extent, partial.target, self.piece.offset + at, *rest)
        return self._digest.hexdigest()

    def rehash(self, size: int) -> str:
        """Hash the piece's first `size` bytes where they lie in the partial."""
        partial, fd = self._partial, self._partial.target.fd
        feed(fd, self.piece.offset, size, self._sinks(), self.advance, partial.cancel)
        return self._digest.hexdigest()

    def _sinks(self) -> list[Sink]:
        sinks = self._digest, self._git, self._blocks, self.whole
        # Each once: the first piece's digest is the whole file's as well.
        return list(filter(None, dict.fromkeys(sinks)))

    def secure(self, size: int) -> None:
        """Make the piece's first `size` bytes durable, and then a line of the journal about it."""
        partial = self._partial
        with writing(partial.path):
            os.fdatasync(partial.target.fd)
            partial.journal(Consumed(self.piece.offset, size, self.piece.sha256))
            os.fsync(partial.journal_fd)
        if not partial.is_named:
            # So that both have their names after a power cut.
            device = os.fstat(partial.target.fd).st_dev
            for folder in partial.path.parents:
                if not os.access(folder, os.R_OK) or folder.stat().st_dev != device:
                    break
                sync(folder)
            partial.is_named = True

    def wanted(self) -> list[tuple[int, int]]:
        """See `PieceWriter`."""
        return self._reorder().wanted()

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        """See `PieceWriter`."""
        self._reorder().write(buffer, offset, size)

    def _reorder(self) -> ReorderBuffer:
        partial, piece = self._partial, self.piece
        if not self._arriving:
            # A file that could not be read to its end has left its bytes in the digests.
            arrived = self.arrived
            self.reset()
            self.arrived = arrived
            self.advance(sum(end - start for start, end in arrived))
            self._arriving = ReorderBuffer(
                partial.target,
                piece.offset,
                piece.end,
                self._sinks(),
                partial.buffers,
                arrived,
                lambda offset, size: partial.journal(Arrival(offset, size, piece.sha256)),
                partial.cancel,
            )
        return self._arriving

    def verify(self, where: str) -> None:
        """See `PieceWriter`."""
        if self._arriving and not self._arriving.finish():
            expected = f"{self.piece.size:,} bytes of the piece at byte {self.piece.offset:,}"
            raise SourceError([Finding(Kind.WRONG_SIZE, where, expected, "fewer bytes")])
        what, found = "sha256", self._digest.hexdigest()
        pinned: str | None = self.piece.sha256
        if self.git_sha1:
            what, found = "git blob id", self.git_sha1
            pinned = self._partial.job.artifact.git_sha1
        if found != pinned:
            # The next run need not hash the same bytes to find this out.
            self._partial.journal(Refuted(self.piece.offset, self.piece.sha256))
            help_text = "its content is damaged or not the published one; get it again"
            words = f"{what} {pinned}", f"{what} {found}"
            raise SourceError([Finding(Kind.WRONG_DIGEST, where, *words, help_text)])


def write_text(target: Path, text: str) -> VerifiedFile:
    """Write the partial of a file whose content is `text`, whole at once."""
    content, partial, digest = text.encode(), partial_path(target), sha256()
    with created(partial) as fd:
        write_all(fd, content, target)
        feed(fd, 0, len(content), [digest], lambda _: None)
        fingerprint = Fingerprint.of(os.fstat(fd))
    return VerifiedFile(partial, digest.hexdigest(), (), fingerprint)

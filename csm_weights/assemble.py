"""Pieces into one unfinished file, every byte hashed as written.

The partial keeps its name until someone else renames it: nothing here knows
the final name's folder rules. The journal beside it has a line for each
proven piece; a later run hashes those pieces again where they lie and does
only the rest, so neither a crash nor a power cut can make a wrong byte count.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

from csm_weights.digest import Chain, Hasher, Tick, feed, run_all, sha256
from csm_weights.errors import Finding, Kind, error_for
from csm_weights.files import Extent, Target, copy_hashed, create, write_all, writing
from csm_weights.manifest import Artifact, Piece
from csm_weights.records import (
    Fingerprint,
    PieceRecord,
    dump,
    journal_path,
    partial_path,
    whole_findings,
)
from csm_weights.sources import Absent, Broken, Source


@dataclass(frozen=True)
class Assembly:
    """One file to assemble: `target` is its name once proven, elsewhere renamed.

    `journaled` are pieces that an earlier run proved in the partial.
    """

    artifact: Artifact
    target: Path
    source: Source
    journaled: tuple[PieceRecord, ...] = ()


@dataclass(frozen=True)
class Assembled:
    """A whole partial, each piece proven: its sha256, records, and fingerprint."""

    partial: Path
    sha256: str
    records: tuple[PieceRecord, ...]
    fingerprint: Fingerprint


def assemble(jobs: Sequence[Assembly], tick: Tick) -> list[Assembled]:
    """Assembles all files at once, in parallel over their pieces.

    `tick` gets bytes as they are proven. Every piece is tried before the
    findings are raised, so one run tells all that is wrong; what was proven
    stays in the partials. Raises MissingInput, WrongContent or NoSpace.
    """
    stop = threading.Event()
    partials: list[_Partial] = []
    try:
        partials.extend(_Partial(job, tick, stop) for job in jobs)
        longest = max(len(job.artifact.pieces) for job in jobs)
        run_all(
            [
                bind(partial.run_piece, index)
                for index in range(longest)
                for partial in partials
                if index < len(partial.job.artifact.pieces)
            ],
            stop,
        )
        if findings := [f for partial in partials for f in partial.all_findings()]:
            raise error_for("no file was assembled; what was proven is kept", findings)
        return [partial.assembled() for partial in partials]
    finally:
        for partial in partials:
            partial.close()


class _Partial:
    """The unfinished file of one job, with its journal and whole-file digest."""

    def __init__(self, job: Assembly, tick: Tick, stop: threading.Event) -> None:
        self.job = job
        self.path = partial_path(job.target)
        self.tick = tick
        self.stop = stop
        self._lock = threading.Lock()
        self._kept = {record.offset: record for record in job.journaled}
        self._records: dict[int, PieceRecord] = {}
        self._findings: dict[int, tuple[Finding, ...]] = {}
        self.target = Target(self.path)
        self._journal = create(journal_path(job.target), os.O_APPEND)
        with writing(self.path):
            os.ftruncate(self.target.fd, job.artifact.size)
        starts = [piece.offset for piece in job.artifact.pieces] + [job.artifact.size]
        self._chain = Chain(self.target.fd, starts, stop)

    def close(self) -> None:
        self.target.close()
        os.close(self._journal)

    def run_piece(self, index: int) -> None:
        """Proves piece `index` where it lies, or else has it delivered."""
        sink = _PieceSink(self, index, self._chain.claim(index))
        record: PieceRecord | None = None
        try:
            record = self._reprove(sink) or self._deliver(sink)
        except Absent:
            self._findings[index] = (_missing(sink.piece),)
        except Broken as broken:
            self._findings[index] = broken.findings
        self._chain.finish(index, sink.whole, proven=record is not None)
        if record:
            self._records[index] = record

    def _reprove(self, sink: _PieceSink) -> PieceRecord | None:
        record = self._kept.get(sink.piece.offset)
        if record is None:
            return None
        sink.begin()
        sink.take_back()
        try:
            sink.prove(str(self.path))
        except Broken:
            return None
        return record

    def _deliver(self, sink: _PieceSink) -> PieceRecord:
        piece = sink.piece
        sink.begin()
        place = self.job.source.deliver(self.job.artifact, piece, sink)
        sink.prove(place)
        record = PieceRecord(piece.offset, piece.size, piece.sha256, place)
        with self._lock:
            # A line may follow one that a crash has torn, so it brings its own start.
            write_all(self._journal, f"\n{dump(record)}\n".encode(), self.path)
        return record

    def all_findings(self) -> list[Finding]:
        """What is wrong with the pieces, or, if nothing, with the whole."""
        findings = [f for index in sorted(self._findings) for f in self._findings[index]]
        artifact = self.job.artifact
        return findings or whole_findings(
            artifact, artifact.editions[0], self._sha256(), str(self.path)
        )

    def _sha256(self) -> str:
        digest = self._chain.hexdigest()
        assert digest is not None, "every piece is proven, so the chain is complete"
        return digest

    def assembled(self) -> Assembled:
        records = tuple(self._records[index] for index in sorted(self._records))
        fingerprint = Fingerprint.of(os.fstat(self.target.fd))
        return Assembled(self.path, self._sha256(), records, fingerprint)


class _PieceSink:
    """Writes one piece into the partial and hashes it as it stands there."""

    def __init__(self, partial: _Partial, index: int, claimed: Hasher | None) -> None:
        self.piece: Piece = partial.job.artifact.pieces[index]
        self.whole = claimed
        self._partial = partial
        self._before = claimed
        self._digest = sha256()

    def begin(self) -> None:
        self._digest = sha256()
        self.whole = self._before.copy() if self._before else None
        if self.whole is not None and self.piece.offset == 0:
            # The whole file's digest begins as its first piece's does.
            self.whole = self._digest

    def take_file(self, fd: int, offset: int) -> None:
        partial, piece = self._partial, self.piece
        # A piece that runs ahead of the whole digest is read again for it, so
        # it stays in the page cache; nobody needs the others there.
        copy_hashed(
            Extent(fd, offset, piece.size),
            partial.target,
            piece.offset,
            self._sinks(),
            self.whole is not None,
            partial.tick,
            partial.stop,
        )

    def take_back(self) -> None:
        """Takes the piece from where it lies in the partial."""
        partial, piece = self._partial, self.piece
        fd = partial.target.fd
        feed(fd, piece.offset, piece.size, self._sinks(), partial.tick, partial.stop)

    def _sinks(self) -> list[Hasher]:
        if self.whole is None or self.whole is self._digest:
            return [self._digest]
        return [self._digest, self.whole]

    def prove(self, where: str) -> None:
        found = self._digest.hexdigest()
        if found != self.piece.sha256:
            finding = Finding(
                Kind.WRONG_DIGEST,
                where,
                f"sha256 {self.piece.sha256}",
                found,
                "its content is damaged or not the published one; get it again",
            )
            raise Broken([finding])


def _missing(piece: Piece) -> Finding:
    return Finding(Kind.MISSING, piece.part, f"{piece.size:,} bytes", "in no source")


def write_text(target: Path, text: str) -> Assembled:
    """The partial of a file whose content is `text`, whole at once."""
    content = text.encode()
    fd = create(partial_path(target), os.O_TRUNC)
    try:
        write_all(fd, content, target)
        digest = sha256()
        feed(fd, 0, len(content), [digest], lambda _: None)
        fingerprint = Fingerprint.of(os.fstat(fd))
    finally:
        os.close(fd)
    return Assembled(partial_path(target), digest.hexdigest(), (), fingerprint)

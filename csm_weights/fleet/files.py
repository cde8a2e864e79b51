"""The files of a job on one node: written block by block, hashed by piece, read to be served."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from csm_weights.byte_ranges import Ranges
from csm_weights.errors import Finding, Kind
from csm_weights.files import open_regular
from csm_weights.fleet.job import Block, Layout
from csm_weights.hashing import Hasher, feed, git_sha1, sha256
from csm_weights.manifest.types import Piece
from csm_weights.store.block_io import Extent, OutputFile, copy_hashed
from csm_weights.store.inspect import ArtifactState
from csm_weights.store.journal import (
    Arrival,
    PieceRecord,
    Record,
    Refuted,
)
from csm_weights.store.partial_file import PartialFile
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import SourceError


class OpenFile:
    """One artifact as it lies on the disk: a verified file, or an unfinished one to be written."""

    def __init__(self, item: ArtifactState) -> None:
        self.artifact = item.artifact
        self._partial: PartialFile | None = None
        if item.verified:
            self.path = item.verified.path
            self.fd = open_regular(self.path)
        else:
            self._partial = PartialFile(item.staged.path, self.artifact.size)
            self.path, self.fd = self._partial.path, self._partial.target.fd

    @property
    def output(self) -> OutputFile:
        """The unfinished file, to be written to."""
        assert self._partial, "a verified file is never written"
        return self._partial.target

    def close(self) -> None:
        """Close the files."""
        if self._partial:
            self._partial.close()
        else:
            os.close(self.fd)

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes to the unfinished file; raises NoSpace."""
        self.output.write(data, offset, direct=False)

    def record(self, line: Record) -> None:
        """Write a line of the journal of an unfinished file."""
        if self._partial:
            self._partial.journal(line)


class Files:
    """All files of a job on this node; `have` are the blocks that it may serve."""

    def __init__(self, layout: Layout, items: dict[str, ArtifactState]) -> None:
        self.layout = layout
        self.have: set[int] = set()
        self.open = {a.path: OpenFile(items[a.path]) for a in layout.artifacts}
        self._numbers = {(b.artifact.path, b.start, b.end): b.number for b in layout.blocks}

    def close(self) -> None:
        """Close all of them; from now on nothing is served."""
        self.have.clear()
        for file in self.open.values():
            file.close()

    def find(self, path: str, start: int, end: int) -> int | None:
        """Return a descriptor, to be closed, of the file with a block that may be served, or None.

        It is one of its own: the number of a closed file may be another file's a moment later.
        """
        is_here = self._numbers.get((path, start, end)) in self.have
        return os.dup(self.open[path].fd) if is_here else None

    def digest(self, block: Block) -> str:
        """Return the hex sha256 of a block as it lies on the disk."""
        digest, file = sha256(), self.open[block.artifact.path]
        feed(file.fd, block.start, block.end - block.start, [digest], lambda _: None)
        return digest.hexdigest()

    def keep(self, block: Block, data: memoryview) -> None:
        """Write a block that has been found right, and note that it arrived."""
        self.open[block.artifact.path].write(data, block.start)
        self.arrived(block)

    def arrived(self, block: Block) -> None:
        """Note that a block is written; it may be served from now on."""
        piece = self.layout.pieces[block.piece][1]
        line = Arrival(block.start, block.end - block.start, piece.sha256)
        self.open[block.artifact.path].record(line)
        self.have.add(block.number)

    def hash(self, number: int, place: str = "") -> tuple[bool, tuple[str, ...]]:
        """Hash a piece as it lies on the disk; return whether it is right, and its blocks' digests.

        A right one may be served; where it came from `place`, its record goes into the journal.
        """
        (artifact, piece), blocks = self.layout.pieces[number], self.layout.of_piece[number]
        file, whole, digests = self.open[artifact.path], sha256(), []
        sinks = [whole]
        if artifact.is_pinned_by_git:
            sinks.append(git_sha1(piece.size))
        for block in blocks:
            digest = sha256()
            feed(file.fd, block.start, block.end - block.start, [digest, *sinks], lambda _: None)
            digests.append(digest.hexdigest())
        expected = piece.sha256 or artifact.git_sha1
        is_right = sinks[0 if piece.sha256 else -1].hexdigest() == expected
        numbers = {block.number for block in blocks}
        if is_right:
            if place:
                file.record(PieceRecord(piece.offset, piece.size, piece.sha256, place))
            self.have |= numbers
        else:
            file.record(Refuted(piece.offset, piece.sha256))
            self.have -= numbers
        return is_right, tuple(digests)


@dataclass(eq=False)
class RangeWriter:
    """The `PieceWriter` of the half-open range `[start, end)` of a piece, in the unfinished file.

    By it the sources of one machine deliver a block as they do a whole piece. `digest` is the
    hex sha256 that it must have, or "" where nobody knows it yet.
    """

    file: OpenFile
    piece: Piece
    start: int
    end: int
    digest: str = ""

    def __post_init__(self) -> None:
        self.notes: list[Finding] = []
        self.found = ""
        self._lock = threading.Lock()
        self._arrived = Ranges()

    def reset(self) -> None:
        """See `PieceWriter`."""
        self._arrived = Ranges()

    @property
    def is_empty(self) -> bool:
        """See `PieceWriter`."""
        return not self._arrived

    def copy_from(self, fd: int, offset: int) -> None:
        """See `PieceWriter`."""
        extent = Extent(fd, offset + self.start - self.piece.offset, self.end - self.start)
        ignored: list[Hasher] = []
        target, cancel = self.file.output, threading.Event()
        copy_hashed(extent, target, self.start, ignored, False, lambda _: None, cancel)
        self._arrived.add(self.start, self.end)

    def wanted(self) -> list[tuple[int, int]]:
        """See `PieceWriter`."""
        with self._lock:
            return self._arrived.missing(self.start, self.end)

    def acquire_buffer(self) -> memoryview:
        """See `PieceWriter`."""
        return memoryview(bytearray(BLOCK))

    def advance(self, count: int) -> None:
        """See `PieceWriter`; a fleet counts whole blocks."""

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        """See `PieceWriter`."""
        if size:
            self.file.write(buffer[:size], offset)
            with self._lock:
                self._arrived.add(offset, offset + size)

    def verify(self, where: str) -> None:
        """See `PieceWriter`; `found` is the digest afterwards."""
        if self.wanted():
            expected = f"{self.end - self.start:,} bytes from byte {self.start:,}"
            raise SourceError([Finding(Kind.WRONG_SIZE, where, expected, "fewer bytes")])
        digest = sha256()
        feed(self.file.fd, self.start, self.end - self.start, [digest], lambda _: None)
        self.found = digest.hexdigest()
        if self.digest and self.found != self.digest:
            raise SourceError([Finding.wrong_digest(where, self.digest, self.found)])


def folder_on_node(text: str) -> str:
    """Return a folder as a node understands it: with its own `~` and `$VARIABLES`."""
    return str(Path(os.path.expandvars(text)).expanduser())

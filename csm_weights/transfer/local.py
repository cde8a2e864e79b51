"""Sources on this machine's disks: chunk files, and copies of the whole artifact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint, opened
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.inspect import Shelved
from csm_weights.transfer.source import NotAvailable, PieceWriter, SourceError


@dataclass(frozen=True)
class ChunkFiles:
    """The chunk files of a repository: one file a piece, below `root`."""

    root: Path

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        """See `Source`; the place is the chunk file's path relative to the root."""
        _deliver(self.root / piece.part, piece.part, piece.size, 0, writer)
        return piece.part


@dataclass(frozen=True)
class WholeFile:
    """A copy of the artifact at `path`; a damaged one may have another `size` in bytes."""

    path: Path
    size: int | None = None

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`; the place is the file's path."""
        size = artifact.size if self.size is None else self.size
        _deliver(self.path, str(self.path), size, piece.offset, writer)
        return str(self.path)


@dataclass(frozen=True)
class Shelf:
    """Files in folders that the user names; `places` has each piece's, by its offset."""

    places: Mapping[int, Shelved]

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:  # noqa: ARG002
        """See `Source`; the place is the file's path."""
        path, size, start = self.places[piece.offset]
        _deliver(path, str(path), size, start, writer)
        return str(path)


def _deliver(path: Path, where: str, size: int, offset: int, writer: PieceWriter) -> None:
    """Write a piece from byte `offset` of a regular file of `size` bytes."""
    try:
        with opened(path) as fd:
            before = os.fstat(fd)
            if before.st_size != size:
                sizes = (f"{size:,} bytes", f"{before.st_size:,} bytes")
                raise SourceError([Finding(Kind.WRONG_SIZE, where, *sizes)])
            writer.copy_from(fd, offset)
            if Fingerprint.of(os.fstat(fd)) != Fingerprint.of(before):
                raise SourceError([Finding.changed(where)])
    except FileNotFoundError:
        raise NotAvailable from None
    except (OSError, EOFError) as error:
        raise SourceError([Finding.unreadable(where, error)]) from None

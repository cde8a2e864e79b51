"""Sources on this machine's disks: the chunk files, or a whole copy of the artifact."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.source import NotAvailable, PieceWriter, SourceError


class ChunkFiles:
    """The chunk files of a repository: one file a piece, below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:  # noqa: ARG002
        """See `Source`; the place is the chunk file's path relative to the root."""
        _deliver(self._root / piece.part, piece.part, piece.size, 0, sink)
        return piece.part


class WholeFile:
    """A copy of the artifact at `path`; a damaged one may have another `size` in bytes."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._path = path
        self._size = size

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
        """See `Source`; the place is the file's path."""
        size = artifact.size if self._size is None else self._size
        _deliver(self._path, str(self._path), size, piece.offset, sink)
        return str(self._path)


def _deliver(path: Path, where: str, size: int, offset: int, sink: PieceWriter) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotAvailable from None
    except OSError as error:
        raise SourceError([Finding.unreadable(where, error)]) from None
    try:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode) or before.st_size != size:
            finding = Finding(
                Kind.WRONG_SIZE, where, f"{size:,} bytes", f"{before.st_size:,} bytes"
            )
            raise SourceError([finding])
        try:
            sink.take_file(fd, offset)
        except (OSError, EOFError) as error:
            raise SourceError([Finding.unreadable(where, error)]) from None
        if Fingerprint.of(os.fstat(fd)) != Fingerprint.of(before):
            raise SourceError([Finding.changed(where)])
    finally:
        os.close(fd)

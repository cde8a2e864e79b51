"""Verified files, and the receipts that record them beside the files.

A receipt is a hint that saves work: one that cannot be understood, or whose
fingerprint is not the file's, counts as absent, and the file is hashed again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import Finding
from csm_weights.files import Fingerprint, read_bounded
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.manifest.types import Artifact
from csm_weights.store.journal import PieceRecord
from csm_weights.untrusted import dump_record, parse_record

#: Names of fields that are other ones on disk, as every version before has written them.
_ON_DISK = {"verified_at": "proven_at"}


@dataclass(frozen=True)
class VerifiedFile:
    """A file whose bytes have just been hashed and found right, under whatever name.

    `git_sha1` is the git blob id, where it was taken. `pieces` tell where its
    pieces came from. `fingerprint` is the stat of the bytes that were hashed.
    `notes` are findings about sources for which another one stepped in. `blocks`
    tile the file, each with its sha256, where those were taken.
    """

    path: Path
    sha256: str
    pieces: tuple[PieceRecord, ...]
    fingerprint: Fingerprint
    git_sha1: str | None = None
    notes: tuple[Finding, ...] = ()
    blocks: tuple[ByteRange, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.fingerprint.size


@dataclass(frozen=True)
class Receipt:
    """The record of a verified file: `path` is relative to the folder it is in.

    `model` is the manifest's name, `verified_at` in ISO 8601, UTC. `blocks` are
    those of `VerifiedFile`: as true as the rest of the receipt, and no truer.
    """

    path: str
    model: str
    size: int
    sha256: str
    pieces: tuple[PieceRecord, ...]
    fingerprint: Fingerprint
    verified_at: str
    tool: str
    git_sha1: str | None = None
    blocks: tuple[ByteRange, ...] = ()

    def is_current(self, status: os.stat_result) -> bool:
        """Check that the file has not been touched since it was verified, by its stat."""
        return self.fingerprint == Fingerprint.of(status)

    def fits(self, artifact: Artifact) -> bool:
        """Check that what was verified is one of the editions that the manifest accepts.

        By the whole digest where the manifest has one, else by the pieces, or
        by the git blob id where there is nothing else; and by the Hub blob id.
        """
        if artifact.sha256 is None and artifact.pieces and not self.covers_pieces(artifact):
            return False
        return any(
            not artifact.digest_findings(edition, self.sha256, self.git_sha1, self.path)
            for edition in artifact.editions
            if edition.size == self.size
        )

    def covers_pieces(self, artifact: Artifact) -> bool:
        """Check that `sha256` is the digest of just the pieces that the manifest pins."""
        return 0 < len(artifact.pieces) == len(self.pieces) and all(
            map(PieceRecord.is_of, self.pieces, artifact.pieces)
        )


def dump_receipt(receipt: Receipt) -> str:
    """Return a receipt as JSON on one line."""
    return dump_record(receipt, _ON_DISK)


def load_receipt(text: str) -> Receipt | None:
    """Return the receipt in `text`, or None where it cannot be understood."""
    return parse_record(text, Receipt, names=_ON_DISK)


def read_receipt(directory: Path, path: str) -> Receipt | None:
    """Return the receipt of `directory/path`, or None where there is none that can be read."""
    try:
        text = read_bounded(receipt_path(directory, path))
    except OSError:
        return None
    return load_receipt(text.decode(errors="replace"))


def receipt_path(directory: Path, path: str) -> Path:
    """Return where the receipt of `directory/path` is kept."""
    return directory / f"{RECEIPTS}/{path}.json"

"""The journal beside an unfinished file: which of its bytes an earlier run has written.

A journal is a hint that saves work. Lines that cannot be understood, or that
are about other pieces than the manifest's, are left out, and the bytes that the
others name are hashed again before they count.
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from csm_weights.files import read_bounded
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.untrusted import parse_record

#: Lines that may be records; others are passed over quickly, however many they are.
_LINE = re.compile(rb'^\{"[ -~]{40,}\}$', re.MULTILINE)


@dataclass(frozen=True)
class PieceRecord:
    """One verified piece: the half-open range, its sha256, where it came from."""

    offset: int
    size: int
    sha256: str
    source: str

    def is_of(self, piece: Piece) -> bool:
        """Compare range and digest with those of a piece."""
        return (self.offset, self.size, self.sha256) == (piece.offset, piece.size, piece.sha256)


@dataclass(frozen=True)
class Arrival:
    """A range of an unfinished file that was written and is not verified yet.

    `piece` is the sha256 of the piece to which it belongs.
    """

    offset: int
    size: int
    piece: str

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size < 1:
            raise ValueError("a range of no bytes, or before the first one")


@dataclass(frozen=True)
class Consumed:
    """The first `consumed` bytes of a piece: durable in the unfinished file.

    The chunk file need not have them any more. The piece begins at byte
    `offset` and has the sha256 `piece`. Of several about one the last holds.
    """

    offset: int
    consumed: int
    piece: str

    def __post_init__(self) -> None:
        if self.offset < 0 or self.consumed < 0:
            raise ValueError("fewer than no bytes, or before the first one")


@dataclass(frozen=True)
class Refuted:
    """The end of all lines so far about the piece at `offset`: its bytes were found wrong.

    `refuted` is the sha256 that it must have. Readers that do not know this line hash the
    bytes once more.
    """

    offset: int
    refuted: str


Record = PieceRecord | Arrival | Consumed | Refuted


@dataclass(frozen=True)
class Journal:
    """The lines of a journal that are about pieces that a manifest has today.

    `pieces` are those that were verified, `arrived` written ranges of others.
    `consumed` is the last line about each piece that was moved out of its
    chunk file, `foreign` those about pieces that are not the artifact's.
    `is_begun` is True where there is an unfinished file, even without lines.
    """

    pieces: tuple[PieceRecord, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    consumed: tuple[Consumed, ...] = ()
    foreign: tuple[Consumed, ...] = ()
    is_begun: bool = False

    @property
    def kept(self) -> Counter[int]:
        """Return the bytes of each verified piece, by the piece's offset."""
        return Counter({record.offset: record.size for record in self.pieces})

    @property
    def moved(self) -> Counter[int]:
        """Return the bytes of each piece, by its offset, that have left its chunk file."""
        return Counter({record.offset: record.consumed for record in self.consumed})


def partial_path(file: Path) -> Path:
    """Return the unfinished form of `file`, in the same folder."""
    return file.with_name(file.name + ".partial")


def journal_path(file: Path) -> Path:
    """Return the journal of the unfinished form of `file`."""
    return file.with_name(file.name + ".partial.journal")


def is_unfinished(name: str) -> bool:
    """Check whether a name is that of an unfinished file, ours or recombine.sh's."""
    return name.endswith((".partial", ".journal")) or ".recombine-partial" in name


def parse_line(line: str) -> Record | None:
    """Return the record on a line of a journal, or None where it cannot be understood."""
    # Most lines are about arrivals.
    kinds: tuple[type[Record], ...] = (Arrival, PieceRecord, Consumed, Refuted)
    return parse_record(line, *kinds)


def read_journal(file: Path, artifact: Artifact) -> Journal:
    """Read the journal of the unfinished form of `file`; empty where either is missing."""
    if not partial_path(file).is_file():
        return Journal()
    try:
        data = read_bounded(journal_path(file))
    except OSError:
        return Journal(is_begun=True)
    tiles, starts = artifact.tiles, [piece.offset for piece in artifact.tiles]
    pieces: dict[int, PieceRecord] = {}
    arrived: dict[int, list[Arrival]] = {}
    moved: dict[tuple[int, str], Consumed] = {}
    for line in _LINE.findall(data):
        if not (record := parse_line(line.decode())):
            continue
        piece = tiles[bisect_right(starts, record.offset) - 1]
        if isinstance(record, Consumed):
            moved[record.offset, record.piece] = record
        elif isinstance(record, PieceRecord):
            if record.is_of(piece):
                pieces[record.offset] = record
        elif isinstance(record, Refuted):
            if (record.offset, record.refuted) == (piece.offset, piece.sha256):
                pieces.pop(piece.offset, None)
                arrived.pop(piece.offset, None)
        elif record.piece == piece.sha256 and record.offset + record.size <= piece.end:
            arrived.setdefault(piece.offset, []).append(record)
    sizes = {(piece.offset, piece.sha256): piece.size for piece in artifact.pieces}
    consumed = [c for key, c in moved.items() if 0 < c.consumed <= sizes.get(key, 0)]
    return Journal(
        tuple(pieces[offset] for offset in sorted(pieces)),
        tuple(a for offset, own in arrived.items() if offset not in pieces for a in own),
        tuple(sorted(consumed, key=lambda c: c.offset)),
        tuple(c for key, c in moved.items() if c.consumed and key not in sizes),
        is_begun=True,
    )

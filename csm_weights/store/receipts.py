"""What is written down beside the files: receipts and journal lines, as JSON.

Records are hints that save work. They are read back with suspicion: a record
that cannot be understood counts as absent, and the bytes are hashed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from csm_weights.manifest.digests import Whole, digest_findings
from csm_weights.manifest.types import RECEIPTS, Artifact, Piece
from csm_weights.untrusted import Fingerprint

SCHEMA = 1

R = TypeVar("R")

#: A record is a few hundred bytes a piece; anything larger is not ours.
MAX_RECORD = 64 << 20


@dataclass(frozen=True)
class PieceRecord:
    """One proven piece: the half-open range, its sha256, where it came from."""

    offset: int
    size: int
    sha256: str
    source: str

    def is_of(self, piece: Piece) -> bool:
        """Whether this is about just that piece with just that digest."""
        return (self.offset, self.size, self.sha256) == (piece.offset, piece.size, piece.sha256)


@dataclass(frozen=True)
class Arrival:
    """A range of an unfinished file that was written and is not proven yet.

    `piece` is the sha256 that the piece must have to which it belongs.
    """

    offset: int
    size: int
    piece: str


@dataclass(frozen=True)
class Consumed:
    """How much of a piece has moved from its part to the unfinished file, where it is durable.

    The piece begins at byte `offset` of the file and has the sha256 `piece`;
    its first `consumed` bytes count, and the part need not have them any
    more. Of several about one piece the last holds.
    """

    offset: int
    consumed: int
    piece: str


@dataclass(frozen=True)
class Receipt:
    """What was proven of a placed file.

    `sha256` is of the whole file, and so is `git_sha1`, the git blob id, where
    it was taken. `proven_at` is ISO 8601 in UTC. `model` is the manifest's name.
    """

    path: str
    model: str
    size: int
    sha256: str
    pieces: tuple[PieceRecord, ...]
    fingerprint: Fingerprint
    proven_at: str
    tool: str
    git_sha1: str | None = None

    def proves(self, artifact: Artifact) -> bool:
        """Whether what was proven is one of the editions that the manifest accepts.

        By the whole digest where the manifest has one, else by the pieces, or
        by the git blob id where there is nothing else; and by the Hub blob id.
        """
        if artifact.sha256 is None and artifact.pieces and not self.covers_pieces(artifact):
            return False
        whole = Whole(self.sha256, self.git_sha1)
        fitting = (e for e in artifact.editions if e.size == self.size)
        return any(not digest_findings(artifact, e, whole, self.path) for e in fitting)

    def covers_pieces(self, artifact: Artifact) -> bool:
        """Whether `sha256` is the digest of just the pieces that the manifest pins."""
        return bool(artifact.pieces) and (
            len(self.pieces) == len(artifact.pieces)
            and all(r.is_of(p) for r, p in zip(self.pieces, artifact.pieces, strict=True))
        )


@dataclass(frozen=True)
class Check:
    """One thing that must be true of a loaded model: what was found, and what is allowed."""

    name: str
    value: str
    limit: str
    ok: bool

    @property
    def verdict(self) -> str:
        """The word a person reads."""
        return "OK" if self.ok else "NOT OK"

    def line(self) -> str:
        """The check as one line of text."""
        return f"{self.name}: {self.value} (limit: {self.limit}) {self.verdict}"


@dataclass(frozen=True)
class Figures:
    """What a smoke test measured beside its checks, and on what.

    Sizes are in bytes, rates in bytes a second; 0 is "not measured": a mapped
    file is not read when it is loaded, and the CPU has no bus. `frame_bytes` are
    the weights that a frame has to read. `driver` is "-" for the CPU.
    """

    machine: str
    driver: str
    torch: str
    dtype: str
    loaded_bytes: int
    bus_rate: float
    frame_bytes: int
    memory_rate: float
    peak_host: int
    peak_device: int


@dataclass(frozen=True)
class SmokeReport:
    """All checks of one loaded model, and the files it was loaded from.

    `real_time_factor` is seconds of computing for a second of audio: below 1
    is faster than real time. `load_seconds` is from opening the file to all
    tensors on the device. `bound_to` says what it holds for: pairs of name
    and digest or version, of the files, the golden frames, torch, this
    package. `made_at` is ISO 8601 in UTC.
    """

    device: str
    checks: tuple[Check, ...]
    frames_per_second: float
    real_time_factor: float
    load_seconds: float
    figures: Figures
    bound_to: tuple[tuple[str, str], ...] = ()
    made_at: str = ""

    @property
    def ok(self) -> bool:
        """Whether there were checks, and every one is OK."""
        return bool(self.checks) and all(check.ok for check in self.checks)


def receipt_path(directory: Path, path: str) -> Path:
    """Where the receipt of `directory/path` is kept."""
    return directory / RECEIPTS / f"{path}.json"


def smoke_path(directory: Path) -> Path:
    """Where the last smoke report of the model in `directory` is kept."""
    return directory / RECEIPTS / "smoke-report"  # receipts end in .json, so none has this name


def partial_path(file: Path) -> Path:
    """The unfinished form of `file`, in the same folder."""
    return file.with_name(file.name + ".partial")


def journal_path(file: Path) -> Path:
    """The journal of pieces proven in the unfinished form of `file`."""
    return file.with_name(file.name + ".partial.journal")


def dump(record: Receipt | PieceRecord | Arrival | Consumed | SmokeReport) -> str:
    """A record as JSON on one line."""
    return json.dumps({"schema": SCHEMA, **asdict(record)}, sort_keys=True)


def load_receipt(text: str) -> Receipt | None:
    """The receipt in `text`, or None where it cannot be understood."""
    return _understood(text, _receipt)


def load_piece(text: str) -> PieceRecord | None:
    """The journal line in `text`, or None where it cannot be understood."""
    return _understood(text, _piece)


def load_arrival(text: str) -> Arrival | None:
    """The journal line in `text`, or None where it is about something else."""
    return _understood(text, _arrival)


def load_consumed(text: str) -> Consumed | None:
    """The journal line in `text`, or None where it is about something else."""
    return _understood(text, _consumed)


def load_smoke(text: str) -> SmokeReport | None:
    """The smoke report in `text`, or None where it cannot be understood."""
    return _understood(text, _smoke)


def _understood(text: str, build: Callable[[dict[str, Any]], R]) -> R | None:
    try:
        data = json.loads(text)
        if data.pop("schema") != SCHEMA:
            return None
        return build(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _typed(kind: Callable[..., R], types: Mapping[str, type], data: dict[str, Any]) -> R:
    """A record from fields of just these types; TypeError otherwise."""
    if any(type(data[name]) is not wanted for name, wanted in types.items()):
        raise TypeError(f"a field of {kind} has another type")
    return kind(**data)


_INTEGERS = {"inode": int, "size": int, "mtime_ns": int, "ctime_ns": int}
_ARRIVAL = {"offset": int, "size": int, "piece": str}
_CONSUMED = {"offset": int, "consumed": int, "piece": str}
_PIECE = {"offset": int, "size": int, "sha256": str, "source": str}
_RECEIPT = {"path": str, "model": str, "size": int, "sha256": str, "proven_at": str, "tool": str}
_CHECK = {"name": str, "value": str, "limit": str, "ok": bool}
_FIGURES = {
    **dict.fromkeys(("machine", "driver", "torch", "dtype"), str),
    **dict.fromkeys(("loaded_bytes", "frame_bytes", "peak_host", "peak_device"), int),
    **dict.fromkeys(("bus_rate", "memory_rate"), float),
}
_REPORT = {
    "device": str,
    "frames_per_second": float,
    "real_time_factor": float,
    "load_seconds": float,
    "made_at": str,
}


def _receipt(data: dict[str, Any]) -> Receipt:
    data["pieces"] = tuple(_piece(p) for p in data["pieces"])
    data["fingerprint"] = _typed(Fingerprint, _INTEGERS, data["fingerprint"])
    if not isinstance(data.get("git_sha1"), str | None):
        raise TypeError("git_sha1 is neither text nor absent")
    return _typed(Receipt, _RECEIPT, data)


def _piece(data: dict[str, Any]) -> PieceRecord:
    return _typed(PieceRecord, _PIECE, data)


def _arrival(data: dict[str, Any]) -> Arrival:
    arrival = _typed(Arrival, _ARRIVAL, data)
    if arrival.offset < 0 or arrival.size < 1:
        raise ValueError("a range of no bytes, or before the first one")
    return arrival


def _consumed(data: dict[str, Any]) -> Consumed:
    consumed = _typed(Consumed, _CONSUMED, data)
    if consumed.offset < 0 or consumed.consumed < 0:
        raise ValueError("fewer than no bytes, or before the first one")
    return consumed


def _smoke(data: dict[str, Any]) -> SmokeReport:
    data["checks"] = tuple(_typed(Check, _CHECK, c) for c in data["checks"])
    data["figures"] = _typed(Figures, _FIGURES, data["figures"])
    data["bound_to"] = tuple((str(name), str(what)) for name, what in data["bound_to"])
    return _typed(SmokeReport, _REPORT, data)

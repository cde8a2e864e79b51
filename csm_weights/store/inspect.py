"""The only reader of what is on disk: placed and staged files, partials, parts.

Looking never hashes and never writes. It stats, reads receipts and journals,
and peeks at files of the wrong size to say what they are instead.
"""

from __future__ import annotations

import enum
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.store import hub_cache
from csm_weights.store.block_io import NOT_PUNCHING, unfit
from csm_weights.store.receipts import (
    MAX_RECORD,
    Arrival,
    Consumed,
    PieceRecord,
    Receipt,
    SmokeReport,
    journal_path,
    load_arrival,
    load_consumed,
    load_piece,
    load_receipt,
    load_smoke,
    partial_path,
    receipt_path,
    smoke_path,
)
from csm_weights.untrusted import Fingerprint, size_finding, stat_of

#: Bytes free that consuming parts begins with: a step of it, and as much for the disk's own books.
CONSUMING_ROOM = 64 << 20

#: Bytes of a file system block, at most: only ranges that begin at one can be shared.
BLOCK = 4096

#: File systems on which a copy within the file system can share blocks.
SHARING = frozenset({"xfs", "btrfs", "bcachefs"})


class FileState(enum.StrEnum):
    """What is known of a file without hashing it; the value is the status word."""

    ABSENT = "absent"
    VERIFIED = "proven"
    UNVERIFIED = "not proven yet"
    INVALID = "wrong"


@dataclass(frozen=True)
class FileStatus:
    """One file as it is on disk; `size` is in bytes, None where it is absent.

    A symbolic link is looked through, and `is_link` says that it is one. `good`
    are the offsets of pieces that can be salvaged from a file that is wrong.
    A consumed part is wrong by itself, and good beside its unfinished file.
    """

    path: Path
    state: FileState
    size: int | None = None
    finding: Finding | None = None
    receipt: Receipt | None = None
    is_link: bool = False
    good: frozenset[int] = frozenset()

    @property
    def is_consumed(self) -> bool:
        """Whether bytes of this part are in an unfinished file, to go on with."""
        return self.finding is not None and self.finding.kind is Kind.CONSUMED

    @property
    def is_usable(self) -> bool:
        """Whether nothing is known to be wrong, or all that is is consumed."""
        return self.finding is None or self.is_consumed


@dataclass(frozen=True)
class ArtifactState:
    """All that is on disk of one artifact.

    `partial` holds the journaled pieces of an unfinished staged file, and
    `arrived` ranges of others that were written to it; `copied` those of an
    unfinished copy in the destination. All are hashed again before they count.
    `parts` has a look for each piece. `cached` is the file in the Hub's cache.
    `consumed` tells what has moved from parts to the unfinished staged file,
    `stranded` that it is of no use today, `unfit` which parts cannot be
    consumed, `saves_nothing` why consuming would make no room, if so.
    """

    artifact: Artifact
    installed: FileStatus
    staged: FileStatus
    partial: tuple[PieceRecord, ...]
    parts: tuple[FileStatus, ...]
    extras: tuple[Finding, ...]
    copied: tuple[PieceRecord, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    cached: FileStatus | None = None
    consumed: tuple[Consumed, ...] = ()
    stranded: Finding | None = None
    unfit: tuple[Finding, ...] = ()
    saves_nothing: str = ""

    @property
    def is_here(self) -> bool:
        """Whether anything of the artifact is on this machine, or was."""
        looks = (self.installed, self.staged, *self.parts)
        return bool(self.partial or self.arrived or self.consumed) or any(
            look.state is not FileState.ABSENT or look.receipt for look in looks
        )


@dataclass(frozen=True)
class Paths:
    """The folders of a run: parts below `root`, then `staging`, then `destination`.

    `cache` is the Hub's on this machine, None where it is not to be used.
    """

    root: Path
    staging: Path
    destination: Path
    cache: Path | None = None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        root: Path,
        destination: str | None = None,
        cache: Path | None = None,
    ) -> Paths:
        """The manifest's folders below `root`; `destination` overrides the last."""
        last = root / Path(destination or manifest.destination).expanduser()
        return cls(root, root / manifest.staging, last, cache)


@dataclass(frozen=True)
class State:
    """What is on disk for the chosen artifacts; sizes in bytes."""

    manifest: Manifest
    paths: Paths
    artifacts: tuple[ArtifactState, ...]
    free_staging: int
    free_destination: int
    same_filesystem: bool
    shares_blocks: bool
    smoke: SmokeReport | None
    links_to_cache: bool = False


def inspect(
    manifest: Manifest,
    artifacts: Sequence[Artifact],
    paths: Paths,
    known_bad: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]] | None = None,
) -> State:
    """Looks at the chosen artifacts of a manifest.

    `known_bad` holds what hashing has found out earlier in this run: those
    files count as wrong whatever their receipts say. `good` has the offsets
    of the pieces that are right in them.
    """
    staging, destination = _existing(paths.staging), _existing(paths.destination)
    return State(
        manifest=manifest,
        paths=paths,
        artifacts=tuple(
            _look_artifact(a, manifest, paths, known_bad, good or {}) for a in artifacts
        ),
        free_staging=shutil.disk_usage(staging).free,
        free_destination=shutil.disk_usage(destination).free,
        same_filesystem=staging.stat().st_dev == destination.stat().st_dev,
        shares_blocks=_shares_blocks(artifacts, paths.root, staging),
        links_to_cache=_links_to(paths.cache, staging),
        smoke=load_smoke(_read_record(smoke_path(paths.destination))),
    )


def _links_to(cache: Path | None, staging: Path) -> bool:
    """Whether a file of the Hub's cache may get a second name in staging: it is one disk."""
    return cache is not None and _existing(cache).stat().st_dev == staging.stat().st_dev


def _look_artifact(
    artifact: Artifact,
    manifest: Manifest,
    paths: Paths,
    known_bad: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]],
) -> ArtifactState:
    def file_look(directory: Path) -> FileStatus:
        look = inspect_file(directory, artifact, manifest.name, known_bad)
        return replace(look, good=_salvageable(artifact, look, good))

    installed, staged = file_look(paths.destination), file_look(paths.staging)
    consumed, stranded = _consumed(artifact, staged.path)
    stranded = stranded or (None if consumed else _unexplained_hole(artifact, staged.path, paths))
    moved = {record.offset: record.consumed for record in consumed}
    parts = [_look_part(p, paths.root, known_bad, moved.get(p.offset, 0)) for p in artifact.pieces]
    return ArtifactState(
        artifact=artifact,
        installed=installed,
        staged=staged,
        partial=_journaled(artifact, staged.path),
        arrived=_arrived(artifact, staged.path),
        copied=_journaled(artifact, installed.path),
        cached=_look_cached(artifact, manifest, paths, known_bad, good),
        parts=tuple(parts),
        extras=_extra_parts(artifact, paths.root),
        consumed=consumed,
        stranded=stranded,
        unfit=tuple(f for p in parts if p.is_usable and (f := unfit(p.path, paths.root))),
        saves_nothing=_saves_nothing(parts, _existing(paths.staging)),
    )


def _salvageable(
    artifact: Artifact, look: FileStatus, good: Mapping[Path, frozenset[int]]
) -> frozenset[int]:
    """The pieces of a wrong file that are right, or may be in one that was cut short."""
    finding, size = look.finding, look.size or 0
    if finding and finding.kind is Kind.WRONG_SIZE and size < artifact.size:
        return frozenset(piece.offset for piece in artifact.pieces if piece.end <= size)
    return good.get(look.path, frozenset())


def _look_cached(
    artifact: Artifact,
    manifest: Manifest,
    paths: Paths,
    known_bad: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]],
) -> FileStatus | None:
    """The file in the Hub's cache that has the artifact's size, if there is one."""
    if not paths.cache or not manifest.repo:
        return None
    try:
        path = hub_cache.find(paths.cache, manifest.repo, manifest.revision, artifact)
    except OSError:
        # A cache that may not be read holds nothing for us.
        return None
    if path is None:
        return None
    finding = known_bad.get(path)
    condition = FileState.INVALID if finding else FileState.UNVERIFIED
    return FileStatus(path, condition, artifact.size, finding, good=good.get(path, frozenset()))


def inspect_file(
    directory: Path, artifact: Artifact, model: str, known_bad: Mapping[Path, Finding]
) -> FileStatus:
    """One artifact in one folder, judged by its stat and its receipt."""
    path = directory / artifact.path
    receipt = _receipt(directory, artifact)
    status, finding = stat_of(path)
    if path.is_dir():
        what = "a plain file or nothing"
        finding = Finding(Kind.IN_THE_WAY, str(path), what, "a folder", "move it away")
    if status is None:
        is_here = finding and finding.kind is not Kind.MISSING
        condition = FileState.INVALID if is_here else FileState.ABSENT
        return FileStatus(path, condition, None, finding, receipt)
    size = status.st_size
    finding = known_bad.get(path) or size_finding(path, [e.size for e in artifact.editions], size)
    if finding:
        return FileStatus(path, FileState.INVALID, size, finding, receipt)
    if receipt and _is_current(receipt, artifact, model, status):
        return FileStatus(path, FileState.VERIFIED, size, None, receipt, path.is_symlink())
    return FileStatus(path, FileState.UNVERIFIED, size, None, receipt, path.is_symlink())


def _is_current(receipt: Receipt, artifact: Artifact, model: str, status: os.stat_result) -> bool:
    return (
        receipt.fingerprint == Fingerprint.of(status)
        and receipt.model == model
        and receipt.proves(artifact)
    )


def _look_part(
    piece: Piece, root: Path, known_bad: Mapping[Path, Finding], moved: int
) -> FileStatus:
    """A part, of which `moved` bytes are in the unfinished file; all of them need no part."""
    path = root / piece.part
    status, finding = stat_of(path, piece.part)
    if moved == piece.size and path not in known_bad:
        return FileStatus(path, FileState.INVALID, None, _gone(piece, moved))
    if status is None:
        if finding and finding.kind is not Kind.MISSING:
            return FileStatus(path, FileState.INVALID, None, finding)
        help_text = "get the part (`git lfs pull`, or copy it there)"
        finding = finding or Finding.missing(piece.part, piece.size, help_text)
        return FileStatus(path, FileState.ABSENT, None, finding)
    finding = known_bad.get(path) or size_finding(path, [piece.size], status.st_size, piece.part)
    if finding is None and not os.access(path, os.R_OK):
        finding = Finding.unreadable(piece.part, "permission denied")
    finding = finding or (_gone(piece, moved) if moved else None)
    condition = FileState.INVALID if finding else FileState.UNVERIFIED
    return FileStatus(path, condition, status.st_size, finding)


def _gone(piece: Piece, moved: int) -> Finding:
    found = f"{moved:,} of them moved to the unfinished file"
    help_text = "inv weights goes on with it"
    return Finding(Kind.CONSUMED, piece.part, f"{piece.size:,} bytes", found, help_text)


def _saves_nothing(parts: Sequence[FileStatus], staging: Path) -> str:
    """Why consuming parts makes no room for files in `staging`, or an empty string."""
    folders = {_existing(part.path.parent) for part in parts}
    if any(folder.stat().st_dev != staging.stat().st_dev for folder in folders):
        return f"the parts are on another file system than {staging}"
    kind = filesystem_type(staging)
    return f"{kind} cannot free parts of a file" if kind in NOT_PUNCHING else ""


def _extra_parts(artifact: Artifact, root: Path) -> tuple[Finding, ...]:
    """Files beside the parts that are named like parts and are none."""
    known = {root / piece.part for piece in artifact.pieces}
    prefixes = {(p.parent, p.name.rpartition("-")[0] + "-") for p in known}
    findings = []
    for folder, prefix in sorted(prefixes):
        names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        findings += [
            Finding(
                Kind.EXTRA_PART,
                (folder / name).relative_to(root).as_posix(),
                f"only the {len(artifact.pieces)} parts of {artifact.path}",
                "one more",
                "move it away; is the manifest that of another model?",
            )
            for name in names
            if name.startswith(prefix) and folder / name not in known and not is_unfinished(name)
        ]
    return tuple(findings)


def is_unfinished(name: str) -> bool:
    """Whether a file's name is that of something unfinished, ours or recombine.sh's."""
    return name.endswith((".partial", ".journal")) or ".recombine-partial" in name


def unfinished(state: State) -> list[Path]:
    """What interrupted runs have left: partials, journals, a stand-in's folder."""
    proven = [item for item in state.artifacts if not holds_consumed(item)]
    files = [item.staged.path for item in proven]
    files += [item.installed.path for item in state.artifacts]
    files += [part.path for item in state.artifacts for part in item.parts]
    left = {
        path
        for file in files
        if file.parent.is_dir()
        for path in file.parent.iterdir()
        if path.name.startswith(file.name) and is_unfinished(path.name)
    }
    standin = state.paths.root / "output" / f"{state.manifest.name}.unfinished"
    return sorted(left | ({standin} if standin.exists() else set()))


def holds_consumed(item: ArtifactState) -> bool:
    """Whether an unfinished file has bytes that are nowhere else: those of consumed parts."""
    is_whole = FileState.VERIFIED in (item.installed.state, item.staged.state)
    return bool(item.stranded or item.consumed) and not is_whole


def leftovers(state: State, goal_is_staged: bool) -> list[Path]:
    """What a run that was killed at its very end has left of files that are proven.

    Journals of partials that have got their names, receipts of files that
    were moved on or half written, and, unless files are wanted there, the
    staged copies of files that went to another disk.
    """
    return [path for item in state.artifacts for path in _leftovers(state, item, goal_is_staged)]


def _leftovers(state: State, item: ArtifactState, goal_is_staged: bool) -> Iterator[Path]:
    looks = (item.staged, item.installed)
    proven = [look for look in looks if look.state is FileState.VERIFIED]
    for look in looks:
        partial, journal = partial_path(look.path), journal_path(look.path)
        if proven and journal.is_file() and not os.path.lexists(partial):
            yield journal
    for folder in (state.paths.staging, state.paths.destination):
        unfinished_receipt = partial_path(receipt_path(folder, item.artifact.path))
        if proven and unfinished_receipt.is_file():
            yield unfinished_receipt
    if item.installed not in proven or item.installed.path == item.staged.path:
        return
    receipt = receipt_path(state.paths.staging, item.artifact.path)
    if item.staged in proven and not goal_is_staged:
        if item.staged.path.samefile(item.installed.path):
            return
        yield item.staged.path
        yield receipt
    elif item.staged.state is FileState.ABSENT and receipt.is_file():
        yield receipt


def _receipt(directory: Path, artifact: Artifact) -> Receipt | None:
    text = _read_record(receipt_path(directory, artifact.path))
    return load_receipt(text) if text else None


def _journaled(artifact: Artifact, staged: Path) -> tuple[PieceRecord, ...]:
    """The journal's lines that are about pieces of this artifact as pinned today."""
    records = [load_piece(line) for line in _journal_lines(staged)]
    pinned = {(p.offset, p.size, p.sha256) for p in artifact.tiles}
    found = {r.offset: r for r in records if r and (r.offset, r.size, r.sha256) in pinned}
    return tuple(found[offset] for offset in sorted(found))


def _arrived(artifact: Artifact, staged: Path) -> tuple[Arrival, ...]:
    """The journal's lines about ranges that were written, of pieces that are not proven yet."""
    proven = {record.offset for record in _journaled(artifact, staged)}
    open_tiles = [p for p in artifact.tiles if p.offset not in proven and p.sha256]
    arrivals = [a for line in _journal_lines(staged) if (a := load_arrival(line))]
    return tuple(
        a
        for a in arrivals
        for piece in open_tiles
        if a.piece == piece.sha256 and piece.offset <= a.offset and a.offset + a.size <= piece.end
    )


def _consumed(artifact: Artifact, staged: Path) -> tuple[tuple[Consumed, ...], Finding | None]:
    """The last line about each consumed piece as pinned today; a finding where others are."""
    lines = [c for line in _journal_lines(staged) if (c := load_consumed(line))]
    last = {(c.offset, c.piece): c for c in lines}
    tiles = {(p.offset, p.sha256): p.size for p in artifact.pieces}
    known = [c for key, c in last.items() if 0 < c.consumed <= tiles.get(key, 0)]
    others = [c for key, c in last.items() if c.consumed and key not in tiles]
    partial, finding = partial_path(staged), None
    if others or (known and partial.lstat().st_nlink > 1):
        found = f"parts that {artifact.path} no longer has" if others else "more hard links to it"
        expected, help_text = "the bytes of consumed parts, and no others", "move it away"
        finding = Finding(Kind.CONSUMED, str(partial), expected, found, help_text)
    return tuple(sorted(known, key=lambda c: c.offset)), finding


def _unexplained_hole(artifact: Artifact, staged: Path, paths: Paths) -> Finding | None:
    """That a part begins with a hole, and no journal tells whether its bytes moved to the partial.

    Copied as it is, the hole would go over what may be the only copy.
    """
    partial = partial_path(staged)
    if not partial.is_file():
        return None
    for piece in artifact.pieces:
        if _begins_with_hole(paths.root / piece.part, piece.size):
            found = f"none, and {piece.part} begins with a hole"
            help_text = "bring the journal back, or move the unfinished file away and keep it"
            expected = "a journal that tells of consumed parts"
            return Finding(Kind.CONSUMED, str(partial), expected, found, help_text)
    return None


def _begins_with_hole(path: Path, size: int) -> bool:
    """Whether the first block of a file of that size was given back to the disk."""
    if not hasattr(os, "SEEK_HOLE") or size < BLOCK:
        return False
    try:
        status = path.stat()
        # By far the most parts are told by their stat alone; 512 is the unit of st_blocks.
        if status.st_size != size or status.st_blocks * 512 >= size:
            return False
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) == 0
    except OSError:
        return False
    finally:
        os.close(fd)


def _journal_lines(staged: Path) -> list[str]:
    if not partial_path(staged).is_file():
        return []
    return _read_record(journal_path(staged)).splitlines()


def _read_record(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_RECORD).decode(errors="replace")
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    """The nearest folder on the way to `path` that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _shares_blocks(artifacts: Sequence[Artifact], root: Path, staging: Path) -> bool:
    """Whether assembling takes no room: all pieces begin at a block, on one disk that shares."""
    pieces = [piece for a in artifacts for piece in a.pieces]
    if not pieces or any(piece.offset % BLOCK for piece in pieces):
        return False
    folders = {_existing((root / piece.part).parent) for piece in pieces}
    same = all(folder.stat().st_dev == staging.stat().st_dev for folder in folders)
    return same and filesystem_type(staging) in SHARING


def filesystem_type(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4"; "" where unknown.

    Source: /proc/self/mountinfo, the mount point that is the longest prefix.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and path.resolve().is_relative_to(point):
            best, kind = point, rest.split()[0]
    return kind

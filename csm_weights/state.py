"""The only reader of what is on disk: placed and staged files, partials, parts.

Looking never hashes and never writes. It stats, reads receipts and journals,
and peeks at files of the wrong size to say what they are instead.
"""

from __future__ import annotations

import enum
import errno
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights import hubcache
from csm_weights.errors import Finding, Kind
from csm_weights.manifest import Artifact, Manifest, Piece
from csm_weights.records import (
    MAX_RECORD,
    Arrival,
    Fingerprint,
    PieceRecord,
    Receipt,
    SmokeReport,
    journal_path,
    load_arrival,
    load_piece,
    load_receipt,
    load_smoke,
    partial_path,
    receipt_path,
    smoke_path,
)

#: Bytes read of a file that has the wrong size, to say what it is.
PEEK = 256

#: Bytes of a file system block, at most: only ranges that begin at one can be shared.
BLOCK = 4096

#: File systems on which a copy within the file system can share blocks.
SHARING = frozenset({"xfs", "btrfs", "bcachefs"})


class Condition(enum.StrEnum):
    """What is known of a file without hashing it; the value is the status word."""

    ABSENT = "absent"
    PROVEN = "proven"
    UNPROVEN = "not proven yet"
    WRONG = "wrong"


@dataclass(frozen=True)
class FileLook:
    """One file as it is on disk; `size` is in bytes, None where it is absent.

    A symbolic link is looked through, and `is_link` says that it is one. `good`
    are the offsets of pieces that can be salvaged from a file that is wrong.
    """

    path: Path
    condition: Condition
    size: int | None = None
    finding: Finding | None = None
    receipt: Receipt | None = None
    is_link: bool = False
    good: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ArtifactState:
    """All that is on disk of one artifact.

    `partial` holds the journaled pieces of an unfinished staged file, and
    `arrived` ranges of others that were written to it; `copied` those of an
    unfinished copy in the destination. All are hashed again before they count.
    `parts` has a look for each piece. `cached` is the file in the Hub's cache.
    """

    artifact: Artifact
    placed: FileLook
    staged: FileLook
    partial: tuple[PieceRecord, ...]
    parts: tuple[FileLook, ...]
    extras: tuple[Finding, ...]
    copied: tuple[PieceRecord, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    cached: FileLook | None = None

    @property
    def is_here(self) -> bool:
        """Whether anything of the artifact is on this machine, or was."""
        looks = (self.placed, self.staged, *self.parts)
        return bool(self.partial or self.arrived) or any(
            look.condition is not Condition.ABSENT or look.receipt for look in looks
        )


@dataclass(frozen=True)
class Places:
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
    ) -> Places:
        """The manifest's folders below `root`; `destination` overrides the last."""
        last = root / Path(destination or manifest.destination).expanduser()
        return cls(root, root / manifest.staging, last, cache)


@dataclass(frozen=True)
class State:
    """What is on disk for the chosen artifacts; sizes in bytes."""

    manifest: Manifest
    places: Places
    artifacts: tuple[ArtifactState, ...]
    free_staging: int
    free_destination: int
    same_filesystem: bool
    shares_blocks: bool
    smoke: SmokeReport | None
    links_to_cache: bool = False


def look(
    manifest: Manifest,
    artifacts: Sequence[Artifact],
    places: Places,
    refuted: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]] | None = None,
) -> State:
    """Looks at the chosen artifacts of a manifest.

    `refuted` holds what hashing has found out earlier in this run: those
    files count as wrong whatever their receipts say. `good` has the offsets
    of the pieces that are right in them.
    """
    staging, destination = _existing(places.staging), _existing(places.destination)
    return State(
        manifest=manifest,
        places=places,
        artifacts=tuple(
            _look_artifact(a, manifest, places, refuted, good or {}) for a in artifacts
        ),
        free_staging=shutil.disk_usage(staging).free,
        free_destination=shutil.disk_usage(destination).free,
        same_filesystem=staging.stat().st_dev == destination.stat().st_dev,
        shares_blocks=_shares_blocks(artifacts, places.root, staging),
        links_to_cache=_links_to(places.cache, staging),
        smoke=load_smoke(_read_record(smoke_path(places.destination))),
    )


def _links_to(cache: Path | None, staging: Path) -> bool:
    """Whether a file of the Hub's cache may get a second name in staging: it is one disk."""
    return cache is not None and _existing(cache).stat().st_dev == staging.stat().st_dev


def _look_artifact(
    artifact: Artifact,
    manifest: Manifest,
    places: Places,
    refuted: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]],
) -> ArtifactState:
    def file_look(directory: Path) -> FileLook:
        look = look_file(directory, artifact, manifest.name, refuted)
        return replace(look, good=_salvageable(artifact, look, good))

    placed, staged = file_look(places.destination), file_look(places.staging)
    return ArtifactState(
        artifact=artifact,
        placed=placed,
        staged=staged,
        partial=_journaled(artifact, staged.path),
        arrived=_arrived(artifact, staged.path),
        copied=_journaled(artifact, placed.path),
        cached=_look_cached(artifact, manifest, places, refuted, good),
        parts=tuple(_look_part(piece, places.root, refuted) for piece in artifact.pieces),
        extras=_extra_parts(artifact, places.root),
    )


def _salvageable(
    artifact: Artifact, look: FileLook, good: Mapping[Path, frozenset[int]]
) -> frozenset[int]:
    """The pieces of a wrong file that are right, or may be in one that was cut short."""
    finding, size = look.finding, look.size or 0
    if finding and finding.kind is Kind.WRONG_SIZE and size < artifact.size:
        return frozenset(piece.offset for piece in artifact.pieces if piece.end <= size)
    return good.get(look.path, frozenset())


def _look_cached(
    artifact: Artifact,
    manifest: Manifest,
    places: Places,
    refuted: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]],
) -> FileLook | None:
    """The file in the Hub's cache that has the artifact's size, if there is one."""
    if not places.cache or not manifest.repo:
        return None
    try:
        path = hubcache.find(places.cache, manifest.repo, manifest.revision, artifact)
    except OSError:
        # A cache that may not be read holds nothing for us.
        return None
    if path is None:
        return None
    finding = refuted.get(path)
    condition = Condition.WRONG if finding else Condition.UNPROVEN
    return FileLook(path, condition, artifact.size, finding, good=good.get(path, frozenset()))


def look_file(
    directory: Path, artifact: Artifact, model: str, refuted: Mapping[Path, Finding]
) -> FileLook:
    """One artifact in one folder, judged by its stat and its receipt."""
    path = directory / artifact.path
    receipt = _receipt(directory, artifact)
    status, finding = _stat(path)
    if path.is_dir():
        what = "a plain file or nothing"
        finding = Finding(Kind.IN_THE_WAY, str(path), what, "a folder", "move it away")
    if status is None:
        is_here = finding and finding.kind is not Kind.MISSING
        condition = Condition.WRONG if is_here else Condition.ABSENT
        return FileLook(path, condition, None, finding, receipt)
    size = status.st_size
    finding = refuted.get(path) or _size_finding(path, [e.size for e in artifact.editions], size)
    if finding:
        return FileLook(path, Condition.WRONG, size, finding, receipt)
    if receipt and _is_current(receipt, artifact, model, status):
        return FileLook(path, Condition.PROVEN, size, None, receipt, path.is_symlink())
    return FileLook(path, Condition.UNPROVEN, size, None, receipt, path.is_symlink())


def _is_current(receipt: Receipt, artifact: Artifact, model: str, status: os.stat_result) -> bool:
    return (
        receipt.fingerprint == Fingerprint.of(status)
        and receipt.model == model
        and receipt.proves(artifact)
    )


def _look_part(piece: Piece, root: Path, refuted: Mapping[Path, Finding]) -> FileLook:
    path = root / piece.part
    status, finding = _stat(path, piece.part)
    if status is None:
        if finding and finding.kind is not Kind.MISSING:
            return FileLook(path, Condition.WRONG, None, finding)
        finding = finding or Finding(
            Kind.MISSING,
            piece.part,
            f"{piece.size:,} bytes",
            "no such file",
            "get the part (`git lfs pull`, or copy it there)",
        )
        return FileLook(path, Condition.ABSENT, None, finding)
    finding = refuted.get(path) or _size_finding(path, [piece.size], status.st_size, piece.part)
    if finding is None and not os.access(path, os.R_OK):
        finding = _unreadable(piece.part, "permission denied")
    condition = Condition.WRONG if finding else Condition.UNPROVEN
    return FileLook(path, condition, status.st_size, finding)


def _stat(path: Path, where: str = "") -> tuple[os.stat_result | None, Finding | None]:
    """The stat of a regular file; a finding where something else is in its place."""
    where = where or str(path)
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            found = "a symbolic link that leads to no file"
            return None, Finding(Kind.MISSING, where, "a file", found, "mend or remove the link")
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None, None
        return None, _unreadable(where, error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "neither file nor folder"
        return None, Finding(Kind.UNREADABLE, where, "a plain file", found, "move it away")
    return status, None


def _unreadable(where: str, found: str) -> Finding:
    return Finding(Kind.UNREADABLE, where, "a readable file", found, "check its permissions")


def _size_finding(path: Path, sizes: list[int], size: int, where: str = "") -> Finding | None:
    """What a file of the wrong size is: a pointer, a refusal, or just wrong."""
    if size in sizes:
        return None
    where = where or str(path)
    expected = " or ".join(f"{s:,}" for s in sizes) + " bytes"
    try:
        with path.open("rb") as file:
            head = file.read(PEEK)
    except OSError as error:
        return _unreadable(where, error.strerror or str(error))
    found = f"{size:,} bytes"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        found = f"a pointer of {found} in place of the content"
        return Finding(Kind.LFS_POINTER, where, expected, found, "git lfs pull")
    if head.startswith(b"Access to model ") and b" is restricted" in head:
        found = f"the Hub's refusal saved as a file ({found})"
        return Finding(
            Kind.ACCESS_PAGE,
            where,
            expected,
            found,
            "delete it; accept the model's terms on the Hub and download it with a token",
        )
    what = "get it again" if size else "it is empty; get it again"
    return Finding(Kind.WRONG_SIZE, where, expected, found, what)


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
    files = [f for item in state.artifacts for f in (item.staged.path, item.placed.path)]
    files += [part.path for item in state.artifacts for part in item.parts]
    left = {
        path
        for file in files
        if file.parent.is_dir()
        for path in file.parent.iterdir()
        if path.name.startswith(file.name) and is_unfinished(path.name)
    }
    standin = state.places.root / "output" / f"{state.manifest.name}.unfinished"
    return sorted(left | ({standin} if standin.exists() else set()))


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

"""Inspect a disk: installed and staged files, unfinished ones, chunk files.

Inspecting never hashes and never writes. It reads stats, receipts, journals,
and the first bytes of files of the wrong size, to say what they are instead.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from csm_weights.config import user_path
from csm_weights.errors import Finding, Kind
from csm_weights.files import read_bounded, size_finding, stat_of
from csm_weights.manifest.paths import CHUNKS, RECEIPTS
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.store.block_io import NOT_PUNCHING
from csm_weights.store.consumed import BLOCK, held_twice, why_stranded, why_unfit
from csm_weights.store.hub_cache import CachedRepo
from csm_weights.store.journal import Journal, PieceRecord, is_unfinished, read_journal
from csm_weights.store.receipts import Receipt, read_receipt


class FileState(enum.StrEnum):
    """The state of a file, as it is known without hashing; the value is the status word."""

    ABSENT = "absent"
    VERIFIED = "verified"
    UNVERIFIED = "not verified yet"
    INVALID = "wrong"
    CONSUMED = "consumed"


@dataclass(frozen=True)
class FileStatus:
    """One file as it is on disk; `size` is in bytes, None where it is absent.

    A symbolic link, as `is_link` says, is followed. `is_shared` says that it can be
    written to and has other hard links, which an edit would change as well. `good`
    are the offsets of pieces that can be salvaged from an invalid file. A chunk file
    is consumed where bytes of it have moved to the unfinished file.
    """

    path: Path
    state: FileState
    size: int | None = None
    finding: Finding | None = None
    receipt: Receipt | None = None
    is_link: bool = False
    is_shared: bool = False
    good: frozenset[int] = frozenset()

    @property
    def valid_receipt(self) -> Receipt | None:
        """The receipt, where it still fits the file's stat: the digest is known by it."""
        return self.receipt if self.state is FileState.VERIFIED else None

    @property
    def is_usable(self) -> bool:
        """True for a chunk file with nothing known to be wrong, of which bytes may have moved."""
        return self.state in (FileState.UNVERIFIED, FileState.CONSUMED)


#: Folders below one that the user names where ComfyUI's nodes for CSM keep its files.
COMFYUI = ("sesame", "TTS/csm-1b", "models/sesame", "models/TTS/csm-1b")


class Shelved(NamedTuple):
    """A piece in a folder that the user names: it begins at byte `start` of a file of `size`."""

    path: Path
    size: int
    start: int


@dataclass(frozen=True)
class ArtifactState:
    """All that is on disk of one artifact.

    `journal` is that of an unfinished staged file, `copied` are the journaled
    pieces of an unfinished copy in the destination. `chunks` has the status of
    each piece's chunk file, `extras` are about others beside them. `cached` is
    the file in the Hub's cache, `shelved` are the pieces, by offset, in each shelf.
    `stranded` says why the unfinished file cannot be continued, `unfit` which chunk
    files cannot be consumed, `saves_nothing` why consuming would make no room, if
    so. `held_twice` are the bytes of disk that an interrupted run gives back first.
    """

    artifact: Artifact
    installed: FileStatus
    staged: FileStatus
    journal: Journal
    chunks: tuple[FileStatus, ...]
    extras: tuple[Finding, ...]
    copied: tuple[PieceRecord, ...] = ()
    cached: FileStatus | None = None
    shelved: tuple[Mapping[int, Shelved], ...] = ()
    stranded: Finding | None = None
    unfit: tuple[Finding, ...] = ()
    saves_nothing: str = ""
    held_twice: int = 0

    @property
    def file(self) -> FileStatus:
        """The installed file, or the staged one where nothing is installed."""
        return self.installed if self.installed.state is not FileState.ABSENT else self.staged

    @property
    def verified(self) -> FileStatus | None:
        """The verified file, the installed one first, if there is one."""
        files = (self.installed, self.staged)
        return next((file for file in files if file.state is FileState.VERIFIED), None)

    @property
    def is_here(self) -> bool:
        """True where anything of the artifact is on this machine, or was."""
        journal, files = self.journal, (self.installed, self.staged, *self.chunks)
        seen = any(file.state is not FileState.ABSENT or file.receipt for file in files)
        return seen or bool(journal.pieces or journal.arrived or journal.consumed)


@dataclass(frozen=True)
class Paths:
    """The folders of a run: chunk files are below `root`, then `staging`, then `destination`.

    `cache` is the Hub's on this machine, None where it is not to be used. `shelves` are
    others with the files or chunk files, only to be read. `options` are those of a command
    line that name the same model, files and folders, each with its value.
    """

    root: Path
    staging: Path
    destination: Path
    cache: Path | None = None
    shelves: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        root: Path,
        destination: str | None = None,
        cache: Path | None = None,
    ) -> Paths:
        """Return the manifest's folders below `root`; `destination` overrides the last."""
        last = root / user_path(destination or manifest.destination)
        options = (f"--model {manifest.name}",)
        return cls(root, root / manifest.staging, last, cache, options=options)

    def command(self, task: str) -> str:
        """Return the command that runs a task on the same files and folders."""
        has_staging = task in ("weights", "fetch", "place")
        options = [o for o in self.options if has_staging or not o.startswith("--staging ")]
        return " ".join([f"inv {task}", *options])


@dataclass(frozen=True)
class State:
    """The state of the disk for the chosen artifacts; sizes in bytes."""

    manifest: Manifest
    paths: Paths
    artifacts: tuple[ArtifactState, ...]
    free_staging: int
    free_destination: int
    same_filesystem: bool
    shares_blocks: bool
    cache_shares_blocks: bool


def inspect(
    manifest: Manifest,
    artifacts: Sequence[Artifact],
    paths: Paths,
    known_bad: Mapping[Path, Finding],
    good: Mapping[Path, frozenset[int]] | None = None,
    need_blocks: bool = False,
) -> State:
    """Inspect the chosen artifacts of a manifest.

    `known_bad` holds what hashing has found out earlier in this run: those
    files are invalid whatever their receipts say. `good` has the offsets of
    the pieces that are right in them. With `need_blocks` a file counts as verified
    only where its receipt has the digests of its blocks.
    """
    disk = _Disk(manifest, paths, known_bad, good or {}, need_blocks)
    device = disk.device(paths.staging)
    return State(
        manifest=manifest,
        paths=paths,
        artifacts=tuple(map(disk.artifact, artifacts)),
        free_staging=shutil.disk_usage(disk.nearest(paths.staging)).free,
        free_destination=shutil.disk_usage(disk.nearest(paths.destination)).free,
        same_filesystem=device == disk.device(paths.destination),
        shares_blocks=disk.shares_blocks(artifacts),
        cache_shares_blocks=disk.shares_blocks_with(paths.cache) if paths.cache else False,
    )


def _in_folder(artifact: Artifact, folder: Path) -> dict[int, Shelved]:
    """Return the pieces that files of the right size in a folder have, by offset."""
    places = [(folder / artifact.path, artifact.size, {p.offset: p.offset for p in artifact.tiles})]
    for piece in artifact.pieces:
        names = (piece.part, PurePosixPath(piece.part).name)
        places += [(folder / name, piece.size, {piece.offset: 0}) for name in names]
    found: dict[int, Shelved] = {}
    for path, size, starts in places:
        status, _ = stat_of(path)
        if status and status.st_size == size:
            for offset, start in starts.items():
                found.setdefault(offset, Shelved(path, size, start))
    return found


@dataclass
class _Disk:
    """The disk in one inspection: each thing is asked about a folder once."""

    manifest: Manifest
    paths: Paths
    known_bad: Mapping[Path, Finding]
    good: Mapping[Path, frozenset[int]]
    need_blocks: bool

    def __post_init__(self) -> None:
        manifest, paths = self.manifest, self.paths
        self.nearest = functools.cache(self._nearest)
        self.device = functools.cache(lambda folder: self.nearest(folder).stat().st_dev)
        self.names = functools.cache(lambda folder: sorted(f.name for f in os.scandir(folder)))
        self.real = functools.cache(lambda path: Path(os.path.realpath(path)))
        self.is_folder = functools.cache(Path.is_dir)
        self.has_receipts = functools.cache(lambda folder: (folder / RECEIPTS).is_dir())
        self.type = functools.cache(filesystem_type)
        self.strays = functools.cache(self._strays)
        self.cache = self.cached_repo(paths.cache)
        within = [shelf / name for shelf in paths.shelves for name in ("", *COMFYUI)]
        # One that may not be read holds nothing for us; Path.is_dir would raise.
        self.folders = [folder for folder in within if os.path.isdir(folder)]  # noqa: PTH112
        self.caches = list(filter(None, map(self.cached_repo, paths.shelves)))
        self.chunk_names: dict[Path, set[str]] = {}
        for artifact in manifest.artifacts:
            for piece in artifact.pieces:
                path = paths.root / piece.part
                self.chunk_names.setdefault(path.parent, set()).add(path.name)

    def _nearest(self, folder: Path) -> Path:
        """Return the nearest folder on the way to `folder` that exists."""
        folder = folder.absolute()
        return folder if folder.is_dir() else self.nearest(folder.parent)

    def cached_repo(self, cache: Path | None) -> CachedRepo | None:
        """Return the model's repository in a folder laid out as the Hub's cache, if it may be."""
        repo, revision = self.manifest.repo, self.manifest.revision
        # A cache that may not be read holds nothing for us.
        with contextlib.suppress(OSError):
            return CachedRepo(cache, repo, revision) if cache and repo else None
        return None

    def shelved(self, artifact: Artifact) -> Iterator[Mapping[int, Shelved]]:
        """Yield the pieces that folders and caches which the user names have, by offset."""
        yield from filter(None, (_in_folder(artifact, folder) for folder in self.folders))
        for cache in self.caches:
            with contextlib.suppress(OSError):
                if path := cache.find(artifact):
                    size, tiles = artifact.size, artifact.tiles
                    yield {tile.offset: Shelved(path, size, tile.offset) for tile in tiles}

    def artifact(self, artifact: Artifact) -> ArtifactState:
        paths = self.paths
        installed = self.file(paths.destination, artifact)
        staged = self.file(paths.staging, artifact)
        journal = self.journal(staged.path, artifact)
        moved = journal.moved
        chunks = tuple(self.chunk(p, moved[p.offset]) for p in artifact.pieces)
        pairs = zip(artifact.pieces, chunks, strict=True)
        unfit = [why_unfit(c.path, piece.part, artifact) for piece, c in pairs if c.is_usable]
        return ArtifactState(
            artifact=artifact,
            installed=installed,
            staged=staged,
            journal=journal,
            copied=self.journal(installed.path, artifact).pieces,
            cached=self.cached(artifact),
            shelved=tuple(self.shelved(artifact)),
            chunks=chunks,
            extras=tuple(self.extras(artifact)),
            stranded=why_stranded(artifact, staged.path, journal, paths.root),
            unfit=tuple(filter(None, unfit)),
            saves_nothing=self.saves_nothing(chunks),
            held_twice=held_twice(artifact, staged.path, journal, paths.root),
        )

    def journal(self, file: Path, artifact: Artifact) -> Journal:
        """Read the journal of an unfinished file, where its folder is there."""
        return read_journal(file, artifact) if self.is_folder(file.parent) else Journal()

    def file(self, directory: Path, artifact: Artifact) -> FileStatus:
        """Inspect one artifact in one folder, by its stat and its receipt."""
        path = directory / artifact.path
        has_receipts = self.has_receipts(directory)
        receipt = read_receipt(directory, artifact.path) if has_receipts else None
        status, finding = stat_of(path)
        if status is None:
            if path.is_dir():
                words = ("a regular file, or none", "a folder", "move it away")
                finding = Finding(Kind.IN_THE_WAY, str(path), *words)
            is_here = finding and finding.kind is not Kind.MISSING
            state = FileState.INVALID if is_here else FileState.ABSENT
            return FileStatus(path, state, None, finding, receipt)
        trusted = receipt if receipt and receipt.is_current(status) else None
        is_own = trusted is not None and trusted.model == self.manifest.name
        is_fit = trusted is not None and trusted.fits(artifact)
        if trusted and not (is_own or is_fit):
            # It may be the only copy: its chunk files may have been consumed.
            expected, found = "no file of another model", f"a verified file of {trusted.model}"
            mend = "move it away, or choose other folders with --dest and --staging"
            finding = Finding(Kind.IN_THE_WAY, str(path), expected, found, mend)
            return FileStatus(path, FileState.INVALID, status.st_size, finding, receipt)
        size, sizes = status.st_size, [edition.size for edition in artifact.editions]
        if finding := self.known_bad.get(path) or size_finding(path, sizes, size):
            if finding.kind is Kind.WRONG_SIZE and artifact.is_weights:
                from csm_weights.formats.identify import describe

                if what := describe(path):
                    finding = replace(finding, found=f"{finding.found}: {what}")
            good = self.good.get(path, frozenset())
            if finding.kind is Kind.WRONG_SIZE and size < artifact.size:
                # A file that was cut short may be right up to there.
                good = frozenset(piece.offset for piece in artifact.pieces if piece.end <= size)
            return FileStatus(path, FileState.INVALID, size, finding, receipt, good=good)
        state = FileState.VERIFIED if is_own and is_fit else FileState.UNVERIFIED
        if self.need_blocks and size and receipt and not receipt.blocks:
            state = FileState.UNVERIFIED
        is_shared = status.st_nlink > 1 and bool(status.st_mode & 0o222)
        return FileStatus(path, state, size, None, receipt, path.is_symlink(), is_shared)

    def cached(self, artifact: Artifact) -> FileStatus | None:
        """Return the file in the Hub's cache that has the artifact's size, if there is one."""
        path = None
        # A cache that may not be read holds nothing for us.
        with contextlib.suppress(OSError):
            path = self.cache.find(artifact) if self.cache else None
        if path is None:
            return None
        finding, good = self.known_bad.get(path), self.good.get(path, frozenset())
        state = FileState.INVALID if finding else FileState.UNVERIFIED
        return FileStatus(path, state, artifact.size, finding, good=good)

    def chunk(self, piece: Piece, moved: int) -> FileStatus:
        """Inspect a chunk file of which `moved` bytes are in the unfinished file."""
        path = self.paths.root / piece.part
        known = self.known_bad.get(path)
        if moved == piece.size and not known:
            return FileStatus(path, FileState.CONSUMED)
        status, finding = stat_of(path, piece.part)
        if status is None:
            mend = "copy the chunk file there, or restore it from git"
            finding = finding or Finding.missing(piece.part, piece.size, mend)
            is_absent = finding.kind is Kind.MISSING
            state = FileState.ABSENT if is_absent else FileState.INVALID
            return FileStatus(path, state, None, finding)
        finding = known or self.led_out(path, piece.part)
        finding = finding or size_finding(path, [piece.size], status.st_size, piece.part)
        if finding is None and not os.access(path, os.R_OK):
            finding = Finding.unreadable(piece.part, "permission denied")
        state = FileState.CONSUMED if moved else FileState.UNVERIFIED
        return FileStatus(path, FileState.INVALID if finding else state, status.st_size, finding)

    def led_out(self, path: Path, part: str) -> Finding | None:
        """Return that a chunk file is reached through a link out of chunks/, if so.

        chunks/ itself may be a link: where it is, is the user's choice.
        """
        led = self.real(path) if path.is_symlink() else self.real(path.parent)
        if led.is_relative_to(self.real(self.paths.root / CHUNKS)):
            return None
        words = (f"a file inside {CHUNKS}/", f"a link that leads to {led}")
        mend = f"copy the file there, or let {CHUNKS}/ itself be the link"
        return Finding(Kind.IN_THE_WAY, part, *words, mend)

    def extras(self, artifact: Artifact) -> Iterator[Finding]:
        """Yield a finding for files that are named like the artifact's chunk files and are none."""
        chunks = [self.paths.root / piece.part for piece in artifact.pieces]
        for folder, prefix in sorted({(c.parent, c.name.rpartition("-")[0]) for c in chunks}):
            if names := self.strays(folder, f"{prefix}-"):
                where = (folder / names[0]).relative_to(self.paths.root).as_posix()
                expected = f"only the {len(chunks)} chunk files of {artifact.path}"
                found = "one more" if len(names) == 1 else f"{len(names):,} more, this one first"
                mend = "move it away; is the manifest that of another model?"
                yield Finding(Kind.EXTRA_CHUNK_FILE, where, expected, found, mend)

    def _strays(self, folder: Path, prefix: str) -> list[str]:
        """Return names in a folder that begin like those of chunk files, and are of none."""
        names = self.names(folder) if folder.is_dir() else []
        known = self.chunk_names.get(folder, set())
        alike = itertools.takewhile(
            lambda name: name.startswith(prefix),
            itertools.islice(names, bisect_left(names, prefix), None),
        )
        return [name for name in alike if name not in known and not is_unfinished(name)]

    def saves_nothing(self, chunks: Sequence[FileStatus]) -> str:
        """Return why consuming chunk files makes no room in staging, or an empty string."""
        staging = self.nearest(self.paths.staging)
        device = self.device(staging)
        if any(self.device(chunk.path.parent) != device for chunk in chunks):
            return f"the chunk files are on another file system than {staging}"
        kind = self.type(staging)
        return f"{kind} cannot free parts of a file" if kind in NOT_PUNCHING else ""

    def shares_blocks(self, artifacts: Sequence[Artifact]) -> bool:
        """Check whether assembling takes no room: every piece begins at a block and is near."""
        pieces = [piece for artifact in artifacts for piece in artifact.pieces]
        if not pieces or any(piece.offset % BLOCK for piece in pieces):
            return False
        folders = {(self.paths.root / piece.part).parent for piece in pieces}
        return all(map(self.shares_blocks_with, folders))

    def shares_blocks_with(self, folder: Path) -> bool:
        """Check whether copies of a folder's files into the staging folder share blocks."""
        staging = self.paths.staging
        is_one_disk = self.device(folder) == self.device(staging)
        return is_one_disk and self.type(self.nearest(staging)) in ("xfs", "btrfs", "bcachefs")


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as "ext4"; "" where unknown.

    Source: /proc/self/mountinfo, the mount point that is the longest prefix.
    """
    try:
        mounts = read_bounded(Path("/proc/self/mountinfo")).decode(errors="replace")
    except OSError:
        return ""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and path.resolve().is_relative_to(point):
            best, kind = point, rest.split()[0]
    return kind

"""Find files in the Hub's standard cache on this machine, and add files to it.

::

    models--org--name/
        blobs/<sha256 of a large file, git blob SHA-1 of a small one>
        snapshots/<commit>/<path>   a link to ../../blobs/...
        refs/main                   the commit that "main" names
        .no_exist/<commit>/<path>   the Hub has answered that there is no such file

The layout is huggingface_hub's. Since its 1.32 a blob may itself be a link
into a store that all repositories of the cache share, `blobs/xx/<xet hash>`.
"""

import contextlib
import enum
import os
import shutil
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from csm_weights.concurrency import OnProgress
from csm_weights.errors import Finding, Kind, WrongContent, error_for
from csm_weights.files import opened, read_bounded
from csm_weights.hashing import SHA1_HEX, Hasher, HashJob, ShortRead, git_sha1, measure, sha256
from csm_weights.manifest.types import Artifact
from csm_weights.store import atomic, block_io

#: The suffix of unfinished files, the standard client's and ours.
UNFINISHED = ".incomplete"


class How(enum.StrEnum):
    """The way a file got its blob; the value is the word that a person reads."""

    LINKED = "linked"
    SHARED = "shares blocks"
    COPIED = "copied"
    KEPT = "already there"
    REPLACED = "replaced a damaged blob"


@dataclass(frozen=True)
class Seed:
    """A verified file for the cache: `path` in the repository, `file` here, `size` in bytes.

    `blob` is its name among the blobs: the sha256, or the git blob SHA-1.
    """

    path: str
    file: Path
    size: int
    blob: str

    @property
    def is_git(self) -> bool:
        """True where the blob's name is a git blob SHA-1."""
        return SHA1_HEX.fullmatch(self.blob) is not None


@dataclass(frozen=True)
class Seeded:
    """A file that is in the cache now: the path in the repository, the blob, the way it came."""

    path: str
    blob: Path
    how: How


def repository(cache: Path, repo: str) -> Path:
    """Return the folder of a model repository, "org/name", in the cache."""
    return cache / f"models--{repo.replace('/', '--')}"


def main_of(home: Path) -> str | None:
    """Return the commit that an offline client takes "main" of a repository for, or None."""
    try:
        text = read_bounded(home / "refs" / "main").decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    # Only a branch that names a whole commit can be followed offline.
    return text if SHA1_HEX.fullmatch(text) else None


def snapshots_of(home: Path) -> list[Path]:
    """Return the snapshots of a repository, that of main first, then by name; raises OSError."""
    folder = home / "snapshots"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    main = main_of(home)
    return [folder / name for name in sorted(names, key=lambda name: name != main)]


def snapshot_file(cache: Path, repo: str, commit: str, path: str) -> Path | None:
    """Return the whole file that an offline client finds for `path` at `commit`, or None."""
    home = repository(cache, repo)
    return _resolved(home / "snapshots" / commit / path, home)


class CachedRepo:
    """A model repository in the cache, as it is when this is made; raises OSError."""

    def __init__(self, cache: Path, repo: str, revision: str | None) -> None:
        self._home = repository(cache, repo)
        self._snapshots = sorted(snapshots_of(self._home), key=lambda one: one.name != revision)

    def find(self, artifact: Artifact) -> Path | None:
        """Return the file that may hold an artifact, with all links followed, or None.

        By size; nothing is hashed. Blobs by name come first, then the snapshot
        of the revision, then that of main, then any.
        """
        digests = filter(None, (artifact.sha256, artifact.git_sha1))
        paths = [self._home / "blobs" / digest for digest in digests]
        for path in (*paths, *(snapshot / artifact.path for snapshot in self._snapshots)):
            file = _resolved(path, self._home)
            if file and file.stat().st_size == artifact.size and os.access(file, os.R_OK):
                return file
        return None


def _resolved(path: Path, home: Path) -> Path | None:
    """Return the regular file that a path leads to, if it is whole and inside the cache.

    A repository `home` may have been moved to another disk, or its blobs, and a link left
    in its place: what lies there is inside as well.
    """
    try:
        file = Path(os.path.realpath(path))
        is_file = stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return None
    folders = [os.path.realpath(folder) for folder in (home.parent, home, home / "blobs")]
    is_inside = any(file.is_relative_to(folder) for folder in folders)
    return file if is_file and is_inside and not file.name.endswith(UNFINISHED) else None


def seed(
    cache: Path,
    repo: str,
    revision: str,
    seeds: Sequence[Seed],
    move_main: bool,
    on_progress: OnProgress,
) -> list[Seeded]:
    """Add verified files to the cache, as the snapshot `revision` of a repository.

    By sharing blocks where that is possible, else by hard link, else by a copy
    that is hashed as it is written; a linked file becomes read-only under both
    names. A blob that is there already stays if its bytes are right. Where
    `refs/main` names another commit it stays, unless `move_main`. `on_progress`
    gets the bytes of each file as it is done. Raises NoSpace before anything is
    copied, WrongContent where something is in the way or a file no longer has
    the digest that names its blob; no blob has its name before it is whole.
    """
    from filelock import FileLock

    for item in seeds:
        if item.file.stat().st_size != item.size:
            raise _changed(item)
    home = repository(cache, repo)
    snapshot, blobs = home / "snapshots" / revision, home / "blobs"
    folders = [blobs, home / "refs", *((snapshot / item.path).parent for item in seeds)]
    for folder in folders:
        with atomic.writing(folder):
            atomic.make_folder(folder)
        atomic.stay_inside(folder, cache)
    path = cache / ".locks" / home.name / "csm-weights.lock"
    os.close(atomic.create(path))
    # The standard client needs no lock against us: both sides give a blob its name by a
    # rename, and only when it is whole.
    with FileLock(path):
        kept = {s.path: _kept(s, home, snapshot, blobs, on_progress) for s in seeds}
        lacking = {item.blob: item for item in seeds if not kept[item.path]}
        added = _add_blobs(blobs, list(lacking.values()), on_progress)
        for item in seeds:
            _point(snapshot, item.path, blobs / item.blob)
            # The client would believe the note that the Hub has no such file.
            marker = home / ".no_exist" / revision / item.path
            with atomic.writing(marker), contextlib.suppress(NotADirectoryError):
                marker.unlink(missing_ok=True)
        main = main_of(home)
        if main != revision and (move_main or main is None):
            atomic.write_whole(home / "refs" / "main", revision)
        above = {p for f in folders for p in (f, *f.parents) if p.is_relative_to(cache)}
        for folder in sorted(above):
            atomic.sync(folder)
    return [
        Seeded(s.path, kept[s.path] or blobs / s.blob, added.get(s.blob, How.KEPT)) for s in seeds
    ]


def _kept(
    seed: Seed, home: Path, snapshot: Path, blobs: Path, on_progress: OnProgress
) -> Path | None:
    """Return the blob that is there already with just these bytes, whatever its name."""
    blob = blobs / seed.blob
    path = blob if os.path.lexists(blob) else snapshot / seed.path
    file = _resolved(path, home)
    if file is None or file.stat().st_size != seed.size:
        return None
    if file.samefile(seed.file):
        on_progress(seed.size)
        return file
    try:
        (found,) = measure([HashJob(file, seed.size, whole=True, git=seed.is_git)], on_progress)
    except (OSError, ShortRead):
        return None
    return file if seed.blob == (found.git_sha1 if seed.is_git else found.whole) else None


def _add_blobs(blobs: Path, seeds: Sequence[Seed], on_progress: OnProgress) -> dict[str, How]:
    """Make a blob of each file; return the way it came, by the blob's name."""
    unfinished = {s.blob: blobs / f"{s.blob}.csm-weights{UNFINISHED}" for s in seeds}
    try:
        ways = {s.blob: _start(s, unfinished[s.blob]) for s in seeds}
        needed = sum(s.size for s in seeds if ways[s.blob] is How.COPIED)
        if needed > (free := shutil.disk_usage(blobs).free):
            words = (f"{needed:,} bytes free", f"{free:,}, {needed - free:,} too few")
            mend = "free some disk, or set HF_HUB_CACHE to a folder on the disk of the files"
            finding = Finding(Kind.NO_SPACE, str(blobs), *words, mend)
            raise error_for("the files do not fit into the cache", [finding])
        for item in seeds:
            if ways[item.blob] is How.LINKED:
                on_progress(item.size)
            else:
                _write(item, unfinished[item.blob], on_progress)
        for name, path in unfinished.items():
            if os.path.lexists(blobs / name):
                ways[name] = How.REPLACED
            with atomic.writing(path):
                path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o555)
            atomic.sync(path)
            with atomic.writing(blobs / name):
                path.replace(blobs / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return ways


def _start(seed: Seed, unfinished: Path) -> How:
    """Make the unfinished blob in a way that takes no room, or find that there is none."""
    with atomic.writing(unfinished):
        unfinished.unlink(missing_ok=True)
    source = seed.file.resolve()
    with opened(source) as src, atomic.created(unfinished) as dst:
        if block_io.clone_range(src, 0, dst, 0, seed.size):
            return How.SHARED
    # The mode of another user's file cannot be changed, and should not.
    if os.geteuid() in (0, source.stat().st_uid):
        with contextlib.suppress(OSError):
            unfinished.unlink()
            unfinished.hardlink_to(source)
            return How.LINKED
    return How.COPIED


def _write(seed: Seed, unfinished: Path, on_progress: OnProgress) -> None:
    """Write an unfinished blob and compare the digest of what was written with its name."""
    sink: Hasher = git_sha1(seed.size) if seed.is_git else sha256()
    target = block_io.OutputFile(unfinished)
    try:
        with opened(seed.file) as fd:
            whole = block_io.Extent(fd, 0, seed.size)
            block_io.copy_hashed(whole, target, 0, [sink], False, on_progress, threading.Event())
    except (EOFError, ShortRead):
        raise _changed(seed) from None
    finally:
        target.close()
    if sink.hexdigest() != seed.blob:
        raise _changed(seed)


def _changed(seed: Seed) -> WrongContent:
    finding = Finding.edited(seed.file, f"other bytes than those of the digest {seed.blob}")
    return WrongContent("a file is no longer the one that was verified", [finding])


def _point(snapshot: Path, path: str, blob: Path) -> None:
    """Link `path` of a snapshot to a blob, unless it leads to right bytes under another name."""
    pointer = snapshot / path
    target = "../" * (len(PurePosixPath(path).parts) + 1) + f"blobs/{blob.name}"
    if not os.path.lexists(blob) or (pointer.is_symlink() and str(pointer.readlink()) == target):
        return
    unfinished = pointer.with_name(f".{pointer.name}.csm-weights{UNFINISHED}")
    with atomic.writing(pointer):
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(target)
        unfinished.replace(pointer)

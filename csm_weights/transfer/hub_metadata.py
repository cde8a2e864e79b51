"""What the Hub reports of a repository: its commit, and the size and ids of every file.

Nothing is verified by it. It is checked for sense, since it will be written
down as what the files must be.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import quote, urljoin

from csm_weights.errors import Finding, Kind, UsageError, WrongContent, error_for
from csm_weights.hashing import SHA1_HEX, SHA256_HEX, blob_id, git_sha1, sha256
from csm_weights.manifest.paths import folded, path_problem
from csm_weights.manifest.pin import group_of
from csm_weights.manifest.types import MAX_SIZE, Artifact
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.http.client import Timeouts
from csm_weights.transfer.http.ranges import RangeDownloader
from csm_weights.transfer.http.responses import foreign_redirect, wrong_answer
from csm_weights.transfer.hub import Hub
from csm_weights.transfer.source import SourceError
from csm_weights.untrusted import reader

#: Files of one repository at most: more would make no manifest that can be read.
MAX_FILES = 20_000

#: Seconds for all pages of a tree.
LISTING = 300.0

_NOTHING = sha256().hexdigest()


@dataclass(frozen=True)
class Listing:
    """The files of one commit as reported by the Hub.

    `gated` says that it gives them only to those who accepted its terms.
    `left_out` are files whose names no manifest may have.
    """

    commit: str
    gated: bool
    artifacts: tuple[Artifact, ...]
    left_out: tuple[Finding, ...]


def list_repo(
    credentials: HubCredentials,
    repo: str,
    revision: str | None,
    globs: Sequence[str],
    log: Callable[[str], None],
    patience: float | None = None,
) -> Listing:
    """Return the files whose paths match one of `globs`, or all, at a commit, branch or tag.

    None is the main branch. `log` gets a line for each outage, which may last
    `patience` seconds. Raises the error of what the Hub answers: MissingInput,
    AccessRefused, NetworkFailed; WrongContent for figures that contradict each
    other or a path that leaves its folder; UsageError where no file is left.
    """
    page, api = f"{credentials.endpoint}/{repo}", f"{credentials.endpoint}/api/models/{repo}"
    limits = Timeouts.with_patience(patience)
    try:
        with RangeDownloader(threading.Event(), log, limits) as client:
            hub = Hub(client, credentials, repo, revision or "main")
            hub.raise_refusal()
            at = f"/revision/{quote(revision, safe='')}" if revision else ""
            commit, is_gated = _commit(hub, api + at)
            files = _tree(hub, f"{api}/tree/{commit}?recursive=true&expand=false")
    except SourceError as error:
        raise error_for(f"{page}: its files cannot be listed", error.findings) from None
    artifacts, left_out = choose(files, globs, page)
    return Listing(commit, is_gated, artifacts, left_out)


@dataclass(frozen=True)
class File:
    """One file as reported by the Hub; `sha256` and `lfs_size` where it is in LFS."""

    path: str
    size: int
    oid: str
    sha256: str | None = None
    lfs_size: int | None = None


def _commit(hub: Hub, url: str) -> tuple[str, bool]:
    """Return the commit that the revision stands for, and whether its files are gated."""
    _, found = hub.get_json(url)
    commit = found.get("sha") if isinstance(found, dict) else None
    if not isinstance(commit, str) or not SHA1_HEX.fullmatch(commit):
        raise _nonsense(hub, "a commit, 40 hex digits", repr(commit))
    if SHA1_HEX.fullmatch(hub.revision) and commit != hub.revision:
        words = (f"commit {hub.revision}", f"commit {commit}")
        raise SourceError([Finding(Kind.DIFFERENT, hub.page, *words)])
    return commit, bool(found.get("gated"))


def _tree(hub: Hub, url: str) -> list[File]:
    """Return all files of a commit, from as many pages as there are, of the Hub's own host."""
    until, files = time.monotonic() + LISTING, list[File]()
    while True:
        if time.monotonic() > until:
            expected = f"a list of files within {LISTING:g} s"
            words = (expected, f"{len(files):,} files by then", "try again later")
            raise SourceError([Finding(Kind.TOO_SLOW, hub.page, *words)])
        response, rows = hub.get_json(url)
        if not isinstance(rows, list):
            raise _nonsense(hub, "a list of files", f"a {type(rows).__name__}")
        try:
            for row in rows:
                if row.get("type") != "directory":
                    figures = {name: row[name] for name in ("path", "size", "oid")}
                    if lfs := row.get("lfs"):
                        figures |= {"sha256": lfs["oid"], "lfs_size": lfs["size"]}
                    files.append(reader(File)(figures))
        except (AttributeError, LookupError, TypeError) as error:
            raise _nonsense(hub, "a path, a size and an id", f"{error!r}") from None
        if len(files) > MAX_FILES:
            raise _nonsense(hub, f"at most {MAX_FILES:,} files", "more")
        following = response.links.get("next", {}).get("url")
        if following is None:
            return files
        url, asked = urljoin(response.url, following), url
        if not hub.credentials.auth.covers(url):
            raise SourceError([foreign_redirect(asked, url)])


def _nonsense(hub: Hub, expected: str, found: str) -> SourceError:
    shown = hub.credentials.mask(found)[:200]
    return SourceError([wrong_answer(hub.page, expected, shown)])


def choose(
    files: Iterable[File], globs: Sequence[str], page: str
) -> tuple[tuple[Artifact, ...], tuple[Finding, ...]]:
    """Return the artifacts of the files that match `globs`, or of all, and what was left out.

    Of names that are equal where case and Unicode form do not count, the first stays. `page`
    names the repository in messages. Raises as `list_repo`.
    """

    def left_out(file: File, problem: str) -> Finding:
        where = f"{page} {file.path.encode(errors='replace').decode()}"
        return Finding(Kind.MALFORMED, where, "a name that a manifest may have", problem)

    files = sorted(files, key=lambda file: file.path)
    split = [(file, re.split(r"[/\\]", file.path)) for file in files]
    leaving = [file for file, names in split if ".." in names or not names[0]]
    if hostile := [left_out(file, "a path out of its folder") for file in leaving]:
        raise WrongContent(f"{page} has files with unsafe names", hostile)
    # As in `hf download`, a * crosses folders.
    patterns = [f"{glob}*" if glob.endswith("/") else glob for glob in globs] or ["*"]
    kept, refused, names, folders = list[File](), list[Finding](), set[str](), set[str]()
    for file in files:
        if not any(fnmatchcase(file.path, pattern) for pattern in patterns):
            continue
        name = folded(file.path)
        above = {parent.as_posix() for parent in PurePosixPath(name).parents}
        problem = path_problem(file.path)
        if not problem and (name in names or name in folders or above & names):
            problem = "the name of another file, or of a folder, where case does not count"
        if problem:
            refused.append(left_out(file, problem))
        else:
            kept.append(file)
            names.add(name)
            folders |= above
    if wrong := [finding for file in kept for finding in _findings(file, page)]:
        raise WrongContent(f"{page}: the answers of the Hub contradict each other", wrong)
    if not kept:
        among = f"like {', '.join(globs)} " if globs else ""
        raise UsageError(f"no file {among}among the {len(files)} of {page}", refused)
    return tuple(map(artifact_of, kept)), tuple(refused)


def artifact_of(file: File) -> Artifact:
    """Return the manifest entry of a file, with its figures marked H, reported by the Hub."""
    is_model = bool(file.size) and file.path.endswith(".safetensors")
    artifact = Artifact(
        path=file.path,
        group=group_of(file.path),
        format="safetensors" if is_model else "opaque",
        size=file.size,
        text=None if file.size else "",
        sha256=file.sha256 if file.size else _NOTHING,
        blob_id=file.oid if file.sha256 else None,
        git_sha1=None if file.sha256 else file.oid,
    )
    figures = [name for name in ("sha256", "blob_id", "git_sha1") if getattr(artifact, name)]
    return replace(artifact, evidence=dict.fromkeys(["size", *figures], "H"))


def _findings(file: File, page: str) -> list[Finding]:
    """Return where the figures of a file contradict each other, or make no sense."""
    wrong: list[tuple[str, str]] = []
    if not 0 <= file.size <= MAX_SIZE:
        wrong.append((f"a size up to {MAX_SIZE:,}", str(file.size)))
    if not SHA1_HEX.fullmatch(file.oid):
        wrong.append(("a git blob id", repr(file.oid[:80])))
    if file.lfs_size not in (None, file.size):
        wrong.append((f"{file.size:,} bytes as in the tree", f"{file.lfs_size:,} bytes in LFS"))
    if file.sha256 is not None and not SHA256_HEX.fullmatch(file.sha256):
        wrong.append(("a sha256", repr(file.sha256[:80])))
    elif file.size == 0 and file.sha256 not in (None, _NOTHING):
        wrong.append((f"sha256 {_NOTHING}, of no bytes", f"sha256 {file.sha256}"))
    if not wrong:
        # What follows from the other figures, where something does.
        implied = file.oid if file.size else git_sha1(0).hexdigest()
        if file.sha256 is not None:
            implied = blob_id(file.sha256, file.size)
        if file.oid != implied:
            wrong.append((f"git blob id {implied}", f"git blob id {file.oid}"))
    where = f"{page} {file.path}"
    return [Finding(Kind.WRONG_ANSWER, where, expected, found) for expected, found in wrong]

"""What the Hub tells of a repository: its commit, and the size and ids of every file.

All of it is the Hub's word, and nothing is proven by it. It is checked for
sense, since it will be written down as what the files must be.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    NetworkFailed,
    UsageError,
    WrongContent,
    error_for,
)
from csm_weights.hashing import blob_id, git_sha1, sha256
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.pin import group_of
from csm_weights.manifest.types import MAX_SIZE, Artifact
from csm_weights.transfer.http.responses import asked_wait, cause
from csm_weights.transfer.hub import HubCredentials, library, verdict

#: Files of one repository at most: more would make no manifest that can be read.
MAX_FILES = 20_000

#: Seconds before the second try to reach the Hub, and before the third.
WAITS = (1.0, 2.0)

#: Seconds to wait for an answer, and the longest that the Hub may ask to wait.
ANSWER = 30.0
LONGEST = 60.0

#: Seconds for all pages of a tree: the client itself would wait for ever.
LISTING = 300.0

#: Answers after which the same request may succeed, besides all from 500 on.
_PASSING = {408, 425, 429}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")

_NOTHING = sha256().hexdigest()
_NO_BYTES = git_sha1(0).hexdigest()

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The files of one commit as the Hub tells them.

    `gated` says that it gives them only to those who accepted its terms.
    `left_out` are files whose names no manifest may have.
    """

    commit: str
    gated: bool
    artifacts: tuple[Artifact, ...]
    left_out: tuple[Finding, ...]


def list_repo(
    account: HubCredentials,
    repo: str,
    revision: str | None,
    globs: Sequence[str],
    log: Callable[[str], None],
) -> Listing:
    """The files whose paths match one of `globs`, or all, at a commit, branch or tag.

    None is the main branch. `log` gets a line for each wait. Raises the error
    of what the Hub answers: MissingInput, AccessRefused, NetworkFailed;
    WrongContent for an answer that makes no sense or a path that leaves its
    folder; UsageError where no file is left.
    """
    api = library().HfApi(endpoint=account.endpoint, token=account.token or False)
    asking = _Asking(account, repo, revision)

    def info() -> Any:
        with asking:
            return api.model_info(repo, revision=revision, timeout=ANSWER)

    def tree() -> list[File]:
        entries = api.list_repo_tree(repo, recursive=True, revision=commit)
        return [_plain(entry) for entry in islice(entries, MAX_FILES + 1) if hasattr(entry, "size")]

    told = _patiently(info, log)
    commit = asking.commit(told)
    with asking:
        files = _in_time(tree, LISTING)
    if len(files) > MAX_FILES:
        raise asking.nonsense(f"at most {MAX_FILES:,} files", "more")
    artifacts, left_out = choose(files, globs, asking.page)
    return Listing(commit, bool(told.gated), artifacts, left_out)


@dataclass(frozen=True)
class File:
    """One file as the Hub tells it; `sha256` and `lfs_size` where it is in LFS."""

    path: str
    size: int
    oid: str
    sha256: str | None = None
    lfs_size: int | None = None


def _plain(entry: Any) -> File:
    """An entry of the client's, with the types that it only hopes for."""
    lfs = entry.lfs
    texts = [entry.path, entry.blob_id, *([lfs.sha256] if lfs is not None else [])]
    sizes = [entry.size, *([lfs.size] if lfs is not None else [])]
    if not all(type(t) is str for t in texts) or not all(type(s) is int for s in sizes):
        raise TypeError("a path, a size or an id of another type")
    file = File(entry.path, entry.size, entry.blob_id)
    return replace(file, sha256=lfs.sha256, lfs_size=lfs.size) if lfs is not None else file


def choose(
    files: Iterable[File], globs: Sequence[str], page: str
) -> tuple[tuple[Artifact, ...], tuple[Finding, ...]]:
    """The artifacts of the files that match `globs`, or of all, and what was left out.

    `page` names the repository in messages. Raises as `list_repo`.
    """
    files = sorted(files, key=lambda file: file.path)
    hostile = [_left_out(page, f.path, "a path out of its folder") for f in files if _leaves(f)]
    if hostile:
        raise WrongContent(f"{page} has files that no one should save", hostile)
    wanted = [file for file in files if not globs or _matches(file.path, globs)]
    kept, left_out = _with_names(wanted, page)
    if wrong := [finding for file in kept for finding in _findings(file, page)]:
        raise WrongContent(f"{page}: the Hub contradicts itself", wrong)
    if not kept:
        among = f"like {', '.join(globs)} " if globs else ""
        raise UsageError(f"no file {among}among the {len(files)} of {page}", left_out)
    return tuple(map(artifact_of, kept)), left_out


def artifact_of(file: File) -> Artifact:
    """The manifest entry of a file; what it says is marked H, the Hub's word."""
    is_model = file.path.endswith(".safetensors") and file.size > 0
    artifact = Artifact(
        path=file.path,
        group=group_of(file.path),
        format="safetensors" if is_model else "opaque",
        size=file.size,
    )
    if file.sha256:
        artifact = replace(artifact, sha256=file.sha256, blob_id=file.oid)
    else:
        artifact = replace(artifact, git_sha1=file.oid)
    if file.size == 0:
        artifact = replace(artifact, sha256=_NOTHING, text="")
    figures = [name for name in ("sha256", "blob_id", "git_sha1") if getattr(artifact, name)]
    return replace(artifact, evidence=dict.fromkeys(["size", *figures], "H"))


def _matches(path: str, globs: Iterable[str]) -> bool:
    """Whether a path matches a glob, in which * may stand for folders too, as in `hf download`."""
    return any(fnmatchcase(path, f"{glob}*" if glob.endswith("/") else glob) for glob in globs)


def _leaves(file: File) -> bool:
    parts = re.split(r"[/\\]", file.path)
    return ".." in parts or not parts[0]


def _with_names(files: Iterable[File], page: str) -> tuple[list[File], tuple[Finding, ...]]:
    """The files that can have their names, and the others; of two that are one, the first."""
    kept: list[File] = []
    left_out: list[Finding] = []
    names: set[str] = set()
    folders: set[str] = set()
    for file in files:
        name = file.path.casefold()
        above = {parent.as_posix() for parent in PurePosixPath(name).parents}
        problem = _name_problem(file.path)
        if not problem and (name in names | folders or above & names):
            problem = "the name of another file, or of a folder, where case does not count"
        if problem:
            left_out.append(_left_out(page, file.path, problem))
            continue
        kept.append(file)
        names.add(name)
        folders |= above
    return kept, tuple(left_out)


def _name_problem(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return "no text"
    return path_problem(path)


def _left_out(page: str, path: str, problem: str) -> Finding:
    shown = path.encode(errors="replace").decode()
    return Finding(Kind.MALFORMED, f"{page} {shown}", "a name that a manifest may have", problem)


def _findings(file: File, page: str) -> list[Finding]:
    """What makes no sense in what is told of a file."""
    wrong: list[tuple[str, str]] = []
    if not 0 <= file.size <= MAX_SIZE:
        wrong.append((f"a size up to {MAX_SIZE:,}", str(file.size)))
    if not _SHA1.fullmatch(file.oid):
        wrong.append(("a git blob id", repr(file.oid[:80])))
    if file.lfs_size not in (None, file.size):
        wrong.append((f"{file.size:,} bytes as in the tree", f"{file.lfs_size:,} bytes in LFS"))
    if file.sha256 is not None and not _SHA256.fullmatch(file.sha256):
        wrong.append(("a sha256", repr(file.sha256[:80])))
    elif file.size == 0 and file.sha256 not in (None, _NOTHING):
        wrong.append((f"sha256 {_NOTHING}, of no bytes", f"sha256 {file.sha256}"))
    if not wrong and file.oid != _implied_id(file):
        wrong.append((f"git blob id {_implied_id(file)}", f"git blob id {file.oid}"))
    where = f"{page} {file.path}"
    return [Finding(Kind.WRONG_ANSWER, where, expected, found) for expected, found in wrong]


def _implied_id(file: File) -> str:
    """The git blob id that follows from what else is told, or the one that is told."""
    if file.sha256 is not None:
        return blob_id(file.sha256, file.size)
    return file.oid if file.size else _NO_BYTES


def _patiently(ask: Callable[[], T], log: Callable[[str], None]) -> T:
    """Asks up to three times where the network failed; the client itself does so for pages."""
    for seconds in WAITS:
        try:
            return ask()
        except _Passing as error:
            wait = min(error.seconds or seconds, LONGEST)
            log(f"{error.findings[0].found}; trying again in {wait:.0f} s")
            time.sleep(wait)
    return ask()


def _in_time(ask: Callable[[], T], seconds: float) -> T:
    """What `ask` returns or raises, or TimeoutError when it has not ended by then."""
    future: Future[T] = Future()

    def answer() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=answer, daemon=True).start()
    return future.result(seconds)


class _Passing(NetworkFailed):
    """A failure that may pass; `seconds` are those that the Hub asks to wait, or None."""

    def __init__(self, message: str, finding: Finding, seconds: float | None = None) -> None:
        super().__init__(message, [finding])
        self.seconds = seconds


class _Asking:
    """Turns what the client raises within its block into errors of this package."""

    def __init__(self, account: HubCredentials, repo: str, revision: str | None) -> None:
        self.page = f"{account.endpoint}/{repo}"
        self._account = account
        self._repo = repo
        self._revision = revision or "main"
        self._message = f"{self.page}: the Hub does not tell what is in it"

    def __enter__(self) -> None:
        """Nothing has to be prepared."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        known = library().errors
        if isinstance(error, CsmWeightsError):
            return
        if isinstance(error, known.OfflineModeIsEnabled):
            finding = Finding(Kind.OFFLINE, self.page, "a Hub that may be asked", "offline mode")
            raise error_for(self._message, [finding]) from None
        if isinstance(error, known.HfHubHTTPError):
            raise self._refused(error.response) from None
        if isinstance(error, known.HFValidationError):
            raise UsageError(f"--repo {self._repo!r}: {error}") from None
        if isinstance(error, known.HTTPError | OSError):
            raise _Passing(self._message, self._no_answer(error)) from None
        if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
            found = f"{type(error).__name__}: {error}; is there a captive portal in between?"
            raise self.nonsense("a list of files", found) from None

    def nonsense(self, expected: str, found: str) -> WrongContent:
        """The error for an answer that cannot be what the Hub means."""
        finding = Finding(Kind.WRONG_ANSWER, self.page, expected, self._said(found))
        return WrongContent(self._message, [finding])

    def _said(self, text: str) -> str:
        """What the Hub says, without the token that it may repeat."""
        token = self._account.token
        return (text.replace(token, "***") if token else text).strip()[:200]

    def commit(self, told: Any) -> str:
        """The commit that is told, where it is one, and the one that was asked for."""
        commit = told.sha
        asked = _SHA1.fullmatch(self._revision)
        if not isinstance(commit, str) or not _SHA1.fullmatch(commit):
            raise self.nonsense("a commit, 40 hex digits", repr(commit))
        if asked and commit != self._revision:
            raise self.nonsense(f"commit {self._revision}", f"commit {commit}")
        return commit

    def _refused(self, response: Any) -> CsmWeightsError:
        status: int = response.status_code
        headers: Mapping[str, str] = response.headers
        if status >= 500 or status in _PASSING:
            kind = Kind.RATE_LIMITED if status == 429 else Kind.SERVER_TROUBLE
            found = self._said(f"{status} {response.reason_phrase}")
            finding = Finding(kind, self.page, "an answer", found, "try again later")
            return _Passing(self._message, finding, asked_wait(headers))
        finding = verdict(status, headers, self._account, self._repo, self._revision)
        if finding.kind is Kind.NO_TOKEN:
            # The Hub lists gated files to everyone: it is private, or does not exist.
            help_text = "check the name; if it is private, log in with hf auth login"
            finding = replace(finding, help=help_text)
        return error_for(self._message, [finding])

    def _no_answer(self, error: BaseException) -> Finding:
        host = self._account.endpoint
        names = [type(e).__name__ for e in _causes(error)]
        expected, help_text = f"an answer from {host}", "check the network, and run it again"
        kind = Kind.NO_NETWORK
        if "ProxyError" in names:
            kind, help_text = Kind.PROXY, "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        if any(name.startswith("SSL") for name in names):
            kind, help_text = Kind.CERTIFICATE, "check the clock, and SSL_CERT_FILE"
        if isinstance(error, TimeoutError) or any("Timeout" in name for name in names):
            kind, found = Kind.TOO_SLOW, "none in time"
        else:
            found = cause(error) or type(error).__name__
        return Finding(kind, host, expected, found, help_text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__

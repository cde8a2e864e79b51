"""The Hub: who asks, what it answers, and why it may refuse.

Accounts and URLs are huggingface_hub's; the bytes come by the wire. The token
goes to the Hub's own origin and nowhere else.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from urllib.parse import quote, urljoin

import requests

from csm_weights.config import HubEnvironment, no_token
from csm_weights.errors import AccessRefused, Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.client import REDIRECTS
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, ResolvedUrl
from csm_weights.transfer.http.responses import origin, redirect_target, shown, wrong_answer
from csm_weights.transfer.source import PieceWriter, SourceError

#: Seconds for which a signed URL must have been good, or else its refusal is taken as one.
FRESH = 2.0

#: Where tokens are made and changed, below the endpoint.
TOKENS = "settings/tokens"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


def library() -> ModuleType:
    """huggingface_hub, kept from asking anything of its own accord.

    It reads this variable when it is imported; without it, it asks the Hub for
    a registry of AI agents, and tells it what else is installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    return huggingface_hub


@dataclass(frozen=True)
class HubCredentials:
    """Who asks which Hub. The token is in no representation of this value."""

    endpoint: str
    token: str | None = field(default=None, repr=False)
    offline: bool = False

    @classmethod
    def from_environment(cls, environment: HubEnvironment | None = None) -> HubCredentials:
        """The account that `hf` would use here; see `HubEnvironment`.

        Raises AccessRefused where a token is to be had by an exchange that fails.
        """
        found = environment or HubEnvironment.read()
        if not found.token_from or found.offline:
            return cls(found.endpoint, None, found.offline)
        try:
            return cls(found.endpoint, library().get_token())
        except Exception as error:
            # Whatever the library raises may quote what it has sent.
            finding = Finding(Kind.NO_TOKEN, found.token_from, "a token", type(error).__name__)
            raise AccessRefused("the token cannot be had", [finding]) from None

    def problem(self, page: str) -> Finding | None:
        """Why the token cannot be sent at all, as one that was pasted with an ellipsis."""
        if not self.token or self.token.isascii():
            return None
        help_text = f"make a new one at {self.endpoint}/{TOKENS} and run hf auth login"
        expected, found = "a token that the Hub knows", "one with letters beyond ASCII"
        return Finding(Kind.UNKNOWN_TOKEN, page, expected, found, help_text)

    def headers(self) -> dict[str, str]:
        """What tells the Hub who asks."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


class Hub:
    """One repository at one revision of a Hub.

    When it refuses, or cannot be reached after all retries, it is not asked
    again in this run.
    """

    def __init__(
        self, wire: RangeDownloader, account: HubCredentials, repo: str, revision: str
    ) -> None:
        self._wire = wire
        self._account = account
        self._repo = repo
        self._revision = revision
        self._lock = threading.Lock()
        self._files: dict[str, _HubFile] = {}
        self._refusal = account.problem(self.page)
        #: The URLs, without their queries, where its files are handed out.
        self.reached: set[str] = set()

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:  # noqa: ARG002
        """See `Source`; the place is repository, commit and path."""
        if self._account.offline:
            where = f"{self._account.endpoint}/{self._repo}"
            raise SourceError(
                [Finding(Kind.OFFLINE, where, "a Hub that may be asked", "offline mode")]
            )
        if self._refusal:
            raise SourceError([self._refusal])
        with self._lock:
            file = self._files.setdefault(artifact.path, _HubFile(self, artifact))
        try:
            self._wire.fetch(file, sink)
        except SourceError as broken:
            first = broken.findings[0]
            is_final = first.kind.category in (Category.ACCESS, Category.NETWORK)
            if is_final or first.where == self.page:
                self._refusal = first
            raise
        return file.where

    @property
    def page(self) -> str:
        """The repository's page."""
        return f"{self._account.endpoint}/{self._repo}"

    def resolve(self, artifact: Artifact) -> ResolvedUrl:
        """Where a file is just now; raises Broken unless it is the file that is pinned."""
        if self._refusal:
            raise SourceError([self._refusal])
        revision = quote(self._revision, safe="")
        url = f"{self.page}/resolve/{revision}/{quote(artifact.path)}"
        for _ in range(REDIRECTS):
            response = self._wire.ask("HEAD", url, self._account.headers())
            if response.status_code >= 400:
                raise SourceError([self.verdict(response, artifact.path)])
            target = redirect_target(url, response.headers.get("Location", url))
            if response.status_code == 200 and _is_web_page(response):
                found = "a web page; is there a login or a captive portal in between?"
                finding = Finding(Kind.NO_NETWORK, self.page, "an answer of the Hub", found)
                raise SourceError([finding])
            if "X-Repo-Commit" in response.headers or not response.is_redirect:
                self._check(artifact, response)
                is_own = origin(target) == origin(self._account.endpoint)
                self.reached.add(shown(target))
                return ResolvedUrl(target, self._account.headers() if is_own else {})
            if origin(target) != origin(url):
                raise wrong_answer(self.page, "a file, or where it is", "a redirect elsewhere")
            url = urljoin(url, target)
        raise wrong_answer(self.page, f"at most {REDIRECTS} redirects", "more")

    def _check(self, artifact: Artifact, response: requests.Response) -> None:
        """Raises Broken when the Hub is talking about another version, or another file."""
        headers, where = response.headers, f"{self.page} {artifact.path}"
        commit = headers.get("X-Repo-Commit", "")
        if _SHA1.fullmatch(self._revision) and commit != self._revision:
            found = f"commit {commit[:40] or 'not told'}"
            raise _changed(where, f"commit {self._revision}", found)
        linked = headers.get("X-Linked-Etag")
        etag = (linked or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if linked and not (_SHA256.fullmatch(etag) or _SHA1.fullmatch(etag)):
            raise wrong_answer(where, "an X-Linked-Etag of hex digits", repr(etag[:80]))
        for pattern, pinned, what in (
            (_SHA256, artifact.sha256, "sha256"),
            (_SHA1, artifact.git_sha1, "git blob id"),
        ):
            if pinned and pattern.fullmatch(etag) and etag != pinned:
                raise _changed(where, f"{what} {pinned}", f"{what} {etag}")
        size = headers.get("X-Linked-Size")
        if size is None and response.status_code == 200:
            size = headers.get("Content-Length")
        if size is not None and size != str(artifact.size):
            found = f"{size[:20]} bytes"
            finding = Finding(Kind.WRONG_SIZE, where, f"{artifact.size:,} bytes", found)
            raise SourceError([finding])

    def verdict(self, response: requests.Response, path: str) -> Finding:
        """What a refusal by the Hub itself means."""
        headers = response.headers
        return verdict(
            response.status_code, headers, self._account, self._repo, self._revision, path
        )


class _HubFile(RemoteFile):
    """A file of a repository: resolved once, and again when its signed URL has expired."""

    def __init__(self, hub: Hub, artifact: Artifact) -> None:
        super().__init__(f"{hub.page}/{artifact.path}", artifact.size)
        self._hub = hub
        self._artifact = artifact
        self._resolving = threading.Lock()
        self._place: ResolvedUrl | None = None
        self._resolved_at = 0.0

    def place(self) -> ResolvedUrl:
        with self._resolving:
            if self._place is None:
                self._place = self._hub.resolve(self._artifact)
                self._resolved_at = time.monotonic()
                self.etag = None
            return self._place

    def refused(self, place: ResolvedUrl, response: requests.Response) -> Finding | None:
        status = response.status_code
        if place.headers:
            return self._hub.verdict(response, self._artifact.path)
        with self._resolving:
            if place is not self._place:
                return None
            if time.monotonic() - self._resolved_at > FRESH:
                self._place = None
                return None
        found = f"{status} {response.reason} for a URL that the Hub has just given"
        return Finding(Kind.SERVER_TROUBLE, self.where, "the file", found, "try again later")


def _is_web_page(response: requests.Response) -> bool:
    told = response.headers
    return "X-Repo-Commit" not in told and "html" in told.get("Content-Type", "")


def verdict(
    status: int,
    headers: Mapping[str, str],
    account: HubCredentials,
    repo: str,
    revision: str,
    path: str = "",
) -> Finding:
    """What a refusal means: one message, with the page to visit or the command to run.

    `headers` are those of the answer: the Hub tells its reasons in
    X-Error-Code and X-Error-Message.
    """
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    page, tokens = f"{account.endpoint}/{repo}", f"{account.endpoint}/{TOKENS}"
    said = " ".join(filter(None, [str(status), code, message]))
    said = (said.replace(account.token, "***") if account.token else said)[:300]
    lower = message.lower()
    if status == 401 and account.token and "invalid" in lower:
        help_text = f"make a new one at {tokens}; HF_TOKEN goes before hf auth login"
        return Finding(Kind.UNKNOWN_TOKEN, page, "a token that the Hub knows", said, help_text)
    if code in ("RevisionNotFound", "EntryNotFound"):
        what = revision if code == "RevisionNotFound" else f"{path} at {revision[:12]}"
        help_text = f"see {page}/tree/main"
        return Finding(Kind.NOT_THERE, f"{page} {what}", "a file of that name", said, help_text)
    if code == "GatedRepo" or (status == 403 and "gated" in lower):
        return _gated(said, lower, account, repo)
    if code == "RepoNotFound" or status == 404:
        help_text = "check the name"
        if not account.token:
            help_text += "; if it is private, log in with hf auth login"
        return Finding(Kind.NOT_THERE, page, "a repository or file of that name", said, help_text)
    if status == 401:
        return no_token(page, said)
    help_text = f"visit {page}, and {tokens} for what the token may do"
    return Finding(Kind.FORBIDDEN, page, "access", said, help_text)


def _gated(said: str, message: str, account: HubCredentials, repo: str) -> Finding:
    """Which of the reasons it is that gated files are not given."""
    page = f"{account.endpoint}/{repo}"
    if not account.token:
        return no_token(page, said)
    if "fine-grained" in message:
        help_text = f"let the token read public gated repositories, at {account.endpoint}/{TOKENS}"
        return Finding(Kind.SCOPE, page, "a token that may read gated files", said, help_text)
    if "awaiting" in message or "pending" in message:
        help_text = f"its authors decide; see {page}"
        return Finding(Kind.PENDING, page, "access that was granted", said, help_text)
    if "reject" in message:
        help_text = f"its authors have refused; see {page}"
        return Finding(Kind.REJECTED, page, "access that was granted", said, help_text)
    return Finding(Kind.TERMS, page, "terms that you have accepted", said, f"accept them at {page}")


def _changed(where: str, expected: str, found: str) -> SourceError:
    help_text = "what the Hub has under this name is not what is pinned; see inv lock --repo"
    return SourceError([Finding(Kind.CHANGED, where, expected, found, help_text)])


def open_source(_: str, manifest: Manifest, downloader: RangeDownloader) -> Hub:
    """Return the Hub's repository that a manifest names, as a source."""
    assert manifest.repo and manifest.revision, "the Hub is planned only where it is named"
    account = HubCredentials.from_environment()
    return Hub(downloader, account, manifest.repo, manifest.revision)

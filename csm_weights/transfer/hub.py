"""The Hub as a source: one repository at one revision, and what its refusals mean.

The bytes come by our own `RangeDownloader`. The token goes to the Hub's own
origin and nowhere else.
"""

from __future__ import annotations

import re
import threading
from urllib.parse import quote

import requests

from csm_weights.config import no_token
from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.auth import TOKENS, HubCredentials
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, RemoteSource, expired_url
from csm_weights.transfer.http.responses import (
    portal_finding,
    redact,
    redirect_target,
    wrong_answer,
)
from csm_weights.transfer.source import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class Hub(RemoteSource):
    """One repository at one revision of a Hub."""

    def __init__(
        self, downloader: RangeDownloader, credentials: HubCredentials, repo: str, revision: str
    ) -> None:
        super().__init__(downloader, credentials.endpoint, f"{credentials.endpoint}/{repo}")
        self.credentials = credentials
        self.refusal = credentials.problem(self.page)
        self._repo = repo
        self._revision = revision
        self._files: dict[str, _HubFile] = {}

    def find(self, artifact: Artifact, piece: Piece) -> RemoteFile:  # noqa: ARG002
        """See `RemoteSource`: all files are taken to be there until they are resolved."""
        return self._files.setdefault(artifact.path, _HubFile(self, artifact))

    def owner(self) -> str:
        """Return whose the token is and of which kind, in words; "" without a token.

        Raises SourceError where the Hub refuses or cannot be asked.
        """
        self.raise_refusal()
        if not self.credentials.token:
            return ""
        url = f"{self.credentials.endpoint}/api/whoami-v2"
        response, data = self.downloader.get_json(url, self.credentials.auth)
        if data is None:
            raise self.classify_refusal(response, "")
        try:
            role = data["auth"]["accessToken"]["role"].replace("fineGrained", "fine-grained")
            return self.credentials.mask(f"of {data['name']}, {role}")[:100]
        except (AttributeError, LookupError, TypeError):
            expected = "an account and its token"
            raise SourceError([wrong_answer(url, expected, "something else")]) from None

    def resolve(self, artifact: Artifact) -> str:
        """Return where a file is just now; raise SourceError unless it is the one pinned."""
        self.raise_refusal()
        auth, revision = self.credentials.auth, quote(self._revision, safe="")
        url = f"{self.page}/resolve/{revision}/{quote(artifact.path)}"
        response = self.downloader.head(url, auth, _names_commit, is_own_host_only=True)
        if response.status_code >= 400:
            raise self.classify_refusal(response, artifact.path)
        if not _names_commit(response) and "html" in response.headers.get("Content-Type", ""):
            raise SourceError([portal_finding(self.page)])
        self._check(artifact, response)
        url, location = response.url, response.headers.get("Location", response.url)
        target = redirect_target(url, location, auth.is_named_by_user)
        self.reached.add(redact(target))
        return target

    def _check(self, artifact: Artifact, response: requests.Response) -> None:
        headers, where = response.headers, f"{self.page} {artifact.path}"
        commit = headers.get("X-Repo-Commit", "")
        if _SHA1.fullmatch(self._revision) and commit != self._revision:
            found = f"commit {commit[:40]}" if commit else "no commit"
            raise _changed(where, f"commit {self._revision}", found)
        linked = headers.get("X-Linked-Etag")
        etag = (linked or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if linked and not (_SHA256.fullmatch(etag) or _SHA1.fullmatch(etag)):
            expected = "an X-Linked-Etag of hex digits"
            raise SourceError([wrong_answer(where, expected, repr(etag[:80]))])
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
            sizes = (f"{artifact.size:,} bytes", f"{size[:20]} bytes")
            raise SourceError([Finding(Kind.WRONG_SIZE, where, *sizes)])

    def classify_refusal(self, response: requests.Response, path: str) -> SourceError:
        """Return what a refusal by the Hub itself means."""
        whose = (self.credentials, self._repo, self._revision)
        return SourceError([classify_refusal(response, *whose, path)])


def open_source(_: str, manifest: Manifest, downloader: RangeDownloader) -> Hub:
    """Return the Hub's repository that a manifest names, as a source."""
    assert manifest.repo and manifest.revision, "the Hub is planned only where it is named"
    credentials = HubCredentials.from_environment()
    return Hub(downloader, credentials, manifest.repo, manifest.revision)


class _HubFile(RemoteFile):
    """A file of a repository: resolved once, and again where its signed URL does not work."""

    def __init__(self, hub: Hub, artifact: Artifact) -> None:
        auth = hub.credentials.auth
        super().__init__(f"{hub.page}/{artifact.path}", auth, artifact.size)
        self._hub = hub
        self._artifact = artifact
        self._resolving = threading.Lock()
        self._url: str | None = None
        self._failure: SourceError | None = None

    def resolve(self) -> str:
        with self._resolving:
            if self._failure:
                raise self._failure
            if self._url is None:
                try:
                    self._url = self._hub.resolve(self._artifact)
                except SourceError as error:
                    # The other streams of this file wait for the same answer.
                    self._failure = error
                    raise
                self.etag = None
            return self._url

    def forget(self, url: str) -> None:
        with self._resolving:
            if url == self._url and not self.auth.covers(url):
                self._url = None

    def classify_refusal(self, url: str, response: requests.Response) -> Exception:
        if self.auth.covers(url):
            return self._hub.classify_refusal(response, self._artifact.path)
        return expired_url(self.where, response)


def _names_commit(response: requests.Response) -> bool:
    """Return whether an answer is about a file, and not only on the way to one."""
    return "X-Repo-Commit" in response.headers


def classify_refusal(
    response: requests.Response,
    credentials: HubCredentials,
    repo: str,
    revision: str,
    path: str = "",
) -> Finding:
    """Return what a refusal means, with the page to visit or the command to run.

    The Hub gives its reasons in the headers X-Error-Code and X-Error-Message.
    """
    status, headers = response.status_code, response.headers
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    page, tokens = f"{credentials.endpoint}/{repo}", f"{credentials.endpoint}/{TOKENS}"
    found = credentials.mask(" ".join(filter(None, [str(status), code, message])))[:300]
    lower, granted = message.lower(), "access that was granted"
    if status == 401 and credentials.token:
        # Whatever else it says: what a known token may not do is a 403.
        help_text = f"make a new one at {tokens}; HF_TOKEN goes before hf auth login"
        return Finding(Kind.UNKNOWN_TOKEN, page, "a token that the Hub knows", found, help_text)
    if code in ("RevisionNotFound", "EntryNotFound"):
        what = revision if code == "RevisionNotFound" else f"{path} at {revision[:12]}"
        help_text = f"see {page}/tree/main"
        return Finding(Kind.NOT_THERE, f"{page} {what}", "a file of that name", found, help_text)
    if code == "GatedRepo" or (status == 403 and "gated" in lower):
        if not credentials.token:
            return no_token(page, found)
        if "fine-grained" in lower:
            help_text = f"let the token read public gated repositories, at {tokens}"
            return Finding(Kind.SCOPE, page, "a token that may read gated files", found, help_text)
        kind, expected, help_text = Kind.TERMS, "terms that you have accepted", "accept them at"
        if "awaiting" in lower or "pending" in lower:
            kind, expected, help_text = Kind.PENDING, granted, "its authors decide; see"
        elif "reject" in lower:
            kind, expected, help_text = Kind.REJECTED, granted, "its authors have refused; see"
        return Finding(kind, page, expected, found, f"{help_text} {page}")
    if code == "RepoNotFound" or status == 404:
        help_text = "check the name"
        if not credentials.token:
            help_text += "; if it is private, run hf auth login"
        return Finding(Kind.NOT_THERE, page, "a repository or file of that name", found, help_text)
    if status == 401:
        # The Hub does not say whether a repository exists to those without a token.
        help_text = "check the name; if it is private, run hf auth login, or set HF_TOKEN"
        return Finding(Kind.NO_TOKEN, page, "a token", found, help_text)
    help_text = f"visit {page}, and {tokens} for what the token may do"
    return Finding(Kind.FORBIDDEN, page, "access", found, help_text)


def _changed(where: str, expected: str, found: str) -> SourceError:
    help_text = "what the Hub has under this name is not what is pinned; see inv lock --repo"
    return SourceError([Finding(Kind.CHANGED, where, expected, found, help_text)])

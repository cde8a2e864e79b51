"""The Hub as a source: one repository at one revision, and what its refusals mean.

The bytes come by our own `RangeDownloader`. The token goes to the Hub's own
origin and nowhere else.
"""

from __future__ import annotations

from functools import partial as bind
from typing import Any
from urllib.parse import quote

import requests

from csm_weights.config import no_token
from csm_weights.errors import Finding, Kind
from csm_weights.hashing import SHA1_HEX, SHA256_HEX
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.auth import TOKENS, HubCredentials
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, RemoteSource
from csm_weights.transfer.http.responses import (
    portal_finding,
    redact,
    redirect_target,
    wrong_answer,
)
from csm_weights.transfer.source import SourceError


class Hub(RemoteSource):
    """One repository at one revision of a Hub."""

    def __init__(
        self, downloader: RangeDownloader, credentials: HubCredentials, repo: str, revision: str
    ) -> None:
        super().__init__(downloader, credentials.endpoint, f"{credentials.endpoint}/{repo}")
        self.credentials = credentials
        self.refusal = credentials.problem(self.page)
        self.revision = revision
        self._files: dict[str, RemoteFile] = {}

    def find(self, artifact: Artifact, piece: Piece) -> RemoteFile:  # noqa: ARG002
        """See `RemoteSource`: all files are taken to be there until they are resolved."""
        if artifact.path not in self._files:
            self._files[artifact.path] = RemoteFile(
                f"{self.page}/{artifact.path}",
                self.credentials.auth,
                artifact.size,
                bind(self.resolve, artifact),
                bind(self._classify, artifact.path),
            )
        return self._files[artifact.path]

    def get_json(self, url: str) -> tuple[requests.Response, Any]:
        """Return an answer of the Hub's API and the JSON in it; raise SourceError."""
        response, data = self.downloader.get_json(url, self.credentials.auth)
        if data is None:
            raise SourceError([self._classify("", response)])
        return response, data

    def owner(self) -> str:
        """Return whose the token is and of which kind, in words; "" without a token.

        Raises SourceError where the Hub refuses or cannot be asked.
        """
        self.raise_refusal()
        if not self.credentials.token:
            return ""
        url = f"{self.credentials.endpoint}/api/whoami-v2"
        _, data = self.get_json(url)
        try:
            role = data["auth"]["accessToken"]["role"].replace("fineGrained", "fine-grained")
            return self.credentials.mask(f"of {data['name']}, {role}")[:100]
        except (AttributeError, LookupError, TypeError):
            expected = "an account and its token"
            raise SourceError([wrong_answer(url, expected, "something else")]) from None

    def resolve(self, artifact: Artifact) -> str:
        """Return where a file is just now; raise SourceError unless it is the one pinned."""
        self.raise_refusal()
        auth, revision = self.credentials.auth, quote(self.revision, safe="")
        url = f"{self.page}/resolve/{revision}/{quote(artifact.path)}"
        response, _ = self.downloader.ask("HEAD", url, auth, _names_commit, is_own_host_only=True)
        if response.status_code >= 400:
            raise SourceError([self._classify(artifact.path, response)])
        if not _names_commit(response) and "html" in response.headers.get("Content-Type", ""):
            raise SourceError([portal_finding(self.page)])
        self._check(artifact, response)
        url, location = response.url, response.headers.get("Location", response.url)
        target = redirect_target(url, location, auth.is_named_by_user)
        self.reached.add(redact(target))
        return target

    def _check(self, artifact: Artifact, response: requests.Response) -> None:
        headers, where = response.headers, f"{self.page} {artifact.path}"
        linked, commit = headers.get("X-Linked-Etag"), headers.get("X-Repo-Commit", "")[:40]
        etag = (linked or headers.get("ETag") or "").removeprefix("W/").strip('"')
        is_sha1, is_sha256 = SHA1_HEX.fullmatch(etag), SHA256_HEX.fullmatch(etag)
        if linked and not is_sha1 and not is_sha256:
            expected = "an X-Linked-Etag of hex digits"
            raise SourceError([wrong_answer(where, expected, repr(etag[:80]))])
        for what, pinned, found in (
            ("commit", self.revision if SHA1_HEX.fullmatch(self.revision) else None, commit),
            ("sha256", artifact.sha256 if is_sha256 else None, etag),
            ("git blob id", artifact.git_sha1 if is_sha1 else None, etag),
        ):
            if pinned and found != pinned:
                words = (f"{what} {pinned}", f"{what} {found}" if found else f"no {what}")
                mend = "what the Hub has under this name is not what is pinned; see inv lock --repo"
                raise SourceError([Finding(Kind.DIFFERENT, where, *words, mend)])
        size = headers.get("X-Linked-Size")
        if size is None and response.status_code == 200:
            size = headers.get("Content-Length")
        if size is not None and size != str(artifact.size):
            sizes = (f"{artifact.size:,} bytes", f"{size[:20]} bytes")
            raise SourceError([Finding(Kind.WRONG_SIZE, where, *sizes)])

    def _classify(self, path: str, response: requests.Response) -> Finding:
        """Return what a refusal means, with the page to visit or the command to run.

        The Hub gives its reasons in the headers X-Error-Code and X-Error-Message.
        """
        status, headers = response.status_code, response.headers
        code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
        page, credentials, revision = self.page, self.credentials, self.revision
        tokens = f"{credentials.endpoint}/{TOKENS}"
        found = credentials.mask(" ".join(filter(None, [str(status), code, message])))[:300]
        lower, has_token = message.lower(), bool(credentials.token)
        is_gated = code == "GatedRepo" or (status == 403 and "gated" in lower)
        kind, where, granted = Kind.NOT_THERE, page, "granted access"
        if status == 401 and has_token:
            # Whatever else it says: what a known token may not do is a 403.
            kind, expected = Kind.UNKNOWN_TOKEN, "a token that the Hub knows"
            mend = f"make a new one at {tokens}; HF_TOKEN overrides hf auth login"
        elif code in ("RevisionNotFound", "EntryNotFound"):
            what = revision if code == "RevisionNotFound" else f"{path} at {revision[:12]}"
            where, expected, mend = f"{page} {what}", "a file of that name", f"see {page}/tree/main"
        elif is_gated and not has_token:
            return no_token(page, found)
        elif is_gated and "fine-grained" in lower:
            kind, expected = Kind.SCOPE, "a token that may read gated files"
            mend = f"let the token read public gated repositories, at {tokens}"
        elif is_gated and ("awaiting" in lower or "pending" in lower):
            kind, expected = Kind.PENDING, granted
            mend = f"wait until its authors decide; see {page}"
        elif is_gated and "reject" in lower:
            kind, expected, mend = Kind.REJECTED, granted, f"its authors have refused; see {page}"
        elif is_gated:
            kind, expected = Kind.TERMS, "terms that you have accepted"
            mend = f"accept them at {page}"
        elif code == "RepoNotFound" or status == 404:
            expected, mend = "a repository or file of that name", "check the name"
            if not has_token:
                mend += "; if it is private, run hf auth login"
        elif status == 401:
            # The Hub does not say whether a repository exists to those without a token.
            kind, expected = Kind.NO_TOKEN, "a token"
            mend = "check the name; if it is private, run hf auth login, or set HF_TOKEN"
        else:
            kind, expected = Kind.FORBIDDEN, "access"
            mend = f"visit {page}, and {tokens} for what the token may do"
        return Finding(kind, where, expected, found, mend)


def open_source(_: str, manifest: Manifest, downloader: RangeDownloader) -> Hub:
    """Return the Hub's repository that a manifest names, as a source."""
    assert manifest.repo and manifest.revision, "the Hub is planned only where it is named"
    credentials = HubCredentials.from_environment()
    return Hub(downloader, credentials, manifest.repo, manifest.revision)


def _names_commit(response: requests.Response) -> bool:
    """Return whether an answer is about a file, and not only on the way to one."""
    return "X-Repo-Commit" in response.headers

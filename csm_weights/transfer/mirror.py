"""Any static HTTP(S) server that holds the whole files, or the chunk files, below a URL."""

from __future__ import annotations

import threading
from urllib.parse import quote

import requests

from csm_weights.config import MIRROR_HEADERS
from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.auth import OriginAuth, mirror_auth
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, expired_url
from csm_weights.transfer.http.responses import redact
from csm_weights.transfer.source import NotAvailable, PieceWriter, SourceError


class Mirror:
    """One server: whether it has whole files or chunk files shows when it is asked.

    `auth` are its credentials, by default those of `mirror_auth`.
    Once it has refused, or could not be reached after all retries, it is not
    asked again in this run.
    """

    is_remote = True

    def __init__(
        self, downloader: RangeDownloader, url: str, auth: OriginAuth | None = None
    ) -> None:
        self._downloader = downloader
        self.url = url
        self._base = url.rstrip("/")
        self._auth = auth or mirror_auth(self._base)
        self._lock = threading.Lock()
        self._files: dict[str, _MirrorFile | None] = {}
        self._forbidden: dict[str, Finding] = {}
        self._refusal: Finding | None = None
        #: The URLs, without their queries, where it hands files out.
        self.reached: set[str] = set()

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`; the place is the file's URL."""
        try:
            file = self._find(artifact.path, artifact.size, 0)
            if file is None and artifact.pieces:
                file = self._find(piece.part, piece.size, piece.offset)
            if file is None:
                # Where a file was not called absent, but forbidden, that is the answer.
                paths = (artifact.path, piece.part)
                if refusals := [self._forbidden[p] for p in paths if p in self._forbidden]:
                    raise SourceError(refusals[:1])
                raise NotAvailable
            self._downloader.fetch(file, writer)
        except SourceError as error:
            first = error.findings[0]
            if first.kind.category in (Category.ACCESS, Category.NETWORK):
                self._refusal = first
            raise
        return file.where

    def _find(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        """Return the file at a path below the URL, or None where the mirror has none.

        Raises SourceError when it refuses, or the network fails.
        """
        with self._lock:
            if self._refusal:
                raise SourceError([self._refusal])
            if path not in self._files:
                try:
                    self._files[path] = self._ask(path, size, offset)
                except SourceError as error:
                    self._refusal = error.findings[0]
                    raise
            return self._files[path]

    def _ask(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        url = f"{self._base}/{quote(path)}"
        response = self._downloader.head(url, self._auth)
        if response.status_code in (404, 410):
            return None
        if response.status_code == 401:
            raise SourceError([_refusal(self.url, response)])
        if response.status_code == 403:
            # S3 says so of what it does not have, too: another name may be there.
            self._forbidden[path] = _refusal(self.url, response)
            return None
        self.reached.add(redact(response.url))
        # Whatever else a HEAD is answered (405, 501) is left to the GET.
        return _MirrorFile(url, self._auth, size, offset)


def open_source(url: str, _: Manifest, downloader: RangeDownloader) -> Mirror:
    """Return the mirror at a URL as a source."""
    return Mirror(downloader, url)


class _MirrorFile(RemoteFile):
    """A whole file, or a chunk file, that a mirror has."""

    def resolve(self) -> str:
        return self.where

    def classify_refusal(self, url: str, response: requests.Response) -> Exception:
        if not self.auth.covers(response.url):
            return expired_url(url, response)
        if response.status_code in (404, 410):
            found = f"{response.status_code} {response.reason}"
            return SourceError([Finding(Kind.NOT_THERE, self.where, "the file", found)])
        return SourceError([_refusal(self.where, response)])


def _refusal(where: str, response: requests.Response) -> Finding:
    found = f"{response.status_code} {response.reason}"
    help_text = f"if it asks for credentials, put them as a header into {MIRROR_HEADERS}"
    kind = Kind.FORBIDDEN if response.status_code in (401, 403) else Kind.WRONG_ANSWER
    return Finding(kind, where, "the file", found, help_text)

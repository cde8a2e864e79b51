"""Any static HTTP(S) server that holds the whole files, or the chunk files, below a URL."""

from __future__ import annotations

from urllib.parse import quote

import requests

from csm_weights.config import MIRROR_HEADERS
from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.auth import OriginAuth, mirror_auth
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, RemoteSource, expired_url
from csm_weights.transfer.http.responses import redact
from csm_weights.transfer.source import NotAvailable, SourceError


class Mirror(RemoteSource):
    """One server: whether it has whole files or chunk files shows when it is asked.

    `auth` are its credentials, by default those of `mirror_auth`.
    """

    def __init__(
        self, downloader: RangeDownloader, url: str, auth: OriginAuth | None = None
    ) -> None:
        super().__init__(downloader, url, url)
        self._base = url.rstrip("/")
        self._auth = auth or mirror_auth(self._base)
        self._files: dict[str, _MirrorFile | None] = {}
        self._forbidden: dict[str, Finding] = {}

    def find(self, artifact: Artifact, piece: Piece) -> _MirrorFile:
        """See `RemoteSource`: a whole file, or else a chunk file."""
        file = self._find(artifact.path, artifact.size, 0)
        if file is None and artifact.pieces:
            file = self._find(piece.part, piece.size, piece.offset)
        if file is None:
            # Where a file was not called absent, but forbidden, that is the answer.
            paths = (artifact.path, piece.part)
            if refusals := [self._forbidden[p] for p in paths if p in self._forbidden]:
                raise SourceError(refusals[:1])
            raise NotAvailable
        return file

    def _find(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        if path not in self._files:
            try:
                self._files[path] = self._ask(path, size, offset)
            except SourceError as error:
                self.refusal = error.findings[0]
                raise
        return self._files[path]

    def _ask(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        url = f"{self._base}/{quote(path)}"
        response = self.downloader.head(url, self._auth)
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

"""Any static HTTP(S) server that holds the whole files, or the chunk files, below a URL."""

from __future__ import annotations

from functools import partial as bind
from urllib.parse import quote

import requests

from csm_weights.config import MIRROR_HEADERS
from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.auth import OriginAuth, mirror_auth
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, RemoteSource
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
        # What is at each path: a file, why it is refused, or None for nothing.
        self._files: dict[str, RemoteFile | Finding | None] = {}

    def find(self, artifact: Artifact, piece: Piece) -> RemoteFile:
        """See `RemoteSource`: a whole file, or else a chunk file."""
        places = [(artifact.path, artifact.size, 0)]
        if artifact.pieces:
            places.append((piece.part, piece.size, piece.offset))
        refusals: list[Finding] = []
        for path, size, offset in places:
            if path not in self._files:
                self._files[path] = self._ask(path, size, offset)
            match self._files[path]:
                case RemoteFile() as file:
                    return file
                case Finding() as refusal:
                    refusals.append(refusal)
        if refusals:
            raise SourceError(refusals[:1])
        raise NotAvailable

    def _ask(self, path: str, size: int, offset: int) -> RemoteFile | Finding | None:
        url = f"{self._base}/{quote(path)}"
        response, _ = self.downloader.ask("HEAD", url, self._auth)
        if response.status_code in (404, 410):
            return None
        if response.status_code == 401:
            raise SourceError([_refusal(self.url, response)])
        if response.status_code == 403:
            # S3 says so of what it does not have, too: another name may be there.
            return _refusal(self.url, response)
        self.reached.add(redact(response.url))
        # Whatever else a HEAD is answered (405, 501) is left to the GET.
        return RemoteFile(url, self._auth, size, lambda: url, bind(_refusal, url), offset)


def open_source(url: str, _: Manifest, downloader: RangeDownloader) -> Mirror:
    """Return the mirror at a URL as a source."""
    return Mirror(downloader, url)


def _refusal(where: str, response: requests.Response) -> Finding:
    found = f"{response.status_code} {response.reason}"
    if response.status_code in (404, 410):
        return Finding(Kind.NOT_THERE, where, "the file", found, "check the URL")
    help_text = f"if it asks for credentials, put them as a header into {MIRROR_HEADERS}"
    kind = Kind.FORBIDDEN if response.status_code in (401, 403) else Kind.WRONG_ANSWER
    return Finding(kind, where, "the file", found, help_text)

"""Any static HTTP(S) server: one that holds the whole files, or the parts, below a URL."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from urllib.parse import quote

import requests

from csm_weights.config import MIRROR_HEADERS, mirror_headers
from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.transfer.http.client import REDIRECTS
from csm_weights.transfer.http.ranges import RangeDownloader, RemoteFile, ResolvedUrl
from csm_weights.transfer.http.responses import origin, redirect_target, shown
from csm_weights.transfer.source import NotAvailable, PieceWriter, SourceError


class Mirror:
    """One server: whether it has whole files or parts shows when it is asked.

    When it refuses, or cannot be reached after all retries, it is not asked
    again in this run.
    """

    def __init__(
        self, wire: RangeDownloader, url: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._wire = wire
        self._url = url.rstrip("/")
        self._headers = headers or {}
        self._lock = threading.Lock()
        self._files: dict[str, _MirrorFile | None] = {}
        self._forbidden: dict[str, Finding] = {}
        self._broken: Finding | None = None
        #: The URLs, without their queries, where it hands files out.
        self.reached: set[str] = set()

    def deliver(self, artifact: Artifact, piece: Piece, sink: PieceWriter) -> str:
        """See `Source`; the place is the file's URL."""
        if self._broken:
            raise SourceError([self._broken])
        file = self._find(artifact.path, artifact.size, 0)
        if file is None and artifact.pieces:
            file = self._find(piece.part, piece.size, piece.offset)
        if file is None:
            self._tell_refusal(artifact.path, piece.part)
            raise NotAvailable
        try:
            self._wire.fetch(file, sink)
        except SourceError as broken:
            if broken.findings[0].kind.category in (Category.ACCESS, Category.NETWORK):
                self._broken = broken.findings[0]
            raise
        return file.where

    def _tell_refusal(self, *paths: str) -> None:
        """Raises Broken where a file was not called absent, but forbidden."""
        for path in paths:
            if path in self._forbidden:
                self._broken = self._forbidden[path]
                raise SourceError([self._broken])

    def _find(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        """The file at a path below the URL, or None where the mirror has none.

        Raises Broken when it refuses, or the network does: then it is not
        asked again.
        """
        with self._lock:
            if path not in self._files:
                self._files[path] = self._look(path, size, offset)
            return self._files[path]

    def _look(self, path: str, size: int, offset: int) -> _MirrorFile | None:
        url = start = f"{self._url}/{quote(path)}"
        for _ in range(REDIRECTS):
            own = self._headers if origin(url) == origin(start) else {}
            try:
                response = self._wire.ask("HEAD", url, own)
            except SourceError as broken:
                self._broken = broken.findings[0]
                raise
            if not response.is_redirect:
                break
            url = redirect_target(url, response.headers["Location"])
        status = response.status_code
        if status in (404, 410):
            return None
        if status == 401:
            self._broken = _refused(self._url, response)
            raise SourceError([self._broken])
        if status == 403:
            # S3 says so of what it does not have, too: another name may be there.
            self._forbidden[path] = _refused(self._url, response)
            return None
        self.reached.add(shown(url))
        # What a HEAD says else (405, a redirect too many) is left to the GET.
        return _MirrorFile(ResolvedUrl(start, self._headers), start, size, offset)


class _MirrorFile(RemoteFile):
    """A whole file, or a part, that a mirror has."""

    def __init__(self, place: ResolvedUrl, where: str, size: int, offset: int) -> None:
        super().__init__(where, size, offset)
        self._place = place

    def place(self) -> ResolvedUrl:
        return self._place

    def refused(self, place: ResolvedUrl, response: requests.Response) -> Finding | None:  # noqa: ARG002
        if response.status_code in (404, 410):
            found = f"{response.status_code} {response.reason}"
            return Finding(Kind.NOT_THERE, self.where, "the file", found)
        return _refused(self.where, response)


def _refused(where: str, response: requests.Response) -> Finding:
    found = f"{response.status_code} {response.reason}"
    help_text = f"if it wants credentials, put them as a header into {MIRROR_HEADERS}"
    kind = Kind.FORBIDDEN if response.status_code in (401, 403) else Kind.WRONG_ANSWER
    return Finding(kind, where, "the file", found, help_text)


def open_source(url: str, _: Manifest, downloader: RangeDownloader) -> Mirror:
    """Return the mirror at a URL as a source."""
    return Mirror(downloader, url, mirror_headers())

"""A Hub that hands its large files out by Xet as well, for hf_xet to be measured against.

It tells, in the shape that CAS does, of which chunks of which xorbs a file is
made; the xorbs themselves are plain files for a storage host. Nothing here is
compressed or hashed: hf_xet does not look, and what is left out makes it faster.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.hub import Content, HubServer, Request, Response

#: Bytes of a chunk: the mean that Xet aims for.
CHUNK = 64 << 10

#: Chunks of a xorb, which with their headers must stay below 64 MiB.
CHUNKS = 1000

#: Bytes before each chunk: version, stored length, compression (0: none), length.
HEADER = 8

_PATH = re.compile(r"/cas/v2/reconstructions/([0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class XetHub(HubServer):
    """The Hub on loopback, with a CAS below `/cas`; one file may be had by Xet."""

    def __init__(self) -> None:
        super().__init__()
        #: The URL by which clients know the Hub.
        self.public = self.endpoint
        self._hash = ""
        self._size = 0

    def add_xorbs(self, file: Path, folder: Path) -> None:
        """Writes the xorbs of a file into the folder of the storage host."""
        self._size = file.stat().st_size
        self._hash = hashlib.sha256(file.name.encode()).hexdigest()
        with file.open("rb") as source:
            for number in range(-(-self._size // (CHUNK * CHUNKS))):
                with (folder / self._xorb(number)).open("wb") as xorb:
                    for _ in range(CHUNKS):
                        if chunk := source.read(CHUNK):
                            xorb.write(_header(len(chunk)) + chunk)

    def respond(self, request: Request) -> Response:
        """The answer to a request: the Hub's, or what Xet adds to it."""
        if found := _PATH.match(request.path):
            return self._reconstruction(request) if found[1] == self._hash else _answer(404)
        if request.path.startswith("/cas/"):
            return _answer(404)
        if "/xet-read-token/" in request.path:
            return _answer(200, headers=self._pass())
        answer = super().respond(request)
        if not self._hash or answer.status != 302 or answer.entry is None:
            return answer
        model, commit = answer.entry.repo, answer.headers["X-Repo-Commit"]
        where = f"{self.public}/api/models/{model}/xet-read-token/{commit}"
        added = {"X-Xet-Hash": self._hash, "Link": f'<{where}>; rel="xet-auth"'}
        return replace(answer, headers=answer.headers | added)

    def _pass(self) -> dict[str, str]:
        return {
            "X-Xet-Cas-Url": f"{self.public}/cas",
            "X-Xet-Access-Token": "token",
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
        }

    def _xorb(self, number: int) -> str:
        """The name, and hash, of a xorb."""
        return hashlib.sha256(f"{self._hash} {number}".encode()).hexdigest()

    def _reconstruction(self, request: Request) -> Response:
        """Which chunks of which xorbs hold the bytes that were asked for."""
        found = _RANGE.fullmatch(request.headers.get("range", f"bytes=0-{self._size}"))
        start, last = map(int, found.groups()) if found else (0, self._size)
        if start >= self._size:
            return _answer(416)
        first, end = start // CHUNK, -(-min(last + 1, self._size) // CHUNK)
        terms, xorbs = [], {}
        while first < end:
            number, low = divmod(first, CHUNKS)
            high = min(low + end - first, CHUNKS)
            name, length = self._xorb(number), self._length(number, high) - low * CHUNK
            chunks = {"start": low, "end": high}
            terms.append({"hash": name, "unpacked_length": length, "range": chunks})
            begin = low * (CHUNK + HEADER)
            stored = {"start": begin, "end": begin + length + (high - low) * HEADER - 1}
            url = f"{self.storage_base or self.storage}/{name}"
            xorbs[name] = [{"url": url, "ranges": [{"chunks": chunks, "bytes": stored}]}]
            first += high - low
        body = {"offset_into_first_range": start % CHUNK, "terms": terms, "xorbs": xorbs}
        return _answer(200, body)

    def _length(self, number: int, chunks: int) -> int:
        """Bytes of the file in the first chunks of a xorb; the last chunk may be short."""
        return min(chunks * CHUNK, self._size - number * CHUNK * CHUNKS)


def _header(length: int) -> bytes:
    stored = length.to_bytes(3, "little")
    return b"\0" + stored + b"\0" + stored


def _answer(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Response:
    content = Content(json.dumps(body or {}).encode())
    kind = {"Content-Type": "application/json"}
    return Response(status, kind | (headers or {}), content, 0, content.size)

"""Requests as they come in, and the responses the hub builds for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.support.hub.repository import Content, Entry, Refusal

if TYPE_CHECKING:
    from tests.support.hub.faults import Fault

Host = Literal["hub", "storage"]


@dataclass(frozen=True)
class LogEntry:
    """One request and its response; status 0: there was none."""

    host: Host
    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int
    range: str | None


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    host: Host
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        """Return the fields of the query."""
        return parse_qs(urlsplit(self.path).query)

    def flag(self, name: str) -> bool:
        """Return whether a field of the query is true."""
        return self.query.get(name, [""])[-1].lower() in ("true", "1")


class Patch(NamedTuple):
    """A change of the bytes of a file from `start` up to `stop`."""

    start: int
    stop: int
    change: Callable[[bytes], bytes]


class Event(NamedTuple):
    """Something that happens after `at` bytes of a body; `lines` is how many are not too many."""

    at: int
    kind: Literal["reset", "cut", "stall", "trickle"]
    value: float
    fault: Fault
    lines: int = 0

    def rate(self, lines: int) -> float:
        """Return the bytes a second of each of so many bodies."""
        is_crowd = 0 < self.lines < lines
        return self.value * self.lines / 2 / lines if is_crowd else self.value


@dataclass(frozen=True)
class Response:
    """A response: bytes `start` to `stop` of a content, changed by patches, then a tail."""

    status: int
    headers: dict[str, str]
    content: Content
    start: int
    stop: int
    entry: Entry | None = None
    is_file: bool = False
    patches: tuple[Patch, ...] = ()
    tail: bytes = b""
    events: tuple[Event, ...] = ()
    chunked: bool = False
    sized: bool = True
    silent: bool = False

    @property
    def length(self) -> int:
        """Return the bytes of the body."""
        return self.stop - self.start + len(self.tail)

    def plain(self, begin: int, end: int) -> bool:
        """Return whether these bytes of the body are bytes of a file on disk."""
        first, last = self.start + begin, self.start + end
        changed = any(p.start < last and first < p.stop for p in self.patches)
        return self.content.file is not None and last <= self.stop and not changed

    def read(self, begin: int, end: int) -> bytes | memoryview:
        """Return the bytes of the body from `begin` up to `end`."""
        first, last = self.start + begin, min(self.start + end, self.stop)
        data = self.content.read(first, last) if first < last else b""
        for patch in self.patches:
            low, high = max(first, patch.start), min(last, patch.stop)
            if low < high:
                changed = bytearray(data)
                part = slice(low - first, high - first)
                changed[part] = patch.change(bytes(changed[part]))
                data = bytes(changed)
        behind = self.start + end - self.stop
        if behind > 0:
            data = bytes(data) + self.tail[max(first - self.stop, 0) : behind]
        return data

    def without(self, *names: str) -> dict[str, str]:
        """Return the headers without those."""
        lowered = [name.lower() for name in names]
        return {name: v for name, v in self.headers.items() if name.lower() not in lowered}


def whole_response(
    status: int, body: bytes, kind: str, headers: Mapping[str, str], entry: Entry | None = None
) -> Response:
    content = Content(body)
    return Response(status, {"Content-Type": kind, **headers}, content, 0, content.size, entry)


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return whole_response(
        status, json.dumps(data).encode(), "application/json; charset=utf-8", headers or {}
    )


def text_response(
    body: bytes,
    status: int = 200,
    kind: str = "text/plain; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Response:
    return whole_response(status, body, kind, headers or {})


def redirect(
    status: int, location: str, headers: Mapping[str, str], entry: Entry | None
) -> Response:
    phrase = HTTPStatus(status).phrase
    body = f"{phrase}. Redirecting to {location}".encode()
    kind = "text/plain; charset=utf-8"
    return whole_response(status, body, kind, {"Location": location, **headers}, entry)


def s3_error(status: int, code: str, message: str) -> Response:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return text_response((head + body).encode(), status, "application/xml")


def file_response(
    request: Request, entry: Entry, content: Content, headers: dict[str, str], ranges: bool = True
) -> Response:
    """Return the content of a file, or the range of it that was requested."""
    headers = headers | {"Accept-Ranges": "bytes"}
    etag = headers.get("ETag", "")
    everything = Response(200, headers, content, 0, content.size, entry, is_file=True)
    if request.headers.get("if-match", etag) not in (etag, "*"):
        return text_response(b"", 412)
    if request.headers.get("if-none-match") == etag:
        return replace(everything, status=304, stop=0, is_file=False)
    same = request.headers.get("if-range", etag) in (etag, headers.get("Last-Modified"))
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not ranges or not same or found is None or found[0] == "bytes=-":
        return everything
    if found[1]:
        start = int(found[1])
        stop = min(int(found[2]) + 1, content.size) if found[2] else content.size
    else:
        start, stop = max(content.size - int(found[2]), 0), content.size
    if found[1] and found[2] and int(found[2]) < start:
        return everything
    if start >= content.size:
        refused = {"Content-Range": f"bytes */{content.size}"}
        return text_response(b"Requested Range Not Satisfiable", 416, headers=refused)
    return range_response(everything, start, stop, content.size)


def range_response(response: Response, start: int, stop: int, size: int) -> Response:
    headers = response.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return replace(response, status=206, headers=headers, start=start, stop=stop)


def refused(refusal: Refusal, api: bool) -> Response:
    """Return the response for a refusal: JSON from the API, else text."""
    if api:
        return json_response({"error": refusal.message}, refusal.status, refusal.headers)
    return text_response(refusal.message.encode(), refusal.status, headers=refusal.headers)

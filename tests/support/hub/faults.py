"""The table of faults that a server may have: each a name, a sentence and its code.

To add a fault, write a function with a row above it:

    @_fault("no-content-range", "206 without Content-Range.")
    def _no_content_range(exchange: Exchange) -> Response | None:
        ...

The function returns the changed response, or None where the fault cannot apply. Its
keyword arguments are the options of the fault.
"""

from __future__ import annotations

import gzip
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.hub.repository import Content
from tests.support.hub.responses import (
    Event,
    Host,
    Patch,
    Request,
    Response,
    file_response,
    range_response,
    redirect,
    text_response,
)

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer

_PORTAL = b"<!DOCTYPE html>\n<html><body><h1>Welcome to the guest network</h1></body></html>\n"


class Fault:
    """A fault that is on until it is cleared; `hits` counts how often it was applied."""

    def __init__(
        self,
        name: str,
        match: str,
        host: Host | None,
        method: str | None,
        times: int | None,
        after: int,
        options: dict[str, Any],
    ) -> None:
        self.name = name
        self.hits = 0
        self.cleared = threading.Event()
        self._match = match
        self._host = host
        self._method = method
        self._times = times
        self._after = after
        self._options = options
        self._lock = threading.Lock()
        inspect.signature(FAULTS[name].effect).bind(None, **options)

    def clear(self) -> None:
        """Switch the fault off, also where it is holding up a response."""
        self.cleared.set()

    def apply(self, hub: HubServer, request: Request, response: Response) -> Response:
        """Return the changed response, or the same one where the fault does not apply."""
        if response.silent or self.cleared.is_set() or not self._matches(request, response):
            return response
        changed = FAULTS[self.name].effect(Exchange(hub, self, request, response), **self._options)
        return response if changed is None or not self._counted() else changed

    def _matches(self, request: Request, response: Response) -> bool:
        names = [request.path, request.path.partition("?")[0]]
        if response.entry is not None:
            names.append(response.entry.path)
        return (
            self._host in (None, request.host)
            and self._method in (None, request.method)
            and any(fnmatchcase(name, self._match) for name in names)
        )

    def _counted(self) -> bool:
        with self._lock:
            if self._after > 0:
                self._after -= 1
                return False
            if self._times is not None and self.hits >= self._times:
                return False
            self.hits += 1
            return True


class Exchange(NamedTuple):
    """A request with its response, as a fault receives it."""

    hub: HubServer
    fault: Fault
    request: Request
    response: Response

    @property
    def has_file(self) -> bool:
        """Return whether the body is the body of a file."""
        return self.response.is_file and self.request.method == "GET"

    @property
    def is_partial(self) -> bool:
        """Return whether the body is a range of a file."""
        return self.has_file and self.response.status == 206


Effect = Callable[..., Response | None]


class FaultKind(NamedTuple):
    """A row of the table: a name, what goes wrong, and the code that makes it so."""

    name: str
    sentence: str
    effect: Effect


#: The table of all faults, in the order in which they are applied: those that replace a
#: response come before those that change one.
FAULTS: dict[str, FaultKind] = {}


def _fault(name: str, sentence: str) -> Callable[[Effect], Effect]:
    """Add a function to the table; it returns the new response, or None if it cannot apply."""

    def add(effect: Effect) -> Effect:
        FAULTS[name] = FaultKind(name, sentence, effect)
        return effect

    return add


@_fault("status", "The status `code` in place of the response: 429, 503, 404, 401, ...")
def _status(
    exchange: Exchange,
    *,
    code: int,
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
) -> Response:
    text = HTTPStatus(code).phrase if body is None else body
    data = text.encode() if isinstance(text, str) else text
    return replace(text_response(data, code, headers=headers), entry=exchange.response.entry)


@_fault("redirect", "A redirect to `location`.")
def _redirect(exchange: Exchange, *, location: str, code: int = 302) -> Response:
    return redirect(code, location, {}, exchange.response.entry)


@_fault("moved", "A redirect to the same path with another query.")
def _moved(exchange: Exchange) -> Response:
    location = exchange.request.path.partition("?")[0] + "?moved=1"
    return redirect(307, location, {}, exchange.response.entry)


@_fault("html", "200 and the page of a captive portal, said to be of a type.")
def _html(
    exchange: Exchange, *, body: bytes = _PORTAL, kind: str = "text/html; charset=utf-8"
) -> Response:
    page = text_response(body, kind=kind)
    return replace(page, entry=exchange.response.entry)


@_fault("close", "No response: the connection is closed.")
def _close(exchange: Exchange) -> Response:
    return replace(exchange.response, silent=True)


@_fault("expire", "A signed URL that lives for only `seconds`.")
def _expire(exchange: Exchange, *, seconds: float) -> Response | None:
    response = exchange.response
    location = response.headers.get("Location", "")
    if response.entry is None or not location.startswith(exchange.hub.storage):
        return None
    location = exchange.hub.sign(response.entry, seconds)
    return replace(response, headers=response.headers | {"Location": location})


@_fault("dead-address", "A signed URL at an address where nobody listens.")
def _dead_address(exchange: Exchange, *, address: str) -> Response | None:
    response = exchange.response
    location = response.headers.get("Location", "")
    if not location.startswith(exchange.hub.storage):
        return None
    location = location.replace(exchange.hub.storage, f"http://{address}", 1)
    return replace(response, headers=response.headers | {"Location": location})


@_fault("lfs-pointer", "200 and the text of the LFS pointer in place of the file.")
def _lfs_pointer(exchange: Exchange) -> Response | None:
    entry = exchange.response.entry
    if entry is None or not entry.sha256 or exchange.request.method != "GET":
        return None
    kept = {n: v for n, v in exchange.response.headers.items() if n == "X-Repo-Commit"}
    headers = kept | {"ETag": f'"{entry.oid}"'}
    return replace(text_response(entry.pointer, headers=headers), entry=entry)


@_fault("other-bytes", "`content` in place of the file, under the same headers.")
def _other_bytes(exchange: Exchange, *, content: bytes) -> Response | None:
    response = exchange.response
    if not exchange.has_file or response.entry is None:
        return None
    headers = response.without("Content-Range")
    return file_response(exchange.request, response.entry, Content(content), headers)


@_fault("no-range", "200 and the whole file although a range was requested.")
def _no_range(exchange: Exchange) -> Response | None:
    response = exchange.response
    if not exchange.is_partial or response.entry is None:
        return None
    headers = response.without("Content-Range")
    return file_response(exchange.request, response.entry, response.content, headers, ranges=False)


@_fault("wrong-range", "The range `shift` bytes later, with headers that say so.")
def _wrong_range(exchange: Exchange, *, shift: int = 1) -> Response | None:
    response = exchange.response
    size = response.content.size
    start, stop = response.start + shift, min(response.stop + shift, size)
    if not exchange.is_partial or not 0 <= start < stop:
        return None
    return range_response(response, start, stop, size)


@_fault("short", "`by` bytes less than requested, with headers that say so.")
def _short(exchange: Exchange, *, by: int = 1) -> Response | None:
    response = exchange.response
    if not exchange.has_file or response.length <= by:
        return None
    stop = response.stop - by
    if exchange.is_partial:
        return range_response(response, response.start, stop, response.content.size)
    return replace(response, stop=stop)


@_fault("cap", "At most `size` bytes of a range, with headers that say so.")
def _cap(exchange: Exchange, *, size: int) -> Response | None:
    response = exchange.response
    if not exchange.is_partial or response.length <= size:
        return None
    return range_response(response, response.start, response.start + size, response.content.size)


@_fault("long", "`by` bytes more than requested, with headers that say so.")
def _long(exchange: Exchange, *, by: int = 1) -> Response | None:
    response = exchange.response
    if not exchange.has_file:
        return None
    wanted, size = response.stop + by, response.content.size
    stop = min(wanted, size)
    extended = replace(response, stop=stop, tail=bytes(wanted - stop))
    if not exchange.is_partial:
        return extended
    said = f"bytes {response.start}-{wanted - 1}/{max(wanted, size)}"
    return replace(extended, headers=response.headers | {"Content-Range": said})


def _patched(exchange: Exchange, patch: Patch) -> Response | None:
    response = exchange.response
    if not exchange.has_file or patch.stop <= response.start or response.stop <= patch.start:
        return None
    return replace(response, patches=(*response.patches, patch))


@_fault("flip", "Every bit of the byte at `offset` of the file is inverted.")
def _flip(exchange: Exchange, *, offset: int) -> Response | None:
    return _patched(exchange, Patch(offset, offset + 1, lambda data: bytes([data[0] ^ 0xFF])))


@_fault("zeros", "`size` zero bytes at `offset` of the file.")
def _zeros(exchange: Exchange, *, offset: int, size: int) -> Response | None:
    return _patched(exchange, Patch(offset, offset + size, lambda data: bytes(len(data))))


@_fault("gzip", "200 and the whole file, compressed, whatever was requested.")
def _gzip(exchange: Exchange) -> Response | None:
    response = exchange.response
    if not exchange.has_file:
        return None
    whole = replace(response, start=0, stop=response.content.size, tail=b"")
    content = Content(gzip.compress(whole.read(0, whole.length), 1))
    headers = response.without("Content-Range", "Accept-Ranges")
    headers |= {"Content-Encoding": "gzip", "ETag": f"W/{response.headers.get('ETag')}"}
    return Response(200, headers, content, 0, content.size, response.entry)


@_fault("chunked", "The body in chunks, without a length.")
def _chunked(exchange: Exchange) -> Response | None:
    return replace(exchange.response, chunked=True) if exchange.has_file else None


@_fault("no-content-range", "206 without Content-Range.")
def _no_content_range(exchange: Exchange) -> Response | None:
    if not exchange.is_partial:
        return None
    return replace(exchange.response, headers=exchange.response.without("Content-Range"))


@_fault("content-range", "Content-Range with `last` and `total` added to its figures.")
def _content_range(exchange: Exchange, *, last: int = 0, total: int = 0) -> Response | None:
    response = exchange.response
    if not exchange.is_partial:
        return None
    said = f"bytes {response.start}-{response.stop - 1 + last}/{response.content.size + total}"
    return replace(response, headers=response.headers | {"Content-Range": said})


@_fault("etag", "Another ETag and X-Linked-Etag.")
def _etag(exchange: Exchange, *, value: str) -> Response | None:
    quoted = value if value.startswith(('"', "W/")) else f'"{value}"'
    headers = exchange.response.headers
    changed = {name: quoted for name in headers if name in ("ETag", "X-Linked-Etag")}
    return replace(exchange.response, headers=headers | changed) if changed else None


@_fault("commit", "Another X-Repo-Commit.")
def _commit(exchange: Exchange, *, value: str) -> Response | None:
    if "X-Repo-Commit" not in exchange.response.headers:
        return None
    return replace(exchange.response, headers=exchange.response.headers | {"X-Repo-Commit": value})


@_fault("add-header", "The header `name` is `value`.")
def _add_header(exchange: Exchange, *, name: str, value: str) -> Response:
    return replace(exchange.response, headers=exchange.response.headers | {name: value})


@_fault("drop-header", "The header `name` is missing.")
def _drop_header(exchange: Exchange, *, name: str) -> Response | None:
    response = exchange.response
    if name.lower() == "content-length":
        return replace(response, sized=False)
    kept = response.without(name)
    return replace(response, headers=kept) if len(kept) < len(response.headers) else None


def _event(
    exchange: Exchange, at: int, kind: Any, value: float = 0.0, lines: int = 0
) -> Response | None:
    response = exchange.response
    if exchange.request.method == "HEAD" or at >= response.length:
        return None
    event = Event(at, kind, value, exchange.fault, lines)
    return replace(response, events=(*response.events, event))


@_fault("reset", "RST after `at` bytes of the body.")
def _reset(exchange: Exchange, *, at: int = 0) -> Response | None:
    return _event(exchange, at, "reset")


@_fault("cut", "FIN after `at` bytes of the body.")
def _cut(exchange: Exchange, *, at: int = 0) -> Response | None:
    return _event(exchange, at, "cut")


@_fault("stall", "Nothing more for `seconds` after `at` bytes, then the rest.")
def _stall(exchange: Exchange, *, at: int = 0, seconds: float = 60.0) -> Response | None:
    return _event(exchange, at, "stall", seconds)


@_fault("trickle", "`rate` bytes a second after `at` bytes.")
def _trickle(exchange: Exchange, *, rate: float, at: int = 0) -> Response | None:
    return _event(exchange, at, "trickle", rate)


@_fault("crowd", "`rate` bytes a second; of more than `lines` bodies at once, half of it in all.")
def _crowd(exchange: Exchange, *, lines: int, rate: float) -> Response | None:
    return _event(exchange, 0, "trickle", rate, lines)

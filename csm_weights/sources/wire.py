"""Byte ranges over HTTP(S): by many lines at once, each going on where it broke off.

A line asks for one span with a Range header and checks that the answer is about
just that span; what it reads goes block by block into a sink, which proves it.
Nothing here trusts a server: not its lengths, not its redirects, not its speed.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError
from urllib3.exceptions import SSLError as BodySSLError
from urllib3.util import Retry

from csm_weights.digest import Stopped
from csm_weights.errors import Finding, Kind
from csm_weights.landing import BLOCK
from csm_weights.sources import Broken, Sink
from csm_weights.sources.answers import (
    asked_wait,
    cause,
    certificate_finding,
    describe,
    no_answer,
    origin,
    passing_finding,
    proxy_finding,
    redirect_target,
    shown,
    wrong_answer,
)

#: Bytes that one request asks for.
SPAN = 4 * BLOCK

#: Bytes read at a time: what is lost when a connection is reset.
READ = 256 << 10

#: Lines that are open at the same time.
LINES = 8

#: Redirects that are followed from one request.
REDIRECTS = 5

#: Seconds between two looks at the speed of the lines.
MOMENT = 0.5

#: Bytes of a refusal or a wrong page that are read, to say what it is.
PEEK = 2048

#: Answers after which the same request may succeed.
_PASSING = {408, 425, 429, 500, 502, 503, 504}

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """How patient a wire is: times in seconds, rates in bytes a second.

    A line that gives less than `least_rate` over `slow_seconds` is dropped,
    at most `slow_lines` times for one span. A server may ask for waits up to
    `longest_wait`. `tries` are the requests in a row that may bring nothing.
    """

    connect: float = 10.0
    read: float = 30.0
    tries: int = 5
    connect_tries: int = 2
    backoff: float = 0.5
    longest_wait: float = 300.0
    least_rate: int = 1024
    slow_seconds: float = 20.0
    slow_lines: int = 2


@dataclass(frozen=True)
class Place:
    """Where a file can be had just now; `headers` are for this URL's own origin only."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Location:
    """One file on a server, wherever that has it at the moment.

    `where` names it in messages and receipts, without secrets. The file is
    `size` bytes long; its first one is byte `offset` of the artifact.
    """

    def __init__(self, where: str, size: int, offset: int = 0) -> None:
        self.where = where
        self.size = size
        self.offset = offset
        self.lock = threading.Lock()
        self.has_ranges = True
        self.etag: str | None = None
        self.stream: _Line | None = None

    def place(self) -> Place:
        """Where the file is; raises Broken."""
        raise NotImplementedError

    def refused(self, place: Place, response: requests.Response) -> Finding | None:
        """What a refusal at `place` means, or None where there is another place now."""
        raise NotImplementedError


class _NoAuth(AuthBase):
    """Keeps requests from taking credentials from .netrc: ours are in headers, or nowhere."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class _NoRanges(Exception):
    """The server answers a range with the whole file."""


class _Trouble(Exception):
    """Something that may pass, or not: a finding, and how long to wait if the server said so."""

    def __init__(self, finding: Finding, seconds: float | None = None, connected: bool = True):
        super().__init__(finding.line())
        self.finding = finding
        self.seconds = seconds
        self.connected = connected


class Wire:
    """All transfers of one run: a pool of connections, of lines, and one who watches them."""

    def __init__(
        self,
        stop: threading.Event,
        say: Say = lambda _: None,
        limits: Limits | None = None,
        lines: int = LINES,
    ) -> None:
        self.limits = limits or Limits()
        self._stop = stop
        self._say = say
        self._session = requests.Session()
        self._session.auth = _NoAuth()
        self._session.headers["User-Agent"] = f"csm-weights/{version('csm-weights')}"
        self._session.headers["Accept-Encoding"] = "identity"
        adapter = HTTPAdapter(pool_connections=8, pool_maxsize=2 * lines, max_retries=0)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)
        self._pool = ThreadPoolExecutor(lines)
        self._lock = threading.Lock()
        self._open_lines: set[_Line] = set()
        self._quiet_until: dict[str, float] = {}
        self._is_closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._watcher.join()
        self._session.close()

    # ---- one request

    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer to a request without a body worth reading, after retries.

        Redirects and refusals are answers too. Raises Broken when the network
        or the server fails, Stopped.
        """
        patience = _Patience(self)
        while True:
            try:
                with self._request(method, url, headers) as response:
                    return response
            except _Trouble as trouble:
                patience.wait(trouble, url)

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """One try; raises _Trouble where there is no answer, or one that may pass."""
        host = urlsplit(url).netloc.rpartition("@")[2]
        self._pause(self._quiet_until.get(host, 0.0) - time.monotonic())
        limits = self.limits
        try:
            response = self._session.request(
                method,
                url,
                headers=dict(headers),
                stream=True,
                allow_redirects=False,
                timeout=(limits.connect, limits.read),
            )
        except requests.exceptions.ProxyError as error:
            raise Broken([proxy_finding(host, cause(error))]) from None
        except requests.exceptions.SSLError as error:
            raise Broken([certificate_finding(host, error)]) from None
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            is_read = isinstance(error, requests.exceptions.ReadTimeout)
            raise _Trouble(no_answer(host, error), connected=is_read) from None
        if response.status_code == 407:
            response.close()
            raise Broken([proxy_finding(host, "407 proxy authentication required")])
        if response.status_code in _PASSING:
            response.close()
            seconds = asked_wait(response.headers)
            if seconds is not None and seconds <= limits.longest_wait:
                self._quiet_until[host] = time.monotonic() + seconds
            raise _Trouble(passing_finding(host, response, seconds), seconds)
        return response

    def _follow(self, place: Place, headers: Mapping[str, str]) -> requests.Response:
        """A GET, by redirects if need be; a place's own headers go to its own origin only."""
        url = place.url
        for _ in range(REDIRECTS):
            own = place.headers if origin(url) == origin(place.url) else {}
            response = self._request("GET", url, {**headers, **own})
            if not response.is_redirect:
                return response
            response.close()
            url = redirect_target(url, response.headers["Location"])
        finding = Finding(
            Kind.REDIRECT, shown(place.url), f"at most {REDIRECTS} redirects", "more, in a circle?"
        )
        raise Broken([finding])

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and self._stop.wait(seconds):
            raise Stopped

    def pause(self, seconds: float, why: Finding) -> None:
        """Waits, and says so where a person would wonder; raises Stopped."""
        if seconds >= 1:
            self._say(f"{why.where}: {why.kind} ({why.found}); trying again in {seconds:.0f} s")
        self._pause(seconds)

    # ---- one file

    def fetch(self, location: Location, sink: Sink) -> None:
        """Puts what the sink wants of a file into it, by many lines or, without ranges, by one.

        Raises Broken; what was put until then stays in the sink.
        """
        try:
            if location.has_ranges:
                self._fetch_spans(location, sink)
                return
        except _NoRanges:
            location.has_ranges = False
        self._read_through(location, sink)

    def _fetch_spans(self, location: Location, sink: Sink) -> None:
        over = threading.Event()
        spans = [span for wanted in sink.wanted() for span in _spans(*wanted)]
        futures: list[Future[None]] = [
            self._pool.submit(self._fetch_span, location, span, sink, over) for span in spans
        ]
        try:
            _, left = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            over.set()
        for future in left:
            future.cancel()
        wait(futures)
        errors = [e for f in futures if not f.cancelled() and (e := f.exception())]
        errors.sort(key=lambda error: isinstance(error, Stopped))
        if errors:
            raise errors[0]

    def _fetch_span(
        self, location: Location, span: tuple[int, int], sink: Sink, over: threading.Event
    ) -> None:
        at, end = span
        patience = _Patience(self)
        while at < end:
            if over.is_set() or self._stop.is_set():
                raise Stopped
            place = location.place()
            line: _Line | None = None
            try:
                with self._line(location, place, at, end, over) as line:
                    line.read_into(sink)
            except _Trouble as trouble:
                if line and line.at > at and not line.is_too_slow:
                    patience = _Patience(self)
                patience.wait(trouble, place.url)
            finally:
                at = line.at if line else at

    @contextlib.contextmanager
    def _line(
        self, location: Location, place: Place, at: int, end: int, over: threading.Event
    ) -> Iterator[_Line]:
        """An open line that will give the bytes `[at, end)` of the artifact."""
        start, stop = at - location.offset, end - location.offset
        response = self._follow(place, {"Range": f"bytes={start}-{stop - 1}"})
        with contextlib.closing(response):
            self._check_answer(location, place, response, start, stop)
            line = _Line(response, at, end, self.limits, over)
            with self._watched(line):
                yield line

    @contextlib.contextmanager
    def _watched(self, line: _Line) -> Iterator[None]:
        with self._lock:
            self._open_lines.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._open_lines.discard(line)

    def _watch(self) -> None:
        """Cuts lines that are too slow, and all of them when the run is stopped."""
        while not self._is_closed.wait(MOMENT):
            with self._lock:
                lines = list(self._open_lines)
            for line in lines:
                line.check_speed(is_stopped=self._stop.is_set() or line.over.is_set())

    def _check_answer(
        self,
        location: Location,
        place: Place,
        response: requests.Response,
        start: int,
        stop: int,
    ) -> None:
        """Raises unless the answer is about the bytes `[start, stop)` of this very file."""
        headers, where = response.headers, location.where
        if response.status_code not in (200, 206, 416):
            finding = location.refused(place, response)
            if finding is None:
                expired = Finding(Kind.FORBIDDEN, where, "a URL that is valid", "an expired one")
                raise _Trouble(expired, seconds=0)
            raise Broken([finding])
        if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
            raise wrong_answer(where, "the bytes as they are", f"them encoded as {encoding}")
        if response.status_code == 200:
            _check_whole(location, response)
            if (start, stop) != (0, location.size):
                raise _NoRanges
            return
        found = headers.get("Content-Range", "none")
        match = _CONTENT_RANGE.fullmatch(found)
        if response.status_code == 416 or not match:
            raise wrong_answer(where, f"bytes {start}-{stop - 1}/{location.size}", found)
        first, last, total = match.groups()
        length = headers.get("Content-Length", str(stop - start))
        if (int(first), int(last) + 1, length) != (start, stop, str(stop - start)) or (
            total not in ("*", str(location.size))
        ):
            found = f"{found}, {length} bytes of body"
            raise wrong_answer(where, f"bytes {start}-{stop - 1}/{location.size}", found)
        _check_etag(location, headers.get("ETag"))

    # ---- a file on a server without ranges

    def _read_through(self, location: Location, sink: Sink) -> None:
        """Reads the file from its start, once for pieces that follow each other."""
        with location.lock:
            for start, end in sink.wanted():
                at, patience = start, _Patience(self)
                while at < end:
                    place = location.place()
                    try:
                        self._stream_to(location, place, at, end, sink)
                    except _Trouble as trouble:
                        reached = location.stream.at if location.stream else at
                        patience = patience if reached <= at else _Patience(self)
                        at = max(at, min(reached, end))
                        self._hang_up(location)
                        patience.wait(trouble, place.url)
                    else:
                        at = end
            if location.stream and location.stream.at == location.offset + location.size:
                self._hang_up(location)

    def _stream_to(self, location: Location, place: Place, at: int, end: int, sink: Sink) -> None:
        if location.stream is None or location.stream.at > at:
            self._hang_up(location)
            response = self._follow(place, {})
            self._check_answer(location, place, response, 0, location.size)
            location.stream = _Line(
                response, location.offset, location.offset, self.limits, self._stop
            )
        line = location.stream
        with self._watched(line):
            line.skip_to(at)
            line.end = end
            line.read_into(sink)

    def _hang_up(self, location: Location) -> None:
        if location.stream:
            location.stream.close()
        location.stream = None


class _Line:
    """The body of one answer: the bytes `[at, end)` of an artifact, `at` moving on."""

    def __init__(
        self,
        response: requests.Response,
        at: int,
        end: int,
        limits: Limits,
        over: threading.Event,
    ) -> None:
        self.at = at
        self.end = end
        self.over = over
        self.is_too_slow = False
        self._response = response
        self._host = urlsplit(response.url).netloc
        self._limits = limits
        self._came = self._came_before = 0
        self._since = time.monotonic()

    def close(self) -> None:
        """Ends the connection: what is left of the body is not wanted."""
        self._response.close()

    def read_into(self, sink: Sink) -> None:
        """Reads up to `end`, block by block; what came before a failure is put too."""
        while self.at < self.end:
            if self.over.is_set():
                raise Stopped
            # Blocks lie on a grid, whatever byte a line goes on from.
            room = min(self.end, (self.at // BLOCK + 1) * BLOCK) - self.at
            block, trouble, size = sink.lend(), None, 0
            try:
                while size < room:
                    with block.view[size : min(room, size + READ)] as view:
                        size += self._read(view)
            except _Trouble as error:
                trouble = error
            sink.put(block, self.at, size)
            self.at += size
            if trouble:
                raise trouble

    def skip_to(self, at: int) -> None:
        """Reads and throws away what comes before byte `at`."""
        with memoryview(bytearray(READ)) as waste:
            while self.at < at:
                if self.over.is_set():
                    raise Stopped
                with waste[: min(READ, at - self.at)] as view:
                    self.at += self._read(view)

    def _read(self, view: memoryview) -> int:
        """Bytes read into `view`, one at least; raises _Trouble."""
        try:
            count: int = self._response.raw.readinto(view)
        except BodySSLError as error:
            raise Broken([certificate_finding(self._host, error)]) from None
        except (HTTPError, OSError, ValueError) as error:
            raise _Trouble(self._lost(cause(error))) from None
        if not count:
            raise _Trouble(self._lost("the connection was closed"))
        self._came += count
        return count

    def _lost(self, found: str) -> Finding:
        if self.is_too_slow:
            limits = self._limits
            least = f"at least {limits.least_rate:,} bytes a second over {limits.slow_seconds:g} s"
            return Finding(Kind.TOO_SLOW, self._host, least, "less", "try again later")
        expected = "the whole body of an answer"
        return Finding(Kind.NO_NETWORK, self._host, expected, found, "run the same command again")

    def check_speed(self, is_stopped: bool) -> None:
        """Cuts the line when it gave too little for too long, or when the run is stopped."""
        now, limits = time.monotonic(), self._limits
        seconds = now - self._since
        if not is_stopped and seconds < limits.slow_seconds:
            return
        is_slow = self._came - self._came_before < limits.least_rate * seconds
        self._came_before, self._since = self._came, now
        if is_stopped or is_slow:
            self.is_too_slow = not is_stopped
            # It may have ended meanwhile, which is as good.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._response.raw.shutdown()


class _Patience:
    """How often the same request is made again, and how long is waited in between."""

    def __init__(self, wire: Wire) -> None:
        limits = wire.limits
        self._wire = wire
        self._slow = limits.slow_lines
        self._retry = Retry(
            total=limits.tries,
            connect=limits.connect_tries,
            backoff_factor=limits.backoff,
            backoff_jitter=limits.backoff,
            backoff_max=30,
        )

    def wait(self, trouble: _Trouble, url: str) -> None:
        """Waits before the next try; raises Broken where there is none, Stopped."""
        finding, seconds = trouble.finding, trouble.seconds
        self._slow -= finding.kind is Kind.TOO_SLOW
        longest = self._wire.limits.longest_wait
        if self._slow <= 0 or (seconds is not None and seconds > longest):
            raise Broken([finding])
        error = None if trouble.connected else ConnectTimeoutError()
        try:
            self._retry = self._retry.increment("GET", url, error=error)
        except MaxRetryError:
            raise Broken([finding]) from None
        backoff = self._retry.get_backoff_time()
        self._wire.pause(max(seconds, 0) if seconds is not None else backoff, finding)


def _spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges that tile `[start, end)`, cut where multiples of `SPAN` are."""
    while start < end:
        cut = min(end, (start // SPAN + 1) * SPAN)
        yield start, cut
        start = cut


def _check_whole(location: Location, response: requests.Response) -> None:
    """Raises Broken unless an answer without a range can be the whole file."""
    length = response.headers.get("Content-Length")
    if length is not None and length != str(location.size):
        with contextlib.suppress(HTTPError, OSError):
            head = response.raw.read(PEEK)
            raise wrong_answer(
                location.where,
                f"a file of {location.size:,} bytes",
                f"{length} bytes: {describe(head, response.headers.get('Content-Type', ''))}",
            )
    _check_etag(location, response.headers.get("ETag"))


def _check_etag(location: Location, etag: str | None) -> None:
    first, location.etag = location.etag, location.etag or etag
    if first and etag and etag != first:
        help_text = "the file there was replaced meanwhile; run the same command again"
        finding = Finding(
            Kind.CHANGED, location.where, f"the file with ETag {first}", etag, help_text
        )
        raise Broken([finding])

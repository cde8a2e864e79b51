"""Byte ranges over HTTP(S): by many lines at once, each going on where it broke off.

A line asks for one span with a Range header and checks that the answer is about
just that span; what it reads goes block by block into a sink, which proves it.
Nothing here trusts a server: not its lengths, not its redirects, not its speed.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.client import HttpClient, Log, RetryPolicy, Timeouts, TransientError
from csm_weights.transfer.http.responses import cause, describe, wrong_answer
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import PieceWriter, SourceError

#: Bytes that one request asks for. A kill loses at most this much a line: 20 MiB in all.
SPAN = 2 * BLOCK

#: Bytes read at a time: what is lost when a connection is reset.
READ = 256 << 10

#: Bytes that a line must have brought for a break to count as the first one again.
PROGRESS = 16 << 10

#: Lines that are open at the same time.
LINES = 5

#: Seconds between two looks at the speed of the lines.
MOMENT = 0.5

#: Bytes of a refusal or a wrong page that are read, to say what it is.
PEEK = 2048

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)


@dataclass(frozen=True)
class ResolvedUrl:
    """Where a file can be had just now; `headers` are for this URL's own origin only."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class RemoteFile(ABC):
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
        self.stream: _RangeStream | None = None

    @abstractmethod
    def place(self) -> ResolvedUrl:
        """Where the file is; raises Broken."""

    @abstractmethod
    def refused(self, place: ResolvedUrl, response: requests.Response) -> Finding | None:
        """What a refusal at `place` means, or None where there is another place now."""


class _NoRanges(Exception):
    """The server answers a range with the whole file."""


class RangeDownloader(HttpClient):
    """All transfers of one run: a pool of lines, and one who watches them."""

    def __init__(
        self,
        cancel: threading.Event,
        log: Log = lambda _: None,
        limits: Timeouts | None = None,
        lines: int = LINES,
    ) -> None:
        super().__init__(cancel, log, limits or Timeouts(), 2 * lines)
        self._pool = ThreadPoolExecutor(lines)
        self._lock = threading.Lock()
        self._open_lines: set[_RangeStream] = set()
        self._is_closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> RangeDownloader:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._watcher.join()
        self.hang_up()

    def fetch(self, location: RemoteFile, sink: PieceWriter) -> None:
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

    def _fetch_spans(self, location: RemoteFile, sink: PieceWriter) -> None:
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
        errors.sort(key=lambda error: isinstance(error, Cancelled))
        if errors:
            raise errors[0]

    def _fetch_span(
        self, location: RemoteFile, span: tuple[int, int], sink: PieceWriter, over: threading.Event
    ) -> None:
        at, end = span
        patience = RetryPolicy(self)
        while at < end:
            if over.is_set() or self.cancel.is_set():
                raise Cancelled
            place = location.place()
            line: _RangeStream | None = None
            try:
                with self._line(location, place, at, end, over) as line:
                    line.read_into(sink)
            except TransientError as trouble:
                if line and line.at - at >= PROGRESS and not line.is_too_slow:
                    patience = RetryPolicy(self)
                patience.wait(trouble, place.url)
            finally:
                at = line.at if line else at

    @contextlib.contextmanager
    def _line(
        self, location: RemoteFile, place: ResolvedUrl, at: int, end: int, over: threading.Event
    ) -> Iterator[_RangeStream]:
        """An open line that will give the bytes `[at, end)` of the artifact."""
        start, stop = at - location.offset, end - location.offset
        response = self.follow(place.url, place.headers, {"Range": f"bytes={start}-{stop - 1}"})
        with contextlib.closing(response):
            self._check_answer(location, place, response, start, stop)
            line = _RangeStream(response, at, end, self.limits, over)
            with self._watched(line):
                yield line

    @contextlib.contextmanager
    def _watched(self, line: _RangeStream) -> Iterator[None]:
        line.is_reading(True)
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
            self.end_waits()
            for line in lines:
                line.check_speed(is_stopped=self.cancel.is_set() or line.over.is_set())

    def _check_answer(
        self,
        location: RemoteFile,
        place: ResolvedUrl,
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
                raise TransientError(expired, seconds=0)
            raise SourceError([finding])
        if (encoding := headers.get("Content-Encoding", "identity")).lower() != "identity":
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

    def _read_through(self, location: RemoteFile, sink: PieceWriter) -> None:
        """Reads the file from its start, once for pieces that follow each other."""
        with location.lock:
            for start, end in sink.wanted():
                at, patience = start, RetryPolicy(self)
                while at < end:
                    place = location.place()
                    try:
                        self._stream_to(location, place, at, end, sink)
                    except TransientError as trouble:
                        reached = location.stream.at if location.stream else at
                        patience = patience if reached - at < PROGRESS else RetryPolicy(self)
                        at = max(at, min(reached, end))
                        self._hang_up(location)
                        patience.wait(trouble, place.url)
                    else:
                        at = end
            if location.stream and location.stream.at == location.offset + location.size:
                self._hang_up(location)

    def _stream_to(
        self, location: RemoteFile, place: ResolvedUrl, at: int, end: int, sink: PieceWriter
    ) -> None:
        if location.stream is None or location.stream.at > at:
            self._hang_up(location)
            response = self.follow(place.url, place.headers)
            self._check_answer(location, place, response, 0, location.size)
            location.stream = _RangeStream(
                response, location.offset, location.offset, self.limits, self.cancel
            )
        line = location.stream
        with self._watched(line):
            line.skip_to(at)
            line.end = end
            line.read_into(sink)

    def _hang_up(self, location: RemoteFile) -> None:
        if location.stream:
            location.stream.close()
        location.stream = None


class _RangeStream:
    """The body of one answer: the bytes `[at, end)` of an artifact, `at` moving on."""

    def __init__(
        self,
        response: requests.Response,
        at: int,
        end: int,
        limits: Timeouts,
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

    def read_into(self, sink: PieceWriter) -> None:
        """Reads up to `end`, block by block; what came before a failure is put too."""
        while self.at < self.end:
            if self.over.is_set():
                raise Cancelled
            # Blocks lie on a grid, whatever byte a line goes on from.
            room = min(self.end, (self.at // BLOCK + 1) * BLOCK) - self.at
            block, trouble, size = sink.acquire_buffer(), None, 0
            try:
                while size < room:
                    with block.view[size : min(room, size + READ)] as view:
                        size += self._read(view)
            except TransientError as error:
                trouble = error
            self.is_reading(False)
            sink.write(block, self.at, size)
            self.is_reading(True)
            self.at += size
            if trouble:
                raise trouble

    def skip_to(self, at: int) -> None:
        """Reads and throws away what comes before byte `at`."""
        with memoryview(bytearray(READ)) as waste:
            while self.at < at:
                if self.over.is_set():
                    raise Cancelled
                with waste[: min(READ, at - self.at)] as view:
                    self.at += self._read(view)

    def _read(self, view: memoryview) -> int:
        """Bytes read into `view`, one at least; raises Trouble."""
        try:
            count: int = self._response.raw.readinto(view)
        except (HTTPError, OSError, ValueError) as error:
            raise TransientError(self._lost(cause(error))) from None
        if not count:
            raise TransientError(self._lost("the connection was closed"))
        self._came += count
        return count

    def _lost(self, found: str) -> Finding:
        if self.is_too_slow:
            limits = self._limits
            least = f"at least {limits.least_rate:,} bytes a second over {limits.slow_seconds:g} s"
            return Finding(Kind.TOO_SLOW, self._host, least, "less", "try again later")
        expected = "the whole body of an answer"
        return Finding(Kind.NO_NETWORK, self._host, expected, found, "run the same command again")

    def is_reading(self, reading: bool) -> None:
        """Says whether the server is waited for; what else takes time is not its fault."""
        self._since = time.monotonic() if reading else math.inf
        self._came_before = self._came

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


def _spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges that tile `[start, end)`, cut where multiples of `SPAN` are."""
    while start < end:
        cut = min(end, (start // SPAN + 1) * SPAN)
        yield start, cut
        start = cut


def _check_whole(location: RemoteFile, response: requests.Response) -> None:
    """Raises Broken unless an answer without a range can be the whole file."""
    length = response.headers.get("Content-Length")
    if length is not None and length != str(location.size):
        head = b""
        with contextlib.suppress(HTTPError, OSError):
            head = response.raw.read(PEEK)
        raise wrong_answer(
            location.where,
            f"a file of {location.size:,} bytes",
            f"{length} bytes: {describe(head, response.headers.get('Content-Type', ''))}",
        )
    _check_etag(location, response.headers.get("ETag"))


def _check_etag(location: RemoteFile, etag: str | None) -> None:
    first, location.etag = location.etag, location.etag or etag
    if first and etag and etag != first:
        help_text = "the file there was replaced meanwhile; run the same command again"
        finding = Finding(
            Kind.CHANGED, location.where, f"the file with ETag {first}", etag, help_text
        )
        raise SourceError([finding])

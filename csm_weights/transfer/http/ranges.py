"""Byte ranges over HTTP(S), by several streams at once, each going on where it broke off.

A stream asks for one span with a Range header and checks that the answer is
about that span. What it reads goes block by block into a `PieceWriter`, which
verifies it. No server is trusted: not its lengths, its redirects or its speed.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import requests
from urllib3.exceptions import HTTPError

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, Log, RetryPolicy, Timeouts, TransientError
from csm_weights.transfer.http.responses import (
    cause_of,
    describe_body,
    host_of,
    lost_finding,
    wrong_answer,
)
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import PieceWriter, SourceError

#: Bytes that one request asks for. A kill loses at most this much a stream: 20 MiB in all.
SPAN = 2 * BLOCK

#: Bytes read at a time: what is lost when a connection is reset.
READ = 256 << 10

#: Bytes that a stream must have brought for a failure to count as the first one again.
PROGRESS = 16 << 10

#: Streams that are open at the same time.
STREAMS = 5

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)


class RemoteFile(ABC):
    """One file on a server, wherever that has it at the moment.

    `where` names it in messages and receipts, without secrets. The file is
    `size` bytes long; its first one is byte `offset` of the artifact. `auth`
    are the credentials for the server that was named.
    """

    def __init__(self, where: str, auth: OriginAuth, size: int, offset: int = 0) -> None:
        self.where = where
        self.auth = auth
        self.size = size
        self.offset = offset
        self.lock = threading.Lock()
        self.has_ranges = True
        self.etag: str | None = None
        self.stream: RangeStream | None = None

    @abstractmethod
    def resolve(self) -> str:
        """Return the URL where the file can be had just now; raise SourceError."""

    def forget(self, url: str) -> None:  # noqa: B027
        """Resolve anew the next time, where `url` is what was resolved and can change."""

    @abstractmethod
    def classify_refusal(self, url: str, response: requests.Response) -> Exception:
        """Return what a refusal at `url` means: SourceError, or TransientError if it may pass."""


class RemoteSource(ABC):
    """A server as a source.

    Once it has refused, or could not be reached after all retries, it is not
    asked again in this run. `page` names all of it in findings; `reached` are
    the URLs, without their queries, where it hands files out.
    """

    is_remote = True

    def __init__(self, downloader: RangeDownloader, url: str, page: str) -> None:
        self.downloader = downloader
        self.url = url
        self.page = page
        self.refusal: Finding | None = None
        self.reached: set[str] = set()
        self._lock = threading.Lock()

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`; the place is the file's URL."""
        try:
            with self._lock:
                self.raise_refusal()
                file = self.find(artifact, piece)
            self.downloader.fetch(file, writer)
        except SourceError as error:
            first = error.findings[0]
            is_final = first.kind.category in (Category.ACCESS, Category.NETWORK)
            if is_final or first.where == self.page:
                self.refusal = first
            raise
        return file.where

    def raise_refusal(self) -> None:
        """Raise SourceError where the server has refused already."""
        if self.refusal:
            raise SourceError([self.refusal])

    @abstractmethod
    def find(self, artifact: Artifact, piece: Piece) -> RemoteFile:
        """Return the file with a piece; raise NotAvailable or SourceError."""


#: Opens the bytes of a file at a URL from one byte of the artifact to another.
_Open = Callable[
    [RemoteFile, str, int, int, threading.Event], AbstractContextManager["RangeStream"]
]


class _NoRanges(Exception):
    """The server answers a range with the whole file."""


class RangeDownloader(HttpClient):
    """All transfers of one run, by a pool of streams."""

    def __init__(
        self, cancel: threading.Event, log: Log = lambda _: None, timeouts: Timeouts | None = None
    ) -> None:
        super().__init__(cancel, log, timeouts)
        self._pool = ThreadPoolExecutor(STREAMS)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        super().__exit__()

    def fetch(self, file: RemoteFile, writer: PieceWriter) -> None:
        """Write what `writer` wants of a file, by several streams or, without ranges, by one.

        Raises SourceError; what was written until then stays.
        """
        if file.has_ranges:
            try:
                self._fetch_spans(file, writer)
                return
            except _NoRanges:
                file.has_ranges = False
        # From its start, once for pieces that follow each other.
        with file.lock:
            for span in writer.wanted():
                self._fetch_span(self._open_whole, file, span, writer, self.cancel)
            if file.stream and file.stream.at == file.offset + file.size:
                self._close(file)

    def _fetch_spans(self, file: RemoteFile, writer: PieceWriter) -> None:
        over = threading.Event()
        futures: list[Future[None]] = [
            self._pool.submit(self._fetch_span, self._open, file, span, writer, over)
            for wanted in writer.wanted()
            for span in _spans(*wanted)
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
        self,
        open_stream: _Open,
        file: RemoteFile,
        span: tuple[int, int],
        writer: PieceWriter,
        over: threading.Event,
    ) -> None:
        (at, end), retry = span, None
        while at < end:
            if over.is_set() or self.cancel.is_set():
                raise Cancelled
            url, started = file.resolve(), time.monotonic()
            retry = retry or RetryPolicy(self, url, over)
            stream: RangeStream | None = None
            failure: TransientError | None = None
            try:
                with open_stream(file, url, at, end, over) as stream:
                    stream.read_into(writer, at)
            except TransientError as error:
                failure = error
                is_about_url = error.is_doubtful or error.seconds == 0
                if not stream and (is_about_url or error.finding.kind is Kind.NO_NETWORK):
                    file.forget(url)
            came = stream.at - at if stream else 0
            at += max(came, 0)
            if at == end or (came >= PROGRESS and not (stream and stream.is_too_slow)):
                retry.progressed()
            if failure is None and at < end and came < PROGRESS:
                words = (f"answers of at least {PROGRESS:,} bytes", f"one of {came:,}")
                failure = _doubtful(file, *words)
            if failure:
                retry.wait(failure, started)

    @contextlib.contextmanager
    def _open(
        self, file: RemoteFile, url: str, at: int, end: int, over: threading.Event
    ) -> Iterator[RangeStream]:
        """Open a stream of the bytes `[at, end)` of the artifact, or of the first of them."""
        start, stop = at - file.offset, end - file.offset
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with contextlib.closing(self.follow("GET", url, file.auth, headers)) as response:
            stop = self._check_answer(file, url, response, start, stop)
            stream = RangeStream(response, at, file.offset + stop, self.timeouts, over)
            with self.watchdog.watching(stream.check):
                yield stream

    @contextlib.contextmanager
    def _open_whole(
        self, file: RemoteFile, url: str, at: int, end: int, over: threading.Event
    ) -> Iterator[RangeStream]:
        """Go on with the stream of the whole file, or open one; a failure ends it."""
        if file.stream is None or file.stream.at > at:
            self._close(file)
            response = self.follow("GET", url, file.auth)
            self._check_answer(file, url, response, 0, file.size)
            file.stream = RangeStream(response, file.offset, end, self.timeouts, over)
        stream = file.stream
        stream.end = end
        stream.is_reading(True)
        try:
            with self.watchdog.watching(stream.check):
                yield stream
        except TransientError:
            self._close(file)
            raise

    def _check_answer(
        self, file: RemoteFile, url: str, response: requests.Response, start: int, stop: int
    ) -> int:
        """Return where the body ends, of the bytes `[start, stop)` of this file asked for.

        Raises unless the answer is about them and begins with the first.
        """
        headers, status = response.headers, response.status_code
        if status not in (200, 206, 416):
            raise file.classify_refusal(url, response)
        if (encoding := headers.get("Content-Encoding", "identity")).lower() != "identity":
            raise _doubtful(file, "the bytes as they are", f"them encoded as {encoding}")
        if status == 200:
            length = headers.get("Content-Length", str(file.size))
            if length != str(file.size):
                head = b""
                with contextlib.suppress(HTTPError, OSError):
                    head = response.raw.read(2048)
                body = describe_body(head, headers.get("Content-Type", ""))
                raise _doubtful(file, f"a file of {file.size:,} bytes", f"{length} bytes: {body}")
            _check_etag(file, headers.get("ETag"))
            if (start, stop) != (0, file.size):
                raise _NoRanges
            return stop
        expected = f"bytes {start}-{stop - 1}/{file.size}"
        found = headers.get("Content-Range", "no Content-Range")
        match = _CONTENT_RANGE.fullmatch(found)
        if status == 416 or not match:
            raise _doubtful(file, expected, f"{status} {response.reason}, {found}")
        first, last, total = int(match[1]), int(match[2]), match[3]
        length = headers.get("Content-Length", str(last + 1 - first))
        # A server may give less than was asked for, never other bytes or more.
        is_meant = first == start <= last < stop and length == str(last + 1 - first)
        if not is_meant or total not in ("*", str(file.size)):
            raise _doubtful(file, expected, f"{found}, {length} bytes of body")
        _check_etag(file, headers.get("ETag"))
        return last + 1

    def _close(self, file: RemoteFile) -> None:
        if file.stream:
            file.stream.close()
        file.stream = None


class RangeStream:
    """The body of one answer: the bytes `[at, end)` of an artifact, `at` moving on."""

    def __init__(
        self,
        response: requests.Response,
        at: int,
        end: int,
        timeouts: Timeouts,
        over: threading.Event,
    ) -> None:
        self.at = at
        self.end = end
        self.is_too_slow = False
        self._over = over
        self._response = response
        self._host = host_of(response.url)
        self._timeouts = timeouts
        self._came = self._came_before = 0
        self._since = time.monotonic()

    def close(self) -> None:
        """End the connection: what is left of the body is not wanted."""
        self._response.close()

    def read_into(self, writer: PieceWriter, at: int) -> None:
        """Read from byte `at` to `end`, by blocks; what came before a failure is written too."""
        with memoryview(bytearray(READ)) as waste:
            while self.at < at:
                if self._over.is_set():
                    raise Cancelled
                with waste[: min(READ, at - self.at)] as view:
                    self.at += self._read(view)
        while self.at < self.end:
            if self._over.is_set():
                raise Cancelled
            # Blocks lie on a grid, whatever byte a stream goes on from.
            room = min(self.end, (self.at // BLOCK + 1) * BLOCK) - self.at
            block, failure, size = writer.acquire_buffer(), None, 0
            try:
                while size < room:
                    with block.view[size : min(room, size + READ)] as view:
                        size += self._read(view)
            except TransientError as error:
                failure = error
            self.is_reading(False)
            writer.write(block, self.at, size)
            self.is_reading(True)
            self.at += size
            if failure:
                raise failure

    def _read(self, view: memoryview) -> int:
        """Return the number of bytes read into `view`, one at least; raise TransientError."""
        try:
            count: int = self._response.raw.readinto(view)
        except (HTTPError, OSError, ValueError) as error:
            raise self._lost(cause_of(error)) from None
        if not count:
            raise self._lost("the connection was closed")
        self._came += count
        return count

    def _lost(self, found: str) -> TransientError:
        if not self.is_too_slow:
            return TransientError(lost_finding(self._host, found))
        rate, seconds = self._timeouts.least_rate, self._timeouts.slow_seconds
        least = f"at least {rate:,.0f} bytes a second over {seconds:g} s"
        return TransientError(Finding(Kind.TOO_SLOW, self._host, least, "less", "try again later"))

    def is_reading(self, reading: bool) -> None:
        """Note whether the server is waited for; what else takes time is not its fault."""
        self._since = time.monotonic() if reading else math.inf
        self._came_before = self._came

    def check(self, is_cancelled: bool) -> None:
        """End the stream when it gave too little for too long, or is not wanted any more."""
        is_cancelled = is_cancelled or self._over.is_set()
        now, timeouts = time.monotonic(), self._timeouts
        seconds = now - self._since
        if not is_cancelled and seconds < timeouts.slow_seconds:
            return
        is_slow = self._came - self._came_before < timeouts.least_rate * seconds
        self._came_before, self._since = self._came, now
        if is_cancelled or is_slow:
            self.is_too_slow = not is_cancelled
            # It may have ended meanwhile, which is as good.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._response.raw.shutdown()


def _spans(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges that tile `[start, end)`, cut where multiples of `SPAN` are."""
    while start < end:
        cut = min(end, (start // SPAN + 1) * SPAN)
        yield start, cut
        start = cut


def _doubtful(file: RemoteFile, expected: str, found: str) -> TransientError:
    """Return the error for an answer that makes no sense, and gets one more try."""
    return TransientError(wrong_answer(file.where, expected, found), is_doubtful=True)


def expired_url(where: str, response: requests.Response) -> TransientError:
    """Return the error for a URL that a server has just given and that is refused elsewhere."""
    found = f"{response.status_code} {response.reason} for the URL that was given for it"
    finding = Finding(Kind.SERVER_TROUBLE, where, "the file", found, "try again later")
    return TransientError(finding, seconds=0)


def _check_etag(file: RemoteFile, etag: str | None) -> None:
    first, file.etag = file.etag, file.etag or etag
    if first and etag and etag != first:
        help_text = "the file there was replaced meanwhile; run the same command again"
        expected = f"the file with ETag {first}"
        raise SourceError([Finding(Kind.CHANGED, file.where, expected, etag, help_text)])

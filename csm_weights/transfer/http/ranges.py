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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial as bind
from itertools import pairwise

import requests

from csm_weights.concurrency import Cancelled, run_all
from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.progress import took
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, Log, RetryPolicy, Timeouts, TransientError
from csm_weights.transfer.http.deadlines import Wait
from csm_weights.transfer.http.lines import MOST, Lines
from csm_weights.transfer.http.responses import (
    NO_ANSWER,
    cause_of,
    host_of,
    lost_finding,
    wrong_answer,
)
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import PieceWriter, SourceError

#: Bytes read at a time: what is lost when a connection is reset.
READ = 256 << 10

#: Bytes that a stream must have brought for a failure to count as the first one again.
PROGRESS = 16 << 10

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)


@dataclass
class RemoteFile:
    """One file on a server, wherever that has it at the moment.

    `where` names it in messages and receipts, without secrets. The file is
    `size` bytes long; its first one is byte `offset` of the artifact. `auth`
    are the credentials for the server that was named, `locate` asks it for the
    URL, and `refusal` describes what it answers instead of the file.
    """

    where: str
    auth: OriginAuth
    size: int
    locate: Callable[[], str]
    refusal: Callable[[requests.Response], Finding]
    offset: int = 0
    has_ranges: bool = True
    stream: RangeStream | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    _url: str | None = None
    _failure: SourceError | None = None
    _locating: threading.Lock = field(default_factory=threading.Lock)

    def resolve(self) -> str:
        """Return the URL, which all streams of the file share; raise SourceError."""
        with self._locating:
            if self._failure:
                raise self._failure
            if self._url is None:
                try:
                    self._url = self.locate()
                except SourceError as error:
                    self._failure = error
                    raise
            return self._url

    def forget(self, url: str) -> None:
        """Resolve anew the next time, if `url` is still the one and not on the server named."""
        with self._locating:
            if url == self._url and not self.auth.covers(url):
                self._url = None


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
        self._delivered: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def deliver(self, artifact: Artifact, piece: Piece, writer: PieceWriter) -> str:
        """See `Source`; the place is the file's URL."""
        file: RemoteFile | None = None
        try:
            with self._lock:
                self.raise_refusal()
                file = self.find(artifact, piece)
            # By its end: a part of a piece may be asked for, or the rest of it.
            place = artifact.path, max((end for _, end in writer.wanted()), default=piece.end)
            if times := self._delivered[place]:
                # Its bytes were wrong: over another connection, by another signed URL.
                file.forget(file.resolve())
                self.downloader.begin_afresh(times)
            self.downloader.fetch(file, writer)
            self._delivered[place] += 1
        except SourceError as error:
            first = error.findings[0]
            # An answer that makes no sense is about one file; it says nothing of the others.
            is_about_file = first.kind in (Kind.WRONG_ANSWER, Kind.REDIRECT)
            is_final = first.kind.category in (Category.ACCESS, Category.NETWORK)
            if (is_final and not is_about_file) or file is None or first.where == self.page:
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


class _NoRanges(Exception):
    """The server answers a range with the whole file."""


class RangeDownloader(HttpClient):
    """All transfers of one run, by a pool of streams, as many at once as there are `lines`."""

    def __init__(
        self,
        cancel: threading.Event,
        log: Log = lambda _: None,
        timeouts: Timeouts | None = None,
        lines: Lines | None = None,
    ) -> None:
        super().__init__(cancel, log, timeouts)
        self.lines = lines or Lines()
        # More threads than streams are open at a time, so that one of them always waits.
        self._pool = ThreadPoolExecutor(MOST + 4)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        super().__exit__()

    def fetch(self, file: RemoteFile, writer: PieceWriter) -> None:
        """Write what `writer` wants of a file, by several streams or, without ranges, by one.

        Raises SourceError; what was written until then stays.
        """
        if file.has_ranges:
            over, tasks, step = threading.Event(), [], self.lines.span
            for start, end in writer.wanted():
                # Cut where multiples of the step are.
                cuts = [start, *range((start // step + 1) * step, end, step), end]
                tasks += [bind(self._fetch_span, file, s, writer, over) for s in pairwise(cuts)]
            with contextlib.suppress(_NoRanges):
                run_all(tasks, over, pool=self._pool)
                return
            file.has_ranges = False
        # From its start, once for pieces that follow each other.
        with file.lock:
            for span in writer.wanted():
                self._fetch_span(file, span, writer, self.cancel, is_whole=True)

    def _fetch_span(
        self,
        file: RemoteFile,
        span: tuple[int, int],
        writer: PieceWriter,
        over: threading.Event,
        is_whole: bool = False,
    ) -> None:
        """Write the bytes of a half-open range of the artifact, in as many tries as it takes."""
        (at, end), retry = span, RetryPolicy(self, file.resolve(), over)

        def is_over() -> bool:
            return over.is_set() or self.cancel.is_set()

        with self.lines.line() as line:
            while at < end:
                if is_over():
                    raise Cancelled
                if not is_whole:
                    self.lines.enter(line, is_over)
                url, started = file.resolve(), time.monotonic()
                stream: RangeStream | None = None
                failure: TransientError | None = None
                try:
                    with self._open(file, url, at, end, over, is_whole) as stream:
                        gave_way = stream.read_into(writer, at, line)
                    if stream.at < min(end, at + PROGRESS) and not gave_way:
                        found = f"one of {stream.at - at:,}"
                        raise _doubtful(file, f"answers of at least {PROGRESS:,} bytes", found)
                except TransientError as error:
                    failure = error
                    is_about_url = error.is_doubtful or error.seconds == 0
                    if not stream and (is_about_url or error.finding.kind is Kind.NO_NETWORK):
                        file.forget(url)
                came = max(0, stream.at - at) if stream else 0
                at += came
                took(host_of(file.where), came)
                is_too_slow = failure is not None and failure.finding.kind is Kind.TOO_SLOW
                if at == end or (came >= PROGRESS and not is_too_slow):
                    retry.progressed()
                if failure:
                    retry.wait(failure, started)

    @contextlib.contextmanager
    def _open(
        self, file: RemoteFile, url: str, at: int, end: int, over: threading.Event, is_whole: bool
    ) -> Iterator[RangeStream]:
        """Open a stream of the bytes `[at, end)` of the artifact, or of the first of them.

        One of the whole file begins at its start, and goes on with the spans that follow.
        """
        stream = file.stream if is_whole else None
        if stream and stream.at > at:
            stream.close()
            stream = None
        if stream is None:
            start, stop = (0, file.size) if is_whole else (at - file.offset, end - file.offset)
            headers = {} if is_whole else {"Range": f"bytes={start}-{stop - 1}"}
            response = self.follow("GET", url, file.auth, headers)
            try:
                stop = _check_answer(file, response, start, stop)
            except BaseException:
                response.close()
                raise
            ends = file.offset + start, file.offset + stop
            stream = RangeStream(self, self.lines, response, *ends, over)
        if is_whole:
            stream.end, file.stream = end, None
        try:
            yield stream
            if is_whole and stream.at < file.offset + file.size:
                file.stream = stream
        finally:
            if file.stream is not stream:
                stream.close()


def _check_answer(file: RemoteFile, response: requests.Response, start: int, stop: int) -> int:
    """Return where the body ends, of the bytes `[start, stop)` of this file asked for.

    Raises unless the answer is about them and begins with the first.
    """
    headers, status = response.headers, response.status_code
    if status not in (200, 206, 416):
        if file.auth.covers(response.url):
            raise SourceError([file.refusal(response)])
        # The URL was given just now: it has expired, or another one may work.
        found = f"{status} {response.reason} for the URL that was given for it"
        words = ("the file", found, "try again later")
        raise TransientError(Finding(Kind.SERVER_TROUBLE, file.where, *words), seconds=0)
    if (encoding := headers.get("Content-Encoding", "identity")).lower() != "identity":
        raise _doubtful(file, "bytes without an encoding", f"Content-Encoding: {encoding}")
    if status == 200:
        length = headers.get("Content-Length", str(file.size))
        if length != str(file.size):
            head = b""
            with contextlib.suppress(*NO_ANSWER):
                head = response.raw.read(2048)
            kind, body = Kind.WRONG_SIZE, "another file"
            if head.startswith(b"version https://git-lfs.github.com/spec/"):
                body = "a git-lfs pointer in place of the content"
            elif head.startswith(b"Access to model ") and b" is restricted" in head:
                body = "the Hub's refusal in place of the content"
            elif "html" in headers.get("Content-Type", "") or head.lstrip()[:1] == b"<":
                kind = Kind.WRONG_ANSWER
                body = "a web page; is there a login or a captive portal in between?"
            found = f"{length} bytes: {body}"
            raise _doubtful(file, f"a file of {file.size:,} bytes", found, kind)
    else:
        expected = f"bytes {start}-{stop - 1}/{file.size}"
        found = headers.get("Content-Range", "no Content-Range")
        match = _CONTENT_RANGE.fullmatch(found)
        if status == 416 or not match:
            raise _doubtful(file, expected, f"{status} {response.reason}, {found}")
        first, last, total = int(match[1]), int(match[2]), match[3]
        length = headers.get("Content-Length", str(last + 1 - first))
        # A server may give less than was asked for, never other bytes or more.
        is_meant = first == start <= last < stop and length == str(last + 1 - first)
        is_same_size = total in ("*", str(file.size))
        if not is_meant or not is_same_size:
            kind = Kind.WRONG_SIZE if is_meant else Kind.WRONG_ANSWER
            raise _doubtful(file, expected, f"{found}, {length} bytes of body", kind)
        stop = last + 1
    if status == 200 and (start, stop) != (0, file.size):
        raise _NoRanges
    return stop


@dataclass
class RangeStream:
    """The body of one answer: the bytes `[at, end)` of an artifact, `at` moving on.

    It must bring the least rate of `Timeouts` in the seconds that are spent reading it.
    It ends when `over` is set.
    """

    client: HttpClient
    lines: Lines
    response: requests.Response
    at: int
    end: int
    over: threading.Event
    _came: int = 0
    _seconds: float = 0.0

    def close(self) -> None:
        """End the connection: what is left of the body is not wanted."""
        self.response.close()

    def read_into(self, writer: PieceWriter, at: int, line: int) -> bool:
        """Read from byte `at` to `end`, by blocks; what came before a failure is written too.

        Return True where it has stopped before, as one line fewer is wanted.
        """
        watchdog, shutdown = self.client.watchdog, self.response.raw.shutdown
        read = min(READ, self.lines.span)
        with watchdog.watching(shutdown, math.inf, self.over) as wait:
            waste = memoryview(bytearray(read))
            while self.at < at:
                self.at += self._read(waste[: at - self.at], wait)
            gives_way = False
            while self.at < self.end and not gives_way:
                if self.over.is_set():
                    raise Cancelled
                # Blocks lie on a grid, whatever byte a stream goes on from.
                room = min(self.end, (self.at // BLOCK + 1) * BLOCK) - self.at
                block, size = writer.acquire_buffer(), 0
                try:
                    while size < room and not gives_way:
                        with block[size : min(room, size + read)] as view:
                            came = self._read(view, wait)
                        size += came
                        writer.advance(came)
                        self.client.pause(self.lines.came(came), self.over)
                        gives_way = self.lines.is_surplus(line)
                finally:
                    writer.write(block, self.at, size)
                    self.at += size
            return gives_way

    def _read(self, view: memoryview, wait: Wait) -> int:
        """Return the number of bytes read into `view`, one at least; raise TransientError."""
        timeouts, started = self.client.timeouts, time.monotonic()
        wait.until = started + timeouts.slow_seconds
        try:
            data = b"" if wait.is_late else self.response.raw.read1(len(view))
            found = "the connection was closed"
        except NO_ANSWER as error:
            data, found = b"", cause_of(error)
        wait.until = math.inf
        self._came += len(data)
        self._seconds += time.monotonic() - started
        if self._seconds >= timeouts.slow_seconds:
            wait.is_late |= self._came < timeouts.least_rate * self._seconds
            self._came, self._seconds = 0, 0.0
        if data:
            view[: len(data)] = data
            return len(data)
        host = host_of(self.response.url)
        if not wait.is_late:
            raise TransientError(lost_finding(host, found))
        seconds = f"{timeouts.slow_seconds:g} s"
        least = f"at least {timeouts.least_rate:,.0f} bytes a second over {seconds}"
        raise TransientError(Finding(Kind.TOO_SLOW, host, least, "less", "try again later"))


def _doubtful(
    file: RemoteFile, expected: str, found: str, kind: Kind = Kind.WRONG_ANSWER
) -> TransientError:
    """Return the error for an answer that makes no sense, and gets two more tries."""
    finding = replace(wrong_answer(file.where, expected, found), kind=kind)
    return TransientError(finding, is_doubtful=True)

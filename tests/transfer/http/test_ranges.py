"""Streams of byte ranges: what ends them, and what does not."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import requests
import urllib3

from csm_weights.concurrency import Cancelled, run_all
from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, Timeouts, TransientError
from csm_weights.transfer.http.lines import SLACK, SPAN, Climb, Lines
from csm_weights.transfer.http.ranges import RangeDownloader, RangeStream, RemoteFile, RemoteSource
from csm_weights.transfer.reorder import BLOCK, MOMENT
from csm_weights.transfer.source import SourceError
from tests.support.hub import HubServer
from tests.support.network import HASTY, Clock, answering, response
from tests.support.servers import FileServer, serving

DATA = bytes(range(256)) * (3 * BLOCK // 256)


class Writer:
    """A writer that keeps the bytes in memory."""

    is_empty = True

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.notes: list[Finding] = []
        self.writes = list[tuple[int, int]]()

    def reset(self) -> None: ...

    def copy_from(self, fd: int, offset: int) -> None: ...

    def wanted(self) -> list[tuple[int, int]]:
        return [(0, len(self.data))]

    def acquire_buffer(self) -> memoryview:
        return memoryview(bytearray(BLOCK))

    def advance(self, count: int) -> None: ...

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        self.data[offset : offset + size] = buffer[:size]
        self.writes.append((offset, size))

    def verify(self, where: str) -> None: ...


def at_url(url: str, size: int) -> RemoteFile:
    """Return a file at a URL that never changes; every refusal is final."""

    def refusal(response: requests.Response) -> Finding:
        return Finding(Kind.FORBIDDEN, url, "the file", response.reason)

    return RemoteFile(url, OriginAuth(url), size, lambda: url, refusal)


@contextlib.contextmanager
def at_server(
    folder: Path, ranges: bool, stop: threading.Event | None = None
) -> Iterator[tuple[FileServer, RangeDownloader, RemoteFile]]:
    """A server of a file with `DATA`, and a downloader that `stop` ends."""
    (folder / "x").write_bytes(DATA)
    with (
        serving(folder, ranges) as server,
        RangeDownloader(stop or threading.Event(), timeouts=HASTY) as downloader,
    ):
        yield server, downloader, at_url(f"{server.url}/x", len(DATA))


@contextlib.contextmanager
def at_hub(data: bytes) -> Iterator[tuple[HubServer, RemoteFile]]:
    """A Hub that has the file itself, not on its storage host."""
    with HubServer() as hub:
        hub.add_repo("org/name", {"x": data}, lfs=lambda *_: False)
        url = f"{hub.endpoint}/org/name/resolve/main/x"
        yield hub, at_url(url, len(data))


class Body:
    """A response's body that gives all that is asked for after `seconds`, and counts its cuts."""

    url = "http://hub.example/x"

    def __init__(self, seconds: float) -> None:
        self.raw = self
        self.seconds = seconds
        self.cuts = 0

    def read1(self, size: int) -> bytes:
        time.sleep(self.seconds)
        return b"" if self.cuts else bytes(size)

    def shutdown(self) -> None:
        self.cuts += 1


class SlowDisk(Writer):
    """A writer that takes its time."""

    def write(self, buffer: memoryview, offset: int, size: int) -> None:  # noqa: ARG002
        time.sleep(2 * MOMENT)


def test_a_slow_disk_is_not_the_servers_fault() -> None:
    """While a block is written nothing is expected of the server; while it is read, bytes are."""
    limits = replace(HASTY, slow_seconds=0.1)
    with HttpClient(threading.Event(), timeouts=limits) as client:

        def read_at_leisure(body: Body) -> int:
            response = cast(requests.Response, body)
            stream = RangeStream(client, Lines(), response, 0, BLOCK, threading.Event())
            stream.read_into(SlowDisk(BLOCK), 0, line=0)
            return body.cuts

        assert read_at_leisure(Body(0)) == 0
        with pytest.raises(TransientError) as caught:
            read_at_leisure(Body(2 * MOMENT))
        assert caught.value.finding.kind is Kind.TOO_SLOW


def test_a_server_that_keeps_the_least_rate_is_not_too_slow() -> None:
    """Bytes count as they come: a few thousand a second are enough where 1024 are asked for."""
    limits = replace(HASTY, slow_seconds=0.25, patience=2)
    data = bytes(3000)
    with at_hub(data) as (hub, file):
        hub.fault("trickle", rate=4000)
        with RangeDownloader(threading.Event(), timeouts=limits) as downloader:
            downloader.fetch(file, Writer(len(data)))
        assert len(hub.log) == 1


def test_a_span_that_fails_for_good_ends_the_others() -> None:
    """When one span is refused, those that are open are cut, not read to their end."""
    limits = replace(HASTY, read=60, slow_seconds=60)
    data = bytes(10 * BLOCK)
    with at_hub(data) as (hub, file):
        hub.fault("status", code=403, times=1, after=2)
        stall = hub.fault("stall", at=1000, seconds=60)
        started = time.monotonic()
        with (
            RangeDownloader(threading.Event(), timeouts=limits) as downloader,
            pytest.raises(SourceError),
        ):
            downloader.fetch(file, Writer(len(data)))
        assert time.monotonic() - started < 20
        stall.clear()


def test_the_last_byte_of_a_server_without_ranges_ends_its_connection(tmp_path: Path) -> None:
    """A file that came in one stream leaves none open behind it."""
    with at_server(tmp_path, ranges=False) as (_, downloader, file):
        writer = Writer(len(DATA))
        downloader.fetch(file, writer)
        assert bytes(writer.data) == DATA
        assert file.stream is None


class Part(Writer):
    """A writer that wants some of the bytes."""

    def __init__(self, size: int, *spans: tuple[int, int]) -> None:
        super().__init__(size)
        self.spans = list(spans)

    def wanted(self) -> list[tuple[int, int]]:
        return self.spans


def test_what_lies_before_the_end_of_a_stream_is_asked_for_anew(tmp_path: Path) -> None:
    """Without ranges one stream gives what follows; what it has passed needs another one."""
    with at_server(tmp_path, ranges=False) as (server, downloader, file):
        gets = []
        for start, end in ((0, BLOCK), (BLOCK, 2 * BLOCK), (100, BLOCK), (0, len(DATA))):
            writer = Part(len(DATA), (start, end))
            downloader.fetch(file, writer)
            assert writer.data[start:end] == DATA[start:end]
            gets.append(len(server.gets()))
    assert [more - gets[0] for more in gets] == [0, 0, 1, 2]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_run_that_was_stopped_asks_for_nothing(tmp_path: Path, has_ranges: bool) -> None:
    """The stop is heard before the first request, not after it."""
    stop = threading.Event()
    with at_server(tmp_path, ranges=True, stop=stop) as (server, downloader, file):
        file.has_ranges = has_ranges
        stop.set()
        with pytest.raises(Cancelled):
            downloader.fetch(file, Writer(len(DATA)))
        assert server.log == []


def test_answers_of_next_to_nothing_are_given_up() -> None:
    """A server that gives a byte a request is not asked a million times."""
    with at_hub(DATA) as (hub, file):
        hub.fault("cap", size=1)
        with (
            RangeDownloader(threading.Event(), timeouts=HASTY) as downloader,
            pytest.raises(SourceError),
        ):
            downloader.fetch(file, Writer(len(DATA)))
        assert len(hub.log) < 20


def fetched(hub: HubServer, file: RemoteFile, writer: Writer, lines: Lines) -> None:
    """Fetch a file over these lines."""
    with RangeDownloader(threading.Event(), timeouts=HASTY, lines=lines) as downloader:
        downloader.fetch(file, writer)
    assert sum(entry.sent for entry in hub.log) >= len(writer.data)


def test_no_more_lines_are_open_than_there_may_be() -> None:
    """A server never sends more bodies at a time than lines are wanted."""
    data = random.Random(5).randbytes(8 * SPAN)
    with at_hub(data) as (hub, file):
        writer = Writer(len(data))
        fetched(hub, file, writer, Lines(climb=Climb(first=2)))
        assert hub.most_sending("hub") <= 2
        assert bytes(writer.data) == data


class Fewer(Writer):
    """A writer for which one line is enough once three were busy."""

    def __init__(self, size: int, hub: HubServer, climb: Climb) -> None:
        super().__init__(size)
        self.hub, self.climb = hub, climb

    def advance(self, count: int) -> None:  # noqa: ARG002
        if self.hub.most_sending("hub") >= 3:
            self.climb.lines = 1


def test_a_line_that_gives_way_loses_no_byte() -> None:
    """Lines that are closed in the middle of a span leave the rest of it to be fetched later."""
    data = random.Random(6).randbytes(6 * SPAN)
    with at_hub(data) as (hub, file):
        hub.fault("trickle", rate=20e6)
        climb = Climb(first=4)
        writer = Fewer(len(data), hub, climb)
        fetched(hub, file, writer, Lines(climb=climb))
        assert bytes(writer.data) == data
        assert len(hub.requests("hub")) > 6


@pytest.mark.parametrize("ranges", [True, False])
def test_a_limit_holds_for_all_files_together(tmp_path: Path, ranges: bool) -> None:
    """Two files at once take the time of both at the limit; a slow machine only takes longer."""
    limit, data = 2 << 20, bytes(1 << 20)
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(data)
    with (
        serving(tmp_path, ranges) as server,
        RangeDownloader(threading.Event(), timeouts=HASTY, lines=Lines(limit)) as downloader,
    ):
        files = [at_url(f"{server.url}/{name}", len(data)) for name in ("x", "y")]
        began = time.monotonic()
        tasks = [partial(downloader.fetch, file, Writer(len(data))) for file in files]
        run_all(tasks, threading.Event(), waiting=2)
        assert time.monotonic() - began >= 2 * len(data) / limit - 2 * SLACK


# ---- a server that answers as it is told


def ranged(head: str, data: bytes, most: int = 1 << 30) -> bytes:
    """Return the range that a request asks for, or the first bytes of it, or the whole file."""
    match = re.search(r"\r\nRange: bytes=(\d+)-(\d+)\r\n", head)
    if not match:
        return response("200 OK", body=data)
    start, last = int(match[1]), min(int(match[2]), int(match[1]) + most - 1)
    body = data[start : last + 1]
    return response("206 Part", f"Content-Range: bytes {start}-{last}/{len(data)}", body=body)


def ranges_of(heads: list[str]) -> list[str]:
    """Return the ranges that were asked for."""
    return re.findall(r"\r\nRange: bytes=(\S+)\r\n", "".join(heads))


LETTERS = b"abcdefghij"


def short_lines(span: int = 4) -> Lines:
    """Return lines whose requests ask for a few bytes each."""
    lines = Lines()
    lines.span = span
    return lines


@pytest.mark.parametrize(
    ("offset", "wanted", "ranges"),
    [
        (0, [(0, 10)], ["0-3", "4-7", "8-9"]),
        (0, [(1, 10)], ["1-3", "4-7", "8-9"]),
        (0, [(4, 8)], ["4-7"]),
        (0, [(0, 4), (5, 6)], ["0-3", "5-5"]),
        (102, [(103, 112)], ["1-1", "2-5", "6-9"]),
        (0, [], []),
    ],
)
def test_requests_are_cut_where_multiples_of_the_span_are(
    offset: int, wanted: list[tuple[int, int]], ranges: list[str]
) -> None:
    """Of the artifact, of which the file may be a later part; what is not wanted stays away."""
    with (
        answering(lambda head: ranged(head, LETTERS)) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY, lines=short_lines()) as downloader,
    ):
        writer = Part(offset + 10, *wanted)
        downloader.fetch(replace(at_url(url, 10), offset=offset), writer)
        assert sorted(ranges_of(heads)) == ranges
        expected = bytearray(offset + 10)
        for start, end in wanted:
            expected[start:end] = LETTERS[start - offset : end - offset]
        assert writer.data == expected


def outcome(answers: list[bytes], *span: int) -> tuple[bytes, list[str]]:
    """Fetch bytes of a file of ten from these answers, the last one of them again and again."""
    left = list(answers)
    with (
        answering(lambda _: left.pop(0) if len(left) > 1 else left[0]) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY) as downloader,
    ):
        writer = Part(10, (span[0], span[1]))
        downloader.fetch(at_url(f"{url}/x", 10), writer)
        return bytes(writer.data[span[0] : span[1]]), heads


def part(said: str, body: bytes = b"cdef", *headers: str, status: str = "206 Part") -> bytes:
    """Return a part of the file, that which it is said to be."""
    return response(status, f"Content-Range: {said}", *headers, body=body)


CHUNKED = b"HTTP/1.1 206 Part\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 2-5/10\r\n\r\n"


@pytest.mark.parametrize(
    ("span", "answers", "ranges"),
    [
        ((2, 6), [part("bytes 2-5/10")], ["2-5"]),
        ((2, 6), [part("Bytes 2-5/*")], ["2-5"]),
        ((2, 6), [part("bytes 2-5/10", b"cdef", "Content-Encoding: IDENTITY")], ["2-5"]),
        ((2, 6), [CHUNKED + b"4\r\ncdef\r\n0\r\n\r\n"], ["2-5"]),
        ((2, 3), [part("bytes 2-2/10", b"c")], ["2-2"]),
        ((0, 10), [part("bytes 0-9/10", LETTERS)], ["0-9"]),
        ((0, 10), [response("200 OK", body=LETTERS)], ["0-9"]),
        ((2, 6), [response("200 OK", body=LETTERS)], ["2-5"]),
        ((2, 6), [part("bytes 2-3/10", b"cd"), part("bytes 4-5/10", b"ef")], ["2-5", "4-5"]),
        ((2, 6), [part("bytes 2-2/10", b"c"), part("bytes 3-5/10", b"def")], ["2-5", "3-5"]),
    ],
)
def test_an_answer_may_be_what_was_asked_for_or_the_first_of_it(
    span: tuple[int, int], answers: list[bytes], ranges: list[str]
) -> None:
    """The rest is asked for then; where a server knows no ranges the whole file is taken."""
    data, heads = outcome(answers, *span)
    assert data == LETTERS[slice(*span)]
    is_whole = answers[0].startswith(b"HTTP/1.1 200") and span != (0, 10)
    assert (ranges_of(heads), len(heads)) == (ranges, len(ranges) + is_whole)


def test_bytes_that_are_passed_over_are_not_counted_where_they_break_off() -> None:
    """A server without ranges gives the file from its start, and once more from there."""
    whole = response("200 OK", body=LETTERS)
    for count in (3, 6, 7):
        data, heads = outcome([whole, whole[: count - 10], whole], 6, 10)
        assert (data, len(heads)) == (LETTERS[6:], 3)


def test_one_answer_without_ranges_is_for_all_pieces_of_its_file() -> None:
    """Which may be a later part of the artifact; it is closed with its last byte."""
    with (
        answering(lambda _: response("200 OK", body=LETTERS)) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY) as downloader,
    ):
        file = replace(at_url(url, 10), offset=5, has_ranges=False)
        for start, end, is_last in ((7, 9, False), (9, 11, False), (12, 14, False), (14, 15, True)):
            writer = Part(15, (start, end))
            downloader.fetch(file, writer)
            assert writer.data[start:end] == LETTERS[start - 5 : end - 5]
            assert (file.stream is None) is is_last
        assert len(heads) == 1


def test_as_many_lines_as_there_may_be_are_busy_at_once() -> None:
    """Twelve: none of them is answered here before all have asked."""
    together, data = threading.Barrier(12), bytes(range(48))

    def answer(head: str) -> bytes:
        together.wait(10)
        return ranged(head, data)

    lines = short_lines()
    lines.climb = Climb(first=12)
    with (
        answering(answer) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY, lines=lines) as downloader,
    ):
        writer = Writer(48)
        downloader.fetch(at_url(url, 48), writer)
        assert (bytes(writer.data), len(heads)) == (data, 12)


def test_lines_that_wait_ask_for_nothing_once_a_span_has_failed() -> None:
    """One of twelve is refused while the others wait for their turn; it has not come then."""

    def answer(_: str) -> bytes:
        time.sleep(0.1 * (len(heads) > 1))
        return response("403 Forbidden")

    lines = short_lines()
    lines.climb = Climb(first=1)
    with (
        answering(answer) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY, lines=lines) as downloader,
        pytest.raises(SourceError),
    ):
        downloader.fetch(at_url(url, 48), Writer(48))
    assert len(heads) < 12


SAID = "bytes 2-5/10"


@pytest.mark.parametrize(
    ("answer", "kind", "expected", "found"),
    [
        (part("bytes 1-4/10"), Kind.WRONG_ANSWER, SAID, "bytes 1-4/10, 4 bytes of body"),
        (part("bytes 3-6/10"), Kind.WRONG_ANSWER, SAID, "bytes 3-6/10, 4 bytes of body"),
        (part("bytes 3-5/10", b"def"), Kind.WRONG_ANSWER, SAID, "bytes 3-5/10, 3 bytes of body"),
        (part("bytes 2-6/10", b"cdefg"), Kind.WRONG_ANSWER, SAID, "bytes 2-6/10, 5 bytes of body"),
        (part("bytes 2-1/10", b""), Kind.WRONG_ANSWER, SAID, "bytes 2-1/10, 0 bytes of body"),
        (part("bytes 2-5/10", b"cde"), Kind.WRONG_ANSWER, SAID, "bytes 2-5/10, 3 bytes of body"),
        (part("bytes 2-5/10", b"cdefg"), Kind.WRONG_ANSWER, SAID, "bytes 2-5/10, 5 bytes of body"),
        (part("bytes 2-5/11"), Kind.WRONG_SIZE, SAID, "bytes 2-5/11, 4 bytes of body"),
        (part("bytes 2-5/9"), Kind.WRONG_SIZE, SAID, "bytes 2-5/9, 4 bytes of body"),
        (part("bytes 2-5"), Kind.WRONG_ANSWER, SAID, "206 Part, bytes 2-5"),
        (response("206 Part", body=b"cdef"), Kind.WRONG_ANSWER, SAID, "206 Part, no Content-Range"),
        (
            part("bytes */10", b"", status="416 No Range"),
            Kind.WRONG_ANSWER,
            SAID,
            "416 No Range, bytes */10",
        ),
        (part(SAID, status="416 No Range"), Kind.WRONG_ANSWER, SAID, f"416 No Range, {SAID}"),
        (
            part(SAID, b"cdef", "Content-Encoding: br"),
            Kind.WRONG_ANSWER,
            "bytes without an encoding",
            "Content-Encoding: br",
        ),
        (
            response("200 OK", "Content-Type: text/html", body=b"Sign in"),
            Kind.WRONG_ANSWER,
            "a file of 10 bytes",
            "7 bytes: a web page; is there a login or a captive portal in between?",
        ),
        (
            response("200 OK", "Content-Length: 11", body=b""),
            Kind.WRONG_SIZE,
            "a file of 10 bytes",
            "11 bytes: another file",
        ),
        (
            part("bytes 2-3/10", b"cd"),
            Kind.WRONG_ANSWER,
            SAID.replace("2", "4"),
            "bytes 2-3/10, 2 bytes of body",
        ),
    ],
)
def test_an_answer_about_anything_else_is_told_after_three_tries(
    answer: bytes, kind: Kind, expected: str, found: str
) -> None:
    """No byte of it is taken."""
    with pytest.raises(SourceError) as caught:
        outcome([answer], 2, 6)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.expected, finding.found) == (kind, expected, found)
    assert finding.where.endswith("/x") and finding.help == "use another source"


@pytest.mark.parametrize(
    ("body", "kind", "found"),
    [
        (b"1", Kind.WRONG_SIZE, "another file"),
        (b"0123456789012", Kind.WRONG_SIZE, "another file"),
        (b"it is restricted", Kind.WRONG_SIZE, "another file"),
        (b"Access to model a/b", Kind.WRONG_SIZE, "another file"),
        (b"Access to model a is restricted", Kind.WRONG_SIZE, "the Hub's refusal in place of"),
        (b"version https://git-lfs.github.com/spec/v1", Kind.WRONG_SIZE, "a git-lfs pointer in"),
        (b"\n <p>Sign in</p>", Kind.WRONG_ANSWER, "a web page; is there a login"),
    ],
)
def test_a_text_of_another_size_is_named_by_how_it_begins(
    body: bytes, kind: Kind, found: str
) -> None:
    """Whether it is longer or shorter than the file, and whatever it is said to be."""
    with pytest.raises(SourceError) as caught:
        outcome([response("200 OK", "Content-Type: text/plain", body=body)], 2, 6)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.expected) == (kind, "a file of 10 bytes")
    assert finding.found.startswith(f"{len(body)} bytes: {found}")


@pytest.mark.parametrize("status", [201, 204, 205, 207, 400, 404, 415, 417, 501])
def test_a_refusal_of_the_server_that_was_named_is_final(status: int) -> None:
    """It is asked once, and the source says what it means."""
    with pytest.raises(SourceError) as caught:
        outcome([response(f"{status} Because"), part(SAID)], 2, 6)
    assert caught.value.findings[0].found == "Because"


class Moving:
    """A file of ten bytes whose server sends everybody to another address each time."""

    def __init__(self, url: str, own: str = "http://named.example") -> None:
        self.url, self.given = url, 0
        self.file = replace(at_url(own, 10), locate=self.locate)

    def locate(self) -> str:
        """Return another URL."""
        self.given += 1
        return f"{self.url}/{self.given}"


CLOSED = b""


@pytest.mark.parametrize(
    ("answer", "given", "waited"),
    [
        (part("bytes */10", status="416 No"), 2, 0.02),
        (response("403 Expired"), 2, 0),
        (response("404 Gone"), 2, 0),
        (response("503 Busy"), 1, 0.02),
        (response("429 Many", "Retry-After: 0"), 2, 0),
        (response("429 Many", "Retry-After: 1"), 1, 1),
        (CLOSED, 2, 0.02),
        (part(SAID, b"c", "Content-Length: 4"), 1, 0.02),
    ],
)
def test_another_url_is_asked_for_where_the_one_that_was_given_may_be_why(
    answer: bytes, given: int, waited: float, clock: Clock
) -> None:
    """Not where the server is in trouble, or has begun to give the bytes."""
    answers, began = [answer], clock.now

    def give(head: str) -> bytes:
        return answers.pop() if answers else ranged(head, LETTERS)

    with answering(give) as (url, _), RangeDownloader(clock, timeouts=HASTY) as downloader:
        moving = Moving(url)
        writer = Part(10, (2, 6))
        downloader.fetch(moving.file, writer)
    assert writer.data[2:6] == b"cdef"
    assert moving.given == given
    assert clock.now - began == pytest.approx(waited)


def test_a_url_that_stays_refused_is_told_with_its_status(clock: Clock) -> None:
    """It is asked for anew each time, until the patience is over."""
    with (
        answering(lambda _: response("403 Expired")) as (url, _),
        RangeDownloader(clock, timeouts=HASTY) as downloader,
    ):
        moving = Moving(url)
        with pytest.raises(SourceError) as caught:
            downloader.fetch(moving.file, Part(10, (2, 6)))
    words = ("the file", "403 Expired for the URL that was given for it", "try again later")
    finding = Finding(Kind.SERVER_TROUBLE, "http://named.example", *words)
    assert caught.value.findings == (finding,)
    assert moving.given == 6


def test_a_file_is_located_once_until_its_url_is_forgotten() -> None:
    """On the server that was named it is always at the same one; a failure stays."""
    moving = Moving("http://cdn.example")
    assert [moving.file.resolve() for _ in range(2)] == ["http://cdn.example/1"] * 2
    moving.file.forget("http://cdn.example/0")
    assert moving.file.resolve() == "http://cdn.example/1"
    moving.file.forget("http://cdn.example/1")
    assert moving.file.resolve() == "http://cdn.example/2"
    own = Moving("http://named.example")
    own.file.forget(own.file.resolve())
    assert own.file.resolve() == "http://named.example/1"

    def fails() -> str:
        tries.append(1)
        raise SourceError([Finding(Kind.FORBIDDEN, "x", "a file", "none")])

    tries = list[int]()
    file = replace(at_url("http://named.example", 10), locate=fails)
    for _ in range(2):
        with pytest.raises(SourceError):
            file.resolve()
    assert len(tries) == 1


@pytest.mark.parametrize(("count", "factor"), [(16384, 1), (16383, 2)])
def test_16_kib_make_the_next_failure_the_first_again(
    count: int, factor: int, clock: Clock
) -> None:
    """Where each connection breaks off: waits stay as short as the first one, or double."""
    times, data = list[float](), bytes(3 * count + 1)

    def give(head: str) -> bytes:
        times.append(round(clock.now - began, 6))
        said, _, body = ranged(head, data).partition(b"\r\n\r\n")
        return said + b"\r\n\r\n" + body[:count]

    began = clock.now
    limits = replace(HASTY, backoff=1, patience=60)
    with answering(give) as (url, _), RangeDownloader(clock, timeouts=limits) as downloader:
        downloader.fetch(at_url(url, len(data)), Writer(len(data)))
    assert times == [0, 1, 1 + factor, 1 + factor + factor**2]


@pytest.mark.parametrize(("most", "is_enough"), [(16384, True), (16383, False)])
def test_an_answer_has_to_have_16_kib_of_a_longer_span(most: int, is_enough: bool) -> None:
    """Three shorter ones, one after the other, are no way to get a file."""
    data = bytes(range(256)) * 300
    with (
        answering(lambda head: ranged(head, data, most)) as (url, heads),
        RangeDownloader(threading.Event(), timeouts=HASTY) as downloader,
    ):
        writer = Writer(len(data))
        if is_enough:
            downloader.fetch(at_url(url, len(data)), writer)
            assert (bytes(writer.data), len(heads)) == (data, 5)
            return
        with pytest.raises(SourceError) as caught:
            downloader.fetch(at_url(url, len(data)), writer)
    (finding,) = caught.value.findings
    assert finding.kind is Kind.WRONG_ANSWER
    assert finding.expected == "answers of at least 16,384 bytes"
    assert (finding.found, len(heads)) == ("one of 16,383", 3)


# ---- the reading of one body


class Told:
    """A response whose body comes as it is told: bytes and seconds, or an error, of each read."""

    url = "http://hub.example/x"

    def __init__(self, clock: Clock, *reads: tuple[int, float] | Exception) -> None:
        self.raw = self
        self.clock = clock
        self.reads = list(reads)
        self.asked = list[int]()

    def read1(self, size: int) -> bytes:
        """Give what the next read brings."""
        self.asked.append(size)
        read = self.reads.pop(0) if self.reads else (size, 0.0)
        if isinstance(read, Exception):
            raise read
        self.clock.now += read[1]
        return bytes(range(256))[: min(size, read[0])] if read[0] < 256 else bytes(read[0])

    def shutdown(self) -> None: ...


def told(
    clock: Clock, span: tuple[int, int], *reads: tuple[int, float] | Exception
) -> tuple[Told, RangeStream]:
    """Return a body and the stream of it, for bytes that a test reads."""
    client = HttpClient(clock)
    client.watchdog.close()
    body = Told(clock, *reads)
    answer = cast(requests.Response, body)
    return body, RangeStream(client, Lines(), answer, *span, threading.Event())


@pytest.mark.parametrize(
    ("span", "at", "writes"),
    [
        ((0, 10), 0, [(0, 10)]),
        ((BLOCK - 5, BLOCK + 5), BLOCK - 5, [(BLOCK - 5, 5), (BLOCK, 5)]),
        ((BLOCK - 5, BLOCK), BLOCK - 5, [(BLOCK - 5, 5)]),
        ((BLOCK, 2 * BLOCK + 1), BLOCK, [(BLOCK, BLOCK), (2 * BLOCK, 1)]),
        ((0, 10), 4, [(4, 6)]),
        ((0, BLOCK + 10), BLOCK + 4, [(BLOCK + 4, 6)]),
        ((0, 10), 10, []),
    ],
)
def test_blocks_lie_on_a_grid(
    span: tuple[int, int], at: int, writes: list[tuple[int, int]], clock: Clock
) -> None:
    """Whatever byte a stream goes on from; what comes before it is read and thrown away."""
    writer = Writer(span[1])
    body, stream = told(clock, span)
    assert stream.read_into(writer, at, line=0) is False
    assert (writer.writes, stream.at) == (writes, span[1])
    assert max(body.asked) <= 256 << 10
    assert sum(body.asked) == span[1] - span[0]


def test_small_reads_make_one_block(clock: Clock) -> None:
    """Each read goes behind the one before, in pieces of 256 KiB at most."""
    writer = Writer(600_000)
    body, stream = told(clock, (0, 600_000), (3, 0), (2, 0))
    stream.read_into(writer, 0, line=0)
    assert writer.data[:6] == bytes([0, 1, 2, 0, 1, 0])
    assert writer.writes == [(0, 600_000)]
    assert body.asked == [262144, 262144, 262144, 262144, 75_707]


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ((0, 0), "the connection was closed"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (urllib3.exceptions.ProtocolError("broken"), "broken"),
        (ValueError("I/O operation on closed file."), "I/O operation on closed file."),
    ],
)
def test_what_came_before_a_failure_is_written(
    end: tuple[int, float] | Exception, found: str, clock: Clock
) -> None:
    """The failure may pass, and says what the matter was."""
    writer = Writer(10)
    _, stream = told(clock, (0, 10), (3, 0), (2, 0), end)
    with pytest.raises(TransientError) as caught:
        stream.read_into(writer, 0, line=0)
    assert (writer.writes, stream.at) == ([(0, 5)], 5)
    words = ("the whole body of an answer", found, "run the same command again")
    assert caught.value.finding == Finding(Kind.NO_NETWORK, "hub.example", *words)
    assert caught.value.seconds is None and not caught.value.is_doubtful


@pytest.mark.parametrize(
    ("reads", "is_too_slow"),
    [
        ([(10240, 10), (10240, 10)], False),
        ([(10240, 10), (10239, 10)], True),
        ([(20479, 20)], True),
        ([(1, 19.9)], False),
        ([(30720, 30)], False),
        ([(30719, 30)], True),
        ([(99999, 20), (20479, 20)], True),
        ([(99999, 20), (20479, 19)], False),
        ([(99999, 20), (20480, 20), (20479, 20)], True),
    ],
)
def test_a_body_has_1024_bytes_a_second_over_20_seconds(
    reads: list[tuple[int, float]], is_too_slow: bool, clock: Clock
) -> None:
    """One that has less is ended; each time is measured by itself."""
    writer = Writer(1 << 20)
    body, stream = told(clock, (0, 1 << 20), *reads)
    if not is_too_slow:
        stream.read_into(writer, 0, line=0)
        return
    with pytest.raises(TransientError) as caught:
        stream.read_into(writer, 0, line=0)
    least = "at least 1,024 bytes a second over 20 s"
    finding = Finding(Kind.TOO_SLOW, "hub.example", least, "less", "try again later")
    assert caught.value.finding == finding
    assert stream.at == sum(count for count, _ in reads)
    assert len(body.asked) == len(reads)


def test_a_body_that_is_not_wanted_any_more_is_left(clock: Clock) -> None:
    """Before the next block is read."""
    writer = Writer(10)
    body, stream = told(clock, (0, 10))
    stream.over.set()
    with pytest.raises(Cancelled):
        stream.read_into(writer, 0, line=0)
    assert (body.asked, writer.writes) == ([], [])


def test_a_line_gives_way_after_a_read(clock: Clock) -> None:
    """What it has read until then is written, and the rest is left to be asked for."""
    writer = Writer(10)
    body, stream = told(clock, (0, 10), (3, 0))
    with stream.lines.line() as line:
        stream.lines.enter(line, lambda: True)
        stream.lines.climb.lines = 0
        assert stream.read_into(writer, 0, line) is True
    assert (writer.writes, stream.at, len(body.asked)) == ([(0, 3)], 3, 1)


def test_a_stream_that_is_too_slow_makes_no_progress(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is asked again, the patience with its host goes on running out."""

    class Answer(Told):
        headers: dict[str, str]
        is_redirect = False
        status_code = 206
        reason = "Part"

        def close(self) -> None: ...

    def request(*_: object, headers: dict[str, str], **__: object) -> Answer:
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        answer = Answer(clock, (16384, 21))
        answer.headers = {"Content-Range": f"bytes {first}-{last}/{size}"}
        answers.append(answer)
        return answer

    size, answers = 10 * 16384, list[Answer]()
    monkeypatch.setattr(requests.Session, "request", request)
    with RangeDownloader(clock, timeouts=Timeouts(patience=60)) as downloader:
        downloader.watchdog.close()
        with pytest.raises(SourceError) as caught:
            downloader.fetch(at_url("http://hub.example/x", size), Writer(size))
    assert caught.value.findings[0].kind is Kind.TOO_SLOW
    assert len(answers) == 3


# ---- a server as a source


class Shop(RemoteSource):
    """A source of one file, which fails as a test wants it to."""

    def __init__(self, fails: SourceError | None, finds: bool = True) -> None:
        super().__init__(cast(RangeDownloader, self), "http://hub.example", "the page")
        self.fails, self.finds = fails, finds
        self.began, self.fetched = list[int](), 0

    def find(self, *_: object) -> RemoteFile:
        """Return the file, or fail."""
        if self.fails and not self.finds:
            raise self.fails
        return at_url("http://hub.example/x", 10)

    def fetch(self, *_: object) -> None:
        """Count a transfer, or fail."""
        self.fetched += 1
        if self.fails:
            raise self.fails

    def begin_afresh(self, times: int) -> None:
        """Note how often the place was asked for before."""
        self.began.append(times)


ARTIFACT = Artifact("x", "x", "opaque", 10, "a" * 64)


@pytest.mark.parametrize(
    ("kind", "where", "finds", "is_final"),
    [
        (Kind.FORBIDDEN, "x", True, True),
        (Kind.NO_NETWORK, "x", True, True),
        (Kind.NOT_THERE, "x", True, False),
        (Kind.WRONG_DIGEST, "x", True, False),
        (Kind.WRONG_ANSWER, "x", True, False),
        (Kind.REDIRECT, "x", True, False),
        (Kind.WRONG_ANSWER, "the page", True, True),
        (Kind.NOT_THERE, "the page", True, True),
        (Kind.NOT_THERE, "x", False, True),
        (Kind.WRONG_ANSWER, "x", False, True),
    ],
)
def test_a_server_that_has_refused_is_not_asked_again(
    kind: Kind, where: str, finds: bool, is_final: bool
) -> None:
    """What is about one file, once it was found, says nothing of the others."""
    finding = Finding(kind, where, "a file", "none")
    shop = Shop(SourceError([finding, Finding(Kind.NO_NETWORK, "y", "a", "b")]), finds)
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            shop.deliver(ARTIFACT, ARTIFACT.tiles[0], Writer(10))
        assert caught.value.findings[0] == finding
    assert len(caught.value.findings) == (1 if is_final else 2)
    assert shop.refusal == (finding if is_final else None)
    assert shop.fetched == finds * (1 if is_final else 2)


def test_what_was_delivered_before_is_asked_for_afresh() -> None:
    """By the place where it ends, as a part of a piece, or all of it, may be asked for."""
    shop, piece = Shop(None), ARTIFACT.tiles[0]
    for writer in (Writer(10), Part(10, (3, 10)), Part(10, (0, 5)), Part(10), Part(10, (2, 5))):
        assert shop.deliver(ARTIFACT, piece, writer) == "http://hub.example/x"
    assert shop.began == [1, 2, 1]
    other = replace(ARTIFACT, path="y")
    shop.deliver(other, piece, Writer(10))
    assert shop.began == [1, 2, 1]

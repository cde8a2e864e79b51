"""Streams of byte ranges: what ends them, and what does not."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import requests

from csm_weights.concurrency import Cancelled, run_all
from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, TransientError
from csm_weights.transfer.http.lines import SLACK, SPAN, Climb, Lines
from csm_weights.transfer.http.ranges import RangeDownloader, RangeStream, RemoteFile
from csm_weights.transfer.reorder import BLOCK, MOMENT
from csm_weights.transfer.source import SourceError
from tests.support.hub import HubServer
from tests.support.network import HASTY
from tests.support.servers import FileServer, serving

DATA = bytes(range(256)) * (3 * BLOCK // 256)


class Writer:
    """A writer that keeps the bytes in memory."""

    is_empty = True

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.notes: list[Finding] = []

    def reset(self) -> None: ...

    def copy_from(self, fd: int, offset: int) -> None: ...

    def wanted(self) -> list[tuple[int, int]]:
        return [(0, len(self.data))]

    def acquire_buffer(self) -> memoryview:
        return memoryview(bytearray(BLOCK))

    def advance(self, count: int) -> None: ...

    def write(self, buffer: memoryview, offset: int, size: int) -> None:
        self.data[offset : offset + size] = buffer[:size]

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
    limits = replace(HASTY, slow_seconds=1, patience=2)
    data = bytes(12_000)
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

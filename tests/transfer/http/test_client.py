"""The client: how often a host is asked, for how long, and what all of its streams share."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from requests import PreparedRequest

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Kind
from csm_weights.progress import Progress
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, Timeouts, TransientError
from csm_weights.transfer.http.environment import proxy_for
from csm_weights.transfer.source import SourceError
from tests.support.hub import HubServer
from tests.support.network import (
    HASTY,
    VARIABLES,
    certificate,
    closed_port,
    drip,
    noted_waits,
    refusing_proxy,
    tls_front,
)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with one file, x.txt."""
    with HubServer() as server:
        server.add_repo("org/name", {"x.txt": b"x"})
        yield server


def client(timeouts: Timeouts = HASTY, log: list[str] | None = None) -> HttpClient:
    return HttpClient(threading.Event(), (log if log is not None else []).append, timeouts)


def url_of(hub: HubServer) -> str:
    return f"{hub.endpoint}/org/name/resolve/main/x.txt"


def kind_of(ask: HttpClient, url: str) -> Kind:
    """Return the kind of finding that a HEAD ends with."""
    with pytest.raises(SourceError) as caught:
        ask.ask("HEAD", url, OriginAuth())
    return caught.value.findings[0].kind


def test_a_wait_that_one_request_is_asked_for_holds_for_all(hub: HubServer) -> None:
    """After a 429 with Retry-After the host is left alone by every request for that long."""
    hub.fault("status", code=429, headers={"Retry-After": "1"}, times=1)
    with client() as asks:
        with pytest.raises(TransientError):
            asks.follow("GET", url_of(hub), OriginAuth(), {})
        started = time.monotonic()
        asks.follow("GET", url_of(hub), OriginAuth(), {}).close()
        assert time.monotonic() - started > 0.8


def test_each_wait_is_twice_the_one_before_and_30_seconds_at_most(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what chance adds, or takes away."""
    waits = noted_waits(monkeypatch)
    hub.fault("status", code=503, times=6)
    with client(replace(HASTY, backoff=2, patience=600)) as asks:
        asks.ask("HEAD", url_of(hub), OriginAuth())
    assert waits == [2, 4, 8, 16, 30, 30]


def test_a_name_that_cannot_be_resolved_is_given_up_soon_as_logged() -> None:
    """A name that may be misspelt gets a tenth of the patience, and the log says so."""
    log: list[str] = []
    started = time.monotonic()
    with client(replace(HASTY, backoff=2, patience=30), log) as asks:
        assert kind_of(asks, "http://hub.invalid/x") is Kind.NO_NETWORK
    assert time.monotonic() - started < 6
    assert len(log) == 1
    assert re.search(r"trying again for up to [123] s$", log[0])


def test_refused_connections_are_outlasted_by_a_host_that_never_answered() -> None:
    """A port that is closed at first gets the whole patience: an outage is no misspelt name."""
    address = closed_port()
    host, _, port = address.partition(":")
    log: list[str] = []

    def answer() -> None:
        time.sleep(3.5)
        with socket.create_server((host, int(port))) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with client(replace(HASTY, backoff=2, patience=6), log) as asks:
        response, _ = asks.ask("HEAD", f"http://{address}/x", OriginAuth())
    thread.join()
    assert response.status_code == 204
    assert len(log) == 1
    assert re.search(r"trying again for up to [56] s$", log[0])


def test_a_host_that_has_answered_gets_the_whole_patience() -> None:
    """When a host that was there is gone for a moment, its connections are tried for longer."""
    with HubServer() as hub, client(replace(HASTY, patience=2)) as asks:
        url = f"{hub.endpoint}/x"
        asks.ask("HEAD", url, OriginAuth())
        hub.close()
        started = time.monotonic()
        assert kind_of(asks, url) is Kind.NO_NETWORK
        assert time.monotonic() - started > 1.5


def test_one_outage_is_one_line_and_ends_all_requests(hub: HubServer) -> None:
    """However many requests fail, one line is logged, and the first verdict is that of all."""
    hub.fault("status", code=503)
    log: list[str] = []
    with client(replace(HASTY, backoff=1, patience=4), log) as asks:
        threads = [threading.Thread(target=kind_of, args=(asks, url_of(hub))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(log) == 1
        assert "server error (503 Service Unavailable); trying again for up to" in log[0]
        hub.clear()
        assert kind_of(asks, url_of(hub)) is Kind.SERVER_TROUBLE
        assert len(hub.log) == 1


def test_waits_that_are_asked_for_end_within_a_limit(hub: HubServer) -> None:
    """A host that asks to wait again and again is given up, long before its patience ends."""
    fault = hub.fault("status", code=429, headers={"Retry-After": "1"})
    with client(replace(HASTY, longest_wait=1.5, patience=600)) as asks:
        assert kind_of(asks, url_of(hub)) is Kind.RATE_LIMITED
    assert fault.hits <= 2


def sent(auth: OriginAuth, url: str) -> bool:
    """Return whether a request to a URL carries the header."""
    request = PreparedRequest()
    request.prepare("GET", url)
    return "X-Secret" in auth(request).headers


@pytest.mark.parametrize(
    ("url", "is_sent"),
    [
        ("http://hub.example/a", True),
        ("http://hub.example:80/a", True),
        ("http://HUB.example/a", True),
        ("https://hub.example/a", True),
        ("https://hub.example:8443/a", False),
        ("http://hub.example:8080/a", False),
        ("http://other.example/a", False),
        ("http://hub.example.evil.example/a", False),
        ("http://hub.example@evil.example/a", False),
    ],
)
def test_a_header_goes_to_its_own_origin(url: str, is_sent: bool) -> None:
    """The same scheme, host and port, or https in place of http on the usual ports."""
    assert sent(OriginAuth("http://hub.example/folder", {"X-Secret": "1"}), url) is is_sent


def test_a_header_for_https_is_not_sent_in_the_clear() -> None:
    """From https there is no way down to http."""
    auth = OriginAuth("https://hub.example", {"X-Secret": "1"})
    assert not sent(auth, "http://hub.example/a")


@pytest.mark.parametrize(
    "proxy",
    ["http://me:s3cr/et@127.0.0.1:9", "http://me:s3cret@127.0.0.1:9", "http://s3cret@a b:1"],
)
def test_a_proxy_with_a_bad_url_is_named_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with the proxy's URL, what is said of it has no credentials."""
    monkeypatch.setenv("http_proxy", proxy)
    with (
        client() as asks,
        pytest.raises(SourceError) as caught,
    ):
        asks.ask("HEAD", "http://hub.example/x", OriginAuth())
    finding = caught.value.findings[0]
    assert finding.kind in (Kind.PROXY, Kind.NO_NETWORK)
    assert "s3cr" not in finding.line() and "PROXY" in finding.help


def test_a_proxy_that_is_asked_over_tls_is_verified_by_the_same_authorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURL_CA_BUNDLE counts for it as well: it is reached, and its own refusal is told."""
    cert, key = certificate(tmp_path / "tls")
    with refusing_proxy(407) as address, tls_front(f"http://{address}", cert, key) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        found = []
        for trusted in ("", str(cert)):
            monkeypatch.setenv("CURL_CA_BUNDLE", trusted)
            with client() as asks, pytest.raises(SourceError) as caught:
                asks.ask("HEAD", "https://hub.example/x", OriginAuth())
            found += [f"{f.kind} {f.found}" for f in caught.value.findings]
    assert "407" not in found[0] and "407" in found[1]


@pytest.mark.parametrize(
    ("url", "exempt", "proxy"),
    [
        ("http://hub.example/x", "", "http://127.0.0.1:9"),
        ("http://hub.example/x", "hub.example", ""),
        ("http://other.example/x", "hub.example", "http://127.0.0.1:9"),
        ("https://hub.example/x", "", ""),
        ("http://[hub.example/x", "", ""),
    ],
)
def test_the_proxy_of_a_url_is_that_of_the_environment(
    url: str, exempt: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its scheme, but for NO_PROXY; what is no URL has none."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", exempt)
    assert proxy_for(url) == proxy


# ---- servers that give no answer


ENDLESS = {
    "headers, a byte at a time": (b"H",),
    "interim answers": (b"HTTP/1.1 100 Continue\r\n\r\n",),
}


@pytest.mark.parametrize("texts", ENDLESS.values(), ids=ENDLESS)
def test_an_answer_that_never_begins_is_given_up(texts: tuple[bytes, ...]) -> None:
    """However busy a server is with it, headers have to be there in time."""
    limits = replace(HASTY, read=0.5, patience=0.1)
    with (
        drip(*texts, seconds=0.05) as url,
        client(limits) as asks,
    ):
        started = time.monotonic()
        with pytest.raises(SourceError) as caught:
            asks.ask("HEAD", url, OriginAuth())
        assert time.monotonic() - started < 6
    assert caught.value.findings[0].kind is Kind.NO_NETWORK


def test_a_stop_ends_a_request_that_waits_for_its_answer() -> None:
    """Who is stopped while a server keeps silent is free within a second or so."""
    stop = threading.Event()
    limits = replace(HASTY, read=60)
    with drip(b"H", seconds=0.05) as url, HttpClient(stop, timeouts=limits) as asks:
        started = time.monotonic()
        threading.Timer(0.2, stop.set).start()
        with pytest.raises(Cancelled):
            asks.ask("HEAD", url, OriginAuth())
        assert time.monotonic() - started < 5


def test_a_broken_handshake_is_not_a_bad_certificate() -> None:
    """A host that closes before TLS is there may be asked again; the certificate is not blamed."""
    with (
        drip(b"nonsense", seconds=0.05) as url,
        client() as asks,
        pytest.raises(SourceError) as caught,
    ):
        asks.ask("HEAD", url.replace("http:", "https:"), OriginAuth())
    assert caught.value.findings[0].kind is Kind.NO_NETWORK


def test_what_a_server_says_cannot_drive_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in what is logged of a wait come out escaped."""
    Progress("fetching", 0, sys.stderr).log("503 \x1b]0;title\x07")
    assert capsys.readouterr().err == "fetching: 503 \\x1b]0;title\\x07\n"

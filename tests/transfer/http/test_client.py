"""The client: how often a host is asked, for how long, and what all of its streams share."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests
import urllib3

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Finding, Kind
from csm_weights.progress import Progress
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.client import HttpClient, Timeouts, TransientError
from csm_weights.transfer.source import SourceError
from tests.support.hub import HubServer
from tests.support.network import (
    HASTY,
    Clock,
    answering,
    certificate,
    closed_port,
    drip,
    refusing_proxy,
    response,
    tls_front,
)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with one file, x.txt."""
    with HubServer() as server:
        server.add_repo("org/name", {"x.txt": b"x"})
        yield server


def client(
    timeouts: Timeouts = HASTY,
    cancel: threading.Event | None = None,
    log: list[str] | None = None,
) -> HttpClient:
    log = [] if log is None else log
    return HttpClient(cancel or threading.Event(), log.append, timeouts)


def url_of(hub: HubServer) -> str:
    return f"{hub.endpoint}/org/name/resolve/main/x.txt"


def kind_of(ask: HttpClient, url: str) -> Kind:
    """Return the kind of finding that a HEAD ends with."""
    with pytest.raises(SourceError) as caught:
        ask.ask("HEAD", url, OriginAuth())
    return caught.value.findings[0].kind


def test_a_wait_that_one_request_is_asked_for_holds_for_all(clock: Clock) -> None:
    """After a 429 every request leaves the host alone for that long, if it is not too long."""

    def answer(head: str) -> bytes:
        times.append(clock.now)
        seconds = head.split()[1].removeprefix("/")
        return response("429 Too Many", f"Retry-After: {seconds}")

    times = list[float]()
    with answering(answer) as (url, _), client(replace(HASTY, longest_wait=20), clock) as asks:
        for seconds in (20, 21, 0):
            with pytest.raises(TransientError) as caught:
                asks.follow("GET", f"{url}/{seconds}", OriginAuth(), {})
            assert caught.value.seconds == seconds
    assert [round(time - times[0], 6) for time in times] == [0, 20, 20]


@pytest.mark.parametrize(
    ("status", "headers", "kind", "help_text"),
    [
        ("408 Request Timeout", (), Kind.SERVER_TROUBLE, "try again later"),
        ("425 Too Early", ("Retry-After: 3",), Kind.SERVER_TROUBLE, "try again later"),
        ("429 Too Many", (), Kind.RATE_LIMITED, "try again later"),
        ("429 Too Many", ("Retry-After: 0",), Kind.RATE_LIMITED, "try again in 0 s"),
        ("429 Too Many", ('RateLimit: "api";r=0;t=55',), Kind.RATE_LIMITED, "try again in 55 s"),
        ("500 Error", (), Kind.SERVER_TROUBLE, "try again later"),
        ("502 Bad Gateway", (), Kind.SERVER_TROUBLE, "try again later"),
        ("504 Timeout", (), Kind.SERVER_TROUBLE, "try again later"),
        ("599 Other", (), Kind.SERVER_TROUBLE, "try again later"),
    ],
)
def test_trouble_that_may_pass_is_a_failure_of_a_try(
    status: str, headers: tuple[str, ...], kind: Kind, help_text: str
) -> None:
    """It says what the server has answered, and when to try again."""
    with answering(lambda _: response(status, *headers)) as (url, _), client() as asks:
        with pytest.raises(TransientError) as caught:
            asks.follow("GET", url, OriginAuth(), {})
        where = url.removeprefix("http://")
    assert caught.value.finding == Finding(kind, where, "an answer", status, help_text)
    assert not caught.value.is_doubtful and not caught.value.is_unknown_name


@pytest.mark.parametrize(
    "status", [200, 206, 304, 399, 400, 401, 403, 404, 409, 424, 426, 428, 430, 499, 501, 505]
)
def test_other_answers_are_final(status: int) -> None:
    """Refusals too; their bodies are left out."""
    answer = response(f"{status} Text", body=b"text")
    with answering(lambda _: answer) as (url, heads), client() as asks:
        found, body = asks.ask("GET", url, OriginAuth())
    has_body = status < 400 and status != 304
    assert (found.status_code, body) == (status, b"text" if has_body else b"")
    assert len(heads) == 1
    assert f"\r\nUser-Agent: csm-weights/{version('csm-weights')}\r\n" in heads[0]
    assert "\r\nAccept-Encoding: identity\r\n" in heads[0]


def test_a_proxy_that_wants_a_password_is_asked_once() -> None:
    """407 is not an answer of the host."""
    with (
        answering(lambda _: response("407 Login")) as (url, heads),
        client() as asks,
        pytest.raises(SourceError) as caught,
    ):
        asks.ask("HEAD", url, OriginAuth())
    (finding,) = caught.value.findings
    assert (finding.kind, finding.found) == (Kind.PROXY, "407 Proxy Authentication Required")
    assert len(heads) == 1


@pytest.mark.parametrize("count", [1, 5, 6])
def test_five_redirects_are_followed(count: int) -> None:
    """One more is one too many, and is told of the URL that was asked for."""

    def answer(head: str) -> bytes:
        left = int(head.split()[1].removeprefix("/"))
        return response("302 Found", f"Location: /{left - 1}") if left else response("200 OK")

    with answering(answer) as (url, heads), client() as asks:
        if count <= 5:
            asks.ask("GET", f"{url}/{count}", OriginAuth())
        else:
            with pytest.raises(SourceError) as caught:
                asks.ask("GET", f"{url}/{count}", OriginAuth())
            words = ("at most 5 redirects", "more", "is there a captive portal in between?")
            assert caught.value.findings == (Finding(Kind.REDIRECT, f"{url}/{count}", *words),)
        assert len(heads) == min(count, 5) + 1


def test_a_redirect_may_be_the_answer() -> None:
    """Where the caller says so; otherwise it is followed, and the last answer counts."""
    answer = response("302 Found", "Location: /second", body=b"moved")
    texts = {"/first": answer, "/second": response("200 OK", body=b"here")}
    with answering(lambda head: texts[head.split()[1]]) as (url, heads), client() as asks:
        found, body = asks.ask("GET", f"{url}/first", OriginAuth(), lambda _: True)
        assert (found.status_code, body, len(heads)) == (302, b"moved", 1)
        assert asks.ask("GET", f"{url}/first", OriginAuth())[1] == b"here"
        asks.follow("GET", f"{url}/first", OriginAuth(), {}, lambda _: True).close()
        assert len(heads) == 4
        found = asks.follow("GET", f"{url}/first", OriginAuth(), {"X-More": "1"})
        found.close()
        assert (found.status_code, len(heads)) == (200, 6)
        assert all("\r\nX-More: 1\r\n" in head for head in heads[4:])


def test_headers_stay_with_their_origin_even_if_a_redirect_leads_back() -> None:
    """A detour by another host ends them for good; only where one is meant may there be one."""
    with (
        answering(lambda head: response("302 Found", f"Location: {url}{head.split()[1]}/back")) as (
            other,
            others,
        ),
        answering(lambda head: texts[head.split()[1]]) as (url, heads),
        client() as asks,
    ):
        auth = OriginAuth(url, {"X-Secret": "1"})
        texts = {
            "/a": response("302 Found", "Location: /b"),
            "/b": response("302 Found", f"Location: {other}/c"),
            "/c/back": response("200 OK", body=b"here"),
        }
        assert asks.ask("GET", f"{url}/a", auth)[1] == b"here"
        assert ["X-Secret" in head for head in heads + others] == [True, True, False, False]
        asks.follow("GET", f"{url}/a", auth, {}).close()
        for ask in (
            lambda: asks.ask("GET", f"{url}/a", auth, is_own_host_only=True),
            lambda: asks.get_json(f"{url}/a", auth),
        ):
            with pytest.raises(SourceError) as caught:
                ask()
            host, foreign = url.removeprefix("http://"), other.removeprefix("http://")
            (finding,) = caught.value.findings
            assert (finding.kind, finding.where) == (Kind.REDIRECT, f"{url}/b")
            assert finding.expected == f"an answer of {host}"
            assert finding.found == f"a redirect to {foreign}"
        assert len(others) == 2


PAGE = "a web page; is there a login or a captive portal in between?"


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        ("200 OK", "application/json", b'{"a": [1]}', {"a": [1]}),
        ("200 OK", "text/html", b"[2]", [2]),
        ("400 No", "application/json", b'{"a": 1}', None),
        ("404 No", "text/html", b"<p>", None),
        ("200 OK", "text/html; charset=utf-8", b"Sign in", PAGE),
        ("200 OK", "text/plain", b"<p>Sign in</p>", PAGE),
        ("200 OK", "text/plain", b"Sign in <p>", "another text"),
        ("200 OK", "text/plain", b"", "another text"),
        ("200 OK", "text/plain", b"\xff", "another text"),
    ],
)
def test_json_is_returned_and_nothing_else_is_taken_for_it(
    status: str, kind: str, body: bytes, expected: object
) -> None:
    """A web page means that something stands between this machine and the server."""
    answer = response(status, f"Content-Type: {kind}", body=body)
    with answering(lambda _: answer) as (url, _), client() as asks:
        if not isinstance(expected, str):
            found, data = asks.get_json(f"{url}/x?secret=1", OriginAuth())
            assert (found.status_code, data) == (int(status[:3]), expected)
        else:
            with pytest.raises(SourceError) as caught:
                asks.get_json(f"{url}/x?secret=1", OriginAuth())
            (finding,) = caught.value.findings
            wanted = Kind.NO_NETWORK if expected == PAGE else Kind.WRONG_ANSWER
            assert (finding.kind, finding.where) == (wanted, f"{url}/x")
            assert finding.found == expected


def test_an_answer_is_read_up_to_a_limit() -> None:
    """Of 64 MiB: an endless one ends there."""
    answer = response("200 OK", "Content-Length: 99999999", body=bytes((64 << 20) + 1))
    with answering(lambda _: answer) as (url, _), client() as asks:
        assert len(asks.ask("GET", url, OriginAuth())[1]) == 64 << 20


def test_an_answer_that_breaks_off_is_asked_for_again(clock: Clock) -> None:
    """Within the patience; what it ends with says what was the matter."""
    texts = [response("200 OK", "Content-Length: 9", body=b"half")] * 2
    texts += [response("200 OK", body=b"all of it")]
    with answering(lambda _: texts.pop(0)) as (url, heads), client(HASTY, clock) as asks:
        assert asks.ask("GET", url, OriginAuth())[1] == b"all of it"
        assert len(heads) == 3
        texts += [response("200 OK", "Content-Length: 9", body=b"half")] * 9
        with pytest.raises(SourceError) as caught:
            asks.ask("GET", url, OriginAuth())
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.NO_NETWORK, url.removeprefix("http://"))
    assert finding.expected == "the whole body of an answer"
    assert "4 bytes read, 5 more expected" in finding.found


@dataclass
class Failing:
    """Requests that end in an error, and what they were asked with."""

    error: Exception
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, *_: object, **options: Any) -> NoReturn:
        self.asked.append(options)
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [
        (OSError("broken"), Kind.NO_NETWORK, 8),
        (urllib3.exceptions.HTTPError("broken"), Kind.NO_NETWORK, 8),
        (requests.exceptions.ConnectionError("broken"), Kind.NO_NETWORK, 8),
        (ValueError("broken"), Kind.NO_NETWORK, 1),
        (requests.exceptions.InvalidURL("broken"), Kind.NO_NETWORK, 1),
        (requests.exceptions.ProxyError("broken"), Kind.PROXY, 1),
        (ssl.SSLCertVerificationError("broken"), Kind.CERTIFICATE, 1),
    ],
)
def test_what_may_pass_is_tried_for_a_minute(
    error: Exception, kind: Kind, tries: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection has ten seconds, and an answer thirty; what will not pass is tried once."""
    failing = Failing(error)
    monkeypatch.setattr(requests.Session, "request", failing)
    with HttpClient(clock) as asks:
        assert kind_of(asks, "http://hub.example/x") is kind
    assert len(failing.asked) == tries
    assert all(options["timeout"] == (10, 30) for options in failing.asked)


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (requests.exceptions.ProxyError("broken"), 8),
        (socket.gaierror("unknown"), 8),
        (ssl.SSLCertVerificationError("broken"), 1),
    ],
)
def test_a_host_that_has_answered_is_known_to_be_there(
    error: Exception, tries: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its proxy and its name may fail for a moment; its certificate is another one now."""
    failing = Failing(error)
    with answering(lambda _: response("200 OK")) as (url, _), HttpClient(clock) as asks:
        asks.ask("HEAD", url, OriginAuth())
        monkeypatch.setattr(requests.Session, "request", failing)
        kind_of(asks, url)
    assert len(failing.asked) == tries


def test_a_name_that_cannot_be_resolved_is_given_up_soon_as_logged(clock: Clock) -> None:
    """A name that may be misspelt gets a tenth of the patience, and the log says so."""
    log, began = list[str](), clock.now
    with client(replace(HASTY, backoff=2, patience=30), clock, log) as asks:
        assert kind_of(asks, "http://hub.invalid/x") is Kind.NO_NETWORK
    assert clock.now - began == pytest.approx(3)
    assert len(log) == 1
    assert log[0].endswith("; trying again for up to 3 s")


def test_refused_connections_are_tried_for_the_whole_patience(clock: Clock) -> None:
    """A port that is closed is an outage, and no misspelt name: before an answer, and after."""
    began = clock.now
    with client(replace(HASTY, patience=6), clock) as asks:
        assert kind_of(asks, f"http://{closed_port()}/x") is Kind.NO_NETWORK
        assert clock.now - began == pytest.approx(6)
        with HubServer() as hub:
            url = f"{hub.endpoint}/x"
            asks.ask("HEAD", url, OriginAuth())
            began = clock.now
        assert kind_of(asks, url) is Kind.NO_NETWORK
        assert clock.now - began == pytest.approx(6)


def test_one_outage_is_one_line_and_ends_all_requests(hub: HubServer, clock: Clock) -> None:
    """However many requests fail, one line is logged, and the first verdict is that of all."""
    hub.fault("status", code=503)
    log: list[str] = []
    with client(replace(HASTY, backoff=2, patience=4), clock, log) as asks:
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


def test_a_client_that_is_not_closed_does_not_keep_a_program_from_ending() -> None:
    """Its thread is one that Python does not wait for, and ends with the client."""
    before = set(threading.enumerate())
    with client():
        own = set(threading.enumerate()) - before
        assert own and all(thread.daemon for thread in own)
    assert not any(thread.is_alive() for thread in own)


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


def test_servers_and_proxies_over_tls_are_verified_by_the_same_authorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURL_CA_BUNDLE counts for both: without it the certificate is refused, and asked once."""
    cert, key = certificate(tmp_path / "tls")
    with refusing_proxy(407) as address, tls_front(f"http://{address}", cert, key) as proxy:
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for trusted in ("", str(cert)):
            monkeypatch.setenv("CURL_CA_BUNDLE", trusted)
            for url in (f"{proxy}/x", "https://hub.example/x"):
                with client() as asks, pytest.raises(SourceError) as caught:
                    asks.ask("HEAD", url, OriginAuth())
                (finding,) = caught.value.findings
                assert ("407" in finding.found) is bool(trusted)
                assert trusted or finding.kind in (Kind.CERTIFICATE, Kind.PROXY)
                assert trusted or "certificate verify failed" in finding.found


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
    (finding,) = caught.value.findings
    assert (finding.kind, finding.found) == (Kind.NO_NETWORK, "no answer in time")


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

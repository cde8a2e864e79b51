"""What is made of answers: redirects, waits, and texts that are shown."""

from __future__ import annotations

import socket
import ssl
from email.utils import formatdate
from time import time
from typing import Any

import pytest
import requests

from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.responses import (
    FOREVER,
    cause_of,
    classify_error,
    redirect_target,
    requested_wait,
)
from csm_weights.transfer.source import SourceError

#: How an answer that did not come in time is told.
LATE = "no answer in time"

#: An error of the library that speaks to SOCKS proxies.
SocksError = type("SOCKS5Error", (Exception,), {"__module__": "socks"})


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server of our own."""
    known = {
        "hub.example": "93.184.216.34",
        "cdn.example": "151.101.1.1",
        "inside.example": "127.0.0.1",
        "metadata.example": "169.254.169.254",
        "intranet.example": "10.0.0.7",
        "six.example": "::1",
        "several.example": "93.184.216.34 10.0.0.7 127.0.0.1",
        "mixed.example": "93.184.216.34 10.0.0.7 93.184.216.35",
    }

    def lookup(host: str, *_: object) -> list[Any]:
        if host not in known:
            raise socket.gaierror(f"no {host}")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in known[host].split()]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def refused(target: str, source: str = "https://hub.example/file", near: bool = False) -> Finding:
    """Return the finding that a redirect ends with."""
    with pytest.raises(SourceError) as caught:
        redirect_target(source, target, near)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.REDIRECT, source)
    assert finding.help == "if that is meant, name the final URL yourself"
    assert "secret" not in finding.line()
    return finding


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("target", "expected", "found"),
    [
        ("http://cdn.example/x", "an https:// URL", "one to http://cdn.example"),
        ("http://hub.example/x", "an https:// URL", "one to http://hub.example"),
        ("ftp://cdn.example/x?secret", "an https:// URL", "one to ftp://cdn.example"),
        ("file:///etc/passwd", "an https:// URL", "one to file://"),
        ("javascript:alert(1)", "an https:// URL", "one to javascript://"),
        ("https://me:secret@cdn.example/x", "without credentials in its URL", "one with them"),
        ("https://me@cdn.example/x", "without credentials in its URL", "one with them"),
        ("https://:secret@cdn.example/x", "without credentials in its URL", "one with them"),
        ("https://[::1", "a URL", "one that cannot be read"),
        ("https://host:99999/x", "a URL", "one that cannot be read"),
    ],
)
def test_a_redirect_to_another_scheme_or_to_no_plain_url_is_refused(
    target: str, expected: str, found: str
) -> None:
    """The finding says what was wrong with it."""
    finding = refused(target)
    assert finding.expected.removeprefix("a redirect ").removeprefix("to ") == expected
    assert finding.found == found


#: Hosts that are this machine or its link, and those in a network around it.
HERE = [
    "localhost",
    "LOCALHOST.",
    "127.0.0.1",
    "127.1.2.3:8443",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "0.0.0.0",
    "169.254.169.254",
    "[fe80::1]",
    "inside.example",
    "metadata.example",
    "six.example",
    "several.example",
    "2130706433",
    "0x7f000001",
    "127.1",
    "0",
    "2852039166",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "\uff11\uff12\uff17.1",
]
NEAR = [
    "10.1.2.3",
    "intranet.example",
    "mixed.example",
    "[::ffff:10.1.2.3]",
    "[64:ff9b::a01:203]",
    "[2002:a01:203::]",
    "[fd00::1]",
]


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("host", [*HERE, *NEAR])
@pytest.mark.parametrize("proxy", ["", "http://p.example:1"])
def test_a_redirect_inwards_is_refused(
    host: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way an address is written; behind a proxy it is the proxy that resolves names."""
    monkeypatch.setenv("https_proxy", proxy)
    target = f"https://{host}/x"
    if proxy and host.endswith(".example"):
        assert redirect_target("https://hub.example/file", target, False) == target
        return
    finding = refused(target)
    assert finding.expected == "a redirect to a public host"
    named = host.removesuffix(":8443").strip("[]").lower()
    assert finding.found == f"one to {named}, an address inside this machine or network"
    if host in NEAR:
        assert redirect_target("https://hub.example/file", target, allow_private=True) == target
        assert redirect_target("https://10.0.0.8/file", target, False) == target
    else:
        assert refused(target, near=True) == finding
        assert refused(target, "https://10.0.0.8/file").found == finding.found
    assert redirect_target("https://127.0.0.1/file", target, False) == target


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("https://hub.example/a", "https://cdn.example/x?signature=1"),
        ("https://hub.example/a/b", "/c"),
        ("https://hub.example/a/b", "c"),
        ("http://127.0.0.1:8000/a", "http://127.0.0.1:9000/x"),
        ("http://127.0.0.1:8000/a", "http://cdn.example/x"),
        ("http://10.0.0.7/a", "http://10.0.0.8/x"),
        ("https://hub.example/a", "https://unknown.example/x"),
    ],
)
def test_other_redirects_are_followed(source: str, target: str) -> None:
    """To public hosts, and among hosts that are equally near."""
    assert redirect_target(source, target, False).endswith(target.lstrip("/"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "17"}, 17),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"api";r=10;t=55'}, None),
        ({"RateLimit": '"api"; r = 0 ; t = 0'}, 0),
        ({"RateLimit": '"api";t=55'}, None),
        ({"Retry-After": "0"}, 0),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "5"}, 55),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "60"}, 60),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    """Retry-After and RateLimit are understood, and nothing else is taken for them."""
    assert requested_wait(headers) == seconds


def test_a_wait_may_be_given_as_a_date() -> None:
    """Retry-After with a date is the time until then."""
    seconds = requested_wait({"Retry-After": formatdate(time() + 5000, usegmt=True)})
    assert seconds and 4000 < seconds <= 5000


def test_no_wait_is_too_long_to_be_counted() -> None:
    """Four hundred digits of seconds are a long time, and nothing worse."""
    seconds = requested_wait({"Retry-After": "9" * 400})
    assert seconds is not None and 300 < seconds <= 1e9
    assert requested_wait({"RateLimit": '"api";r=0;t=' + "9" * 400}) == FOREVER == 1e9


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("http://hub.example/a", "https://hub.example/b"),
        ("http://hub.example/a", "https://hub.example:8443/b"),
        ("https://hub.example/a", "https://198.18.0.7/b"),
        ("https://hub.example/a", "https://198.19.255.255/b"),
        ("https://hub.example/a", "https://[64:ff9b::5db8:d822]/b"),
        ("https://hub.example/a", "https://[2002:5db8:d822::]/b"),
        ("https://hub.example/a", "https://[2606:2800::1]/b"),
    ],
)
def test_a_move_to_https_and_an_invented_address_are_followed(source: str, target: str) -> None:
    """The same host over https, and an address that only stands for a name behind a proxy."""
    assert redirect_target(source, target, False) == target


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(("url", "where"), [("http://.hub", ".hub"), ("http:///x", "a URL")])
def test_a_url_that_cannot_be_asked_is_named_by_its_host(url: str, where: str) -> None:
    """Where it has none, as a redirect may, the finding says at least what it is about."""
    finding = classify_error(url, ValueError("invalid"))
    assert (finding.kind, finding.where) == (Kind.NO_NETWORK, where)


class Closed(Exception):
    """A library's error that has wrapped another one."""

    def __init__(self, *arguments: object, reason: object = None) -> None:
        super().__init__(*arguments)
        self.reason = reason


def caused(error: Exception, cause: Exception) -> Exception:
    """Return an error with its cause."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("broken"), "broken"),
        (ValueError(), "ValueError"),
        (Closed("outer", reason=OSError("inner")), "inner"),
        (Closed("outer", OSError("inner"), OSError("other")), "inner"),
        (Closed(Closed("x", reason=Closed("y", OSError(1, "innermost")))), "innermost"),
        (caused(Closed("outer"), OSError("inner")), "inner"),
        (Closed("outer", reason="text"), "outer"),
        (OSError("x" * 201), "x" * 200),
        (OSError("<Connection(host='h', port=1) object at 0x7f>: Refused"), "Refused"),
        (OSError("HTTPPool(host='h', port=1): Read timed out."), "Read timed out."),
    ],
)
def test_the_innermost_cause_is_told_in_words(error: Exception, words: str) -> None:
    """In 200 letters at most, and without the objects of a library."""
    assert cause_of(error) == words


def test_errors_that_are_causes_of_each_other_have_an_end() -> None:
    """The last one that was not seen before is told."""
    one, other = Closed("one"), Closed("other")
    caused(other, one)
    assert cause_of(caused(one, other)) == "other"


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("error", "kind", "expected", "found"),
    [
        (OSError("broken"), Kind.NO_NETWORK, "an answer from h.example:1", "broken"),
        (TimeoutError("timed out"), Kind.NO_NETWORK, "an answer from h.example:1", LATE),
        (requests.exceptions.Timeout("x"), Kind.NO_NETWORK, "an answer from h.example:1", LATE),
        (Closed("Max retries", reason=OSError("Read timed out.")), Kind.NO_NETWORK, "", LATE),
        (
            caused(Closed("x"), socket.gaierror("x")),
            Kind.NO_NETWORK,
            "an answer from h.example:1",
            "no such host, or no name server that answers",
        ),
        (ValueError("x"), Kind.NO_NETWORK, "an http:// or https:// URL", "another kind of URL"),
        (
            Closed("x", reason=ssl.SSLCertVerificationError(1, "expired")),
            Kind.CERTIFICATE,
            "a certificate for h.example:1 from an authority that is trusted",
            "expired",
        ),
        (
            requests.exceptions.ProxyError(OSError("refused")),
            Kind.PROXY,
            "a way through the proxy to h.example:1",
            "refused",
        ),
        (SocksError("refused"), Kind.PROXY, "a way through the proxy to h.example:1", "refused"),
    ],
)
def test_a_request_that_failed_is_told_by_its_cause(
    error: Exception, kind: Kind, expected: str, found: str
) -> None:
    """The finding names the host without credentials, and what was the matter with it."""
    finding = classify_error("https://me:secret@h.example:1/x", error)
    assert (finding.kind, finding.where, finding.found) == (kind, "h.example:1", found)
    assert finding.expected == (expected or "an answer from h.example:1")


@pytest.mark.usefixtures("names")
def test_a_url_that_cannot_be_used_may_be_the_proxys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one it is named; where there is none, the URL is wrong."""
    monkeypatch.setenv("https_proxy", "http://a b:1")
    finding = classify_error("https://h.example/x", ValueError("x"))
    assert (finding.kind, finding.where) == (Kind.PROXY, "h.example")
    assert finding.found == "a proxy's URL that cannot be used"
    assert finding.help == "check https_proxy and NO_PROXY"

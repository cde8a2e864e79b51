"""What is made of answers: redirects, waits, and texts that are shown."""

from __future__ import annotations

import socket
from email.utils import formatdate
from time import time
from typing import Any

import pytest

from csm_weights.errors import Kind
from csm_weights.transfer.http.responses import (
    FOREVER,
    classify_error,
    redirect_target,
    requested_wait,
)
from csm_weights.transfer.source import SourceError


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
    }

    def lookup(host: str, *_: object) -> list[Any]:
        if host not in known:
            raise socket.gaierror(f"no {host}")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "target",
    [
        "http://cdn.example/x",
        "ftp://cdn.example/x",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://user:secret@cdn.example/x",
        "https://localhost/x",
        "https://127.0.0.1/x",
        "https://127.1.2.3:8443/x",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://0.0.0.0/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[fe80::1]/x",
        "https://10.1.2.3/x",
        "https://inside.example/x",
        "https://metadata.example/x",
        "https://intranet.example/x",
        "https://six.example/x",
        "//localhost/x",
    ],
)
def test_a_redirect_inwards_or_to_another_scheme_is_refused(target: str) -> None:
    """From a public host to this machine, this link, this network, or another scheme: no."""
    with pytest.raises(SourceError) as caught:
        redirect_target("https://hub.example/file", target)
    finding = caught.value.findings[0]
    assert finding.kind is Kind.REDIRECT
    assert "secret" not in finding.line()


def test_a_redirect_to_another_scheme_says_which_was_expected() -> None:
    """The finding names the scheme that was meant and where the redirect leads."""
    with pytest.raises(SourceError) as caught:
        redirect_target("http://hub.example/file", "https://other.example/x?signature=secret")
    finding = caught.value.findings[0]
    assert finding.expected == "a redirect to an http:// URL"
    assert finding.found == "one to https://other.example"


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
    assert redirect_target(source, target).endswith(target.lstrip("/"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "17"}, 17),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
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


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "127.1",
        "0",
        "2852039166",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "LOCALHOST.",
        "\uff11\uff12\uff17.1",
        "[::1",
        "host:99999",
    ],
)
@pytest.mark.parametrize("variables", [{"no_proxy": "x"}, {"https_proxy": "http://p.example:1"}])
def test_no_notation_of_an_inner_address_is_followed(
    host: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a proxy or without, whatever way this machine is written, and no traceback."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceError) as caught:
        redirect_target("https://hub.example/file", f"https://{host}/x")
    assert caught.value.findings[0].kind is Kind.REDIRECT


def test_no_wait_is_too_long_to_be_counted() -> None:
    """Four hundred digits of seconds are a long time, and nothing worse."""
    seconds = requested_wait({"Retry-After": "9" * 400})
    assert seconds is not None and 300 < seconds <= FOREVER


@pytest.mark.usefixtures("names")
def test_a_server_that_the_user_named_may_lead_into_a_private_network() -> None:
    """Behind such a server a private address is followed, this machine's never."""
    target = "https://10.1.2.3/x"
    assert redirect_target("https://hub.example/a", target, allow_private=True) == target
    with pytest.raises(SourceError):
        redirect_target("https://hub.example/a", "https://127.0.0.1/x", allow_private=True)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("http://hub.example/a", "https://hub.example/b"),
        ("http://hub.example/a", "https://hub.example:8443/b"),
        ("https://hub.example/a", "https://198.18.0.7/b"),
    ],
)
def test_a_move_to_https_and_an_invented_address_are_followed(source: str, target: str) -> None:
    """The same host over https, and an address that only stands for a name behind a proxy."""
    assert redirect_target(source, target) == target


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(("url", "where"), [("http://.hub", ".hub"), ("http:///x", "a URL")])
def test_a_url_that_cannot_be_asked_is_named_by_its_host(url: str, where: str) -> None:
    """Where it has none, as a redirect may, the finding says at least what it is about."""
    finding = classify_error(url, ValueError("invalid"))
    assert (finding.kind, finding.where) == (Kind.NO_NETWORK, where)

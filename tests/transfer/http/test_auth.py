"""Credentials: to whom each header is sent, and what is no header and no token."""

from __future__ import annotations

import pytest
from requests import PreparedRequest

from csm_weights.config import HubEnvironment
from csm_weights.errors import AccessRefused, Finding, Kind, UsageError
from csm_weights.transfer.http.auth import HubCredentials, OriginAuth, mirror_auth
from tests.support.network import VARIABLES


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
        ("https://other.example/a", False),
        ("ftp://hub.example:80/a", False),
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
    ("own", "url", "is_sent"),
    [
        ("http://hub.example:8080", "http://hub.example:8080/a", True),
        ("http://hub.example:8080", "https://hub.example/a", False),
        ("http://hub.example:443", "https://hub.example/a", False),
        ("https://hub.example", "https://hub.example:443/a", True),
        ("https://hub.example:443", "https://hub.example/a", True),
        ("https://hub.example", "https://hub.example:444/a", False),
    ],
)
def test_a_port_belongs_to_the_origin(own: str, url: str, is_sent: bool) -> None:
    """The usual one may be left out; no other is moved to https."""
    assert sent(OriginAuth(own, {"X-Secret": "1"}), url) is is_sent


@pytest.mark.parametrize(
    ("url", "is_named"),
    [
        ("https://huggingface.co", False),
        ("https://huggingface.co/org/name", False),
        ("http://huggingface.co", True),
        ("https://hub.example", True),
        ("https://mirror.example", True),
        ("", True),
    ],
)
def test_every_server_but_the_public_hub_is_named_by_the_user(url: str, is_named: bool) -> None:
    """Such a one may be in a network of their own."""
    assert OriginAuth(url).is_named_by_user is is_named


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("", {}),
        (" \n\n", {}),
        ("X-Key: value", {"X-Key": "value"}),
        ("X-Key:a: b \n\n Other :  2\n", {"X-Key": "a: b", "Other": "2"}),
        ("X-Empty:", {"X-Empty": ""}),
    ],
)
def test_the_headers_for_a_mirror_are_lines(
    text: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each a name and a value; blanks around them and empty lines say nothing."""
    monkeypatch.setenv("CSM_MIRROR_HEADERS", text)
    request = PreparedRequest()
    request.prepare("GET", "http://mirror.example/x")
    assert mirror_auth("http://mirror.example")(request).headers == headers
    monkeypatch.delenv("CSM_MIRROR_HEADERS")
    request.prepare("GET", "http://mirror.example/x")
    assert mirror_auth("http://mirror.example")(request).headers == {}


@pytest.mark.parametrize(
    "line", ["X-Key", ": value", " : value", "K\u00e9y: value", "X-Key: \u00e9", "X-Key: a\x01b"]
)
def test_what_is_no_header_is_misuse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not repeated: it may be a secret that was pasted."""
    monkeypatch.setenv("CSM_MIRROR_HEADERS", f"X-Good: 1\n{line}\nX-Other: 1")
    with pytest.raises(UsageError) as caught:
        mirror_auth("http://mirror.example")
    assert str(caught.value) == "CSM_MIRROR_HEADERS: a line is not NAME: VALUE"


def test_the_token_of_the_environment_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the library, only where there may be one and it may be sent."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_library")
    for variables, token in (
        ({"HF_TOKEN": "hf_good"}, "hf_library"),
        ({"HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "1"}, None),
    ):
        variables |= {"HF_ENDPOINT": "https://hub.example"}
        found = HubCredentials.from_environment(HubEnvironment.read(variables))
        assert found == HubCredentials("https://hub.example", token)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setenv("HF_ENDPOINT", "https://own.example")
    assert HubCredentials.from_environment() == HubCredentials("https://own.example", "hf_library")


def test_a_library_that_cannot_get_a_token_is_told_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The finding names what the token was to come from, and the error's class, not its words."""

    def fails() -> str:
        raise RuntimeError("hf_secret was refused")

    monkeypatch.setattr("huggingface_hub.get_token", fails)
    environment = HubEnvironment.read({"HF_TOKEN": "hf_good"})
    with pytest.raises(AccessRefused) as caught:
        HubCredentials.from_environment(environment)
    where = environment.token_from
    help_text = f"check {where}, or set HF_TOKEN"
    finding = Finding(Kind.NO_TOKEN, where, "a token", "RuntimeError", help_text)
    assert caught.value.findings == (finding,)


def test_a_token_is_sent_and_masked() -> None:
    """What the Hub repeats of it is not shown; without one there is no header, and no mask."""
    own, none = HubCredentials("https://hub.example", "hf_a"), HubCredentials("https://hub.example")
    for credentials, headers in ((own, {"Authorization": "Bearer hf_a"}), (none, {})):
        request = PreparedRequest()
        request.prepare("GET", "https://hub.example/x")
        assert credentials.auth(request).headers == headers
    assert own.mask("the token hf_a, hf_a") == "the token ***, ***"
    assert none.mask("no token") == "no token"
    assert (own.problem("page"), none.problem("page")) == (None, None)


def test_a_token_with_other_letters_cannot_be_sent() -> None:
    """As one that was copied where it was cut short."""
    credentials = HubCredentials("https://hub.example", "hf_a\u2026")
    assert credentials.problem("page") == Finding(
        Kind.UNKNOWN_TOKEN,
        "page",
        "a token that the Hub knows",
        "one with letters beyond ASCII",
        "make a new one at https://hub.example/settings/tokens and run hf auth login",
    )

"""One table of faults over `inv lock --repo`, `inv doctor` and `inv weights`: one answer each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csm_weights.commands import lock
from csm_weights.errors import CsmWeightsError, Finding, Kind
from csm_weights.hashing import git_sha1
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply, doctor
from csm_weights.pipeline.request import Request
from tests.support import network
from tests.support.hub import HubServer
from tests.support.network import VARIABLES, be_hasty, certificate, closed_port

REPO = "org/small"
TOKEN = "hf_GeheimGeheimGeheim"
CONTENT = b"the content of a small file\n"

COMMANDS = ("lock", "doctor", "weights")


@dataclass
class World:
    """A Hub with one file that is in git, a manifest that pins it, and three commands."""

    hub: HubServer
    root: Path
    patch: pytest.MonkeyPatch
    closing: contextlib.ExitStack

    def setenv(self, name: str, value: str) -> None:
        self.patch.setenv(name, value)

    def run(self, command: str) -> CsmWeightsError | None:
        """Run a command; return the error that it ends with."""
        request = Request(self.root, "small", source="hf")
        try:
            if command == "lock":
                lock.lock_repo(self.root, REPO, "", "", "locked", False)
                return None
            if command == "doctor":
                return doctor.examine(request, smoke=False).error
            return apply.weights(request, smoke=False).error
        except CsmWeightsError as error:
            return error

    def log_in(self, token: str = TOKEN) -> None:
        self.setenv("HF_TOKEN", token)

    def answer(self, code: int, error: str = "", message: str = "", **headers: str) -> None:
        """Let the Hub answer everything with this status."""
        told = {"X-Error-Code": error, "X-Error-Message": message, **headers}
        self.hub.fault(
            "status", host="hub", code=code, headers={n: v for n, v in told.items() if v}
        )

    def https(self) -> Path:
        """Put the Hub behind TLS; return the certificate, which signs itself."""
        cert, key = certificate(self.root / "tls")
        front = network.tls_front(self.hub.endpoint, cert, key)
        self.setenv("HF_ENDPOINT", self.closing.enter_context(front))
        return cert


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A fresh world, in which nobody waits long."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    be_hasty(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    digest = git_sha1(len(CONTENT))
    digest.update(memoryview(CONTENT))
    artifact = Artifact("a.txt", "a", "opaque", len(CONTENT), git_sha1=digest.hexdigest())
    with HubServer() as hub, contextlib.ExitStack() as closing:
        commit = hub.add_repo(REPO, {"a.txt": CONTENT}, lfs=lambda *_: False)
        hub.add_token(TOKEN)
        manifest = Manifest("small", "output/small", "models/small", (artifact,), repo=REPO)
        (tmp_path / "manifests").mkdir()
        text = render(replace(manifest, revision=commit))
        (tmp_path / "manifests" / "small.toml").write_text(text)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield World(hub, tmp_path, monkeypatch, closing)


def refusing_proxy(world: World) -> None:
    address = world.closing.enter_context(network.refusing_proxy(407))
    world.setenv("HTTPS_PROXY", f"http://me:S3cret@{address}")
    world.setenv("HF_ENDPOINT", "https://hub.invalid")


def with_token(world: World, code: int, error: str = "", message: str = "") -> None:
    world.log_in()
    world.answer(code, error, message)


def elsewhere(world: World) -> None:
    location = f"{world.hub.storage}/elsewhere"
    world.hub.fault("redirect", host="hub", location=location, code=302)


def circle(world: World) -> None:
    world.hub.fault("redirect", host="hub", location="/again", code=302)


def slow_headers(world: World) -> None:
    be_hasty(world.patch, read=0.5)
    world.setenv("HF_ENDPOINT", world.closing.enter_context(network.drip(b"H", seconds=0.05)))


#: A fault: how it comes about, the kind of finding, the exit code, and words of the advice.
FAULTS: dict[str, tuple[Callable[[World], object], Kind, int, str]] = {
    "a certificate that nobody has signed": (
        World.https,
        Kind.CERTIFICATE,
        6,
        "SSL_CERT_FILE (not set), SSL_CERT_DIR (not set), REQUESTS_CA_BUNDLE (not set)",
    ),
    "a proxy that wants a password": (refusing_proxy, Kind.PROXY, 6, "check HTTPS_PROXY"),
    "a proxy that is not there": (
        lambda w: w.setenv("HTTP_PROXY", f"http://me:S3cret@{closed_port()}"),
        Kind.PROXY,
        6,
        "check HTTP_PROXY and NO_PROXY",
    ),
    "a SOCKS proxy that is not there": (
        lambda w: w.setenv("ALL_PROXY", f"socks5://{closed_port()}"),
        Kind.PROXY,
        6,
        "check ALL_PROXY",
    ),
    "a proxy of no known kind": (
        lambda w: w.setenv("ALL_PROXY", "gopher://me:S3cret@127.0.0.1:9"),
        Kind.PROXY,
        6,
        "check ALL_PROXY",
    ),
    "nobody listens": (
        lambda w: w.setenv("HF_ENDPOINT", f"http://{closed_port()}"),
        Kind.NO_NETWORK,
        6,
        "check the network",
    ),
    "no such host": (
        lambda w: w.setenv("HF_ENDPOINT", "http://hub.invalid"),
        Kind.NO_NETWORK,
        6,
        "check the network",
    ),
    "closed connections": (
        lambda w: w.hub.fault("close", host="hub"),
        Kind.NO_NETWORK,
        6,
        "check the network",
    ),
    "headers that never end": (slow_headers, Kind.NO_NETWORK, 6, "check the network"),
    "the page of a captive portal": (
        lambda w: w.hub.fault("html", host="hub"),
        Kind.NO_NETWORK,
        6,
        "open any web page",
    ),
    "another page in place of the answer": (
        lambda w: w.hub.fault("html", host="hub", body=b"<p>Sign in</p>"),
        Kind.NO_NETWORK,
        6,
        "open any web page",
    ),
    "a redirect to another host": (elsewhere, Kind.REDIRECT, 6, "set HF_ENDPOINT"),
    "redirects in a circle": (circle, Kind.REDIRECT, 6, "captive portal"),
    "no token for what is private": (
        lambda w: w.answer(401),
        Kind.NO_TOKEN,
        5,
        "if it is private, run hf auth login",
    ),
    "no token for what is gated": (
        lambda w: w.answer(401, "GatedRepo", "restricted"),
        Kind.NO_TOKEN,
        5,
        "accept the terms at",
    ),
    "a token that the Hub does not know": (
        lambda w: w.log_in("hf_Unbekannt"),
        Kind.UNKNOWN_TOKEN,
        5,
        "make a new one",
    ),
    "a token that was revoked": (
        lambda w: with_token(w, 401, "GatedRepo", "Access is restricted"),
        Kind.UNKNOWN_TOKEN,
        5,
        "make a new one",
    ),
    "a token with letters beyond ASCII": (
        lambda w: w.log_in("hf_Geheim\N{HORIZONTAL ELLIPSIS}"),
        Kind.UNKNOWN_TOKEN,
        5,
        "make a new one",
    ),
    "terms that were not accepted": (
        lambda w: with_token(w, 403, "GatedRepo", "not in the authorized list"),
        Kind.TERMS,
        5,
        "accept them at",
    ),
    "a token without the scope": (
        lambda w: with_token(w, 403, "", "enable access to gated in your fine-grained token"),
        Kind.SCOPE,
        5,
        "let the token read",
    ),
    "no such repository": (
        lambda w: with_token(w, 404, "RepoNotFound"),
        Kind.NOT_THERE,
        3,
        "check the name",
    ),
    "a wait that is too long": (
        lambda w: w.answer(429, **{"Retry-After": "3600"}),
        Kind.RATE_LIMITED,
        6,
        "try again in 3600 s",
    ),
    "an error that stays": (lambda w: w.answer(500), Kind.SERVER_TROUBLE, 6, "try again later"),
    "an overload that stays": (lambda w: w.answer(503), Kind.SERVER_TROUBLE, 6, "try again later"),
    "offline mode": (
        lambda w: w.setenv("HF_HUB_OFFLINE", "1"),
        Kind.OFFLINE,
        3,
        "unset HF_HUB_OFFLINE",
    ),
}


@pytest.mark.parametrize(("cause", "kind", "code", "advice"), FAULTS.values(), ids=FAULTS)
def test_every_command_gives_one_answer_to_a_fault(
    world: World,
    cause: Callable[[World], object],
    kind: Kind,
    code: int,
    advice: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All three commands end with the same finding, exit code and advice, and show no secret."""
    cause(world)
    errors = {command: world.run(command) for command in COMMANDS}
    findings: set[tuple[Finding, ...]] = set()
    for command, error in errors.items():
        assert error, f"{command} did not fail"
        assert (command, error.exit_code, len(error.findings)) == (command, code, 1)
        # The path of a URL tells the commands apart.
        findings.add(tuple(replace(f, where="") for f in error.findings))
    assert len(findings) == 1, findings
    finding = next(iter(findings))[0]
    assert finding.kind is kind
    assert advice in finding.help
    text = "\n".join([*map(str, errors.values()), *map(repr, errors.values()), *capfd.readouterr()])
    for secret in ("Geheim", "hf_Unbekannt", "S3cret"):
        assert secret not in text
    assert "Connection(" not in text and "object at 0x" not in text


PASSING: dict[str, Callable[[World], object]] = {
    "one 503": lambda w: w.hub.fault("status", host="hub", code=503, times=1),
    "a short wait": lambda w: w.hub.fault(
        "status", host="hub", code=429, headers={"Retry-After": "1"}, times=1
    ),
    "one closed connection": lambda w: w.hub.fault("close", host="hub", times=1),
    "a redirect on the same host": lambda w: w.hub.fault("moved", host="hub", times=1),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("cause", PASSING.values(), ids=PASSING)
def test_every_command_outlasts_what_passes(
    world: World,
    cause: Callable[[World], object],
    command: str,
) -> None:
    """What is over soon ends none of them."""
    be_hasty(world.patch, patience=60)
    cause(world)
    assert world.run(command) is None


# ---- who is trusted, and by which way


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
)
def test_an_authority_may_be_in_any_of_four_variables(
    world: World, variable: str, command: str
) -> None:
    """Whichever of the variables names a company's authority, every command trusts it."""
    cert = world.https()
    path = network.hashed(cert) if variable == "SSL_CERT_DIR" else cert
    world.setenv(variable, str(path))
    assert world.run(command) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_an_authority_adds_to_the_others(world: World, command: str) -> None:
    """A variable with another authority, or with a file that is not there, takes none away."""
    world.setenv("SSL_CERT_FILE", str(world.https()))
    other, _ = certificate(world.root / "other")
    world.setenv("REQUESTS_CA_BUNDLE", str(other))
    world.setenv("CURL_CA_BUNDLE", str(world.root / "none.pem"))
    assert world.run(command) is None


def test_a_refused_certificate_names_what_is_set(world: World) -> None:
    """The advice has each variable with its value, and which of the files cannot be used."""
    world.https()
    other, _ = certificate(world.root / "other")
    world.setenv("REQUESTS_CA_BUNDLE", str(other))
    world.setenv("CURL_CA_BUNDLE", "/none.pem")
    for command in COMMANDS:
        error = world.run(command)
        assert error
        assert "SSL_CERT_FILE (not set)" in str(error)
        assert f"REQUESTS_CA_BUNDLE={other}, CURL_CA_BUNDLE=/none.pem (cannot be used)" in str(
            error
        )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_every_command_goes_through_a_socks_proxy(world: World, scheme: str, command: str) -> None:
    """ALL_PROXY with SOCKS is honoured for all requests."""
    address, led = world.closing.enter_context(network.socks_proxy())
    world.setenv("ALL_PROXY", f"{scheme}://{address}")
    assert world.run(command) is None
    assert set(led) == {world.hub.endpoint.removeprefix("http://")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY"])
def test_a_host_in_no_proxy_is_asked_directly(world: World, variable: str, command: str) -> None:
    """Where NO_PROXY covers the Hub, a proxy that nothing can use is not touched."""
    world.setenv(variable, "socks5://127.0.0.1:9")
    world.setenv("NO_PROXY", "127.0.0.1")
    assert world.run(command) is None


# ---- where the token goes


def test_the_token_goes_to_no_other_host_by_any_command(world: World) -> None:
    """Neither a redirect nor the link to the next page takes the token, or is followed."""
    world.log_in()
    elsewhere(world)
    for command in COMMANDS:
        error = world.run(command)
        assert error and error.findings[0].kind is Kind.REDIRECT
    world.hub.clear_faults()
    link = f'<{world.hub.storage}/next>; rel="next"'
    world.hub.fault("add-header", match="*/tree/*", name="Link", value=link)
    error = world.run("lock")
    assert error and error.findings[0].kind is Kind.REDIRECT
    asked = world.hub.requests(host="hub")
    assert {r.headers.get("authorization") for r in asked} == {f"Bearer {TOKEN}"}
    assert world.hub.requests(host="storage") == []

"""What the environment says of authorities and proxies, and how it is shown."""

from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest

from csm_weights.transfer.http.environment import (
    describe_trust,
    proxy_for,
    proxy_variables,
    trust_context,
)
from tests.support.network import VARIABLES, certificate, hashed


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of this machine counts."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


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
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", exempt)
    assert proxy_for(url) == proxy


@pytest.mark.parametrize(
    ("url", "variables", "expected"),
    [
        ("https://hub.example/x", {}, "HTTPS_PROXY and HTTP_PROXY and NO_PROXY"),
        ("https://hub.example/x", {"http_proxy": "p"}, "HTTPS_PROXY and HTTP_PROXY and NO_PROXY"),
        ("http://hub.example/x", {"http_proxy": "p"}, "http_proxy and NO_PROXY"),
        ("https://hub.example/x", {"HTTPS_PROXY": "p"}, "HTTPS_PROXY and NO_PROXY"),
        (
            "https://hub.example/x",
            {"all_proxy": "p", "ALL_PROXY": "p", "https_proxy": "p", "no_proxy": "x"},
            "https_proxy and all_proxy and ALL_PROXY and NO_PROXY",
        ),
    ],
)
def test_the_variables_to_check_are_those_that_count_for_a_url(
    url: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either case; where none is set, those that people know."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_variables(url) == expected


def test_every_place_of_authorities_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what each variable says, and whether it can be used: a file, or several folders."""
    assert describe_trust() == (
        "the system's store, SSL_CERT_FILE (not set), SSL_CERT_DIR (not set),"
        " REQUESTS_CA_BUNDLE (not set), CURL_CA_BUNDLE (not set)"
    )
    cert, _ = certificate(tmp_path / "tls")
    (tmp_path / "text").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", f"{tmp_path / 'none'}")
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}:{tmp_path / 'none'}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{cert}")
    monkeypatch.setenv("CURL_CA_BUNDLE", f"{tmp_path / 'text'}")
    assert describe_trust().split(", ")[1:] == [
        f"SSL_CERT_FILE={tmp_path / 'none'} (cannot be used)",
        f"SSL_CERT_DIR={tmp_path}:{tmp_path / 'none'} (cannot be used)",
        f"REQUESTS_CA_BUNDLE={cert}",
        f"CURL_CA_BUNDLE={tmp_path / 'text'} (cannot be used)",
    ]
    cert = cert.rename(cert.parent / "a:b")
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}:{hashed(cert)}:")
    monkeypatch.setenv("CURL_CA_BUNDLE", f"{cert}")
    assert describe_trust().split(", ")[2] == f"SSL_CERT_DIR={tmp_path}:{cert.parent / 'hashed'}:"
    assert describe_trust().split(", ")[4] == f"CURL_CA_BUNDLE={cert}"


def test_authorities_of_all_variables_are_added_to_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of certifi counts as well; what cannot be read adds nothing."""
    usual = trust_context().cert_store_stats()["x509_ca"]
    own = ssl.create_default_context(cafile=certifi.where())
    assert usual >= own.cert_store_stats()["x509_ca"] > 0
    assert trust_context().verify_mode == ssl.CERT_REQUIRED
    cert, _ = certificate(tmp_path / "tls")
    for name in ("SSL_CERT_FILE", "CURL_CA_BUNDLE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, f"{cert}")
            patch.setenv("SSL_CERT_DIR", f"{tmp_path / 'none'}")
            assert trust_context().cert_store_stats()["x509_ca"] == usual + 1

"""What servers answer, judged: waits, redirects, wrong bodies, and why there is no answer."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
import unicodedata
from collections.abc import Mapping
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import NameResolutionError
from urllib3.util import Retry

from csm_weights.errors import Finding, Kind
from csm_weights.transfer.source import SourceError

#: Addresses that stand for IPv4 ones behind a translator.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

#: Seconds that stand for any longer wait.
FOREVER = 1e9

_RATE_LIMIT = re.compile(r"\br\s*=\s*(\d{1,9})\s*;\s*t\s*=\s*(\d{1,9})")


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: by Retry-After (number or date), or RateLimit.

    RateLimit as in draft-ietf-httpapi-ratelimit-headers: `"api";r=0;t=55`.
    """
    waits: list[float] = []
    with contextlib.suppress(Exception):
        waits.append(Retry().parse_retry_after(headers.get("Retry-After", "")))
    match = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    if match and match[1] == "0":
        waits.append(float(match[2]))
    return min(max(waits), FOREVER) if waits else None


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL: who it is that answers."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def redirect_target(url: str, location: str) -> str:
    """Where a redirect from `url` leads.

    Raises Broken unless it keeps the scheme, and leads to no address that is
    nearer to this machine than the one that sent it there.
    """
    before = urlsplit(url)
    try:
        target = urljoin(url, location)
        origin(target)
        problem = _redirect_problem(before, urlsplit(target))
    except ValueError:
        target, problem = "", "a URL that makes no sense"
    if problem:
        help_text = "if that is meant, name the final URL yourself"
        expected = f"a redirect within {before.scheme} to a public host"
        finding = Finding(Kind.REDIRECT, shown(url), expected, problem, help_text)
        raise SourceError([finding])
    return target


def _redirect_problem(before: SplitResult, after: SplitResult) -> str:
    """Why a redirect is not followed, or an empty string."""
    if after.scheme != before.scheme:
        return f"another scheme, {after.scheme}"
    if after.username or after.password:
        return "a URL with credentials in it"
    if _nearness(after) > _nearness(before):
        return f"{after.hostname}, an address inside this machine or network"
    return ""


def _nearness(parts: SplitResult) -> int:
    """0 for a public host, 1 for a private network's, 2 for this machine or link."""
    host = parts.hostname or ""
    names, url = [host], parts.geturl()
    if not select_proxy(url, get_environ_proxies(url)):
        # Behind a proxy it is the proxy who looks the name up.
        with contextlib.suppress(OSError, UnicodeError):
            names += [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    return max(map(_address_nearness, names))


def _address_nearness(name: str) -> int:
    if name.lower().rstrip(".").endswith("localhost"):
        return 2
    address = _address(name)
    if address is None:
        return 0
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        return 2
    return 0 if address.is_global else 1


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a name is, in any of the forms that resolvers take, or None."""
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        with contextlib.suppress(OSError, ValueError):
            return ipaddress.IPv4Address(socket.inet_aton(unicodedata.normalize("NFKC", name)))
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def shown(url: str) -> str:
    """A URL without its query, which may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def describe(head: bytes, content_type: str) -> str:
    """What a body is that is not the file, by its first bytes."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer in place of the content"
    if head.startswith(b"Access to model ") and b" is restricted" in head:
        return "the Hub's refusal in place of the content"
    if "html" in content_type or head.lstrip()[:1] == b"<":
        return "a web page; is there a login or a captive portal in between?"
    return "another file"


def wrong_answer(where: str, expected: str, found: str) -> SourceError:
    """The error for an answer that is about something else than what was asked."""
    return SourceError([Finding(Kind.WRONG_ANSWER, where, expected, found, "ask another source")])


def is_about_certificate(error: BaseException) -> bool:
    """Whether a host could not prove who it is; all else of TLS may pass."""
    return isinstance(_innermost(error), ssl.SSLCertVerificationError | ssl.CertificateError)


def cause(error: BaseException) -> str:
    """The innermost reason of an error that libraries have wrapped, in words."""
    inner = _innermost(error)
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return re.sub(r"^.*?(?:object at 0x\w+>|Connection\([^)]*\)): ?", "", text)[:200]


def _innermost(error: BaseException) -> BaseException:
    while True:
        reasons = [getattr(error, "reason", None), *error.args]
        inner = next((r for r in reasons if isinstance(r, BaseException)), None)
        if inner is None:
            return error
        error = inner


def no_answer(host: str, error: BaseException) -> Finding:
    """That no answer came, and why."""
    expected, found = f"an answer from {host}", cause(error)
    help_text = "check the network, and run the same command again"
    if "timed out" in found or isinstance(error, requests.exceptions.Timeout):
        found = "none in time"
    if isinstance(error.__context__, NameResolutionError) or "resolve" in found:
        found = "no such host, or no name server that answers"
    return Finding(Kind.NO_NETWORK, host, expected, found, help_text)


def bad_url_finding(host: str) -> Finding:
    """That a URL, or that of the proxy on the way to it, is none."""
    help_text = "check HF_ENDPOINT, --url, HTTPS_PROXY and HTTP_PROXY"
    where, expected = host or "a URL", "an http:// or https:// URL, and a way to it"
    return Finding(Kind.NO_NETWORK, where, expected, "one that makes no sense", help_text)


def proxy_finding(host: str, found: str) -> Finding:
    """That the proxy lets nothing through."""
    help_text = "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    return Finding(Kind.PROXY, host, f"a way through the proxy to {host}", found, help_text)


def certificate_finding(host: str, error: BaseException) -> Finding:
    """That a host could not prove who it is."""
    help_text = "check the clock; for a company's own authority set REQUESTS_CA_BUNDLE"
    expected = f"a certificate that proves {host}"
    return Finding(Kind.CERTIFICATE, host, expected, cause(error), help_text)


def passing_finding(host: str, response: requests.Response, seconds: float | None) -> Finding:
    """An answer after which the same request may succeed."""
    status = f"{response.status_code} {response.reason}"
    if response.status_code == 429:
        asked = "later" if seconds is None else f"in {seconds:.0f} s"
        return Finding(Kind.RATE_LIMITED, host, "an answer", status, f"try again {asked}")
    return Finding(Kind.SERVER_TROUBLE, host, "an answer", status, "try again later")

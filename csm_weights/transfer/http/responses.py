"""Answers of servers, judged: redirects, waits, wrong bodies, and why no answer came."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
import unicodedata
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.environment import describe_trust, proxy_for, proxy_variables
from csm_weights.transfer.source import SourceError

#: Networks whose addresses stand for others: IPv4 behind a translator, and
#: names behind a proxy that invents addresses (RFC 2544, used by Clash and the like).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_INVENTED = ipaddress.ip_network("198.18.0.0/15")

#: What is raised by requests and urllib3 where no answer comes, or its body breaks off.
NO_ANSWER = (HTTPError, OSError, ValueError)

#: Seconds that stand for any longer wait.
FOREVER = 1e9

#: No request is left, and the seconds until there is one again.
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)")

#: The start of a library's message that names one of its objects.
_OBJECT = re.compile(r"^.*?(?:object at 0x\w+>|\w+\((?:host|proxy)[^)]*\)): ?")

# ---- URLs


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of a URL: who it is that answers."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def is_upgrade(before: str, after: str) -> bool:
    """Return whether a URL moves from http to https of the same host."""
    (old, host, _), (new, other, _) = origin(before), origin(after)
    return (old, new) == ("http", "https") and host == other


def host_of(url: str) -> str:
    """Return host and port of a URL, without credentials."""
    return urlsplit(url).netloc.rpartition("@")[2]


def redact(url: str) -> str:
    """Return a URL without credentials and without its query, which may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{host_of(url)}{parts.path}"


def redirect_target(url: str, location: str, allow_private: bool) -> str:
    """Return where a redirect from `url` leads.

    It may not change the scheme, except from http to https of the same host,
    nor lead to an address nearer to this machine than the host that sent it:
    from a public host into a private network only with `allow_private`, to
    this machine or its link never. Raises SourceError.
    """
    target = problem = ""
    expected = "a redirect to a public host"
    try:
        target = urljoin(url, location)
        origin(target)
        before, after = urlsplit(url), urlsplit(target)
        if after.scheme != before.scheme and not is_upgrade(url, target):
            expected = f"a redirect to an {before.scheme}:// URL"
            problem = f"one to {after.scheme}://{host_of(target)}"
        elif after.username or after.password:
            expected, problem = "a redirect without credentials in its URL", "one with them"
        elif _nearness(after) > max(_nearness(before), int(allow_private)):
            problem = f"one to {after.hostname}, an address inside this machine or network"
    except ValueError:
        expected, problem = "a redirect to a URL", "one that cannot be read"
    if problem:
        help_text = "if that is meant, name the final URL yourself"
        raise SourceError([Finding(Kind.REDIRECT, redact(url), expected, problem, help_text)])
    return target


def _nearness(parts: SplitResult) -> int:
    """Return 0 for a public host, 1 for one in a private network, 2 for this machine or link."""
    host = parts.hostname or ""
    names = [host]
    if not proxy_for(parts.geturl()):
        # Behind a proxy it is the proxy who looks the name up.
        with contextlib.suppress(OSError, UnicodeError):
            names += [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    nearness = 2 if host.lower().rstrip(".").endswith("localhost") else 0
    for address in map(_address, names):
        if address is None:
            continue
        if address.is_loopback or address.is_link_local or address.is_unspecified:
            return 2
        if not address.is_global and address not in _INVENTED:
            nearness = max(nearness, 1)
    return nearness


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a name is, in any of the forms that resolvers take, or None."""
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        with contextlib.suppress(OSError, ValueError):
            return ipaddress.IPv4Address(socket.inet_aton(unicodedata.normalize("NFKC", name)))
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(address.packed[-4:])
        return address.ipv4_mapped or address.sixtofour or address
    return address


# ---- answers


def requested_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, by Retry-After or RateLimit, or None.

    Retry-After is a number or a date. RateLimit is as in
    draft-ietf-httpapi-ratelimit-headers: `"api";r=0;t=55`.
    """
    waits: list[float] = []
    with contextlib.suppress(Exception):
        waits.append(Retry().parse_retry_after(headers.get("Retry-After", "")))
    if match := _RATE_LIMIT.search(headers.get("RateLimit", "")):
        waits.append(float(match[1]))
    return min(max(waits), FOREVER) if waits else None


def portal_finding(where: str) -> Finding:
    """Describe a web page in place of an answer of the Hub."""
    found = "a web page; is there a login or a captive portal in between?"
    help_text = "open any web page in a browser, then run the same command again"
    return Finding(Kind.NO_NETWORK, where, "an answer of the Hub", found, help_text)


def foreign_redirect(url: str, target: str) -> Finding:
    """Describe a redirect to another host where only the one that was asked is believed."""
    host, other = host_of(url), host_of(target)
    help_text = "is there a captive portal in between? if the host has moved, set HF_ENDPOINT"
    expected, found = f"an answer of {host}", f"a redirect to {other}"
    return Finding(Kind.REDIRECT, redact(url), expected, found, help_text)


def lost_finding(host: str, found: str) -> Finding:
    """Describe an answer that broke off."""
    words = ("the whole body of an answer", found, "run the same command again")
    return Finding(Kind.NO_NETWORK, host, *words)


def wrong_answer(where: str, expected: str, found: str) -> Finding:
    """Describe an answer that is about something else than what was asked."""
    return Finding(Kind.WRONG_ANSWER, where, expected, found, "use another source")


# ---- no answer


def classify_error(url: str, error: BaseException) -> Finding:
    """Return what the failure of a request means, without naming a library's objects."""
    host, causes = host_of(url), list(_causes(error))
    found = cause_of(error)
    kinds = {name for cause in causes for name in (type(cause).__name__, type(cause).__module__)}
    if kinds & {"ProxyError", "socks"}:
        return proxy_finding(url, found)
    if any(isinstance(c, ssl.SSLCertVerificationError) for c in causes):
        expected = f"a certificate for {host} from an authority that is trusted"
        help_text = f"check the clock; a company's own authority may be in {describe_trust()}"
        return Finding(Kind.CERTIFICATE, host, expected, found, help_text)
    if isinstance(error, ValueError):
        if proxy_for(url):
            return proxy_finding(url, "a proxy's URL that cannot be used")
        expected, help_text = "an http:// or https:// URL", "check HF_ENDPOINT and --url"
        return Finding(Kind.NO_NETWORK, host or "a URL", expected, "another kind of URL", help_text)
    if "timed out" in found or isinstance(error, requests.exceptions.Timeout):
        found = "no answer in time"
    if is_unresolved(error):
        found = "no such host, or no name server that answers"
    help_text = "check the network, and run the same command again"
    return Finding(Kind.NO_NETWORK, host, f"an answer from {host}", found, help_text)


def is_unresolved(error: BaseException) -> bool:
    """Return whether a request failed because a name has no address."""
    return any(isinstance(c, socket.gaierror) for c in _causes(error))


def proxy_finding(url: str, found: str) -> Finding:
    """Describe a proxy that lets nothing through."""
    host, help_text = host_of(url), f"check {proxy_variables(url)}"
    return Finding(Kind.PROXY, host, f"a way through the proxy to {host}", found, help_text)


def cause_of(error: BaseException) -> str:
    """Return the innermost reason of an error that libraries have wrapped, in words."""
    *_, inner = _causes(error)
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return _OBJECT.sub("", text)[:200]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it wraps, as requests and urllib3 do that."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        reasons = [getattr(current, "reason", None), *current.args]
        reasons += [current.__cause__, current.__context__]
        current = next((r for r in reasons if isinstance(r, BaseException)), None)

"""Certificate authorities and proxies, as the environment names them for every request."""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import certifi
from requests.utils import get_environ_proxies, select_proxy
from urllib3.util.ssl_ import create_urllib3_context

#: Variables that name files or folders of authorities: for OpenSSL and hf, requests, and curl.
CA_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def trust_context() -> ssl.SSLContext:
    """Return a TLS context that trusts what any of hf, curl and requests would trust here.

    That is the union of the system's store, the list of certifi, and what
    `CA_VARIABLES` name. A file that cannot be read adds nothing;
    `describe_trust` says so.
    """
    return _context(tuple(path for name in CA_VARIABLES for path in _paths(name)))


@functools.cache
def _context(named: tuple[str, ...]) -> ssl.SSLContext:
    context = create_urllib3_context()
    context.load_default_certs()
    # Where SSL_CERT_FILE is set, OpenSSL has left its own store out.
    system = ssl.get_default_verify_paths()
    for path in (certifi.where(), system.openssl_cafile, system.openssl_capath, *named):
        _add(context, path)
    return context


def _paths(name: str) -> list[str]:
    value = os.environ.get(name, "")
    return [p for p in (value.split(os.pathsep) if name.endswith("_DIR") else [value]) if p]


def _add(context: ssl.SSLContext, path: str) -> bool:
    """Add the authorities of a file or folder; return False where it cannot be used."""
    try:
        if Path(path).is_dir():
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(cafile=path)
    except OSError:
        return False
    return True


def describe_trust() -> str:
    """Return where authorities were looked for, with what each of `CA_VARIABLES` is set to."""
    probe, states = create_urllib3_context(), ["the system's store"]
    for name in CA_VARIABLES:
        paths = _paths(name)
        is_usable = all(_add(probe, path) for path in paths)
        state = f"={os.environ[name]}" if paths else " (not set)"
        states.append(name + state + ("" if is_usable else " (cannot be used)"))
    return ", ".join(states)


def proxy_for(url: str) -> str:
    """Return the URL of the proxy for a URL, or an empty string; NO_PROXY is honoured."""
    with contextlib.suppress(ValueError):
        return select_proxy(url, get_environ_proxies(url)) or ""
    return ""


def proxy_variables(url: str) -> str:
    """Return the names of the variables to check where a URL is asked for through a proxy."""
    names = [f"{word}_proxy" for word in (urlsplit(url).scheme, "all")]
    found = [n for name in names for n in (name, name.upper()) if os.environ.get(n)]
    return " and ".join([*(found or ["HTTPS_PROXY", "HTTP_PROXY"]), "NO_PROXY"])

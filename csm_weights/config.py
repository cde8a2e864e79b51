"""What the environment says of the Hub, read without importing any of its libraries.

The names and their defaults are huggingface_hub's own (its constants.py), so
that what works for `hf` works here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from csm_weights.errors import Finding, Kind, UsageError

PUBLIC_ENDPOINT = "https://huggingface.co"

#: The variable with headers for mirrors, one a line: `Authorization: Bearer ...`.
MIRROR_HEADERS = "CSM_MIRROR_HEADERS"

_TRUE = {"1", "ON", "YES", "TRUE"}

#: Variables that hold a token; the second is huggingface_hub's former name.
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class HubEnvironment:
    """Where the Hub is, whether it may be asked, and what is here of it.

    `cache` is the folder of `models--org--name` folders. `token_from` says
    where a token was found, by the name of a variable or file; it is empty
    where there is none. The token itself is not kept.
    """

    endpoint: str
    offline: bool
    cache: Path
    token_from: str

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> HubEnvironment:
        """What these variables say, by default the process's own."""
        values = os.environ if environ is None else environ
        home = _home(values)
        return cls(
            endpoint=(values.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/"),
            offline=(
                values.get("HF_HUB_OFFLINE") or values.get("TRANSFORMERS_OFFLINE") or ""
            ).upper()
            in _TRUE,
            cache=_folder(
                values.get("HF_HUB_CACHE")
                or values.get("HUGGINGFACE_HUB_CACHE")
                or str(home / "hub")
            ),
            token_from=_token_from(values, home),
        )

    def page(self, repo: str) -> str:
        """The page of a repository, for a person to visit."""
        return f"{self.endpoint}/{repo}"

    def problem(self, repo: str, gated: bool) -> Finding | None:
        """Why the Hub need not be asked, as far as that is known without asking.

        Raises UsageError where HF_ENDPOINT is not the URL of a Hub.
        """
        if self.offline:
            help_text = "unset HF_HUB_OFFLINE, or bring the files here"
            expected = "a Hub that may be asked"
            return Finding(Kind.OFFLINE, self.page(repo), expected, "HF_HUB_OFFLINE", help_text)
        if not _is_plain_url(self.endpoint):
            expected = "an http:// or https:// URL without credentials or a query"
            raise UsageError(f"HF_ENDPOINT is not {expected}; unset it for {PUBLIC_ENDPOINT}")
        return no_token(self.page(repo)) if gated and not self.token_from else None


def no_token(page: str, found: str = "none") -> Finding:
    """That the Hub gives the files of a repository only to those who show a token."""
    help_text = f"accept the terms at {page}, then run hf auth login, or set HF_TOKEN"
    return Finding(Kind.NO_TOKEN, page, "a token", found, help_text)


def _home(values: Mapping[str, str]) -> Path:
    if home := values.get("HF_HOME"):
        return _folder(home)
    caches = values.get("XDG_CACHE_HOME") or "~/.cache"
    return _folder(caches) / "huggingface"


def _folder(text: str) -> Path:
    # Unlike Path's own, this leaves a home that cannot be found as it is written.
    return Path(os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111


def _token_from(values: Mapping[str, str], home: Path) -> str:
    """The name of what holds a token, as huggingface_hub looks for it."""
    if values.get("HF_OIDC_RESOURCE"):
        return "HF_OIDC_RESOURCE"
    for name in _TOKENS:
        if values.get(name, "").strip():
            return name
    path = _folder(values.get("HF_TOKEN_PATH") or str(home / "token"))
    try:
        has_token = bool(path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return ""
    return str(path) if has_token else ""


def check_mirror(url: str) -> None:
    """Raises UsageError unless a mirror's URL is plain HTTP(S), without secrets in it.

    Those belong into the environment, since an argument is for all to see.
    """
    if "@" in url or "?" in url:
        raise UsageError(f"--url with credentials or a query: put secrets into {MIRROR_HEADERS}")
    if not _is_plain_url(url):
        raise UsageError(f"--url {url!r} is not an http:// or https:// URL")


def _is_plain_url(url: str) -> bool:
    """Whether a URL is one of HTTP(S) with a host, and nothing in it that may be a secret."""
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError:
        return False
    host = parts.hostname or ""
    is_named = bool(host) and not any(c.isspace() for c in host) and port != 0
    extras = parts.username or parts.password or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and is_named and not extras


def mirror_headers(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers that mirrors get, from the environment; raises UsageError."""
    text = (os.environ if environ is None else environ).get(MIRROR_HEADERS, "")
    headers = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, value = line.partition(":")
        is_sent = name.strip().isascii() and value.strip().isascii() and value.strip().isprintable()
        if not colon or not name.strip() or not is_sent:
            raise UsageError(f"{MIRROR_HEADERS}: a line is not NAME: VALUE")
        headers[name.strip()] = value.strip()
    return headers

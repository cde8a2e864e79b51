"""Settings from the environment and the command line, read without importing any library.

The names and their defaults are huggingface_hub's own (its constants.py), so
that what works for `hf` works here.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from csm_weights.errors import Finding, Kind, UsageError
from csm_weights.files import read_bounded

PUBLIC_ENDPOINT = "https://huggingface.co"

#: The variable with headers for mirrors, one a line: `Authorization: Bearer ...`.
MIRROR_HEADERS = "CSM_MIRROR_HEADERS"


@dataclass(frozen=True)
class HubEnvironment:
    """The Hub's address, whether it may be asked, and its cache on this machine.

    `cache` is the folder of `models--org--name` folders. `token_from` names the
    variable or file where a token was found, or is empty. The token is not kept.
    """

    endpoint: str
    offline: bool
    cache: Path
    token_from: str

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> HubEnvironment:
        """Return the settings in these variables, by default the process's own."""
        values = os.environ if environ is None else environ

        def first(*names: str, default: str = "") -> str:
            return next(filter(None, map(values.get, names)), default)

        def folder(text: str) -> Path:
            # Unlike Path's own, this leaves a home that cannot be found as it is written.
            return Path(os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111

        is_offline = first("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE").upper()
        caches = first("XDG_CACHE_HOME", default="~/.cache")
        home = folder(first("HF_HOME", default=f"{caches}/huggingface"))
        # The order is huggingface_hub's; its last variable is a former name, and the first
        # gets a token by an exchange.
        tokens = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        token_from = next((name for name in tokens if values.get(name, "").strip()), "")
        if not token_from:
            path = folder(first("HF_TOKEN_PATH", default=f"{home}/token"))
            with contextlib.suppress(OSError, UnicodeDecodeError):
                token_from = str(path) if read_bounded(path, 64 << 10).decode().strip() else ""
        return cls(
            endpoint=first("HF_ENDPOINT", default=PUBLIC_ENDPOINT).rstrip("/"),
            offline=is_offline in {"1", "ON", "YES", "TRUE"},
            cache=folder(first("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=f"{home}/hub")),
            token_from=token_from,
        )

    def page(self, repo: str) -> str:
        """Return the page of a repository, for a person to visit."""
        return f"{self.endpoint}/{repo}"

    def problem(self, repo: str, gated: bool) -> Finding | None:
        """Return why the Hub need not be asked, as far as that is known without asking.

        Raises UsageError where HF_ENDPOINT is not the URL of a Hub.
        """
        page = self.page(repo)
        if self.offline:
            return offline(page, "the Hub")
        if not _is_plain_url(self.endpoint):
            expected = "an http:// or https:// URL without credentials or a query"
            raise UsageError(f"HF_ENDPOINT is not {expected}; unset it for {PUBLIC_ENDPOINT}")
        return no_token(page) if gated and not self.token_from else None


def pip_command(extra: str) -> str:
    """Return the command that installs an extra of this package, in its checkout or anywhere."""
    if (Path(__file__).parents[1] / "constraints.txt").is_file():
        return f".venv/bin/pip install -c constraints.txt -e '.[{extra}]'"
    return f"pip install 'csm-weights[{extra}]'"


def offline(where: str, server: str) -> Finding:
    """Describe a server that may not be asked."""
    mend = "unset HF_HUB_OFFLINE, or copy the files to this machine"
    words = (f"permission to ask {server}", "HF_HUB_OFFLINE is set", mend)
    return Finding(Kind.OFFLINE, where, *words)


def no_token(page: str, found: str = "none") -> Finding:
    """Describe a repository whose files the Hub gives only to those who show a token."""
    help_text = f"accept the terms at {page}, then run hf auth login, or set HF_TOKEN"
    return Finding(Kind.NO_TOKEN, page, "a token", found, help_text)


def parse_patience(text: str) -> float | None:
    """Return the seconds that --patience names, or None for ""; raise UsageError."""
    try:
        seconds = float(text or 1)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"--patience {text!r} is not a number of seconds")
    return seconds if text else None


def parse_rate(text: str) -> float | None:
    """Return the bytes a second that --limit-rate names, or None for ""; raise UsageError.

    As for curl and wget K is 1024, M its square, and G its cube.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMG]?)B?(?:/s)?", text.strip(), re.IGNORECASE)
    rate = float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " ") if found else 0.0
    if rate < 1024:
        raise UsageError(f"--limit-rate {text!r} is not a rate from 1K on: 500K, 20M, 1G, or bytes")
    return rate


def check_mirror(url: str, schemes: Collection[str]) -> None:
    """Raise UsageError unless a mirror's URL is a plain one of these schemes, without secrets.

    Those belong into the environment: other users of a machine can read arguments.
    """
    if folder_of(url):
        return
    if "@" in url or "?" in url:
        raise UsageError(f"--url with credentials or a query: put secrets into {MIRROR_HEADERS}")
    if not _is_plain_url(url, schemes):
        known = " or ".join(f"{scheme}://" for scheme in sorted({*schemes, "file"}))
        raise UsageError(f"--url {url!r} is not a URL with {known}")


def folder_of(url: str) -> Path | None:
    """Return the folder of this machine that a URL such as file:///mnt/nas/csm-1b names, or None.

    No other scheme names one.
    """
    return user_path(unquote(urlsplit(url).path)) if url.startswith("file:///") else None


def user_path(text: str) -> Path:
    """Return the path that a person names; raises UsageError where it cannot be one."""
    try:
        if "\0" not in text:
            return Path(text).expanduser()
    except RuntimeError:
        pass  # no such user
    raise UsageError(f"{text!r} is not a path on this machine")


def _is_plain_url(url: str, schemes: Collection[str] = ("http", "https")) -> bool:
    """Return whether a URL has one of these schemes, a host, and nothing that may be secret."""
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError:
        return False
    host = parts.hostname or ""
    is_named = bool(host) and not any(c.isspace() for c in host) and port != 0
    extras = parts.username or parts.password or parts.query or parts.fragment
    return parts.scheme in schemes and is_named and not extras

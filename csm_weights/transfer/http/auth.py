"""Who gets which credentials: every header belongs to one origin and goes nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from requests import PreparedRequest
from requests.auth import AuthBase

from csm_weights.config import MIRROR_HEADERS, PUBLIC_ENDPOINT, HubEnvironment
from csm_weights.errors import AccessRefused, Finding, Kind, UsageError
from csm_weights.transfer.http.responses import is_upgrade, origin

#: Where tokens are made and changed, below the endpoint.
TOKENS = "settings/tokens"


class OriginAuth(AuthBase):
    """Headers for requests to the origin of `url`, and to no other.

    That this is given with every request also keeps requests from taking
    credentials from .netrc. `is_named_by_user` says that a person chose this
    server, so that it may be in their own network.
    """

    def __init__(self, url: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.url = url
        self.is_named_by_user = origin(url) != origin(PUBLIC_ENDPOINT)
        self._headers = dict(headers or {})

    def covers(self, url: str) -> bool:
        """Return whether a URL has this origin, or is its http address moved to https."""
        default_ports = origin(self.url)[2] == 80 and origin(url)[2] == 443
        return origin(url) == origin(self.url) or (default_ports and is_upgrade(self.url, url))

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the headers to a request to their own origin; see requests' AuthBase."""
        if self.covers(request.url or ""):
            request.headers.update(self._headers)
        return request


def mirror_auth(url: str) -> OriginAuth:
    """Return the credentials for a mirror: the headers in the variable `MIRROR_HEADERS`.

    Raises UsageError where a line of it is no header.
    """
    headers = {}
    for line in filter(None, map(str.strip, os.environ.get(MIRROR_HEADERS, "").splitlines())):
        name, colon, value = line.partition(":")
        is_sent = name.strip().isascii() and value.strip().isascii() and value.strip().isprintable()
        if not colon or not name.strip() or not is_sent:
            raise UsageError(f"{MIRROR_HEADERS}: a line is not NAME: VALUE")
        headers[name.strip()] = value.strip()
    return OriginAuth(url, headers)


@dataclass(frozen=True)
class HubCredentials:
    """An endpoint and the token for it, which no representation of this value shows."""

    endpoint: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environment: HubEnvironment | None = None) -> HubCredentials:
        """Return the credentials that `hf` would use here; see `HubEnvironment`.

        Raises AccessRefused where a token is to be exchanged and the exchange fails.
        """
        found = environment or HubEnvironment.read()
        if not found.token_from or found.offline:
            return cls(found.endpoint)
        try:
            # Read when it is imported: it shall send no request of its own accord.
            os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
            from huggingface_hub import get_token

            return cls(found.endpoint, get_token())
        except Exception as error:
            # The library's message may quote what it has sent.
            words = ("a token", type(error).__name__, f"check {found.token_from}, or set HF_TOKEN")
            finding = Finding(Kind.NO_TOKEN, found.token_from, *words)
            raise AccessRefused("no token could be read", [finding]) from None

    @property
    def auth(self) -> OriginAuth:
        """The header with the token, for the endpoint's origin."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return OriginAuth(self.endpoint, headers)

    def problem(self, page: str) -> Finding | None:
        """Return why the token cannot be sent, as one that was pasted with an ellipsis, or None."""
        if not self.token or self.token.isascii():
            return None
        help_text = f"make a new one at {self.endpoint}/{TOKENS} and run hf auth login"
        expected, found = "a token that the Hub knows", "one with letters beyond ASCII"
        return Finding(Kind.UNKNOWN_TOKEN, page, expected, found, help_text)

    def mask(self, text: str) -> str:
        """Return a text of the Hub's without the token that it may repeat."""
        return text.replace(self.token, "***") if self.token else text

"""Asking over HTTP(S): one session, no secrets where they do not belong, patience with limits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError
from urllib3.util import Retry

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.deadlines import Waits, WatchedAdapter
from csm_weights.transfer.http.responses import (
    asked_wait,
    bad_url_finding,
    cause,
    certificate_finding,
    is_about_certificate,
    no_answer,
    origin,
    passing_finding,
    proxy_finding,
    redirect_target,
    shown,
)
from csm_weights.transfer.source import SourceError

#: Redirects that are followed from one request.
REDIRECTS = 5

#: Answers after which the same request may succeed.
_PASSING = {408, 425, 429, 500, 502, 503, 504}

#: What requests says of URLs, a proxy's included; its messages repeat them, credentials and all.
_NO_URL = (
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.InvalidSchema,
)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Timeouts:
    """How patient a wire is: times in seconds, rates in bytes a second.

    A line that gives less than `least_rate` over `slow_seconds` is dropped,
    at most `slow_lines` times for one span. A server may ask for waits up to
    `longest_wait`. `tries` are the requests in a row that may bring nothing.
    """

    connect: float = 10.0
    read: float = 30.0
    tries: int = 5
    connect_tries: int = 2
    backoff: float = 0.5
    longest_wait: float = 300.0
    least_rate: int = 1024
    slow_seconds: float = 20.0
    slow_lines: int = 2


class _NoAuth(AuthBase):
    """Keeps requests from taking credentials from .netrc: ours are in headers, or nowhere."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class TransientError(Exception):
    """Something that may pass, or not: a finding, and how long to wait if the server said so."""

    def __init__(self, finding: Finding, seconds: float | None = None, connected: bool = True):
        super().__init__(finding.line())
        self.finding = finding
        self.seconds = seconds
        self.connected = connected


class HttpClient:
    """A session of requests that share connections, and wait together where a server asks so."""

    def __init__(
        self, cancel: threading.Event, log: Log, limits: Timeouts, connections: int = 8
    ) -> None:
        self.limits = limits
        self.cancel = cancel
        self._say = log
        self._quiet_until: dict[str, float] = {}
        self._answered: set[str] = set()
        self._waits = Waits()
        self._session = requests.Session()
        self._session.auth = _NoAuth()
        self._session.headers["User-Agent"] = f"csm-weights/{version('csm-weights')}"
        self._session.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            adapter = WatchedAdapter(self._waits, pool_maxsize=connections, max_retries=0)
            self._session.mount(scheme, adapter)
        # Signed URLs are secrets for as long as they live, and its warnings have them too.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    def hang_up(self) -> None:
        """Closes all connections."""
        self._session.close()

    def end_waits(self) -> None:
        """Ends requests whose answer does not begin in time, and all when the run is stopped."""
        self._waits.end(older=0 if self.cancel.is_set() else self.limits.read)

    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer to a request without a body worth reading, after retries.

        Redirects and refusals are answers too. Raises Broken when the network
        or the server fails, Stopped.
        """
        patience = RetryPolicy(self)
        while True:
            try:
                with self._request(method, url, headers) as response:
                    return response
            except TransientError as trouble:
                patience.wait(trouble, url)

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        """One try; raises Trouble where there is no answer, or one that may pass."""
        host = urlsplit(url).netloc.rpartition("@")[2]
        self._pause(self._quiet_until.get(host, 0.0) - time.monotonic())
        limits = self.limits
        try:
            response = self._session.request(
                method,
                url,
                headers=dict(headers),
                stream=True,
                allow_redirects=False,
                timeout=(limits.connect, limits.read),
            )
        except _NO_URL:
            raise SourceError([bad_url_finding(host)]) from None
        except requests.exceptions.ProxyError as error:
            raise SourceError([proxy_finding(host, cause(error))]) from None
        except requests.exceptions.SSLError as error:
            if is_about_certificate(error):
                raise SourceError([certificate_finding(host, error)]) from None
            raise TransientError(no_answer(host, error)) from None
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            # What the pool gave up before it asked; all else broke off after that.
            connected = not (error.args and isinstance(error.args[0], MaxRetryError))
            connected = connected or host in self._answered
            raise TransientError(no_answer(host, error), connected=connected) from None
        self._answered.add(host)
        if response.status_code == 407:
            response.close()
            raise SourceError([proxy_finding(host, "407 proxy authentication required")])
        if response.status_code in _PASSING:
            response.close()
            seconds = asked_wait(response.headers)
            if seconds is not None and seconds <= limits.longest_wait:
                self._quiet_until[host] = time.monotonic() + seconds
            raise TransientError(passing_finding(host, response, seconds), seconds)
        return response

    def follow(
        self, first: str, secrets: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        """The answer to one try of a GET, its body unread, by redirects if need be.

        `secrets` are headers for the origin of the first URL only. Raises
        Broken, and Trouble where it may pass.
        """
        url = first
        for _ in range(REDIRECTS):
            own = secrets if origin(url) == origin(first) else {}
            response = self._request("GET", url, {**(headers or {}), **own})
            if not response.is_redirect:
                return response
            response.close()
            url = redirect_target(url, response.headers["Location"])
        expected, found = f"at most {REDIRECTS} redirects", "more, in a circle?"
        raise SourceError([Finding(Kind.REDIRECT, shown(first), expected, found)])

    def _pause(self, seconds: float) -> None:
        if self.cancel.wait(max(seconds, 0)):
            raise Cancelled

    def pause(self, seconds: float, why: Finding) -> None:
        """Waits, and says so where a person would wonder; raises Stopped."""
        if seconds >= 1:
            self._say(f"{why.where}: {why.kind} ({why.found}); trying again in {seconds:.0f} s")
        self._pause(seconds)


class RetryPolicy:
    """How often the same request is made again, and how long is waited in between."""

    def __init__(self, asker: HttpClient) -> None:
        limits = asker.limits
        self._asker = asker
        self._slow = limits.slow_lines
        self._retry = Retry(
            total=limits.tries,
            connect=limits.connect_tries,
            backoff_factor=limits.backoff,
            backoff_jitter=limits.backoff,
            backoff_max=30,
        )

    def wait(self, trouble: TransientError, url: str) -> None:
        """Waits before the next try; raises Broken where there is none, Stopped."""
        finding, seconds = trouble.finding, trouble.seconds
        self._slow -= finding.kind is Kind.TOO_SLOW
        longest = self._asker.limits.longest_wait
        if self._slow <= 0 or (seconds is not None and seconds > longest):
            raise SourceError([finding])
        error = None if trouble.connected else ConnectTimeoutError()
        try:
            self._retry = self._retry.increment("GET", url, error=error)
        except MaxRetryError:
            raise SourceError([finding]) from None
        backoff = self._retry.get_backoff_time()
        self._asker.pause(max(seconds or 0, backoff), finding)

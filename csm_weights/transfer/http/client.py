"""One way to ask: TLS, proxies, redirects, timeouts and retries for every request of a run."""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

import requests

from csm_weights.concurrency import Cancelled
from csm_weights.errors import Finding, Kind
from csm_weights.transfer.http.auth import OriginAuth
from csm_weights.transfer.http.deadlines import Watchdog, WatchedAdapter
from csm_weights.transfer.http.responses import (
    NO_ANSWER,
    cause_of,
    classify_error,
    foreign_redirect,
    host_of,
    is_unresolved,
    is_upgrade,
    lost_finding,
    portal_finding,
    proxy_finding,
    redact,
    redirect_target,
    requested_wait,
    wrong_answer,
)
from csm_weights.transfer.reorder import MOMENT
from csm_weights.transfer.source import ASKED, SourceError

#: Redirects that are followed from one request.
REDIRECTS = 5

#: Seconds between two tries at most, unless the server asks for more.
LONGEST_BACKOFF = 30

Log = Callable[[str], None]


@dataclass(frozen=True)
class Timeouts:
    """The limits of a client; times in seconds, rates in bytes a second.

    A host that gives nothing is asked again for `patience`, and one whose name
    was never resolved for a tenth of that: it may be misspelt. A host may ask
    for waits that end within `longest_wait`. A stream that gives less than
    `least_rate` over `slow_seconds` is ended.
    """

    connect: float = 10.0
    read: float = 30.0
    patience: float = 60.0
    backoff: float = 0.5
    longest_wait: float = 300.0
    least_rate: float = 1024
    slow_seconds: float = 20.0

    @classmethod
    def with_patience(cls, seconds: float | None) -> Timeouts:
        """Return the usual limits with another patience; None is the usual one."""
        if seconds is None:
            return cls()
        return cls(patience=seconds, longest_wait=max(seconds, cls.longest_wait))


@dataclass(eq=False)
class TransientError(Exception):
    """A failure that may pass.

    `seconds` is how long the server asks to wait, if it does; 0 means that
    another try may be made at once. `is_doubtful` marks an answer that makes
    no sense: it gets as many tries as wrong bytes, not the whole patience.
    """

    finding: Finding
    seconds: float | None = None
    is_unknown_name: bool = False
    is_doubtful: bool = False


@dataclass
class Outage:
    """The time `since` which nothing came from a host, to any of the streams that ask it.

    It may go on until `until` (monotonic), which is infinite before a request has failed.
    """

    since: float = 0.0
    until: float = math.inf
    is_logged: bool = False
    verdict: Finding | None = None


class _Session(requests.Session):
    """A session that follows no redirect: requests would read each one's body to its end."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return that an answer leads nowhere."""


class HttpClient:
    """A session of requests that share connections, credentials by origin, and one retry policy.

    Errors of the network are raised as SourceError once retrying has failed.
    Setting `cancel` ends whatever is waited for with Cancelled.
    """

    def __init__(
        self, cancel: threading.Event, log: Log = lambda _: None, timeouts: Timeouts | None = None
    ) -> None:
        self.cancel = cancel
        self.log = log
        self.timeouts = timeouts or Timeouts()
        self.lock = threading.Lock()
        # By host, and by whether it is asked for bodies rather than for answers about files.
        self.outages: defaultdict[tuple[str, bool], Outage] = defaultdict(Outage)
        self.watchdog = Watchdog(cancel)
        self._quiet_until: defaultdict[str, float] = defaultdict(float)
        self._answered: set[str] = set()
        self._session = _Session()
        self._session.headers["User-Agent"] = f"csm-weights/{version('csm-weights')}"
        self._session.headers["Accept-Encoding"] = "identity"
        adapter = WatchedAdapter(self.watchdog, self.timeouts.read)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        # Signed URLs are secrets for as long as they live, and urllib3's warnings have them.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.close()
        self._session.close()

    def ask(
        self,
        method: str,
        url: str,
        auth: OriginAuth,
        is_final: Callable[[requests.Response], bool] = lambda _: False,
        is_own_host_only: bool = False,
    ) -> tuple[requests.Response, bytes]:
        """Return an answer and its body, after redirects and retries; refusals are answers too.

        The body of a refusal is left out. See `follow` for the options. Raises
        SourceError, Cancelled.
        """
        retry, body = RetryPolicy(self, url), b""
        while True:
            started = time.monotonic()
            try:
                with (
                    self.follow(method, url, auth, {}, is_final, is_own_host_only) as response,
                    self.watchdog.watching(response.raw.shutdown, self.timeouts.read) as wait,
                ):
                    try:
                        if response.ok:
                            body = response.raw.read(64 << 20)
                            # This fails where the body broke off.
                            response.raw.read(1)
                    except NO_ANSWER as error:
                        found = "an incomplete answer" if wait.is_late else cause_of(error)
                        raise TransientError(lost_finding(host_of(response.url), found)) from None
                retry.progressed()
                return response, body
            except TransientError as error:
                retry.wait(error, started)

    def get_json(self, url: str, auth: OriginAuth) -> tuple[requests.Response, Any]:
        """Return an answer and the JSON in it, or None where it is a refusal; see `ask`.

        Only this URL's own host is believed.
        """
        response, body = self.ask("GET", url, auth, is_own_host_only=True)
        try:
            return response, json.loads(body) if response.ok else None
        except ValueError:
            if "html" in response.headers.get("Content-Type", "") or body[:1] == b"<":
                raise SourceError([portal_finding(redact(url))]) from None
            raise SourceError([wrong_answer(redact(url), "JSON", "another text")]) from None

    def follow(
        self,
        method: str,
        url: str,
        auth: OriginAuth,
        headers: Mapping[str, str],
        is_final: Callable[[requests.Response], bool] = lambda _: False,
        is_own_host_only: bool = False,
    ) -> requests.Response:
        """Return the answer to one try, its body unread, after redirects.

        A redirect for which `is_final` is true is an answer too. Once a
        redirect has left the origin of `auth`, its headers are sent no more,
        even if another one leads back; with `is_own_host_only` it is refused.
        Raises SourceError, and TransientError where it may pass.
        """
        first, is_own = url, True
        for _ in range(1 + REDIRECTS):
            is_own = is_own and auth.covers(url)
            response = self._request(method, url, auth if is_own else OriginAuth(), headers)
            if not response.is_redirect or is_final(response):
                return response
            response.close()
            target = redirect_target(url, response.headers["Location"], auth.is_named_by_user)
            if is_own_host_only and not auth.covers(target) and not is_upgrade(url, target):
                raise SourceError([foreign_redirect(url, target)])
            url = target
        words = (f"at most {REDIRECTS} redirects", "more", "is there a captive portal in between?")
        raise SourceError([Finding(Kind.REDIRECT, redact(first), *words)])

    def _request(
        self, method: str, url: str, auth: OriginAuth, headers: Mapping[str, str]
    ) -> requests.Response:
        host, timeouts = host_of(url), self.timeouts
        limits = (timeouts.connect, timeouts.read)
        options: dict[str, Any] = {"stream": True, "timeout": limits}
        self.pause(self._quiet_until[host] - time.monotonic())
        try:
            response = self._session.request(method, url, headers=headers, auth=auth, **options)
        except NO_ANSWER as error:
            if self.cancel.is_set():
                raise Cancelled from None
            finding, is_new = classify_error(url, error), host not in self._answered
            settled = (Kind.CERTIFICATE, Kind.PROXY) if is_new else (Kind.CERTIFICATE,)
            if finding.kind in settled or isinstance(error, ValueError):
                raise SourceError([finding]) from None
            raise TransientError(finding, None, is_new and is_unresolved(error)) from None
        self._answered.add(host)
        status = response.status_code
        if status == 407:
            response.close()
            raise SourceError([proxy_finding(url, "407 Proxy Authentication Required")])
        if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
            # The same request may succeed later.
            response.close()
            seconds = requested_wait(response.headers)
            if seconds is not None and seconds <= timeouts.longest_wait:
                self._quiet_until[host] = time.monotonic() + seconds
            is_limited, found = status == 429, f"{status} {response.reason}"
            kind = Kind.RATE_LIMITED if is_limited else Kind.SERVER_TROUBLE
            when = f"in {seconds:.0f} s" if is_limited and seconds is not None else "later"
            finding = Finding(kind, host, "an answer", found, f"try again {when}")
            raise TransientError(finding, seconds)
        return response

    def begin_afresh(self, times: int) -> None:
        """Close the connections that are idle, and wait, as before try `times` after the first."""
        self._session.close()
        self.pause(self.timeouts.backoff * 2 ** (times - 1))

    def pause(self, seconds: float, over: threading.Event | None = None) -> None:
        """Wait; raise Cancelled when the run is cancelled meanwhile, or `over` is set."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 or self.cancel.is_set():
            if self.cancel.wait(min(left, MOMENT)) or (over and over.is_set()):
                raise Cancelled


class RetryPolicy:
    """Tries of one request: longer waits each time, and one end for all streams of a host.

    Answers about files and bodies are counted apart: a host that says where a
    file is and then does not give it has given nothing. `body_over` is set
    when a body is no longer wanted.
    """

    def __init__(
        self, client: HttpClient, url: str, body_over: threading.Event | None = None
    ) -> None:
        self._client = client
        self._over = body_over
        self._host = host_of(url), body_over is not None
        self._tries = self._doubts = 0

    def progressed(self) -> None:
        """Note that something came."""
        self._tries = self._doubts = 0
        with self._client.lock:
            self._client.outages[self._host] = Outage(time.monotonic())

    def wait(self, error: TransientError, started: float) -> None:
        """Wait before the next try of a request that was `started` (monotonic) and failed.

        Raises SourceError where there is no next try, Cancelled.
        """
        client, now = self._client, time.monotonic()
        self._tries += 1
        self._doubts += error.is_doubtful
        if self._doubts >= ASKED:
            raise SourceError([error.finding])
        backoff = client.timeouts.backoff * 2 ** min(self._tries - 1, 10)
        delay = min(backoff * random.uniform(0.5, 1.5), LONGEST_BACKOFF)
        if error.seconds is not None:
            is_first = error.seconds == 0 and self._tries == 1
            delay = 0.0 if is_first else max(delay, error.seconds)
        with client.lock:
            outage = client.outages[self._host]
            if outage.until == math.inf:
                outage.since = max(started, outage.since)
                outage.until = outage.since + client.timeouts.patience
            end = outage.until
            if error.seconds:
                end = outage.since + client.timeouts.longest_wait - error.seconds
            elif error.is_unknown_name:
                end = outage.since + client.timeouts.patience / 10
            if outage.verdict or now >= end:
                outage.verdict = outage.verdict or error.finding
                raise SourceError([outage.verdict])
            if error.seconds:
                end = outage.until = max(outage.until, now + delay + client.timeouts.patience)
            is_news = delay >= 1 and not outage.is_logged
            outage.is_logged |= is_news
        if is_news:
            left = f"in {delay:.0f} s" if error.seconds else f"for up to {end - now:.0f} s"
            finding = error.finding
            client.log(f"{finding.where}: {finding.kind} ({finding.found}); trying again {left}")
        client.pause(min(delay, end - now), self._over)

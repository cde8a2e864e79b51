"""Deadlines: end requests whose answer does not begin, and bodies that come too slowly.

A socket's timeout is for one byte. A server that sends its headers a byte a
second, or one interim answer after the other, could keep a request for ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool

from csm_weights.transfer.http.environment import trust_context

#: Seconds between two checks.
MOMENT = 0.5


class Deadline:
    """A wait of at most `seconds`, which `end` ends; it may be called after the wait is over."""

    def __init__(self, end: Callable[[], object], seconds: float) -> None:
        self._end = end
        self._until = time.monotonic() + seconds
        self.is_over = False

    def check(self, is_cancelled: bool) -> None:
        """End the wait if its time is over, or if the run was cancelled."""
        self.is_over = time.monotonic() >= self._until
        if is_cancelled or self.is_over:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._end()


class Watchdog:
    """A thread that checks all waits of a client every `MOMENT` seconds."""

    def __init__(self, cancel: threading.Event) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._checks: set[Callable[[bool], None]] = set()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self, check: Callable[[bool], None]) -> Iterator[None]:
        """Call `check` until the block ends, with whether the run was cancelled."""
        with self._lock:
            self._checks.add(check)
        try:
            yield
        finally:
            with self._lock:
                self._checks.discard(check)

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.wait(MOMENT):
            with self._lock:
                checks = list(self._checks)
            for check in checks:
                check(self._cancel.is_set())


class WatchedAdapter(HTTPAdapter):
    """The adapter of requests with a TLS context of ours, and a deadline for every answer."""

    def __init__(self, watchdog: Watchdog, seconds: float) -> None:
        self._watchdog = watchdog
        self._seconds = seconds
        self._context = trust_context()
        super().__init__(max_retries=0)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Make the pools for hosts that need no proxy."""
        super().init_poolmanager(*arguments, ssl_context=self._context, **options)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Return the pools for hosts behind a proxy."""
        if proxy not in self.proxy_manager:
            options["ssl_context"] = self._context
            if proxy.lower().startswith("https:"):
                options["proxy_ssl_context"] = self._context
            self._watch(super().proxy_manager_for(proxy, **options))
        return self.proxy_manager[proxy]

    def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
        """Send a request, verified by the context: it has the authorities of all variables."""
        return super().send(request, *arguments, **{**options, "verify": True})

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the choice of authorities to the context."""

    def _watch(self, manager: Any) -> None:
        known = manager.pool_classes_by_scheme.items()
        manager.pool_classes_by_scheme = {s: self._watched_pool(pool) for s, pool in known}

    def _watched_pool(self, pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        watchdog, seconds, parent = self._watchdog, self._seconds, pool.ConnectionCls

        def getresponse(connection: Any) -> Any:
            sock = connection.sock
            if sock is None:
                return parent.getresponse(connection)
            deadline = Deadline(lambda: sock.shutdown(socket.SHUT_RDWR), seconds)
            try:
                with watchdog.watching(deadline.check):
                    return parent.getresponse(connection)
            except (OSError, HTTPException):
                if deadline.is_over:
                    raise TimeoutError("timed out") from None
                raise

        watched = type(parent.__name__, (parent,), {"getresponse": getresponse})
        return type(pool.__name__, (pool,), {"ConnectionCls": watched})

"""Deadlines: end requests whose answer does not begin, and bodies that come too slowly.

A socket's timeout is for one byte. A server that sends its headers a byte a
second, or one interim answer after the other, could keep a request for ever.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool

from csm_weights.transfer.http.environment import trust_context
from csm_weights.transfer.http.lines import MOST
from csm_weights.transfer.reorder import MOMENT


@dataclass(eq=False)
class Wait:
    """A wait for a server, which `end` ends: at `until` (monotonic), or once `over` is set."""

    end: Callable[[], object]
    until: float
    over: threading.Event
    is_late: bool = False


class Watchdog:
    """A thread that checks all waits of a client every `MOMENT` seconds."""

    def __init__(self, cancel: threading.Event) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._waits: set[Wait] = set()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(
        self, end: Callable[[], object], seconds: float, over: threading.Event | None = None
    ) -> Iterator[Wait]:
        """Call `end` if the block takes longer, the run is cancelled, or `over` is set."""
        wait = Wait(end, time.monotonic() + seconds, over or self._cancel)
        with self._lock:
            self._waits.add(wait)
        try:
            yield wait
        finally:
            with self._lock:
                self._waits.discard(wait)

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closed.wait(MOMENT):
            with self._lock:
                waits = list(self._waits)
            for wait in waits:
                wait.is_late |= time.monotonic() >= wait.until
                if wait.is_late or wait.over.is_set() or self._cancel.is_set():
                    # It may have ended meanwhile, which is as good.
                    with contextlib.suppress(OSError, RuntimeError, ValueError):
                        wait.end()


class WatchedAdapter(HTTPAdapter):
    """The adapter of requests with a TLS context of ours, and a deadline for every answer."""

    def __init__(self, watchdog: Watchdog, seconds: float) -> None:
        self._watchdog = watchdog
        self._seconds = seconds
        self._context = trust_context()
        super().__init__(pool_maxsize=MOST)

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
        """Let every connection that the pools of `manager` make be watched."""

        def watched(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
            parent = pool.ConnectionCls

            def getresponse(connection: Any) -> Any:
                end = functools.partial(connection.sock.shutdown, socket.SHUT_RDWR)
                with self._watchdog.watching(end, self._seconds) as wait:
                    try:
                        return parent.getresponse(connection)
                    except (OSError, HTTPException):
                        if wait.is_late:
                            raise TimeoutError("timed out") from None
                        raise

            connection = type(parent.__name__, (parent,), {"getresponse": getresponse})
            return type(pool.__name__, (pool,), {"ConnectionCls": connection})

        known = manager.pool_classes_by_scheme.items()
        manager.pool_classes_by_scheme = {scheme: watched(pool) for scheme, pool in known}

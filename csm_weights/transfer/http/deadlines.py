"""Requests whose answer has not begun: they can be ended from outside.

A read timeout is for one byte, so a server that sends its headers a byte a
second, or one interim answer after the other, could keep a request for ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection


class Waits:
    """The connections on which an answer is awaited, each with its beginning."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[object, tuple[socket.socket, float]] = {}

    @contextlib.contextmanager
    def during(self, sock: socket.socket | None) -> Iterator[None]:
        """Knows a socket while the block runs."""
        key = object()
        if sock is not None:
            with self._lock:
                self._begun[key] = sock, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._begun.pop(key, None)

    def end(self, older: float) -> None:
        """Ends those that have waited for more than so many seconds."""
        before = time.monotonic() - older
        with self._lock:
            late = [sock for sock, begun in self._begun.values() if begun <= before]
        for sock in late:
            with contextlib.suppress(OSError, ValueError):
                sock.shutdown(socket.SHUT_RDWR)


class WatchedAdapter(HTTPAdapter):
    """The adapter of requests, with connections that are known to `waits` while they wait."""

    def __init__(self, waits: Waits, **options: Any) -> None:
        self._pools = _pools(waits)
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """See HTTPAdapter."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: Any, **options: Any) -> Any:
        """See HTTPAdapter."""
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(waits: Waits) -> dict[str, type[HTTPConnectionPool]]:
    """Pools of connections by scheme, as urllib3 has them, that tell `waits`."""

    class Plain(HTTPConnection):
        def getresponse(self) -> Any:
            with waits.during(self.sock):
                return super().getresponse()

    class Secure(HTTPSConnection):
        def getresponse(self) -> Any:
            with waits.during(self.sock):
                return super().getresponse()

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}

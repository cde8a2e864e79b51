"""The sockets of the hub: reading requests, and sending responses with their faults."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from tests.support.hub.responses import Event, Host, LogEntry, Request, Response

if TYPE_CHECKING:
    from tests.support.hub.faults import Fault
    from tests.support.hub.server import HubServer

_BLOCK = 256 * 1024


@dataclass
class Record:
    request: Request
    status: int
    sent: int = 0

    def frozen(self) -> LogEntry:
        request = self.request
        wanted = request.headers.get("range")
        return LogEntry(
            request.host,
            request.method,
            request.path,
            request.headers,
            self.status,
            self.sent,
            wanted,
        )


class _ConnectionEnded(Exception):
    """The connection was ended on purpose."""


class SocketServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, name: Host, address: str) -> None:
        super().__init__((address, 0), _Handler)
        self.hub = hub
        self.name = name
        self.url = f"http://{address}:{self.server_port}"
        #: Bodies that are being sent, and the most that were at the same time.
        self.sending = self.most_sending = 0
        self._open: set[socket.socket] = set()
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_bind(self) -> None:
        # Without the look-up of the host's name that HTTPServer does.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def opened(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.add(connection)
            if self._stopped:
                connection.shutdown(socket.SHUT_RDWR)

    def ended(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.discard(connection)
            self._changed.notify_all()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a body that is sent in the block."""
        with self._changed:
            self.sending += 1
            self.most_sending = max(self.most_sending, self.sending)
        try:
            yield
        finally:
            with self._changed:
                self.sending -= 1

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        with self._changed:
            self._stopped = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def is_idle(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout=1.0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: SocketServer
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.server.ended(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(self.server.name, self.command, self.path, headers, body)
        response = self.server.hub.respond(request)
        record = self.server.hub.record(request, 0 if response.silent else response.status)
        try:
            if response.silent:
                raise _ConnectionEnded
            self._send(response, record)
        except (_ConnectionEnded, OSError):
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def _send(self, response: Response, record: Record) -> None:
        bodiless = self.command == "HEAD" or response.status in (204, 304)
        if not response.sized and not response.chunked:
            self.close_connection = True
        self.connection.sendall(_head(response, self.close_connection))
        if bodiless:
            return
        with self.server.counted():
            self._send_body(response, record)

    def _send_body(self, response: Response, record: Record) -> None:
        position, pace = 0, None
        for event in sorted(response.events, key=lambda event: event.at):
            self._stream(response, record, position, event.at, pace)
            position = event.at
            match event.kind:
                case "reset":
                    self._reset(event.fault)
                case "cut":
                    raise _ConnectionEnded
                case "stall":
                    event.fault.cleared.wait(event.value)
                case "trickle":
                    pace = event
        self._stream(response, record, position, response.length, pace)
        if response.chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def _stream(
        self, response: Response, record: Record, begin: int, end: int, pace: Event | None
    ) -> None:
        while begin < end:
            slow = pace is not None and not pace.fault.cleared.is_set()
            rate = pace.rate(self.server.sending) if pace and slow else 0.0
            block = max(int(rate / 20), 1) if rate else _BLOCK
            stop = min(begin + block, end)
            # Counted before, so that who has the bytes finds them in the log.
            record.sent += stop - begin
            sent = 0
            try:
                sent = self._send_some(response, begin, stop)
            finally:
                record.sent -= stop - begin - sent
            begin += sent
            if pace and rate:
                pace.fault.cleared.wait(sent / rate)

    def _send_some(self, response: Response, begin: int, stop: int) -> int:
        if response.chunked:
            data = response.read(begin, stop)
            self.connection.sendall(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
            return len(data)
        if response.plain(begin, stop) and response.content.file is not None:
            source = response.content.file.fileno()
            sent = os.sendfile(
                self.connection.fileno(), source, response.start + begin, stop - begin
            )
            if not sent:
                raise OSError("the file is shorter than it was")
            return sent
        return self.connection.send(response.read(begin, stop))

    def _reset(self, fault: Fault) -> None:
        # A reset throws away what is not sent yet.
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not fault.cleared.is_set():
            if _unsent(self.connection) == 0:
                break
            time.sleep(0.002)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        raise _ConnectionEnded


def _unsent(connection: socket.socket) -> int:
    try:
        response = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except OSError:
        time.sleep(0.05)
        return 0
    return int(struct.unpack("i", response)[0])


def _head(response: Response, closing: bool) -> bytes:
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    headers = {"Date": formatdate(usegmt=True)} | response.headers
    if response.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif response.sized and response.status not in (204, 304):
        headers.setdefault("Content-Length", str(response.length))
    if closing:
        headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {response.status} {phrase}", *(f"{n}: {v}" for n, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def second_address() -> str:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.2", 0))
        except OSError:  # macOS has only one: a name makes another host of it too
            return "localhost"
    return "127.0.0.2"

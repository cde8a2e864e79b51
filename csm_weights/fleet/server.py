"""Serve verified blocks of a job's files to its other nodes, by HTTP ranges and nothing else."""

from __future__ import annotations

import hmac
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

#: Seconds after which a connection that says nothing is closed.
QUIET = 60.0

#: Opens a file that may be read from one byte to another: a descriptor to be closed, or None.
Find = Callable[[str, int, int], int | None]

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; it knows the secret of its job, and which files may be read."""

    protocol_version = "HTTP/1.1"
    timeout = QUIET
    disable_nagle_algorithm = True
    secret: str
    find: Find

    def log_message(self, *_: object) -> None:
        """Print nothing: the report of the job says what was served."""

    def do_GET(self) -> None:
        """Answer a range of a file's bytes that are all verified here; 403, 404 or 416 else."""
        shown = self.headers.get("Authorization", "")
        if not hmac.compare_digest(shown.encode(), f"Bearer {self.secret}".encode()):
            self._refuse(403)
            return
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not match or int(match[1]) > int(match[2]):
            self._refuse(416)
            return
        start, end = int(match[1]), int(match[2]) + 1
        fd = self.find(unquote(self.path.removeprefix("/")), start, end)
        if fd is None:
            self._refuse(404)
            return
        try:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/*")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.send_body(fd, start, end)
        finally:
            os.close(fd)

    def send_body(self, fd: int, start: int, end: int) -> None:
        """Send the bytes `[start, end)` of a file without copying them through this process."""
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            if self.connection.sendfile(file, start, end - start) < end - start:
                self.close_connection = True  # the file was cut: the rest will not come

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Ignore a node that closes its connection, as one that died does."""


@contextmanager
def serving(host: str, secret: str, find: Find, handler: type = Handler) -> Iterator[str]:
    """Serve on a free port of this host's address until the block ends; yield the URL."""
    bound = type("Handler", (handler,), {"secret": secret, "find": staticmethod(find)})
    with _Server((host, 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{server.server_port}"
        finally:
            with suppress(OSError):
                server.shutdown()
            thread.join()

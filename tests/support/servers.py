"""Static file servers on loopback, with and without ranges, that log their requests."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One request: method, path, headers by lower-case name."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FileServer:
    """A folder behind http://127.0.0.1:PORT, with the log of the requests so far.

    `absent` is the status for what is not there.
    """

    url: str
    absent: int = 404
    log: list[Request] = field(default_factory=list)

    def gets(self) -> list[Request]:
        """Return the GET requests."""
        return [request for request in self.log if request.method == "GET"]


class _Handler(SimpleHTTPRequestHandler):
    """Python's own server, which has no ranges, with a log."""

    protocol_version = "HTTP/1.1"
    served: FileServer

    def log_message(self, *_: object) -> None:
        """Print nothing on stderr."""

    def send_head(self):  # type: ignore[no-untyped-def]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.served.log.append(Request(self.command, self.path, headers))
        return super().send_head()

    def send_error(self, code: int, message=None, explain=None) -> None:  # type: ignore[no-untyped-def]
        super().send_error(self.served.absent if code == 404 else code, message, explain)

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


class _RangedHandler(_Handler):
    """The same server, with single ranges."""

    def do_GET(self) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not match or not path.is_file():
            super().do_GET()
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.served.log.append(Request(self.command, self.path, headers))
        start, size = int(match[1]), path.stat().st_size
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(int(match[2]) + 1 - start)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)


@contextlib.contextmanager
def serving(folder: Path, ranges: bool) -> Iterator[FileServer]:
    """Serve a folder until the block ends."""
    base = _RangedHandler if ranges else _Handler
    served = FileServer("")
    handler = type("Handler", (base,), {"served": served})

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
            handler(request, client_address, self, directory=str(folder))

        def handle_error(self, *_: object) -> None:
            """Ignore a client that closes its connection."""

    with Server(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()

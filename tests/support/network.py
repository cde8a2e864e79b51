"""Networks as people have them, on loopback: TLS, proxies, servers that never finish an answer.

Each helper is a context manager that ends its threads, and yields a URL.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from requests import Response

from csm_weights.pipeline import doctor
from csm_weights.transfer.http.client import HttpClient, Timeouts
from csm_weights.transfer.http.ranges import RangeDownloader

#: Limits that end within a test.
HASTY = Timeouts(connect=5, read=15, patience=0.6, backoff=0.02, slow_seconds=2, longest_wait=30)

#: Variables of a developer's machine that a test must not see.
VARIABLES = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_OIDC_RESOURCE",
    "TRANSFORMERS_OFFLINE",
    "HUGGINGFACE_HUB_CACHE",
    "CSM_MIRROR_HEADERS",
    "NO_PROXY",
    "no_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
]


def be_hasty(patch: pytest.MonkeyPatch, **limits: float) -> None:
    """Let every command of this process try again soon and give up soon, but for these limits."""
    timeouts = replace(HASTY, **limits)
    patch.setattr(Timeouts, "with_patience", classmethod(lambda *_: timeouts))
    patch.setattr(doctor, "LIMITS", {})


class Clock(threading.Event):
    """A stop on whose clock time passes only while a client waits, or a test lets it pass."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 1000.0
        patch.setattr("time.monotonic", lambda: self.now)
        patch.setattr("random.uniform", lambda low, high: (low + high) / 2)

    def wait(self, timeout: float | None = None) -> bool:
        """Let the time pass."""
        assert timeout is not None
        self.now += max(0.0, timeout)
        return self.is_set()


def noted_waits(patch: pytest.MonkeyPatch) -> list[float]:
    """Let clients wait for no time; return the seconds that they wait for, without chance."""
    waits = list[float]()

    def note(_: HttpClient, seconds: float, *__: object) -> None:
        waits.extend([seconds] if seconds > 0 else [])

    patch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    patch.setattr(HttpClient, "pause", note)
    return waits


@contextlib.contextmanager
def serve(handle: Callable[[socket.socket], object]) -> Iterator[str]:
    """Call `handle` with every connection, each in a thread; yield 127.0.0.1 and the port."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=run, args=(connection,), daemon=True).start()

    def run(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            handle(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@contextlib.contextmanager
def answering(answer: Callable[[str], bytes]) -> Iterator[tuple[str, list[str]]]:
    """Answer what `answer` makes of a request's head, in a connection each; yield URL and heads."""
    heads = list[str]()

    def handle(connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(65536)
        heads.append(head.decode())
        connection.sendall(answer(heads[-1]))

    with serve(handle) as address:
        yield f"http://{address}", heads


def response(status: str, *headers: str, body: bytes = b"") -> bytes:
    """Return an answer after which the connection is closed, its length told unless it is given."""
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
    if not any(header.startswith("Content-Length:") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "\r\n"]).encode() + body


def closed_port() -> str:
    """Return an address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def drip(*texts: bytes, seconds: float) -> Iterator[str]:
    """Answer with these texts again and again, so many seconds apart."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        for text in itertools.cycle(texts):
            connection.sendall(text)
            if over.wait(seconds):
                return

    with serve(answer) as address:
        yield f"http://{address}"
        over.set()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Return a certificate for 127.0.0.1 that signs itself, and its key, both as PEM files."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl makes the certificate, and is not here")
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    command: list[str | Path] = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def hashed(cert: Path) -> Path:
    """Return a folder in which OpenSSL finds a certificate, by its hash."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(cert)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    folder = cert.parent / "hashed"
    folder.mkdir()
    (folder / f"{name}.0").symlink_to(cert)
    return folder


@contextlib.contextmanager
def tls_front(url: str, cert: Path, key: Path) -> Iterator[str]:
    """Serve over https what another server on loopback serves over http."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    def pass_on(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            relay(secure, connect(urlsplit(url).netloc))

    with serve(pass_on) as address:
        yield f"https://{address}"


def connect(address: str) -> socket.socket:
    """Connect to an address like 127.0.0.1:8000."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def relay(one: socket.socket, other: socket.socket) -> None:
    """Copy bytes both ways until one side ends."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    with other:
        back = threading.Thread(target=copy, args=(other, one), daemon=True)
        back.start()
        copy(one, other)
        back.join(5)


@contextlib.contextmanager
def socks_proxy() -> Iterator[tuple[str, list[str]]]:
    """Serve SOCKS 5 for IPv4 addresses and names; yield its address, and where it led."""
    led: list[str] = []

    def handle(connection: socket.socket) -> None:
        connection.recv(262)
        connection.sendall(b"\x05\x00")
        request = connection.recv(262)
        size = request[4] if request[3] == 3 else 4
        name = request[5 : 5 + size] if request[3] == 3 else request[4:8]
        host = name.decode() if request[3] == 3 else socket.inet_ntoa(name)
        led.append(f"{host}:{int.from_bytes(request[-2:])}")
        connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
        relay(connection, connect(led[-1]))

    with serve(handle) as address:
        yield address, led


@contextlib.contextmanager
def refusing_proxy(status: int) -> Iterator[str]:
    """Serve a proxy that answers everything with a status; yield its address."""

    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        text = f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(text.encode())

    with serve(handle) as address:
        yield address


class Answering(RangeDownloader):
    """A downloader that sends nothing: each request gets the same answer, and is noted."""

    def __init__(
        self, status: int, headers: Mapping[str, str] | None = None, data: object = None
    ) -> None:
        # It needs no session, and no thread that watches one.
        self.status, self.headers, self.data = status, headers or {}, data
        self.asked: list[tuple[str, str]] = []

    def ask(self, method: str, url: str, *_: object, **__: object) -> tuple[Response, bytes]:
        """Return the answer to any request, without a body."""
        self.asked.append((method, url))
        response = Response()
        response.status_code, response.reason, response.url = self.status, "Why", url
        response.headers.update(self.headers)
        return response, json.dumps(self.data).encode()

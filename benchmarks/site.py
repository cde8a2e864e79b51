"""A Hub on loopback whose storage host is nginx, which fills any line there is."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from benchmarks.xet_server import XetHub

REPO = "bench/model"

#: Seconds without a new line after which a log is taken to be whole.
QUIET = 1.0

_CONF = """
{user}
worker_processes 1;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  log_format bytes '$body_bytes_sent';
  client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp;
  uwsgi_temp_path temp; scgi_temp_path temp;
  server {{
    listen {address}:{storage};
    access_log sent.log bytes;
    root {files};
    rewrite "/([^/]+)$" /$1 break;
  }}
  server {{
    listen {address}:{front};
    access_log off;
    location / {{ proxy_pass {hub}; proxy_set_header Host $http_host; }}
  }}
}}
"""


class Site:
    """Serves one file, which is in `served`, as `model.safetensors` of a repository.

    `endpoint` is the Hub, `url` the file on the storage host. The Hub is asked
    by way of nginx where others are to reach it than on loopback.
    """

    def __init__(self, folder: Path, served: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.served = served
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "temp").mkdir(parents=True)
        self.hub = XetHub()
        storage, front = _free_port(address), _free_port(address)
        self.url = f"http://{address}:{storage}/{served.name}"
        self.hub.storage_base = f"http://{address}:{storage}"
        if address != "127.0.0.1":
            self.hub.public = f"http://{address}:{front}"
        self.endpoint = self.hub.public
        conf = _CONF.format(
            user="user root;" if os.geteuid() == 0 else "",
            address=address,
            storage=storage,
            front=front,
            files=served.parent,
            hub=self.hub.endpoint,
        )
        (folder / "nginx.conf").write_text(conf)
        self.commit = self.hub.add_repo(REPO, {"model.safetensors": served})
        self._nginx = _start(folder, (address, storage))

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._nginx.terminate()
        self._nginx.wait()
        self.hub.close()

    def sent(self) -> int:
        """Bytes of bodies that the storage host has sent, by requests that have ended."""
        return sum(map(int, (self.folder / "sent.log").read_text().split()))

    def all_sent(self) -> int:
        """The same, once no request is open any more."""
        before = -1
        while before != (now := self.sent()):
            before = now
            time.sleep(QUIET)
        return now


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def _start(folder: Path, address: tuple[str, int]) -> subprocess.Popen[bytes]:
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with suppress(OSError):
                socket.create_connection(address).close()
                return process
            time.sleep(0.1)
        raise SystemExit(f"nginx does not start: {(folder / 'error.log').read_text()}")
    except BaseException:
        process.terminate()
        raise

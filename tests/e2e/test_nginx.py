"""Mirrors as they are in the world: nginx, with ranges, without, and with gzip on the fly."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clone import Clone

pytestmark = pytest.mark.integration

TINY = ("--model", "csm-tiny")
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")

CONFIGURATION = """
daemon off;
worker_processes 1;
pid {home}/pid;
error_log {home}/error;
events {{ worker_connections 64; }}
http {{
    access_log {home}/access;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    sendfile on;
    {settings}
    server {{ listen 127.0.0.1:{port}; root {root}; {server} }}
}}
"""


@contextlib.contextmanager
def nginx(home: Path, root: Path, settings: str = "", server: str = "") -> Iterator[str]:
    """nginx on a folder until the block ends; gives its URL."""
    if NGINX is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir()
    text = CONFIGURATION.format(home=home, root=root, port=port, settings=settings, server=server)
    # Else workers of an nginx that root has started could not enter pytest's folders.
    user = "user root;\n" if os.geteuid() == 0 else ""
    (home / "nginx.conf").write_text(user + text)
    process = subprocess.Popen([NGINX, "-c", home / "nginx.conf", "-e", home / "error"])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone whose parts have gone to a folder of whole files, `mirror`."""
    clone = Clone.make(tmp_path / "clone")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name in ("model.safetensors", "ckpt.pt"):
        (mirror / name).write_bytes(clone.joined(name))
    (clone.root / "chunks").rename(tmp_path / "parts")
    return clone


KINDS = {
    "ranges": ("", ""),
    "no ranges": ("max_ranges 0;", ""),
    "gzip where it may": ("gzip on; gzip_types *; gzip_proxied any;", ""),
    "a redirect to another path": ("", "rewrite ^/old/(.*)$ /$1 redirect;"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nginx_serves_whole_files(clone: Clone, tmp_path: Path, kind: str) -> None:
    """Both files come whole, are verified and installed."""
    mirror = tmp_path / "mirror"
    with nginx(tmp_path / "nginx", mirror, *KINDS[kind]) as url:
        folder = f"{url}/old" if "redirect" in kind else url
        words = ("--only=all", "--source=mirror", f"--url={folder}", "--no-smoke")
        result = clone.inv("weights", *TINY, *words)
        assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "ckpt.pt"):
        assert (clone.installed / name).read_bytes() == (mirror / name).read_bytes()


def test_nginx_serves_parts(clone: Clone, tmp_path: Path) -> None:
    """The chunk folders behind nginx are a mirror too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "parts").rename(tmp_path / "site" / "chunks")
    with nginx(tmp_path / "nginx", tmp_path / "site") as url:
        words = ("--only=ckpt", "--source=mirror", f"--url={url}", "--no-smoke")
        assert clone.inv("weights", *TINY, *words).returncode == 0


def test_a_mirror_that_asks_for_a_password(clone: Clone, tmp_path: Path) -> None:
    """Without the header: exit 5 and where to put it. With it: done, and it is in no file."""
    (tmp_path / "users").write_text("me:{PLAIN}open\n")
    server = f'auth_basic "mine"; auth_basic_user_file {tmp_path / "users"};'
    with nginx(tmp_path / "nginx", tmp_path / "mirror", "", server) as url:
        words = ("--only=ckpt", "--source=mirror", f"--url={url}", "--no-smoke")
        refused = clone.inv("weights", *TINY, *words)
        assert (refused.returncode, "CSM_MIRROR_HEADERS" in refused.stderr) == (5, True)
        secret = "bWU6b3Blbg=="
        clone.variables["CSM_MIRROR_HEADERS"] = f"Authorization: Basic {secret}"
        result = clone.inv("weights", *TINY, *words)
        assert result.returncode == 0
    written = [p for p in clone.root.rglob("*.json") if secret in p.read_text(errors="replace")]
    assert written == []
    assert secret not in result.stdout + result.stderr

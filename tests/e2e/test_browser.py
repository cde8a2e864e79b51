"""The page of --report in a real browser: no errors, no requests, and nothing wider than it."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from csm_weights.commands.render import html
from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.pipeline import apply
from tests.commands.test_page import HOSTILE, RUN, events
from tests.commands.test_render import SMOKE
from tests.support.toy import Toy

pytestmark = pytest.mark.integration

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

#: Nothing that a browser asks of its own accord, no sandbox for root, and its console on stderr.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
)

#: Seconds after which a browser counts as hanging.
LIMIT = 120

#: The widths of a screen and of a phone, in pixels.
WIDTHS = (1280, 400)


class Server(ThreadingHTTPServer):
    """A server of one folder that keeps what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)


Open = Callable[..., tuple[str, list[str], list[str]]]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Open]:
    """Opens a page of the test's folder; gives its document, its console, and what it asked for."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def browse(name: str, *options: str) -> tuple[str, list[str], list[str]]:
        server.asked.clear()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        home = f"--user-data-dir={tmp_path / 'home'}"
        command = [CHROMIUM, *OPTIONS, home, "--dump-dom", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, console, list(server.asked)

    yield browse
    server.shutdown()
    server.server_close()


def pages(toy: Toy) -> Iterator[str]:
    """Yield a page with everything on it, and one about hostile names."""
    run = replace(RUN, events=events("fetching", *range(1, 40)))
    outcome = replace(apply.weights(toy.request(), smoke=False), smoke=SMOKE)
    yield html.render(outcome, apply.status(toy.request()), run)
    finding = Finding(Kind.WRONG_DIGEST, HOSTILE * 3, "a" * 300, HOSTILE, HOSTILE)
    yield html.render(WrongContent(HOSTILE, [finding], HOSTILE), None, replace(RUN, host=HOSTILE))


def test_a_page_is_quiet_in_a_browser(toy: Toy, tmp_path: Path, browse: Open) -> None:
    """The console stays empty, and nothing is asked for but the page: also of hostile names."""
    for number, text in enumerate(pages(toy)):
        (tmp_path / f"{number}.html").write_text(text, encoding="utf-8")
        document, console, asked = browse(f"{number}.html")
        assert (console, asked) == ([], [f"/{number}.html"])
        assert "<h1" in document and "<script" not in document
    # A page that is not quiet is heard: a script that the policy forbids, a picture that it loads.
    policy = text[text.index("<meta http-equiv") : text.index("<link")]
    (tmp_path / "loud.html").write_text(f"{policy}<script>1</script><img src=/a.png>")
    assert browse("loud.html")[1] != []
    # Under a name of its own: a page that changes within a second is not loaded again.
    (tmp_path / "louder.html").write_text("<img src=/a.png>")
    assert "/a.png" in browse("louder.html")[2]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_screens_and_phones(toy: Toy, tmp_path: Path, browse: Open, width: int) -> None:
    """No part of a page is wider than the window, and it can be photographed."""
    measure = "<script>document.title = document.documentElement.scrollWidth</script>"
    for number, text in enumerate(pages(toy)):
        free = re.sub("<meta http-equiv[^>]*>", "", text)
        framed = f'<iframe width="{width}" height="900" srcdoc="" name="page"></iframe>'
        (tmp_path / "page.html").write_text(free.replace("</body>", f"{measure}</body>"))
        (tmp_path / "frame.html").write_text(
            framed.replace('srcdoc=""', 'src="page.html"')
            + (
                "<script>onload = () => { document.title = "
                "document.querySelector('iframe').contentDocument.title }</script>"
            )
        )
        found = re.search("<title>(.*?)</title>", browse("frame.html")[0])
        assert found and 0 < int(found[1]) <= width, f"page {number}"
        picture = tmp_path / f"{number}-{width}.png"
        browse("page.html", f"--window-size={width},900", f"--screenshot={picture}")
        assert picture.read_bytes().startswith(b"\x89PNG")

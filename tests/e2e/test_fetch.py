"""Fetching as a person does it: `inv` against a Hub and mirrors on loopback."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pytest

from csm_weights.manifest.parse import load
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.store.journal import journal_path
from csm_weights.transfer.reorder import BLOCK
from tests.support.clone import INV, Clone, Result
from tests.support.hub import HubServer
from tests.support.servers import FileServer, serving
from tests.support.toy import flip

TOKEN = f"hf_{sha256(b'a person').hexdigest()[:30]}"
TINY = ("--model", "csm-tiny")
NAMES = ("model.safetensors", "ckpt.pt", "config.json")

#: A file that takes many lines and blocks, and the name of its model.
BIG = random.Random(5).randbytes(24 << 20)

#: No socket may be made: what tries to is told by name.
NO_SOCKETS = """
import socket

def forbidden(*arguments, **options):
    raise AssertionError("a socket was opened")

class Forbidden(socket.socket):
    __init__ = forbidden

socket.socket, socket.create_connection, socket.getaddrinfo = Forbidden, forbidden, forbidden
"""


@dataclass
class Desk:
    """A clone whose csm-tiny is in a gated repository of a Hub, and a person with a token."""

    clone: Clone
    hub: HubServer
    folder: Path

    def inv(self, *arguments: str, **variables: str) -> Result:
        """`inv` with these arguments, and these variables besides the usual ones."""
        before = dict(self.clone.variables)
        self.clone.variables.update(variables)
        try:
            return self.clone.inv(*arguments)
        finally:
            self.clone.variables.clear()
            self.clone.variables.update(before)

    def without_chunk_files(self, *names: str) -> None:
        """Remove chunk files: all, or those whose names end so."""
        for part in (self.clone.root / "chunks").rglob("*.part-*"):
            if not names or part.name.endswith(names):
                part.unlink()

    def is_right(self, folder: Path | None = None) -> bool:
        return all(
            ((folder or self.clone.installed) / n).read_bytes() == self.content[n] for n in NAMES
        )

    @property
    def content(self) -> dict[str, bytes]:
        return dict(self._content)

    _content: tuple[tuple[str, bytes], ...] = ()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk at which nothing was done yet."""
    clone = Clone.make(tmp_path / "clone")
    path = clone.root / "manifests" / "csm-tiny.toml"
    manifest = load(path)
    text = manifest.artifacts[2].text or ""
    content = {name: clone.joined(name) for name in NAMES[:2]} | {NAMES[2]: text.encode()}
    with HubServer() as hub:
        hub.add_token(TOKEN)
        hub.add_token("hf_of_a_stranger", access="none")
        commit = hub.add_repo("org/tiny", dict(content), gated=True)
        path.write_text(render(replace(manifest, repo="org/tiny", revision=commit, gated=True)))
        clone.variables.update(
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "hf"), HF_TOKEN=TOKEN
        )
        yield Desk(clone, hub, tmp_path, tuple(content.items()))


def big_model(desk: Desk) -> None:
    """A manifest for a large file in a public repository, pinned by its whole digest alone."""
    commit = desk.hub.add_repo("org/big", {"big.bin": BIG})
    artifact = Artifact("big.bin", "big", "opaque", len(BIG), sha256(BIG).hexdigest())
    manifest = Manifest("big", "output/big", "models/big", (artifact,), "", "org/big", commit)
    (desk.clone.root / "manifests" / "big.toml").write_text(render(manifest))


def text_of(result: Result) -> str:
    return result.stdout + result.stderr


# ---- from the Hub


def test_everything_comes_from_the_hub(desk: Desk) -> None:
    """Without chunk files, one command fetches, verifies and installs all files."""
    desk.without_chunk_files()
    result = desk.inv("weights", *TINY, "--only=all", "--source=hf", "--no-smoke")
    assert (result.returncode, desk.is_right()) == (0, True)
    assert "\nOK: installed and verified\n" in result.stdout


def test_a_second_run_asks_nobody(desk: Desk) -> None:
    """Installed and verified files are not asked for again."""
    desk.inv("weights", *TINY, "--source=hf", "--no-smoke")
    desk.hub.clear()
    assert desk.inv("weights", *TINY, "--source=hf", "--no-smoke").returncode == 0
    assert desk.hub.log == []


def test_chunk_files_that_are_here_need_no_network(desk: Desk) -> None:
    """With all chunk files here, auto asks no server, with a token and without."""
    result = desk.inv("weights", *TINY, "--no-smoke")
    assert (result.returncode, desk.is_right(), desk.hub.log) == (0, True, [])


def test_one_bad_chunk_file_means_one_piece_of_the_hub(desk: Desk) -> None:
    """Of twelve chunk files one is bad: only its piece is fetched, and the file is named."""
    flip(desk.clone.chunk_files("ckpt.pt")[2])
    result = desk.inv("weights", *TINY, "--no-smoke")
    assert (result.returncode, desk.is_right()) == (0, True)
    gets = desk.hub.requests(host="storage", method="GET")
    assert [(r.range, r.sent) for r in gets] == [("bytes=409600-614399", 204800)]
    assert re.search(r"wrong digest: .*ckpt.pt.part-ac\n", result.stdout)


def test_one_missing_chunk_file_means_one_piece_of_the_hub(desk: Desk) -> None:
    """The piece of a missing chunk file is planned by status, and fetched alone."""
    desk.without_chunk_files("model.safetensors.part-af")
    status = desk.inv("status", *TINY)
    assert re.search(r"6 of 6 +163.7 KiB +the Hub", status.stdout)
    assert "163.7 KiB to fetch" in status.stdout
    assert desk.hub.log == []
    assert desk.inv("weights", *TINY, "--no-smoke").returncode == 0
    assert desk.hub.bytes_sent() == 167632


def test_a_damaged_file_in_place_is_repaired_by_its_bad_piece(desk: Desk) -> None:
    """Without chunk files, a flipped byte in an installed file costs one piece."""
    desk.inv("weights", *TINY, "--no-smoke")
    desk.without_chunk_files()
    flip(desk.clone.installed / "model.safetensors", 300_000)
    result = desk.inv("weights", *TINY, "--no-smoke")
    assert (result.returncode, desk.is_right()) == (0, True)
    assert desk.hub.bytes_sent() == 204800
    assert re.search(r"wrong digest: .* bytes 204,800 to 409,599", result.stdout)


def test_a_file_that_was_cut_short_is_completed(desk: Desk) -> None:
    """Of a truncated copy in output/ the whole pieces are used, and the rest is fetched."""
    desk.without_chunk_files()
    desk.clone.staged.mkdir(parents=True)
    cut = desk.content["model.safetensors"][:500_000]
    (desk.clone.staged / "model.safetensors").write_bytes(cut)
    assert desk.inv("weights", *TINY, "--only=safetensors", "--no-smoke").returncode == 0
    assert desk.hub.bytes_sent() == 1_191_632 - 409_600


def test_two_thirds_of_a_download_survive_a_kill(desk: Desk) -> None:
    """After kill -9 midway the next run goes on: at most the blocks in flight come again."""
    big_model(desk)
    fault = desk.hub.fault("trickle", host="storage", match="*", rate=4 << 20, at=0)
    process = desk.clone.start(INV, "fetch", "--model=big", "--source=hf")
    journal = journal_path(desk.clone.root / "output" / "big" / "big.bin")
    wait_until(lambda: journal.exists() and journal.read_text().count("offset") >= 3)
    process.kill()
    process.communicate()
    here = sum(
        json.loads(line)["size"] for line in journal.read_text().split("\n") if line[-1:] == "}"
    )
    fault.clear()
    desk.hub.clear()
    assert desk.inv("weights", "--model=big", "--no-smoke").returncode == 0
    assert (desk.clone.root / "models" / "big" / "big.bin").read_bytes() == BIG
    assert here >= 3 * BLOCK
    assert desk.hub.bytes_sent() == len(BIG) - here


def test_ctrl_c_ends_a_download_soon_and_keeps_what_came(desk: Desk) -> None:
    """An interrupt midway exits 130 within seconds, and the next run goes on."""
    big_model(desk)
    desk.hub.fault("stall", host="storage", at=5 << 19, seconds=60)
    process = desk.clone.start(INV, "fetch", "--model=big", "--source=hf")
    journal = journal_path(desk.clone.root / "output" / "big" / "big.bin")
    wait_until(lambda: journal.exists() and "offset" in journal.read_text())
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, time.monotonic() - started < 5) == (130, True)
    assert "what was verified is kept" in said and "Traceback" not in said
    desk.hub.clear_faults()
    desk.hub.clear()
    assert desk.inv("fetch", "--model=big").returncode == 0
    assert desk.hub.bytes_sent() < len(BIG)


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for a condition, half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_revision_main_that_moved_is_refused_in_time(desk: Desk) -> None:
    """With --revision=main the manifest's digests decide: another file is refused unread."""
    desk.without_chunk_files()
    desk.hub.push("org/tiny", {"model.safetensors": b"x" * 1_191_632})
    only = ("--only=safetensors", "--source=hf", "--no-smoke")
    result = desk.inv("weights", *TINY, *only, "--revision=main")
    assert (result.returncode, desk.hub.bytes_sent()) == (4, 0)
    assert desk.inv("weights", *TINY, *only).returncode == 0


# ---- refusals, on the screen

REFUSALS: dict[str, tuple[dict[str, str], int, str]] = {
    "no token": ({"HF_TOKEN": ""}, 5, "hf auth login"),
    "unknown token": ({"HF_TOKEN": "hf_unknown"}, 5, "/settings/tokens"),
    "terms": ({"HF_TOKEN": "hf_of_a_stranger"}, 5, "accept them at"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, 3, "unset HF_HUB_OFFLINE"),
    "no such host": ({"HF_ENDPOINT": "http://nowhere.invalid"}, 6, "check the network"),
    "nobody listens": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 6, "check the network"),
    "a proxy that is not there": ({"HTTP_PROXY": "http://127.0.0.1:9"}, 6, "HTTP_PROXY"),
}


@pytest.mark.parametrize(("variables", "code", "help_text"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_what_helps(
    desk: Desk, variables: dict[str, str], code: int, help_text: str
) -> None:
    """One block with the page or the command that helps, once, and the exit code of its kind."""
    desk.without_chunk_files()
    asks = ("--only=safetensors", "--source=hf", "--patience=5")
    result = desk.inv("fetch", *TINY, *asks, **variables)
    assert result.returncode == code
    assert result.stderr.count("    help ") <= 2
    assert help_text in " ".join(result.stderr.split())
    assert "hf_" not in result.stderr.replace("hf_hub", "") and "Traceback" not in result.stderr


def test_without_a_token_auto_shows_the_ways(desk: Desk) -> None:
    """Parts missing and no token: what is missing, and what to do for the Hub, exit 3."""
    desk.without_chunk_files()
    result = desk.inv("weights", *TINY, "--no-smoke", HF_TOKEN="")
    assert result.returncode == 3
    assert f"accept the terms at {desk.hub.endpoint}/org/tiny" in " ".join(result.stderr.split())
    assert desk.hub.log == []


def test_offline_opens_no_socket(desk: Desk) -> None:
    """With HF_HUB_OFFLINE=1 not one socket is opened, by any command."""
    desk.clone.fake("sitecustomize", NO_SOCKETS)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert desk.inv("weights", *TINY, "--no-smoke", **offline).returncode == 0
    desk.without_chunk_files()
    for source in ("hf", "mirror", "auto"):
        url = () if source == "hf" else (f"--url={desk.hub.endpoint}",)
        asks = (f"--source={source}", *url, "--dest=models/elsewhere")
        result = desk.inv("fetch", *TINY, "--only=ckpt", *asks, **offline)
        assert "a socket was opened" not in text_of(result)
        assert result.returncode == 3
    assert desk.hub.log == []


def test_no_request_that_nobody_asked_for(desk: Desk) -> None:
    """A fetch asks for its files and for nothing else: no telemetry, no updates, no registry."""
    desk.without_chunk_files()
    desk.inv("weights", *TINY, "--only=all", "--source=hf", "--no-smoke")
    assert {"/resolve/" in r.path for r in desk.hub.requests(host="hub")} == {True}


def test_the_token_is_written_nowhere(desk: Desk) -> None:
    """After a fetch and a failure no file and no line has the token, nor a signed URL."""
    desk.without_chunk_files()
    said = text_of(desk.inv("weights", *TINY, "--source=hf", "--no-smoke"))
    desk.hub.fault("status", host="storage", code=403)
    said += text_of(
        desk.inv("fetch", *TINY, "--only=ckpt", "--source=hf", "--json", "--patience=1")
    )
    files = [p for p in desk.folder.rglob("*") if p.is_file() and not p.is_symlink()]
    guilty = [p for p in files if TOKEN.encode() in p.read_bytes()]
    signed = [
        p for p in files if p.suffix in (".json", ".journal") and "Signature" in p.read_text()
    ]
    assert (guilty, signed) == ([], [])
    assert TOKEN not in said and "Signature" not in said


# ---- mirrors


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def mirror(request: pytest.FixtureRequest, desk: Desk) -> Iterator[FileServer]:
    """A mirror of the whole files of csm-tiny."""
    folder = desk.folder / "mirror"
    folder.mkdir()
    for name, data in desk.content.items():
        (folder / name).write_bytes(data)
    with serving(folder, request.param) as server:
        yield server


def test_everything_comes_from_a_mirror(desk: Desk, mirror: FileServer) -> None:
    """A static server with the whole files is enough, with ranges and without."""
    desk.without_chunk_files()
    result = desk.inv(
        "weights", *TINY, "--only=all", "--source=mirror", f"--url={mirror.url}", "--no-smoke"
    )
    assert (result.returncode, desk.is_right(), desk.hub.log) == (0, True, [])


def test_a_mirror_without_ranges_sends_a_file_once(desk: Desk) -> None:
    """Six pieces of one file come in one request where there are no ranges."""
    folder = desk.folder / "plain"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(desk.content["ckpt.pt"])
    desk.without_chunk_files()
    with serving(folder, ranges=False) as server:
        result = desk.inv("fetch", *TINY, "--only=ckpt", "--source=mirror", f"--url={server.url}")
        assert result.returncode == 0
        # The first answer shows that there are no ranges.
        assert len([asked for asked in server.gets() if asked.path == "/ckpt.pt"]) <= 2


def test_the_chunk_files_may_be_on_a_mirror(desk: Desk) -> None:
    """A copy of the repository's chunk folders behind a web server serves as well."""
    (desk.clone.root / "chunks").rename(desk.folder / "chunks")
    with serving(desk.folder, ranges=True) as server:
        result = desk.inv("fetch", *TINY, "--only=ckpt", "--source=mirror", f"--url={server.url}/")
    assert result.returncode == 0
    assert (desk.clone.staged / "ckpt.pt").read_bytes() == desk.content["ckpt.pt"]


def test_chunk_files_are_found_where_absent_files_are_forbidden(desk: Desk) -> None:
    """S3 answers 403 for files that it does not have: chunk files are asked for all the same."""
    (desk.clone.root / "chunks").rename(desk.folder / "chunks")
    with serving(desk.folder, ranges=True) as server:
        server.absent = 403
        url = f"--url={server.url}/"
        result = desk.inv("fetch", *TINY, "--only=ckpt", "--source=mirror", url)
        refused = desk.inv("fetch", *TINY, "--only=safetensors", "--source=mirror", f"{url}no/")

    assert result.returncode == 0, result.stderr
    assert (refused.returncode, "403" in refused.stderr) == (5, True)


def test_a_bad_mirror_is_named_and_the_next_one_is_asked(desk: Desk, mirror: FileServer) -> None:
    """Two mirrors, the first with a wrong byte: it is named, the second gives that piece."""
    bad = desk.folder / "bad"
    bad.mkdir()
    data = bytearray(desk.content["model.safetensors"])
    data[300_000] ^= 1
    (bad / "model.safetensors").write_bytes(data)
    desk.without_chunk_files()
    with serving(bad, ranges=True) as other:
        urls = (f"--url={other.url}", f"--url={mirror.url}")
        only = ("--only=safetensors", "--source=mirror", "--no-smoke")
        result = desk.inv("weights", *TINY, *only, *urls)
        asked = [a for a in other.gets() if a.headers.get("range") == "bytes=204800-409599"]
    assert result.returncode == 0
    assert f"wrong digest: {other.url}/model.safetensors" in result.stdout
    assert len(asked) == 1
    receipt = json.loads(
        (desk.clone.installed / ".csm-weights" / "model.safetensors.json").read_text()
    )
    origins = [piece["source"].rpartition("/")[0] for piece in receipt["pieces"]]
    assert origins == [other.url, mirror.url, *[other.url] * 4]


def test_auto_asks_mirrors_before_the_hub(desk: Desk, mirror: FileServer) -> None:
    """Parts first, then mirrors, and the Hub for what they lack."""
    (desk.folder / "mirror" / "ckpt.pt").unlink()
    desk.without_chunk_files("part-aa")
    result = desk.inv("weights", *TINY, f"--url={mirror.url}", "--no-smoke")
    assert (result.returncode, desk.is_right()) == (0, True)
    assert [r.sent for r in desk.hub.requests(host="storage", method="GET")] == [204800]
    assert any("model.safetensors" in asked.path for asked in mirror.gets())


def test_a_mirror_that_lacks_the_file_is_missing_input(desk: Desk) -> None:
    """An empty mirror is a missing input, exit 3."""
    desk.without_chunk_files()
    (desk.folder / "empty").mkdir()
    with serving(desk.folder / "empty", ranges=True) as server:
        result = desk.inv("fetch", *TINY, "--only=ckpt", "--source=mirror", f"--url={server.url}")
    assert result.returncode == 3
    assert "ckpt.pt" in result.stderr


def test_headers_for_mirrors_come_from_the_environment(desk: Desk, mirror: FileServer) -> None:
    """A secret for a mirror is sent to it, and the Hub's token is not."""
    desk.without_chunk_files()
    variables = {"CSM_MIRROR_HEADERS": "Authorization: Basic c2VjcmV0\nX-Other: 1"}
    result = desk.inv(
        "fetch", *TINY, "--only=ckpt", "--source=mirror", f"--url={mirror.url}", **variables
    )
    assert result.returncode == 0
    assert {asked.headers.get("authorization") for asked in mirror.log} == {"Basic c2VjcmV0"}
    assert not any(TOKEN in str(asked.headers) for asked in mirror.log)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--source=nowhere",),
        ("--source=mirror",),
        ("--source=mirror", "--url=ftp://host/x"),
        ("--source=mirror", "--url=not a url"),
        ("--url=https://user:s3cr3t@host/x",),
        ("--url=https://host/x?token=s3cr3t",),
        ("--source=mirror", "--url=http://[::1"),
        ("--source=mirror", "--url=http://host:99999/x"),
        ("--source=hf", "--url=https://host/x"),
        ("--source=chunks", "--url=https://host/x"),
        ("--revision=--evil", "--source=hf"),
        ("--revision=../../x y", "--source=hf"),
    ],
)
def test_a_command_line_that_makes_no_sense_exits_2(desk: Desk, arguments: tuple[str, ...]) -> None:
    """Misuse is refused before any server is asked, and secrets are not repeated."""
    result = desk.inv("fetch", *TINY, *arguments)
    assert (result.returncode, desk.hub.log) == (2, [])
    assert "s3cr3t" not in result.stderr and "Traceback" not in result.stderr


# ---- the Hub's cache


def fill_cache(desk: Desk, damage: bool = False) -> Path:
    """A cache as the standard client leaves it; returns the blob of model.safetensors."""
    home = desk.folder / "hf" / "hub" / "models--org--tiny"
    data = desk.content["model.safetensors"]
    blob = home / "blobs" / sha256(data).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    if damage:
        flip(blob, 300_000)
    return blob


def test_an_edit_of_a_file_from_the_hubs_cache_is_none_of_the_cache(desk: Desk) -> None:
    """A file in the cache is copied and verified without a request; the blob stays as it is."""
    desk.without_chunk_files()
    blob = fill_cache(desk)
    result = desk.inv("weights", *TINY, "--only=safetensors", "--no-smoke")
    assert (result.returncode, desk.hub.log) == (0, [])
    assert "from the Hub's cache" in result.stdout
    placed = desk.clone.installed / "model.safetensors"
    assert placed.read_bytes() == desk.content["model.safetensors"]
    with placed.open("r+b") as file:
        file.write(b"an edit")
    assert blob.read_bytes() == desk.content["model.safetensors"]
    assert not placed.samefile(blob)


def test_a_file_that_was_linked_to_the_cache_is_kept_and_that_is_told(desk: Desk) -> None:
    """As former versions linked it: its receipt holds, and status warns while it is writable."""
    desk.without_chunk_files()
    blob = fill_cache(desk)
    placed = desk.clone.installed / "model.safetensors"
    placed.parent.mkdir(parents=True, exist_ok=True)
    placed.hardlink_to(blob)
    only = (*TINY, "--only=safetensors")
    assert desk.inv("weights", *only, "--no-smoke").returncode == 0
    told = desk.inv("status", *only)
    assert (told.returncode, "chmod a-w" in text_of(told)) == (0, True)
    assert placed.samefile(blob)
    placed.chmod(0o444)
    assert desk.inv("weights", *only, "--no-smoke").returncode == 0
    told = desk.inv("status", *only)
    assert (told.returncode, "chmod" in text_of(told)) == (0, False)


def test_a_damaged_blob_gives_its_good_pieces(desk: Desk) -> None:
    """Of a blob with a wrong byte five pieces are used and one is fetched; the blob stays."""
    desk.without_chunk_files()
    blob = fill_cache(desk, damage=True)
    before = blob.read_bytes()
    result = desk.inv("weights", *TINY, "--only=safetensors", "--no-smoke")
    assert result.returncode == 0
    placed = desk.clone.installed / "model.safetensors"
    assert placed.read_bytes() == desk.content["model.safetensors"]
    assert (desk.hub.bytes_sent(), blob.read_bytes()) == (204800, before)


@pytest.mark.parametrize(
    "endpoint",
    ["huggingface.co", "ftp://host", "http://[::1", "http://h:99999", "https://me:s3cr3t@host"],
)
def test_an_endpoint_that_is_none_exits_2(desk: Desk, endpoint: str) -> None:
    """An HF_ENDPOINT that is not a plain URL is refused by its name, without a secret in it."""
    desk.without_chunk_files()
    result = desk.inv("fetch", *TINY, "--source=hf", HF_ENDPOINT=endpoint)
    assert (result.returncode, "HF_ENDPOINT" in result.stderr) == (2, True)
    assert "s3cr3t" not in text_of(result) and "Traceback" not in result.stderr


@pytest.mark.parametrize("headers", [": x", "X-Name", "X-Name: \u20ac"])
def test_headers_that_cannot_be_sent_exit_2(desk: Desk, headers: str) -> None:
    """A line that is not a header is refused with the variable's name."""
    desk.without_chunk_files()
    asks = ("--source=mirror", f"--url={desk.hub.endpoint}", "--only=ckpt")
    result = desk.inv("fetch", *TINY, *asks, CSM_MIRROR_HEADERS=headers)
    assert (result.returncode, "CSM_MIRROR_HEADERS" in result.stderr) == (2, True)


def test_a_home_that_cannot_be_found_is_no_traceback(desk: Desk) -> None:
    """With HF_HOME of a user who does not exist, what needs no Hub goes on."""
    result = desk.inv("weights", *TINY, "--no-smoke", HF_HOME="~nosuchuser/x")
    assert (result.returncode, desk.is_right()) == (0, True)


def test_a_captive_portal_is_no_hub(desk: Desk) -> None:
    """A web page in place of the Hub's answer is a captive portal: network trouble."""
    desk.without_chunk_files()
    desk.hub.fault("html", host="hub")
    result = desk.inv("fetch", *TINY, "--source=hf", "--only=ckpt")
    assert (result.returncode, "captive portal" in result.stderr) == (6, True)


def test_no_signed_url_is_logged_when_debugging(desk: Desk) -> None:
    """With every library's log on, neither the token nor a signature is in it."""
    desk.without_chunk_files()
    logging = "import logging; logging.basicConfig(level=logging.DEBUG)\n"
    desk.clone.fake("sitecustomize", logging)
    result = desk.inv("fetch", *TINY, "--source=hf", "--only=ckpt")
    assert result.returncode == 0
    assert "Signature" not in text_of(result) and TOKEN not in text_of(result)


def test_more_files_than_may_be_open_are_fetched(desk: Desk) -> None:
    """Two hundred files come where only 256 may be open."""
    files = {f"f{number:03}.txt": b"%d" % number for number in range(200)}
    desk.hub.add_repo("org/many", dict(files))
    assert desk.inv("lock", "--repo", "org/many").returncode == 0
    command = f"ulimit -n 256; exec {INV} weights --model many --no-smoke"
    result = desk.clone.run("bash", "-c", command)
    assert result.returncode == 0, result.stderr
    placed = desk.clone.root / "models" / "many"
    assert {name: (placed / name).read_bytes() for name in files} == files


def test_a_mirrors_secret_does_not_follow_its_redirects(desk: Desk, mirror: FileServer) -> None:
    """Sent on to another origin by the mirror, we go there without its headers."""
    desk.without_chunk_files()
    desk.hub.fault("redirect", host="hub", location=f"{mirror.url}/ckpt.pt", code=302)
    asks = ("--source=mirror", f"--url={desk.hub.endpoint}", "--only=ckpt")
    result = desk.inv("fetch", *TINY, *asks, CSM_MIRROR_HEADERS="Authorization: Basic c2VjcmV0")
    assert result.returncode == 0, result.stderr
    first = desk.hub.requests(host="hub")
    assert first and all(r.headers["authorization"] == "Basic c2VjcmV0" for r in first)
    assert mirror.log and not any("authorization" in asked.headers for asked in mirror.log)

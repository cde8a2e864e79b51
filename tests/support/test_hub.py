"""The Hub on loopback serves the real client as the Hub does, with the faults of its table."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.hub import FAULTS, HubServer
from tests.support.hub.responses import Event

REPO = "org/model"
BIG = random.Random("big").randbytes(300_001)
CONFIG = b'{"hidden_size": 8}\n'
FILES = {
    "config.json": CONFIG,
    "model.safetensors": BIG,
    "original/note.txt": b"a note\n",
    "original/parts/voice.wav": b"RIFF" + bytes(100),
}

Got = dict[str, Any]

_PRELUDE = """
import hashlib, json, os, sys, tempfile
from pathlib import Path
import huggingface_hub as hf

def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def raised(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except hf.errors.LocalEntryNotFoundError as error:  # what came from the hub is behind it
        return type(error.__cause__).__name__, str(error.__cause__)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""

def fresh(file, repo="org/model", **options):
    return hf.hf_hub_download(repo, file, cache_dir=tempfile.mkdtemp(dir=sys.argv[1]), **options)

found = {}
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_token("hf_good")
        server.add_repo(REPO, FILES)
        yield server


@dataclass
class Reply:
    """The response to a raw request; `broken` says how a body ended early."""

    status: int
    headers: dict[str, str]
    body: bytes
    broken: str | None
    reused: bool

    @property
    def data(self) -> Any:
        return json.loads(self.body)


def ask(url: str, method: str = "GET", form: str | None = None, **headers: str) -> Reply:
    """Send a request without a client library, which would hide what is wrong."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request(method, target, body=form, headers=named)
        response = connection.getresponse()
        body, broken = bytearray(), None
        try:
            while block := response.read1(65536):
                body += block
        except ConnectionResetError:
            broken = "reset"
        except http.client.IncompleteRead:
            broken = "cut"
        length = response.headers.get("content-length")
        if broken is None and method != "HEAD" and length and len(body) < int(length):
            broken = "cut"
        lowered = {name.lower(): value for name, value in response.headers.items()}
        reused = connection.sock is not None
        return Reply(response.status, lowered, bytes(body), broken, reused)
    finally:
        connection.close()


def resolve(hub: HubServer, path: str, revision: str = "main", repo: str = REPO) -> str:
    """The URL at which the hub resolves a file."""
    return f"{hub.endpoint}/{repo}/resolve/{revision}/{path}"


def signed(hub: HubServer, path: str = "model.safetensors") -> str:
    """The signed URL of a file in LFS."""
    return ask(resolve(hub, path), "HEAD").headers["location"]


def client(hub: HubServer, home: Path, code: str, **environment: str) -> Got:
    """The findings of a script with the real client."""
    script = f"{_PRELUDE}{textwrap.dedent(code)}\nprint(json.dumps(found))\n"
    own = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(home)],
        env={"PATH": os.environ["PATH"]} | own | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: Got = json.loads(done.stdout.splitlines()[-1])
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The real client


@pytest.mark.parametrize("resolve_cache", [False, True])
def test_the_real_client_gets_everything(
    hub: HubServer, tmp_path: Path, resolve_cache: bool
) -> None:
    """huggingface_hub downloads every file, and a snapshot, of a gated repository."""
    commit = hub.add_repo("org/gated", FILES, gated=True)
    hub.page_size = 2
    hub.resolve_cache = resolve_cache
    code = """
    found["file"] = [sha(fresh(name, "org/gated")) for name in ("config.json", "model.safetensors")]
    folder = Path(hf.snapshot_download("org/gated"))
    found["snapshot"] = folder.name
    found["all"] = {
        p.relative_to(folder).as_posix(): sha(p) for p in folder.rglob("*") if p.is_file()
    }
    found["blobs"] = sorted(p.name for p in (folder.parent.parent / "blobs").iterdir())
    """
    found = client(hub, tmp_path, code, HF_TOKEN="hf_good")
    assert found["file"] == [sha256(CONFIG), sha256(BIG)]
    assert found["snapshot"] == commit
    assert found["all"] == {path: sha256(data) for path, data in FILES.items()}
    assert {sha256(BIG), _blob_id(CONFIG)} <= set(found["blobs"])
    assert len(hub.requests("hub", "GET", "/tree/")) == 3
    assert hub.requests("hub", "GET", "/api/agent-harnesses")[0].status == 200


def test_the_real_client_sends_the_storage_host_no_token(hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub sends its token to the hub and not to the storage host."""
    hub.add_repo("org/gated", FILES, gated=True)
    client(hub, tmp_path, 'fresh("model.safetensors", "org/gated")', HF_TOKEN="hf_good")
    (at_hub,) = hub.requests("hub", contains="/resolve/")
    (at_storage,) = hub.requests("storage")
    assert at_hub.headers["authorization"] == "Bearer hf_good"
    assert "authorization" not in at_storage.headers
    assert at_storage.status == 200
    assert at_storage.sent == hub.bytes_sent() == len(BIG)


def test_the_real_client_understands_the_api(hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub reads model information, tree, paths and refs."""
    commit = hub.add_repo("org/gated", FILES, gated=True)
    hub.page_size = 3
    code = """
    api = hf.HfApi()
    info = api.model_info("org/gated", files_metadata=True)
    found["info"] = [info.sha, info.gated, info.private, info.author]
    found["siblings"] = {
        s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in info.siblings
    }
    found["bare"] = [s.size for s in api.model_info("org/gated", revision="main").siblings]
    tree = list(api.list_repo_tree("org/gated", recursive=True, expand=True))
    found["tree"] = [[type(e).__name__, e.path] for e in tree]
    found["security"] = [e.security.safe for e in tree if hasattr(e, "security")]
    found["commits"] = list({e.last_commit.oid for e in tree})
    linked = [e for e in tree if getattr(e, "lfs", None)]
    found["lfs"] = {e.path: [e.lfs.sha256, e.lfs.pointer_size] for e in linked}
    found["top"] = [e.path for e in api.list_repo_tree("org/gated")]
    found["folder"] = [e.path for e in api.list_repo_tree("org/gated", "original")]
    paths = ["original", "config.json", "absent", "model.safetensors"]
    found["paths"] = [[type(e).__name__, e.path] for e in api.get_paths_info("org/gated", paths)]
    found["refs"] = [[b.name, b.target_commit] for b in api.list_repo_refs("org/gated").branches]
    found["who"] = api.whoami()
    found["check"] = api.auth_check("org/gated")
    found["exists"] = [api.file_exists("org/gated", name) for name in ("config.json", "absent")]
    """
    found = client(hub, tmp_path, code, HF_TOKEN="hf_good")
    assert found["info"] == [commit, "auto", False, "org"]
    siblings = found["siblings"]
    assert siblings["config.json"] == [len(CONFIG), _blob_id(CONFIG), None]
    pointer = _blob_id(_pointer(BIG))
    assert siblings["model.safetensors"] == [len(BIG), pointer, sha256(BIG)]
    assert found["bare"] == [None] * len(FILES)
    folders = [["RepoFolder", path] for path in ("original", "original/parts")]
    assert sorted(found["tree"]) == sorted([["RepoFile", path] for path in FILES] + folders)
    assert found["security"] == [True] * len(FILES)
    assert found["commits"] == [commit]
    assert found["lfs"]["model.safetensors"] == [sha256(BIG), len(_pointer(BIG))]
    assert found["top"] == ["config.json", "model.safetensors", "original"]
    assert found["folder"] == ["original/note.txt", "original/parts"]
    assert found["paths"] == [
        ["RepoFolder", "original"],
        ["RepoFile", "config.json"],
        ["RepoFile", "model.safetensors"],
    ]
    assert found["refs"] == [["main", commit]]
    assert found["who"]["name"] == "alice"
    assert found["who"]["auth"]["accessToken"]["fineGrained"]["canReadGatedRepos"] is True
    assert found["check"] is None
    assert found["exists"] == [True, False]


#: Of each refusal: what is asked for, with which token, the client's exception, its words.
REFUSALS = {
    "no token": ("org/gated@main/config.json", "", "GatedRepoError", "Please log in."),
    "terms": ("org/gated@main/config.json", "hf_none", "GatedRepoError", "to ask for access."),
    "pending": ("org/gated@main/config.json", "hf_pending", "GatedRepoError", "a review from"),
    "rejected": ("org/gated@main/config.json", "hf_rejected", "GatedRepoError", "rejected by"),
    "scope": ("org/gated@main/config.json", "hf_scope", "HfHubHTTPError", "enable access to"),
    "bad token": ("org/gated@main/config.json", "hf_bad", "HfHubHTTPError", "Invalid credentials"),
    "bad, public": ("org/model@main/config.json", "hf_bad", "HfHubHTTPError", "Invalid credent"),
    "no repository": ("org/nope@main/config.json", "hf_good", "RepositoryNotFoundError", "404"),
    # Over https the client makes a RepositoryNotFoundError of these two.
    "no repo or token": ("org/nope@main/config.json", "", "HfHubHTTPError", "Invalid username or"),
    "private": ("org/private@main/config.json", "", "HfHubHTTPError", "Invalid username or"),
    "private, token": ("org/private@main/config.json", "hf_none", "", ""),
    "revision": ("org/model@v9/config.json", "", "RevisionNotFoundError", "Invalid rev id: v9"),
    "file": ("org/model@main/no.json", "", "RemoteEntryNotFoundError", "Entry Not Found"),
}


def test_the_real_client_understands_each_refusal(hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub raises its own error for each refusal of the hub."""
    hub.add_repo("org/gated", FILES, gated=True)
    hub.add_repo("org/private", FILES, private=True)
    hub.add_token("hf_none", access="none")
    hub.add_token("hf_pending", access="pending")
    hub.add_token("hf_rejected", access="rejected")
    hub.add_token("hf_scope", can_read_gated=False)
    code = f"""
    for name, (where, token, *_) in {REFUSALS!r}.items():
        repo, _, where = where.partition("@")
        revision, _, file = where.partition("/")
        found[name] = raised(fresh, file, repo, revision=revision, token=token or False)
    checked = ("hf_none", "hf_pending", "hf_rejected", "hf_scope", "hf_bad", False)
    found["check"] = [raised(hf.auth_check, "org/gated", token=token)[0] for token in checked]
    found["whoami"] = raised(hf.whoami, token="hf_bad")
    found["public"] = [
        hf.model_info("org/gated", token=False).id,
        len(list(hf.list_repo_tree("org/gated", token="hf_none"))),
        len(hf.get_paths_info("org/gated", ["config.json"], token=False)),
    ]
    """
    found = client(hub, tmp_path, code)
    for name, (_, _, kind, words) in REFUSALS.items():
        got, message = found[name]
        assert (name, got) == (name, kind)
        assert words in message
    gated, plain = "GatedRepoError", "HfHubHTTPError"
    assert found["check"] == [gated, gated, gated, plain, plain, gated]
    assert "Invalid user token" in found["whoami"][1]
    assert found["public"] == ["org/gated", 3, 1]


def test_the_real_client_takes_flipped_bytes_for_good(hub: HubServer, tmp_path: Path) -> None:
    """huggingface_hub accepts a flipped byte without an error."""
    fault = hub.fault("flip", "model.safetensors", offset=1000)
    found = client(hub, tmp_path, 'found["sha"] = sha(fresh("model.safetensors"))')
    assert found["sha"] == sha256(BIG[:1000] + bytes([BIG[1000] ^ 0xFF]) + BIG[1001:])
    assert fault.hits == 1


# Repositories


def test_ids_are_those_of_git(hub: HubServer, tmp_path: Path) -> None:
    """Blob and tree ids are those that git computes."""
    for path, data in FILES.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_pointer(data) if path.endswith((".safetensors", ".wav")) else data)
    run = ["git", "-C", str(tmp_path), "-c", "core.autocrlf=false"]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "add", "."], check=True)
    tree = subprocess.run([*run, "write-tree"], check=True, capture_output=True, text=True).stdout
    listed = subprocess.run(
        [*run, "ls-tree", "-rt", tree.strip()], check=True, capture_output=True, text=True
    ).stdout
    expected = {line.split("\t")[1]: line.split()[2] for line in listed.splitlines()}
    entries = ask(f"{hub.endpoint}/api/models/{REPO}/tree/main?recursive=true").data
    assert {entry["path"]: entry["oid"] for entry in entries} == expected


def test_commits_stay_readable(hub: HubServer) -> None:
    """An old commit has the files that it had."""
    first = hub.push(REPO, {})
    second = hub.push(REPO, {"config.json": b"{}", "original/note.txt": None})
    hub.tag(REPO, "v1", first)
    assert ask(resolve(hub, "config.json")).body == b"{}"
    assert ask(resolve(hub, "config.json", first)).body == CONFIG
    assert ask(resolve(hub, "config.json", "v1")).headers["x-repo-commit"] == first
    assert ask(resolve(hub, "config.json", second)).headers["x-repo-commit"] == second
    gone = ask(resolve(hub, "original/note.txt"))
    assert (gone.status, gone.headers["x-error-code"]) == (404, "EntryNotFound")
    assert gone.headers["x-repo-commit"] == second


def test_a_commit_depends_on_the_content_only(hub: HubServer) -> None:
    """Two hubs with the same files have the same commit."""
    with HubServer() as other:
        assert other.add_repo(REPO, FILES) == hub.add_repo("org/again", FILES)
        assert other.push(REPO, {"config.json": b""}) != hub.push("org/again", {})


def test_a_file_on_disk_is_served_as_one_in_memory(hub: HubServer, tmp_path: Path) -> None:
    """A file on disk is served like bytes in memory."""
    path = tmp_path / "file"
    path.write_bytes(BIG)
    hub.add_repo(
        "org/disk", {"model.safetensors": path, "plain": path}, lfs=lambda p, _: p != "plain"
    )
    for name in ("model.safetensors", "plain"):
        url = resolve(hub, name, repo="org/disk")
        answer = ask(url)
        assert ask(answer.headers.get("location", url)).body == BIG
        assert ask(answer.headers.get("location", url), Range="bytes=9-99").body == BIG[9:100]


def test_many_hubs_at_once_end_at_once() -> None:
    """Ten hubs with stalled responses close long before the stalls are over."""
    hubs = [HubServer() for _ in range(10)]
    for hub in hubs:
        hub.add_repo(REPO, FILES)
        hub.fault("stall", at=10, seconds=60)
    waiting = [threading.Thread(target=ask, args=(signed(hub),)) for hub in hubs]
    for thread in waiting:
        thread.start()
    while not all(hub.requests("storage") for hub in hubs):
        time.sleep(0.01)
    began = time.monotonic()
    for hub in hubs:
        hub.close()
    for thread in waiting:
        thread.join(30)
    assert time.monotonic() - began < 20
    with pytest.raises(ConnectionError):
        ask(hubs[0].endpoint)


# Responses, byte by byte


def test_the_response_to_a_head(hub: HubServer) -> None:
    """A HEAD of an LFS file has the headers of the Hub, and a redirect."""
    commit = hub.push(REPO, {})
    linked = ask(resolve(hub, "model.safetensors"), "HEAD")
    assert linked.status == 302
    assert linked.headers["x-repo-commit"] == commit
    assert linked.headers["x-linked-etag"] == f'"{sha256(BIG)}"'
    assert linked.headers["x-linked-size"] == str(len(BIG))
    assert linked.headers["accept-ranges"] == "bytes"
    assert linked.headers["location"].startswith(f"{hub.storage}/")
    plain = ask(resolve(hub, "config.json"), "HEAD")
    assert plain.status == 200
    assert plain.headers["etag"] == f'"{_blob_id(CONFIG)}"'
    assert plain.headers["content-length"] == str(len(CONFIG))
    stored = ask(linked.headers["location"], "HEAD")
    assert (stored.status, stored.headers["content-length"]) == (200, str(len(BIG)))
    assert stored.headers["etag"].startswith('"')
    assert stored.headers["etag"] != linked.headers["x-linked-etag"]
    assert "last-modified" in stored.headers
    assert urlsplit(hub.storage).hostname != urlsplit(hub.endpoint).hostname


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=1000-", 1000, len(BIG)),
        ("bytes=-7", len(BIG) - 7, len(BIG)),
        ("bytes=-999999999", 0, len(BIG)),
        (f"bytes=5-{len(BIG) + 5}", 5, len(BIG)),
    ],
)
def test_a_range(hub: HubServer, wanted: str, start: int, stop: int) -> None:
    """A range is served with 206 and its Content-Range."""
    answer = ask(signed(hub), Range=wanted)
    assert answer.status == 206
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(BIG)}"
    assert answer.body == BIG[start:stop]
    assert hub.requests("storage")[-1].range == wanted


@pytest.mark.parametrize("wanted", ["bytes=9-5", "bytes=0-1,5-6", "lines=1-2", "bytes=-"])
def test_a_range_that_is_none(hub: HubServer, wanted: str) -> None:
    """A malformed range is ignored, and the whole file is served."""
    answer = ask(signed(hub), Range=wanted)
    assert (answer.status, answer.body) == (200, BIG)


def test_a_range_behind_the_end(hub: HubServer) -> None:
    """A range behind the end is 416, with the size."""
    for url, size in ((signed(hub), len(BIG)), (resolve(hub, "config.json"), len(CONFIG))):
        answer = ask(url, Range=f"bytes={size}-")
        assert answer.status == 416
        assert answer.headers["content-range"] == f"bytes */{size}"


def test_conditions(hub: HubServer) -> None:
    """If-Match, If-None-Match and If-Range are honoured."""
    url = signed(hub)
    etag = ask(url, "HEAD").headers["etag"]
    assert ask(url, Range="bytes=0-9", If_Range=etag).status == 206
    assert ask(url, Range="bytes=0-9", If_Range='"other"').body == BIG
    assert ask(url, If_Match='"other"').status == 412
    assert ask(url, If_None_Match=etag).status == 304


def test_a_signed_url(hub: HubServer) -> None:
    """A signed URL is good for its file and its time, and no other."""
    url = signed(hub)
    last = "0" if url[-1] != "0" else "1"
    forged = [url[:-1] + last, url.partition("?")[0], url.replace("X-Expires=", "X-Expires=9")]
    for other in forged:
        answer = ask(other)
        assert (answer.status, answer.headers["content-type"]) == (403, "application/xml")
        assert b"SignatureDoesNotMatch" in answer.body
    hub.expire_urls()
    assert b"Request has expired" in ask(url).body
    assert ask(signed(hub)).status == 200


def test_the_log(hub: HubServer) -> None:
    """The log has host, method, status, bytes and range of each request."""
    ask(resolve(hub, "config.json"), Authorization="Bearer hf_good")
    ask(signed(hub), Range="bytes=0-99")
    got, head, stored = hub.log
    assert (got.host, got.method, got.status, got.sent) == ("hub", "GET", 200, len(CONFIG))
    assert got.headers["authorization"] == "Bearer hf_good"
    assert (head.method, head.sent) == ("HEAD", 0)
    assert (stored.host, stored.status, stored.sent) == ("storage", 206, 100)
    assert hub.requests("hub", contains="config") == [got]
    assert hub.requests(method="HEAD") == [head]
    assert (hub.bytes_sent(), hub.bytes_sent("hub")) == (100, len(CONFIG))
    hub.clear()
    assert hub.log == []


def test_a_connection_is_kept(hub: HubServer) -> None:
    """A connection is kept open after each kind of response."""
    for url in (resolve(hub, "config.json"), resolve(hub, "absent"), signed(hub)):
        assert ask(url).reused


# Faults


def test_every_fault_is_described_and_tried() -> None:
    """Each fault of the table has a sentence, and a test in this file."""
    here = Path(__file__).read_text(encoding="utf-8")
    for name, kind in FAULTS.items():
        assert kind.name == name
        assert kind.sentence.endswith("."), name
        assert f'"{name}"' in here, name


def test_a_fault_that_makes_no_sense(hub: HubServer) -> None:
    """A fault with an unknown name or option raises."""
    with pytest.raises(TypeError):
        hub.fault("cut", after_bytes=5)
    with pytest.raises(KeyError):
        hub.fault("earthquake")


def test_when_a_fault_applies(hub: HubServer) -> None:
    """`after`, `times`, `host` and `method` say when a fault applies, and clearing ends it."""
    url = resolve(hub, "config.json")
    fault = hub.fault("status", "*/config.json", after=1, times=2, code=503)
    assert [ask(url).status for _ in range(4)] == [200, 503, 503, 200]
    assert fault.hits == 2
    fault = hub.fault("status", "model.safetensors", host="storage", method="GET", code=500)
    assert ask(url).status == 200
    assert ask(signed(hub), "HEAD").status == 200
    assert ask(signed(hub)).status == 500
    fault.clear()
    assert ask(signed(hub)).status == 200
    hub.fault("status", code=404)
    hub.clear_faults()
    assert ask(url).status == 200


def test_several_faults_at_once(hub: HubServer) -> None:
    """Several faults apply in the order of the table."""
    hub.fault("cut", host="storage", at=5)
    hub.fault("flip", offset=0)
    hub.fault("no-range")
    hub.fault("other-bytes", content=b"0123456789")
    answer = ask(signed(hub), Range="bytes=3-")
    assert (answer.status, answer.broken) == (200, "cut")
    assert answer.body == bytes([ord("0") ^ 0xFF]) + b"1234"


def test_status(hub: HubServer) -> None:
    """The fault `status` gives that status, headers and body."""
    limits = {"Retry-After": "3", "RateLimit": '"resolvers";r=0;t=3'}
    hub.fault("status", code=429, headers=limits, body="slow down")
    answer = ask(resolve(hub, "config.json"))
    assert (answer.status, answer.body) == (429, b"slow down")
    assert (answer.headers["retry-after"], answer.headers["ratelimit"]) == tuple(limits.values())


def test_redirect(hub: HubServer) -> None:
    """The fault `redirect` gives that status and location."""
    hub.fault("redirect", location="http://127.0.0.3/evil", code=307)
    answer = ask(resolve(hub, "config.json"))
    assert (answer.status, answer.headers["location"]) == (307, "http://127.0.0.3/evil")


def test_html(hub: HubServer) -> None:
    """The fault `html` gives a page with 200 in place of files and JSON."""
    hub.fault("html")
    for url in (resolve(hub, "model.safetensors"), f"{hub.endpoint}/api/models/{REPO}"):
        answer = ask(url)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"<html>" in answer.body
        assert "x-repo-commit" not in answer.headers


def test_close(hub: HubServer) -> None:
    """The fault `close` ends the connection without a response."""
    hub.fault("close")
    with pytest.raises(http.client.RemoteDisconnected):
        ask(resolve(hub, "config.json"))
    assert [(request.status, request.sent) for request in hub.log] == [(0, 0)]


@pytest.mark.parametrize("name", ["reset", "cut"])
@pytest.mark.parametrize("at", [0, 100_000])
def test_reset_and_cut(hub: HubServer, name: str, at: int) -> None:
    """The faults `reset` and `cut` end the body after `at` bytes."""
    url = signed(hub)
    fault = hub.fault(name, at=at, times=1)
    answer = ask(url)
    assert answer.broken == name
    assert answer.body == BIG[:at]
    assert hub.requests("storage")[-1].sent == at
    assert fault.hits == 1
    assert ask(url).body == BIG


def test_reset_and_cut_need_a_body_as_long(hub: HubServer) -> None:
    """They do not apply to a body that is shorter."""
    fault = hub.fault("reset", at=100_000)
    assert ask(signed(hub), Range="bytes=0-99").body == BIG[:100]
    assert ask(resolve(hub, "config.json")).body == CONFIG
    assert fault.hits == 0


def test_stall(hub: HubServer) -> None:
    """The fault `stall` delays the rest of the body, until it is over or cleared."""
    url = signed(hub)
    fault = hub.fault("stall", at=1000, seconds=0.2)
    began = time.monotonic()
    assert ask(url).body == BIG
    assert time.monotonic() - began >= 0.2
    fault.clear()
    fault = hub.fault("stall", at=1000, seconds=60)
    threading.Timer(0.1, fault.clear).start()
    assert ask(url).body == BIG


def test_a_stall_holds_the_bytes_back(hub: HubServer) -> None:
    """During a stall no byte beyond `at` is sent."""
    hub.fault("stall", at=1000, seconds=60)
    parts = urlsplit(signed(hub))
    with socket.create_connection((parts.hostname, parts.port)) as raw:
        raw.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        got = bytearray()
        while len(got.partition(b"\r\n\r\n")[2]) < 1000:
            got += raw.recv(65536)
        raw.settimeout(0.1)
        with pytest.raises(TimeoutError):
            raw.recv(1)
    assert bytes(got).partition(b"\r\n\r\n")[2] == BIG[:1000]
    assert hub.requests("storage")[-1].sent == 1000


def test_trickle(hub: HubServer) -> None:
    """The fault `trickle` slows the body down."""
    hub.fault("trickle", at=len(BIG) - 1000, rate=5000)
    url = signed(hub)
    began = time.monotonic()
    assert ask(url).body == BIG
    assert time.monotonic() - began > 0.15


def test_crowd(hub: HubServer) -> None:
    """The fault `crowd` slows all bodies down once there are too many of them."""
    fault = hub.fault("crowd", lines=2, rate=3e6)
    began = time.monotonic()
    assert ask(signed(hub)).body == BIG
    assert time.monotonic() - began > 0.08
    event = Event(0, "trickle", 1000, fault, lines=2)
    assert [event.rate(lines) * lines for lines in (1, 2, 3, 4)] == [1000, 2000, 1000, 1000]


@pytest.mark.parametrize("on_disk", [False, True])
def test_flip_and_zeros(hub: HubServer, tmp_path: Path, on_disk: bool) -> None:
    """The faults `flip` and `zeros` change those bytes of the file, in memory and on disk."""
    source: bytes | Path = BIG
    if on_disk:
        source = tmp_path / "file"
        source.write_bytes(BIG)
    hub.push(REPO, {"model.safetensors": source})
    flip = hub.fault("flip", offset=5000)
    hub.fault("zeros", offset=262_000, size=1000)
    wrong = bytearray(BIG)
    wrong[5000] ^= 0xFF
    wrong[262_000:263_000] = bytes(1000)
    url = signed(hub)
    assert ask(url).body == wrong
    assert ask(url, Range="bytes=4990-5009").body == wrong[4990:5010]
    assert ask(url, Range="bytes=262500-270000").body == wrong[262_500:270_001]
    assert flip.hits == 2


def test_other_bytes(hub: HubServer) -> None:
    """The fault `other-bytes` serves another content under the same headers."""
    url = signed(hub)
    etag = ask(url).headers["etag"]
    hub.fault("other-bytes", "model.safetensors", content=b"0123456789")
    answer = ask(url)
    assert (answer.body, answer.headers["etag"]) == (b"0123456789", etag)
    assert ask(url, Range="bytes=5-").headers["content-range"] == "bytes 5-9/10"
    assert ask(url, Range="bytes=50-").status == 416


def test_short(hub: HubServer) -> None:
    """The fault `short` serves less than was requested."""
    hub.fault("short", by=10)
    url = signed(hub)
    whole, part = ask(url), ask(url, Range="bytes=100-199")
    assert (whole.broken, whole.body) == (None, BIG[:-10])
    assert (part.broken, part.body) == (None, BIG[100:190])
    assert part.headers["content-range"] == f"bytes 100-189/{len(BIG)}"


def test_cap(hub: HubServer) -> None:
    """The fault `cap` serves the beginning of a range, with headers that say so."""
    hub.fault("cap", size=60)
    part = ask(signed(hub), Range="bytes=100-199")
    assert (part.status, part.broken, part.body) == (206, None, BIG[100:160])
    assert part.headers["content-range"] == f"bytes 100-159/{len(BIG)}"


def test_long(hub: HubServer) -> None:
    """The fault `long` serves more than was requested."""
    hub.fault("long", by=10)
    url = signed(hub)
    whole, part, last = (ask(url, **h) for h in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=-5"}))
    assert (whole.headers["content-length"], whole.body) == (str(len(BIG) + 10), BIG + bytes(10))
    assert (part.body, part.headers["content-range"]) == (BIG[:20], f"bytes 0-19/{len(BIG)}")
    assert last.body == BIG[-5:] + bytes(10)


def test_no_range(hub: HubServer) -> None:
    """The fault `no-range` serves the whole file."""
    hub.fault("no-range")
    answer = ask(signed(hub), Range="bytes=5-9")
    assert (answer.status, answer.body) == (200, BIG)
    assert "content-range" not in answer.headers


def test_wrong_range(hub: HubServer) -> None:
    """The fault `wrong-range` serves a later range."""
    hub.fault("wrong-range", shift=3)
    answer = ask(signed(hub), Range="bytes=5-9")
    assert (answer.status, answer.body) == (206, BIG[8:13])
    assert answer.headers["content-range"] == f"bytes 8-12/{len(BIG)}"


def test_no_content_range(hub: HubServer) -> None:
    """The fault `no-content-range` leaves the header out."""
    hub.fault("no-content-range")
    answer = ask(signed(hub), Range="bytes=5-9")
    assert (answer.status, answer.body) == (206, BIG[5:10])
    assert "content-range" not in answer.headers


def test_content_range(hub: HubServer) -> None:
    """The fault `content-range` changes the header's figures."""
    hub.fault("content-range", last=2, total=7)
    answer = ask(signed(hub), Range="bytes=5-9")
    assert (answer.status, answer.body) == (206, BIG[5:10])
    assert answer.headers["content-range"] == f"bytes 5-11/{len(BIG) + 7}"


def test_lfs_pointer(hub: HubServer) -> None:
    """The fault `lfs-pointer` serves the pointer of a file in LFS."""
    hub.fault("lfs-pointer")
    answer = ask(resolve(hub, "model.safetensors"))
    assert (answer.status, answer.body) == (200, _pointer(BIG))
    assert ask(signed(hub)).body == _pointer(BIG)
    assert ask(resolve(hub, "config.json")).body == CONFIG


def test_gzip(hub: HubServer) -> None:
    """The fault `gzip` compresses the whole file, whatever was requested."""
    hub.fault("gzip")
    answer = ask(signed(hub), Range="bytes=5-9", Accept_Encoding="identity")
    assert (answer.status, answer.headers["content-encoding"]) == (200, "gzip")
    assert gzip.decompress(answer.body) == BIG


def test_chunked(hub: HubServer) -> None:
    """The fault `chunked` sends the body in chunks, also one that is cut."""
    hub.fault("chunked")
    answer = ask(signed(hub))
    assert answer.body == BIG
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in answer.headers
    assert hub.bytes_sent() == len(BIG)
    hub.fault("cut", at=1000)
    broken = ask(signed(hub))
    assert (broken.broken, len(broken.body)) == ("cut", 1000)


def test_expire(hub: HubServer) -> None:
    """The fault `expire` changes the time that a signed URL lives."""
    lasting = hub.fault("expire", seconds=60)
    assert ask(signed(hub)).status == 200
    lasting.clear()
    hub.fault("expire", seconds=0)
    assert ask(signed(hub)).status == 403


def test_dead_address(hub: HubServer) -> None:
    """The fault `dead-address` changes the host of a signed URL, not that of a file in git."""
    hub.fault("dead-address", address="127.0.0.1:9")
    location = ask(resolve(hub, "model.safetensors"), "HEAD").headers["location"]
    assert location.startswith("http://127.0.0.1:9/")
    assert ask(resolve(hub, "config.json")).status == 200


def test_etag_and_commit(hub: HubServer) -> None:
    """The faults `etag` and `commit` change these headers."""
    hub.fault("etag", value="../../evil")
    hub.fault("commit", value="0" * 40)
    linked, plain = (ask(resolve(hub, p), "HEAD") for p in ("model.safetensors", "config.json"))
    assert linked.headers["x-linked-etag"] == plain.headers["etag"] == '"../../evil"'
    assert linked.headers["x-repo-commit"] == plain.headers["x-repo-commit"] == "0" * 40


def test_moved(hub: HubServer) -> None:
    """The fault `moved` redirects to the same path, and not for ever where it is limited."""
    fault = hub.fault("moved", times=1)
    answer = ask(resolve(hub, "config.json"))
    assert answer.status == 307
    assert ask(hub.endpoint + answer.headers["location"]).body == CONFIG
    assert fault.hits == 1


def test_add_header(hub: HubServer) -> None:
    """The fault `add-header` adds a header, or replaces one."""
    hub.fault("add-header", name="X-Extra", value="1")
    answer = ask(resolve(hub, "config.json"))
    assert (answer.headers["x-extra"], answer.body) == ("1", CONFIG)


def test_drop_header(hub: HubServer) -> None:
    """The fault `drop-header` leaves a header out, Content-Length too."""
    hub.fault("drop-header", name="x-linked-size")
    hub.fault("drop-header", name="Content-Length", host="storage")
    assert "x-linked-size" not in ask(resolve(hub, "model.safetensors"), "HEAD").headers
    answer = ask(signed(hub))
    assert "content-length" not in answer.headers
    assert (answer.body, answer.reused) == (BIG, False)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def _pointer(data: bytes) -> bytes:
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


def test_quotas_are_counted_where_they_are_on(hub: HubServer) -> None:
    """The 501st request of the API in five minutes is refused, and says when to ask again."""
    hub.has_quotas = True
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)

    def ask(path: str) -> tuple[int, str]:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status, response.headers["RateLimit"]

    found = [ask("/api/models/org/model") for _ in range(501)]
    left = [rate.removesuffix(rate.partition(";t=")[2]) for _, rate in found]
    assert {status for status, _ in found[:500]} == {200}
    assert (left[0], left[499], left[500]) == ('"api";r=499;t=', *['"api";r=0;t='] * 2)
    assert (found[500][0], ask("/org/model/resolve/main/config.json")[0]) == (429, 200)

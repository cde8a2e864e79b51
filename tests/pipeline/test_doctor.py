"""The doctor: each obstacle by its name and exit code, before anything is fetched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csm_weights.commands.render import blocks
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.errors import CsmWeightsError, Kind
from csm_weights.manifest import parse, render
from csm_weights.model import offline_assets
from csm_weights.pipeline import apply, doctor
from csm_weights.pipeline.doctor import CheckResult, DoctorReport, Verdict
from csm_weights.pipeline.request import Request
from csm_weights.store import hub_cache
from tests.support.clone import REPOSITORY
from tests.support.hub import HubServer
from tests.support.network import (
    VARIABLES,
    be_hasty,
    certificate,
    closed_port,
    refusing_proxy,
    tls_front,
)
from tests.support.servers import serving
from tests.support.toy import Toy

REPO = "org/tiny"
TOKEN = "hf_GeheimGeheimGeheim"
FILES = ("model.safetensors", "ckpt.pt", "config.json")

#: Ends a process that opens a socket, in words.
NO_SOCKETS = """
import socket

class Refused(socket.socket):
    def __init__(self, *arguments, **options):
        raise SystemExit("a socket was opened")

socket.socket = socket.SocketType = Refused
socket.create_connection = socket.getaddrinfo = lambda *a, **o: Refused()
"""


def write_manifest(root: Path, commit: str, gated: bool = True) -> None:
    """Names the Hub's repository in the manifest of csm-tiny below `root`."""
    path = root / "manifests" / "csm-tiny.toml"
    known = parse.load(REPOSITORY / "manifests" / "csm-tiny.toml")
    path.write_text(render.render(replace(known, repo=REPO, revision=commit, gated=gated)))


@functools.cache
def content(name: str) -> bytes:
    """A file of csm-tiny."""
    parts = sorted((REPOSITORY / "chunks" / "csm-tiny").rglob(f"{name}.part-*"))
    if parts:
        return b"".join(part.read_bytes() for part in parts)
    known = parse.load(REPOSITORY / "manifests" / "csm-tiny.toml")
    (artifact,) = (a for a in known.artifacts if a.path == name)
    return str(artifact.editions[0].text).encode()


@dataclass
class Bench:
    """A repository of csm-tiny without parts, a Hub that has it, and who is asked for it."""

    root: Path
    hub: HubServer
    commit: str
    patch: pytest.MonkeyPatch
    closing: contextlib.ExitStack
    request: dict[str, Any] = field(default_factory=lambda: {"only": ("all",)})

    def setenv(self, name: str, value: str) -> None:
        self.patch.setenv(name, value)

    def asked(self) -> Request:
        return Request(self.root, "csm-tiny", **self.request)

    def examine(self, smoke: bool = False) -> DoctorReport:
        return doctor.examine(self.asked(), smoke)

    def owner(self, **access: Any) -> None:
        """Lets the Hub know the token, and what it opens."""
        self.hub.add_token(TOKEN, **access)
        self.setenv("HF_TOKEN", TOKEN)

    def give_parts(self) -> None:
        shutil.copytree(REPOSITORY / "chunks" / "csm-tiny", self.root / "chunks" / "csm-tiny")

    def mirror(self, *names: str) -> str:
        """The URL of a static server that has these files."""
        folder = self.root / "mirror"
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content(name))
        url = self.closing.enter_context(serving(folder, ranges=True)).url
        self.request |= {"source": "mirror", "urls": (url,)}
        return url


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A fresh bench, with a token that the Hub knows and lets in; no command waits long."""
    for name in (*VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    be_hasty(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "manifests").mkdir()
    with HubServer() as hub, contextlib.ExitStack() as closing:
        commit = hub.add_repo(REPO, {name: content(name) for name in FILES}, gated=True)
        write_manifest(tmp_path, commit)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield Bench(tmp_path, hub, commit, monkeypatch, closing)


def checks(diagnosis: DoctorReport) -> dict[str, CheckResult]:
    return {check.name: check for check in diagnosis.checks}


def code(diagnosis: DoctorReport) -> int:
    return diagnosis.error.exit_code if diagnosis.error else 0


def code_of_weights(bench: Bench) -> int:
    """What `inv weights --no-smoke` ends with."""
    try:
        error = apply.weights(bench.asked(), smoke=False).error
    except CsmWeightsError as caught:
        error = caught
    return error.exit_code if error else 0


def said(diagnosis: DoctorReport) -> str:
    told = [as_text.render(diagnosis), *map(blocks.error, filter(None, [diagnosis.error]))]
    return " ".join("\n".join(told).split())


# ---- what can stand in the way


def proxy(bench: Bench, status: int) -> None:
    """All HTTPS goes through a proxy that refuses with that status."""
    address = bench.closing.enter_context(refusing_proxy(status))
    bench.setenv("HTTPS_PROXY", f"http://me:S3cret@{address}")
    bench.setenv("HF_ENDPOINT", "https://hub.invalid")


def self_signed(bench: Bench) -> None:
    """The Hub shows a certificate that it has made itself."""
    front = tls_front(bench.hub.endpoint, *certificate(bench.root / "tls"))
    bench.setenv("HF_ENDPOINT", bench.closing.enter_context(front))


def nobody(bench: Bench) -> None:
    """No one listens at the endpoint."""
    bench.setenv("HF_ENDPOINT", f"http://{closed_port()}")


def another_file(bench: Bench) -> None:
    write_manifest(bench.root, bench.hub.push(REPO, {"ckpt.pt": None}))


def mirror_of_parts(bench: Bench, *lacking: str) -> None:
    """A mirror has the parts of csm-tiny, but not those."""
    bench.mirror()
    shutil.copytree(REPOSITORY / "chunks", bench.root / "mirror" / "chunks")
    for name in lacking:
        next((bench.root / "mirror").rglob(name)).unlink()


def refusing_mirror(bench: Bench) -> None:
    bench.request |= {"source": "mirror", "urls": (bench.hub.endpoint,)}
    bench.hub.fault("status", host="hub", code=403)


@dataclass(frozen=True)
class Obstacle:
    """One thing that can stand in the way: the kind of the finding, its row, the exit code.

    `helps` is in what the finding advises.
    """

    kind: Kind
    row: str
    code: int
    helps: str
    prepare: Callable[[Bench], Any]
    token: str | None = TOKEN
    access: dict[str, Any] = field(default_factory=dict)
    source: str = "auto"


def _nothing(_: Bench) -> None:
    """The bench as it is."""


OBSTACLES = {
    "no token": Obstacle(
        Kind.NO_TOKEN, "token", 5, "hf auth login", _nothing, token=None, source="hf"
    ),
    "no token for a repository that turns out to be gated": Obstacle(
        Kind.NO_TOKEN,
        "token",
        5,
        "hf auth login",
        lambda b: write_manifest(b.root, b.commit, gated=False),
        token=None,
    ),
    "unknown token": Obstacle(
        Kind.UNKNOWN_TOKEN, "token", 5, "/settings/tokens", _nothing, token="hf_Unbekannt"
    ),
    "terms": Obstacle(
        Kind.TERMS, "access", 5, "accept them at http://", _nothing, access={"access": "none"}
    ),
    "pending": Obstacle(
        Kind.PENDING, "access", 5, "its authors decide", _nothing, access={"access": "pending"}
    ),
    "rejected": Obstacle(
        Kind.REJECTED, "access", 5, f"/{REPO}", _nothing, access={"access": "rejected"}
    ),
    "scope": Obstacle(
        Kind.SCOPE, "token", 5, "/settings/tokens", _nothing, access={"can_read_gated": False}
    ),
    "no such repository": Obstacle(
        Kind.NOT_THERE, "access", 3, "check the name", lambda b: b.hub.fault(
            "status", "*/resolve/*", code=404, headers={"X-Error-Code": "RepoNotFound"}
        )
    ),
    "no such revision": Obstacle(
        Kind.NOT_THERE, "access", 3, "/tree/main", lambda b: write_manifest(b.root, "a" * 40)
    ),
    "no such file": Obstacle(Kind.NOT_THERE, "access", 3, "/tree/main", another_file),
    "rate limited": Obstacle(
        Kind.RATE_LIMITED, "access", 6, "try again in 400 s", lambda b: b.hub.fault(
            "status", host="hub", code=429, headers={"Retry-After": "400"}
        )
    ),
    "server trouble": Obstacle(
        Kind.SERVER_TROUBLE, "access", 6, "try again later", lambda b: b.hub.fault(
            "status", host="hub", code=503
        )
    ),
    "storage trouble": Obstacle(
        Kind.SERVER_TROUBLE, "access", 6, "try again later", lambda b: b.hub.fault(
            "status", host="storage", code=403
        )
    ),
    "another file": Obstacle(
        Kind.DIFFERENT,
        "access",
        4,
        "inv lock",
        lambda b: b.hub.fault("etag", value=f'"{"0" * 64}"'),
    ),
    "no network": Obstacle(Kind.NO_NETWORK, "hosts", 6, "check the network", nobody),
    "offline": Obstacle(
        Kind.OFFLINE, "access", 3, "unset", lambda b: b.setenv("HF_HUB_OFFLINE", "1"), source="hf"
    ),
    "proxy wants credentials": Obstacle(
        Kind.PROXY, "proxy", 6, "HTTPS_PROXY", lambda b: proxy(b, 407)
    ),
    "proxy refuses": Obstacle(Kind.PROXY, "proxy", 6, "HTTPS_PROXY", lambda b: proxy(b, 403)),
    "certificate": Obstacle(Kind.CERTIFICATE, "hosts", 6, "REQUESTS_CA_BUNDLE", self_signed),
    "mirror without the file": Obstacle(
        Kind.NOT_THERE, "mirrors", 3, "with --url", lambda b: b.mirror("model.safetensors")
    ),
    "mirror without one of the parts": Obstacle(
        Kind.NOT_THERE, "mirrors", 3, "with --url", lambda b: mirror_of_parts(b, "*.pt.part-ac")
    ),
    "mirror that refuses": Obstacle(
        Kind.FORBIDDEN, "mirrors", 5, "CSM_MIRROR_HEADERS", refusing_mirror
    ),
}  # fmt: skip


def meet(bench: Bench, obstacle: Obstacle) -> None:
    """Put an obstacle up."""
    bench.request |= {"source": obstacle.source}
    if obstacle.token:
        bench.owner(**obstacle.access)
        bench.setenv("HF_TOKEN", obstacle.token)
    obstacle.prepare(bench)


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
def test_every_obstacle_is_reported_by_its_name(
    bench: Bench, obstacle: Obstacle, capfd: pytest.CaptureFixture[str]
) -> None:
    """A finding of its kind with what helps, in its row, its exit code, and no secret anywhere."""
    meet(bench, obstacle)
    diagnosis = bench.examine()
    assert diagnosis.error is not None
    assert [f.kind for f in diagnosis.error.findings] == [obstacle.kind]
    assert obstacle.helps in diagnosis.error.findings[0].help
    row = checks(diagnosis)[obstacle.row]
    assert (code(diagnosis), row.verdict) == (obstacle.code, Verdict.NOT_OK)
    assert diagnosis.error.findings[0] in row.findings
    texts = [as_text.render(diagnosis), as_json.render(diagnosis)]
    texts += [str(diagnosis.error), repr(diagnosis), *capfd.readouterr()]
    for secret in (TOKEN, "hf_Unbekannt", "S3cret"):
        assert secret not in "\n".join(texts)


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
def test_weights_ends_with_the_code_of_the_doctor(bench: Bench, obstacle: Obstacle) -> None:
    """What the doctor says of an obstacle is what `inv weights` then meets."""
    meet(bench, obstacle)
    assert code(bench.examine()) == code_of_weights(bench)


# ---- what does not


def with_parts(bench: Bench) -> None:
    bench.give_parts()


def with_a_token(bench: Bench) -> None:
    bench.owner()


def with_a_mirror(bench: Bench) -> None:
    bench.mirror(*FILES)


def with_a_mirror_of_parts(bench: Bench) -> None:
    mirror_of_parts(bench)


def with_a_mirror_of_the_part_that_is_missing(bench: Bench) -> None:
    bench.give_parts()
    missing = next((bench.root / "chunks").rglob("ckpt.pt.part-ac"))
    bench.mirror()
    target = bench.root / "mirror" / missing.relative_to(bench.root)
    target.parent.mkdir(parents=True)
    missing.rename(target)
    bench.request |= {"source": "auto"}


def with_two_mirrors_of_half_the_parts_each(bench: Bench) -> None:
    mirror_of_parts(bench, "ckpt.pt.part-aa")
    second = bench.root / "second"
    shutil.copytree(REPOSITORY / "chunks", second / "chunks")
    for part in second.rglob("*.part-a[cdef]"):
        part.unlink()
    url = bench.closing.enter_context(serving(second, ranges=True)).url
    bench.request |= {"urls": (*bench.request["urls"], url), "only": ("ckpt",)}


def with_one_part_missing(bench: Bench) -> None:
    bench.owner()
    bench.give_parts()
    next((bench.root / "chunks").rglob("ckpt.pt.part-ac")).unlink()


def with_a_cache(bench: Bench) -> None:
    home = hub_cache.repository(bench.root / "home" / "hub", REPO)
    for name in FILES:
        path = home / "snapshots" / bench.commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))


def with_everything_in_place(bench: Bench) -> None:
    bench.give_parts()
    apply.weights(bench.asked(), smoke=False)
    shutil.rmtree(bench.root / "chunks")


def with_a_server_that_comes_round(bench: Bench) -> None:
    be_hasty(bench.patch, patience=60)
    bench.owner()
    bench.hub.fault("status", host="hub", code=503, times=1)
    bench.hub.fault("close", host="storage", times=1)


def with_an_account_that_is_not_reported(bench: Bench) -> None:
    bench.owner()
    bench.hub.fault("status", "/api/whoami-v2", code=429)


def with_one_mirror_of_two_without_the_files(bench: Bench) -> None:
    bench.owner()
    bench.mirror("ckpt.pt")
    bench.request |= {"source": "auto"}


GOOD = [
    with_parts,
    with_a_token,
    with_a_mirror,
    with_a_mirror_of_parts,
    with_a_mirror_of_the_part_that_is_missing,
    with_two_mirrors_of_half_the_parts_each,
    with_one_part_missing,
    with_a_cache,
    with_everything_in_place,
    with_a_server_that_comes_round,
    with_an_account_that_is_not_reported,
    with_one_mirror_of_two_without_the_files,
]


@pytest.mark.parametrize("prepare", GOOD, ids=[prepare.__name__ for prepare in GOOD])
def test_the_doctor_promises_what_weights_keeps(
    bench: Bench, prepare: Callable[[Bench], None]
) -> None:
    """With no error from the doctor `inv weights` succeeds, and only then does it end with 0."""
    prepare(bench)
    diagnosis = bench.examine()
    assert (code(diagnosis), code_of_weights(bench)) == (0, 0)
    assert Verdict.NOT_OK not in {check.verdict for check in diagnosis.checks}
    promise = f"OK: inv weights {' '.join(bench.asked().options)} --no-smoke could succeed"
    assert said(diagnosis).endswith(promise)


ASKING_NO_ONE = [with_parts, with_a_cache, with_everything_in_place]


@pytest.mark.parametrize("prepare", ASKING_NO_ONE, ids=[p.__name__ for p in ASKING_NO_ONE])
def test_no_server_is_asked_for_what_is_here(
    bench: Bench, prepare: Callable[[Bench], None]
) -> None:
    """Where nothing is to come from the Hub it gets no request, and having no token is a note."""
    prepare(bench)
    found = checks(bench.examine())
    assert bench.hub.log == []
    assert (found["token"].verdict, found["access"].verdict) == (Verdict.NOTE, Verdict.NOT_ASKED)


def test_of_each_file_one_byte_comes_and_nothing_is_written(bench: Bench) -> None:
    """Two large files are asked for one byte each; the disk stays as it is."""
    bench.owner()
    before = sorted(bench.root.rglob("*"))
    assert code(bench.examine()) == 0
    assert bench.hub.bytes_sent() == 2
    assert [path for path in sorted(bench.root.rglob("*")) if path not in before] == []


def test_the_hub_is_asked_for_nothing_else(bench: Bench) -> None:
    """Besides the files only for whose the token is: no telemetry, no list of agents."""
    bench.owner()
    bench.examine()
    others = [r.path for r in bench.hub.requests("hub") if "/resolve/" not in r.path]
    assert others == ["/api/whoami-v2"]


def test_files_that_the_hub_gives_are_counted_and_what_is_wrong_is_named(bench: Bench) -> None:
    """The row has the repository and twelve digits of the commit, then kinds of findings."""
    bench.owner()
    found = checks(bench.examine())["access"].found
    assert found == f"2 of 2 files of {REPO} at {bench.commit[:12]}"
    another_file(bench)
    found = checks(bench.examine())["access"].found
    commit = parse.load(bench.root / "manifests" / "csm-tiny.toml").revision or ""
    assert found == f"1 of 2 files of {REPO} at {commit[:12]}: not found"


def test_the_token_goes_to_the_hub_only(bench: Bench) -> None:
    """The storage host and a mirror see nothing of it."""
    bench.owner()
    bench.request |= {"urls": (f"{bench.hub.storage}/none",)}
    diagnosis = bench.examine()
    assert (code(diagnosis), checks(diagnosis)["mirrors"].verdict) == (0, Verdict.NOTE)
    assert len(bench.hub.requests("storage")) == 4
    assert not any(TOKEN in str(r.headers) for r in bench.hub.requests("storage"))


# ---- what the rows say


def test_the_owner_of_the_token_is_named(bench: Bench) -> None:
    """The token's row has the variable, the account and the kind of the token."""
    bench.owner(user="bob")
    assert checks(bench.examine())["token"].found == "HF_TOKEN, of bob, fine-grained"


def test_a_token_in_a_file_is_found(bench: Bench) -> None:
    """Without a variable, the row names the file that holds the token."""
    path = bench.root / "home" / "token"
    path.parent.mkdir()
    path.write_text(TOKEN)
    bench.give_parts()
    assert checks(bench.examine())["token"].found == f"{path}; not used"


def test_a_slow_answer_about_the_account_is_not_waited_for(bench: Bench) -> None:
    """Where the answer about the account does not end, the rest is reported all the same."""
    bench.owner()
    be_hasty(bench.patch, read=1)
    fault = bench.hub.fault("stall", "/api/whoami-v2", at=0, seconds=60)
    start = time.monotonic()
    diagnosis = bench.examine()
    assert time.monotonic() - start < 20
    fault.clear()
    assert checks(diagnosis)["token"].found == "HF_TOKEN, owner unknown"
    assert code(diagnosis) == 0


def test_a_token_that_the_hub_repeats_is_not_shown(bench: Bench) -> None:
    """A server that quotes the token in its refusal, or as the account's name, is masked."""
    bench.owner(user=f"{TOKEN}\x1b[31m", access="none")
    headers = {"X-Error-Message": f"no access with {TOKEN}", "X-Error-Code": "GatedRepo"}
    bench.hub.fault("status", "*/resolve/*", code=403, headers=headers)
    text = said(bench.examine())
    assert "no access with ***" in text
    assert TOKEN not in text and "\x1b" not in text


def test_a_token_beyond_ascii_is_refused_before_it_is_sent(bench: Bench) -> None:
    """A token that was pasted with an ellipsis is no crash, and opens no connection."""
    bench.setenv("HF_TOKEN", "hf_Geheim\N{HORIZONTAL ELLIPSIS}")
    diagnosis = bench.examine()
    assert (code(diagnosis), code_of_weights(bench), bench.hub.log) == (5, 5, [])
    assert diagnosis.error is not None
    assert diagnosis.error.findings[0].kind is Kind.UNKNOWN_TOKEN
    assert "hf_Geheim" not in said(diagnosis)


def test_both_hosts_are_named_and_where_the_token_goes(bench: Bench) -> None:
    """The endpoint comes first, then the storage host; a token in the clear is pointed out."""
    bench.owner()
    row = checks(bench.examine())["hosts"]
    hub, storage = (url.removeprefix("http://") for url in (bench.hub.endpoint, bench.hub.storage))
    told = f"HF_ENDPOINT: the token goes in the clear to {hub}"
    assert (row.verdict, row.found) == (Verdict.NOTE, f"{hub}, {storage}; {told}")


def test_parts_make_a_missing_token_a_note(bench: Bench) -> None:
    """The same missing token stands in the way without parts, and not with them."""
    assert checks(bench.examine())["token"].verdict is Verdict.NOT_OK
    bench.give_parts()
    assert checks(bench.examine())["token"].verdict is Verdict.NOTE


def test_parts_are_counted_by_their_size(bench: Bench) -> None:
    """A part that is missing and one of the wrong size are told apart."""
    bench.give_parts()
    first, second = sorted((bench.root / "chunks").rglob("ckpt.pt.part-*"))[:2]
    first.unlink()
    second.write_bytes(b"short")
    row = checks(bench.examine())["chunk files"]
    assert row.verdict is Verdict.NOT_OK
    assert row.found == "model.safetensors 6 of 6; ckpt.pt 4 of 6 (wrong size)"


def test_the_cache_row_names_what_it_holds(bench: Bench) -> None:
    """The row of the cache has its folder, and the files that are in it."""
    with_a_cache(bench)
    row = checks(bench.examine())["Hub cache"]
    assert row.found == f"{', '.join(FILES)} in {bench.root / 'home' / 'hub'}"


PROXIES = {
    "http://me:S3cret@127.0.0.1:9": "by http://***@127.0.0.1:9",
    "http://127.0.0.1:9": "by http://127.0.0.1:9",
    "me:S3/cret@127.0.0.1:9": "by ***@127.0.0.1:9",
    "http://me:S3@cret@127.0.0.1:9": "by http://***@127.0.0.1:9",
}


@pytest.mark.parametrize(("proxy", "shown"), PROXIES.items())
def test_a_proxy_is_shown_without_its_password(bench: Bench, proxy: str, shown: str) -> None:
    """Whatever the form of its URL."""
    bench.owner()
    bench.setenv("HTTP_PROXY", proxy)
    row = checks(bench.examine())["proxy"]
    assert row.found == f"{bench.hub.endpoint.removeprefix('http://')} {shown}"


def test_a_host_that_needs_no_proxy_is_asked_directly(bench: Bench) -> None:
    """NO_PROXY is honoured, for what is asked and for what is shown."""
    bench.owner()
    bench.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    bench.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
    diagnosis = bench.examine()
    assert (code(diagnosis), checks(diagnosis)["proxy"].found) == (0, "none")


def test_too_little_disk_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says what is needed and what is free, and the code is that of a full disk."""
    bench.give_parts()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    diagnosis = bench.examine()
    row = checks(diagnosis)["disk"]
    assert (code(diagnosis), row.verdict) == (7, Verdict.NOT_OK)
    assert "2.3 MiB to write" in row.found and "1000 B free" in row.found
    plan = checks(diagnosis)["plan"]
    assert (plan.verdict, plan.findings) == (Verdict.OK, ())


def test_a_folder_that_takes_no_files_is_reported(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination without permission to write ends with the code of a disk that takes none."""
    bench.give_parts()
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode, **_: mode == os.R_OK and access(p, mode))
    diagnosis = bench.examine()
    assert diagnosis.error is not None
    assert {f.kind for f in diagnosis.error.findings} == {Kind.NOT_WRITABLE}
    assert code(diagnosis) == 7


def test_a_read_only_file_system_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can write, the finding says so, and does not speak of permissions."""
    bench.give_parts()
    real = os.statvfs(bench.root)
    fields = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    found = SimpleNamespace(**fields | {"f_flag": os.ST_RDONLY})
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    diagnosis = bench.examine()
    assert diagnosis.error is not None
    assert code(diagnosis) == 7
    assert {f.found for f in diagnosis.error.findings} == {"a read-only file system"}
    assert "permission" not in said(diagnosis)


def test_without_torch_only_the_smoke_test_is_in_danger(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No torch ends with 77 and says what does without it; --no-smoke asks for none."""
    bench.give_parts()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    diagnosis = bench.examine(smoke=True)
    assert diagnosis.error is not None
    assert code(diagnosis) == 77
    assert "--no-smoke" in diagnosis.error.findings[0].help
    assert code(bench.examine(smoke=False)) == 0
    shutil.rmtree(bench.root / "chunks")
    assert code(bench.examine(smoke=True)) == 3


def test_torch_is_not_asked_for_without_weights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no weights are chosen there is no smoke test, as in weights."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    bench.request |= {"only": ("config",)}
    assert code(bench.examine(smoke=True)) == 0


@pytest.mark.parametrize(
    ("output", "hidden", "found"),
    [
        ("H100, 80000 MiB, 81559 MiB", False, "H100, 80000 MiB of 81559 MiB free"),
        ("No devices were found", False, "none: the smoke test runs on the CPU"),
        ("An H100, 80, 1 MiB, 2 MiB", False, "none: the smoke test runs on the CPU"),
        ("H100, 80000 MiB, 81559 MiB", True, "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_the_gpu_is_what_nvidia_smi_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, output: str, hidden: bool, found: str
) -> None:
    """Its name and memory, unless it is hidden; having none is a note."""
    program = bench.root / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{output}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(bench.root), prepend=":")
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bench.give_parts()
    diagnosis = bench.examine(smoke=True)
    assert found in checks(diagnosis)["GPU"].found
    assert code(diagnosis) == 0


def rows(diagnosis: DoctorReport) -> dict[str, tuple[str, str]]:
    return {check.name: (str(check.verdict), check.found) for check in diagnosis.checks}


def test_each_row_is_told_where_no_server_is_asked(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is here, what is not asked, and what would be written, with the free room."""
    free = shutil.disk_usage(toy.root)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    before = rows(doctor.examine(toy.request("a.bin", "b.bin"), smoke=True))
    size = sum(toy.artifact(name).size for name in ("a.bin", "b.bin"))
    written = f"{size / 1024:.1f} KiB"
    told = f"{written} to write in {toy.root}/output/toy, 1.0 GiB free"
    assert before.pop("disk") == ("OK", told)
    assert before == {
        "plan": ("OK", f"2 of 2 files are available: {written} to read, {written} to write"),
        "chunk files": ("OK", "a.bin 5 of 5; b.bin 3 of 3"),
        **dict.fromkeys(
            ("Hub cache", "token", "access"),
            ("not asked", "the manifest names no repository of the Hub"),
        ),
        "mirrors": ("not asked", "not used"),
        **dict.fromkeys(("hosts", "proxy"), ("not asked", "nothing is downloaded")),
        **dict.fromkeys(("torch", "GPU"), ("not asked", "no smoke test is to run")),
    }
    apply.weights(toy.request(), smoke=False)
    after = rows(doctor.examine(toy.request(), smoke=False))
    assert after["plan"] == ("OK", "nothing to do: 3 files installed and verified")
    assert after["disk"] == ("OK", "nothing to write")
    only = rows(doctor.examine(toy.request("note.txt"), smoke=False))
    found = "no file of this model is split into chunk files"
    assert only["chunk files"] == ("not asked", found)


def test_sources_that_are_not_asked_for_are_not_used(bench: Bench) -> None:
    """A mirror alone needs neither chunk files, nor a cache, nor a token, which stays here."""
    bench.owner()
    bench.mirror(*FILES)
    found = rows(bench.examine())
    unused = ("not asked", "not used with this --source")
    assert found["chunk files"] == found["Hub cache"] == unused
    assert found["token"] == ("not asked", "HF_TOKEN; not used")
    assert found["access"] == ("not asked", "not used")
    url = bench.request["urls"][0]
    assert found["mirrors"] == ("OK", f"2 of 2 files from {url}")
    assert found["hosts"] == ("OK", url.removeprefix("http://").partition("/")[0])
    assert found["proxy"] == ("OK", "none")
    assert found["torch"] == found["GPU"] == ("not asked", "no smoke test is to run")


TOKENS = {
    "no token": "none: no token",
    "unknown token": "HF_TOKEN: invalid token",
    "scope": "HF_TOKEN: token lacks the scope",
    "terms": "HF_TOKEN, owner unknown",
    "certificate": "HF_TOKEN, owner unknown",
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_row_of_the_token_says_where_it_is_from(bench: Bench, name: str) -> None:
    """With what is wrong with it, or whose it is; no other finding is the token's."""
    meet(bench, OBSTACLES[name])
    diagnosis = bench.examine()
    found = rows(diagnosis)["token"][1]
    assert found == TOKENS[name]
    if name == "certificate":
        host = os.environ["HF_ENDPOINT"].removeprefix("https://")
        told = f"{host}; HF_ENDPOINT: the token goes to {host}"
        assert rows(diagnosis)["hosts"] == ("NOT OK", told)


def test_a_public_repository_needs_no_token(bench: Bench) -> None:
    """Having none is a note then, and as well where no server is asked."""
    commit = bench.hub.add_repo("org/open", {name: content(name) for name in FILES}, gated=False)
    write_manifest(bench.root, commit, gated=False)
    path = bench.root / "manifests" / "csm-tiny.toml"
    path.write_text(path.read_text().replace(REPO, "org/open"))
    assert rows(bench.examine())["token"] == ("note", "none, and none is needed")
    bench.give_parts()
    assert rows(bench.examine())["token"] == ("note", "none; not used")


@pytest.mark.parametrize("code", [403, 429])
def test_an_account_that_is_not_reported_is_no_finding(bench: Bench, code: int) -> None:
    """The row of the Hub is about its files."""
    bench.owner()
    bench.hub.fault("status", "/api/whoami-v2", code=code)
    found = rows(bench.examine())
    assert found["access"] == ("OK", f"2 of 2 files of {REPO} at {bench.commit[:12]}")
    assert found["token"] == ("OK", "HF_TOKEN, owner unknown")


def test_offline_each_server_has_its_row(bench: Bench) -> None:
    """A mirror that may not be asked is not the Hub, and the other way round."""
    bench.setenv("HF_HUB_OFFLINE", "1")
    bench.request |= {"source": "mirror", "urls": ("https://mirror.example",)}
    found = rows(bench.examine())
    assert found["mirrors"] == ("NOT OK", "offline mode")
    assert found["access"] == ("not asked", "not used")
    bench.request = {"source": "hf", "only": ("all",)}
    found = rows(bench.examine())
    assert found["access"] == ("NOT OK", "offline mode")
    assert found["mirrors"] == ("not asked", "not used")


def test_the_promise_has_the_options_that_were_given(toy: Toy) -> None:
    """Of those that change what is done."""
    for consume, words in ((False, ""), (True, " --consume")):
        for smoke in (True, False):
            report = doctor.examine(replace(toy.request("a.bin"), consume=consume), smoke)
            command = f"inv weights --model toy --only a.bin{words}{'' if smoke else ' --no-smoke'}"
            assert report.promise == f"{command} could succeed"
            assert report.error is None


def test_each_kind_of_wrong_chunk_file_is_named_once(bench: Bench) -> None:
    """Those that are missing are counted; where another source has them they are a note."""
    bench.owner()
    bench.give_parts()
    parts = sorted((bench.root / "chunks").rglob("ckpt.pt.part-*"))
    parts[0].unlink()
    parts[1].write_text("Access to model x is restricted. Please log in.")
    for part in parts[2:4]:
        part.write_bytes(b"short")
    verdict, found = rows(bench.examine())["chunk files"]
    assert verdict == "note"
    assert found.endswith("; ckpt.pt 2 of 6 (access page, wrong size)")


# ---- what speaking offline takes


def test_each_thing_that_speaking_takes_is_named_with_its_command(bench: Bench) -> None:
    """One command brings weights, tokenizer and codec; what other programs ask for is noted."""
    diagnosis = doctor.closure(bench.asked())
    bad = {c.name: c.findings[0].help for c in diagnosis.checks if c.verdict is Verdict.NOT_OK}
    command = "inv weights --with speak --model csm-tiny --only all"
    assert (code(diagnosis), bad) == (3, dict.fromkeys(("weights", "tokenizer", "codec"), command))
    notes = {c.name: c.found for c in diagnosis.checks if c.verdict is Verdict.NOTE}
    assert "accept the terms at" in notes["meta-llama/Llama-3.2-1B"]
    moshi = notes["kyutai/moshiko-pytorch-bf16"]
    assert "; hf download kyutai/moshiko-pytorch-bf16" in moshi and "terms" not in moshi
    assert all(found.startswith("not here: ") for found in notes.values())
    assert rows(diagnosis)["weights"] == ("NOT OK", "not here")
    assert set(notes) == {asset.repo for asset in offline_assets.ASSETS}


def test_a_missing_package_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speaking takes packages as well: the command installs them."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n != "tokenizers" and real(n))
    found = checks(doctor.closure(bench.asked()))
    assert found["torch"].verdict is Verdict.OK
    assert found["tokenizers"].findings[0].help.endswith("'.[speak]'")


def test_files_in_the_cache_are_enough(bench: Bench) -> None:
    """Tokenizer and codec of the Hub's cache count, and weights in chunk files."""
    bench.give_parts()
    for repo, names in (("sesame/csm-1b", ["tokenizer.json"]), ("kyutai/mimi", FILES[::2])):
        snapshot = (
            hub_cache.repository(bench.root / "home" / "hub", repo) / "snapshots" / ("a" * 40)
        )
        snapshot.mkdir(parents=True)
        for name in names:
            (snapshot / name).touch()
    diagnosis = doctor.closure(bench.asked())
    assert code(diagnosis) == 0
    first = min((bench.root / "chunks").rglob("model.safetensors.part-*"))
    assert rows(diagnosis)["weights"] == ("OK", str(first))
    assert rows(diagnosis)["torch"] == ("OK", "installed")
    assert said(diagnosis).endswith("OK: csm-tiny can speak with HF_HUB_OFFLINE=1")

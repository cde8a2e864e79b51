"""Manifests of any repository as the Hub reports it, and the pieces that verified files add."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csm_weights.commands import lock, verify
from csm_weights.errors import CsmWeightsError, Kind, NetworkFailed, UsageError, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.hashing import blob_id
from csm_weights.manifest.parse import load, parse
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.pin import (
    MAX_CHUNK_FILES,
    MAX_PIECES,
    is_same,
    lock_size,
    recomputed,
    tiling,
    with_pieces,
    with_reported,
)
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.store.manifest_file import write_manifest
from csm_weights.store.receipts import dump_receipt, load_receipt, receipt_path
from csm_weights.transfer import hub_metadata
from csm_weights.transfer.hub_metadata import File, artifact_of, choose
from tests.support.hub import HubServer
from tests.support.network import be_hasty
from tests.support.toy import flip

REPO = "Acme/Any_Model.v2"
NAME = "any_model.v2"
TOKEN = "hf_goodToken"
PAGE = "https://hub/Acme/Any_Model.v2"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def safetensors(size: int, seed: int) -> bytes:
    """A file in the format with one tensor of `size` random bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    head = json.dumps({"weight": tensor}).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + random.Random(seed).randbytes(size)


FILES = {
    ONE: safetensors(300_000, 1),
    TWO: safetensors(150_000, 2),
    "config.json": b'{"architectures": ["Other"]}\n',
    "model.safetensors.index.json": b'{"weight_map": {}}\n',
    "original/tokenizer/vocab.txt": b"a\nb\n",
    "original/params.bin": b"in LFS, whatever its size",
    "empty.txt": b"",
}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub that lists three entries a page and knows one token."""
    with HubServer() as server:
        server.page_size = 3
        server.add_token(TOKEN)
        yield server


@pytest.fixture
def root(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, in an environment of that Hub without a token; nobody waits."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_TOKEN_PATH")
    for name in (*names, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    be_hasty(monkeypatch)
    folder = tmp_path / "root"
    (folder / "manifests").mkdir(parents=True)
    return folder


def lock_repo(root: Path, revision: str = "", only: str = "", dry: bool = False) -> str:
    return str(lock.lock_repo(root, REPO, revision, only, "", dry))


def manifest(root: Path) -> Manifest:
    return load(root / "manifests" / f"{NAME}.toml")


def entry(root: Path, path: str) -> Artifact:
    return next(a for a in manifest(root).artifacts if a.path == path)


def fetch(root: Path) -> None:
    assert apply.weights(Request(root, NAME), smoke=False).error is None


def kinds(error: CsmWeightsError) -> list[Kind]:
    return [finding.kind for finding in error.findings]


# ---- what the manifest says


def test_the_manifest_says_what_the_hub_tells(hub: HubServer, root: Path) -> None:
    """Commit, sizes, LFS digests and git ids, marked H; an empty file by its text."""
    commit = hub.add_repo(REPO, FILES)
    assert f"7 files, {sum(map(len, FILES.values())):,} bytes, commit {commit}" in lock_repo(root)
    written = manifest(root)
    assert (written.name, written.repo, written.revision) == (NAME, REPO, commit)
    assert (written.staging, written.destination) == (f"output/{NAME}", f"models/{NAME}")
    assert (written.gated, written.default) == (False, ("all",))
    assert [a.path for a in written.artifacts] == sorted(FILES)
    for artifact in written.artifacts:
        data = FILES[artifact.path]
        is_lfs = artifact.path.endswith((".safetensors", ".bin"))
        digest = sha256(data) if is_lfs or not data else None
        blob = blob_id(sha256(data), len(data)) if is_lfs else None
        git = None if is_lfs else git_sha1(data)
        figures = (artifact.size, artifact.sha256, artifact.blob_id, artifact.git_sha1)
        assert figures == (len(data), digest, blob, git)
        assert set(artifact.evidence.values()) == {"H"}
        assert artifact.format == ("safetensors" if "-of-" in artifact.path else "opaque")
        assert artifact.text == (None if data else "")


def test_a_public_repository_is_fetched_without_an_account(hub: HubServer, root: Path) -> None:
    """No token is asked for, and every file arrives; a second run asks nothing."""
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    fetch(root)
    assert {n: (root / "models" / NAME / n).read_bytes() for n in FILES} == FILES
    hub.clear()
    fetch(root)
    assert hub.log == []
    assert verify.verify(Request(root, NAME)).error is None


def test_a_manifest_may_lie_anywhere(hub: HubServer, root: Path) -> None:
    """--model takes a path, and the model is called like the file; or a name in manifests/."""
    hub.add_repo(REPO, FILES)
    path = root / "mine" / "own.toml"
    path.parent.mkdir()
    assert str(path) in str(lock.lock_repo(root, REPO, "", "", str(path), False))
    assert (load(path).name, load(path).staging) == ("own", "output/own")
    assert "--model short" in str(lock.lock_repo(root, REPO, "", "", "short", False))
    assert (root / "manifests" / "short.toml").is_file()
    with pytest.raises(UsageError, match=r"ends in \.toml"):
        lock.lock_repo(root, REPO, "", "", "some/folder", False)
    for name, stem in (("Own", "Own"), ("own.lock", "own.lock"), ("some/..toml", ".")):
        with pytest.raises(UsageError, match=rf"--model '{stem}': .*name"):
            lock.lock_repo(root, REPO, "", "", name, False)
    assert [path.name for path in (root / "manifests").iterdir()] == ["short.toml"]


@pytest.mark.parametrize("repo", ["gpt2", "a/b/c", "datasets/a/b", "../b", "a/b?x=1", "a--b/c"])
def test_what_is_no_repository_is_refused(hub: HubServer, root: Path, repo: str) -> None:
    """Only ORG/NAME is one; nobody is asked."""
    with pytest.raises(UsageError, match=r"--repo .*(ORG/NAME|--)"):
        lock.lock_repo(root, repo, "", "", "", False)
    assert hub.log == []


def test_a_dry_run_writes_nothing(hub: HubServer, root: Path) -> None:
    """It shows the manifest that would be written, and later the difference."""
    hub.add_repo(REPO, FILES)
    shown = lock_repo(root, dry=True)
    assert list((root / "manifests").iterdir()) == []
    lock_repo(root)
    assert f"{shown}\n" == render(manifest(root))
    commit = hub.push(REPO, {"new.txt": b"new"})
    assert f'+revision = "{commit}"' in lock_repo(root, dry=True)
    assert manifest(root).revision != commit


@pytest.mark.parametrize(
    ("only", "kept"),
    [
        ("*.safetensors", [ONE, TWO]),
        ("*.txt, config.json", ["config.json", "empty.txt", "original/tokenizer/vocab.txt"]),
        ("original/", ["original/params.bin", "original/tokenizer/vocab.txt"]),
        ("model-0000[2-9]*", [TWO]),
    ],
)
def test_globs_choose_files(hub: HubServer, root: Path, only: str, kept: list[str]) -> None:
    """Only files that match one of the globs are in the manifest; * crosses folders."""
    hub.add_repo(REPO, FILES)
    lock_repo(root, only=only)
    assert [a.path for a in manifest(root).artifacts] == kept


def test_globs_that_match_nothing_are_refused(hub: HubServer, root: Path) -> None:
    """A glob without a file is a usage error, and no manifest is written."""
    hub.add_repo(REPO, FILES)
    with pytest.raises(UsageError, match=r"no file like \*\.gguf among the 7"):
        lock_repo(root, only="*.gguf")
    assert list((root / "manifests").iterdir()) == []


def test_a_branch_a_tag_or_a_commit_is_pinned_as_its_commit(hub: HubServer, root: Path) -> None:
    """Whatever names the revision, the manifest has the commit, and its files."""
    first = hub.add_repo(REPO, {"a.txt": b"first"})
    second = hub.push(REPO, {"a.txt": b"second one"})
    third = hub.push(REPO, {"a.txt": b"on a branch"}, branch="feature/x")
    hub.tag(REPO, "v1.0", first)
    for revision, commit, size in (
        ("v1.0", first, 5),
        ("", second, 10),
        ("feature/x", third, 11),
        (first, first, 5),
    ):
        lock_repo(root, revision)
        assert (manifest(root).revision, entry(root, "a.txt").size) == (commit, size)


# ---- refusals


def no_repo(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    """The Hub does not say whether a repository exists to those without a token."""


def no_repo_with_token(_: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", TOKEN)


def private(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, FILES, private=True)


def bad_token(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, FILES)
    patch.setenv("HF_TOKEN", "hf_revoked")


def terms(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", TOKEN)
    hub.add_repo(REPO, FILES, gated=True)
    told = {"X-Error-Code": "GatedRepo", "X-Error-Message": "not in the authorized list"}
    hub.fault("status", match="*/tree/*", code=403, headers=told)


def no_scope(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", TOKEN)
    hub.add_repo(REPO, FILES)
    hub.fault("status", code=403, headers={"X-Error-Message": "Forbidden"})


def disabled(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, FILES)
    told = {"X-Error-Message": "Access to this resource is disabled."}
    hub.fault("status", code=403, headers=told)


def too_often(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("status", code=429)


def trouble(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("status", code=503)


def hangs_up(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("close")


def nobody(_: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def stalls(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    be_hasty(patch, read=0.5)
    hub.add_repo(REPO, FILES)
    hub.fault("stall", match="*/tree/*", seconds=5)


def takes_long(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub_metadata, "LISTING", 0.0)
    hub.add_repo(REPO, FILES)


def too_many(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub_metadata, "MAX_FILES", len(FILES))
    hub.add_repo(REPO, FILES | {"one/more.txt": b"one\n"})


def portal(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("html")


def other_json(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, FILES)
    hub.fault("status", match="*/tree/*", code=200, body='{"error": "none"}')


def untyped_page(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("status", code=200, body="<p>Sign in</p>")


def odd_rows(rows: str) -> Any:
    def prepare(hub: HubServer, _: pytest.MonkeyPatch) -> None:
        hub.add_repo(REPO, FILES)
        hub.fault("status", match="*/tree/*", code=200, body=rows)

    return prepare


def no_json(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    hub.fault("status", code=200, body="out of order")


def no_commit(hub: HubServer, _: pytest.MonkeyPatch) -> None:
    told = json.dumps({"id": REPO, "sha": "../../main"})
    hub.fault("status", match=f"/api/models/{REPO}", code=200, body=told)


def offline(_: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("prepare", "code", "kind"),
    [
        (no_repo, 5, Kind.NO_TOKEN),
        (no_repo_with_token, 3, Kind.NOT_THERE),
        (private, 5, Kind.NO_TOKEN),
        (bad_token, 5, Kind.UNKNOWN_TOKEN),
        (terms, 5, Kind.TERMS),
        (no_scope, 5, Kind.FORBIDDEN),
        (disabled, 5, Kind.FORBIDDEN),
        (too_often, 6, Kind.RATE_LIMITED),
        (trouble, 6, Kind.SERVER_TROUBLE),
        (hangs_up, 6, Kind.NO_NETWORK),
        (nobody, 6, Kind.NO_NETWORK),
        (stalls, 6, Kind.NO_NETWORK),
        (takes_long, 6, Kind.TOO_SLOW),
        (too_many, 6, Kind.WRONG_ANSWER),
        (portal, 6, Kind.NO_NETWORK),
        (untyped_page, 6, Kind.NO_NETWORK),
        (other_json, 6, Kind.WRONG_ANSWER),
        (odd_rows('["a"]'), 6, Kind.WRONG_ANSWER),
        (odd_rows('[{"path": "a"}]'), 6, Kind.WRONG_ANSWER),
        (odd_rows('[{"path": "a", "size": "1", "oid": "0"}]'), 6, Kind.WRONG_ANSWER),
        (no_json, 6, Kind.WRONG_ANSWER),
        (no_commit, 6, Kind.WRONG_ANSWER),
        (offline, 3, Kind.OFFLINE),
    ],
)
def test_refusals_have_their_exit_codes(
    hub: HubServer,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Any,
    code: int,
    kind: Kind,
) -> None:
    """Whatever the Hub says instead, it is one finding with what helps; nothing is written."""
    prepare(hub, monkeypatch)
    with pytest.raises(CsmWeightsError) as caught:
        lock_repo(root)
    assert (caught.value.exit_code, kinds(caught.value)) == (code, [kind]), str(caught.value)
    assert list((root / "manifests").iterdir()) == []
    assert (hub.log == []) == (prepare in (offline, nobody))
    assert len(hub.requests()) <= 12


def test_as_many_files_as_there_may_be_are_listed(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit itself is not too many."""
    monkeypatch.setattr(hub_metadata, "MAX_FILES", len(FILES))
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    assert (root / "manifests").is_dir() and list((root / "manifests").iterdir()) != []


def test_a_revision_that_does_not_exist_is_missing(hub: HubServer, root: Path) -> None:
    """An unknown branch has exit code 3 and is named; what is no name is a usage error."""
    hub.add_repo(REPO, FILES)
    with pytest.raises(CsmWeightsError) as caught:
        lock_repo(root, "nightly")
    assert (caught.value.exit_code, kinds(caught.value)) == (3, [Kind.NOT_THERE])
    assert "nightly" in str(caught.value)
    with pytest.raises(UsageError):
        lock_repo(root, "../main")


def test_another_commit_than_the_one_asked_for_is_refused(hub: HubServer, root: Path) -> None:
    """A Hub that answers for another commit has its answer refused."""
    first = hub.add_repo(REPO, FILES)
    second = hub.push(REPO, {"new.txt": b"new"})
    hub.fault(
        "status",
        match=f"*/revision/{first}",
        code=200,
        body=json.dumps({"id": REPO, "sha": second}),
    )
    with pytest.raises(WrongContent, match=second):
        lock_repo(root, first)


def test_an_outage_is_outlasted_and_logged_in_one_line(
    hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two waits that the Hub asks for are waited; the third try is good."""
    hub.add_repo(REPO, FILES)
    fault = hub.fault("status", code=429, headers={"Retry-After": "1"}, times=2)
    lock_repo(root)
    assert (fault.hits, manifest(root).repo) == (2, REPO)
    logged = capsys.readouterr().err
    assert logged.count("rate limited (429 Too Many Requests); trying again in 1 s") == 1
    assert logged.count("trying again") == 1


def test_a_token_that_the_hub_repeats_is_not_shown(
    hub: HubServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is quoted of an answer, the token is not."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fault("status", code=200, body=json.dumps({"id": REPO, "sha": f"your {TOKEN}"}))
    with pytest.raises(NetworkFailed) as caught:
        lock_repo(root)
    assert TOKEN not in str(caught.value)


# ---- names and ids


def told(path: str, data: bytes = b"x", lfs: bool = False) -> File:
    """A file as an honest Hub tells it."""
    if not lfs:
        return File(path, len(data), git_sha1(data))
    return File(path, len(data), blob_id(sha256(data), len(data)), sha256(data), len(data))


@pytest.mark.parametrize("path", ["../../evil", "/etc/passwd", "a/../../b", "..", "a\\..\\b"])
def test_a_name_that_leaves_its_folder_is_an_error(hub: HubServer, root: Path, path: str) -> None:
    """Hostile names have exit code 4, are told, and no manifest is written."""
    commit = hub.add_repo(REPO, FILES)
    listed = {"type": "file", "path": path, "size": 1, "oid": git_sha1(b"x")}
    hub.fault("status", match=f"*/tree/{commit}*", code=200, body=json.dumps([listed]))
    with pytest.raises(WrongContent) as caught:
        lock_repo(root, only="*.safetensors")
    assert path in str(caught.value)
    assert list((root / "manifests").iterdir()) == []


def test_names_that_no_manifest_may_have_are_left_out(
    hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are told on stderr, one a line without control characters; the rest is written."""
    odd = ["a.lock", "b:c", "d\x1b[2J", ".git/config", "e.", "aux/f.partial"]
    hub.add_repo(REPO, dict.fromkeys([*odd, "good"], b"x"))
    lock_repo(root)
    assert [a.path for a in manifest(root).artifacts] == ["good"]
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("left out: ")) == (len(odd), len(odd))
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("paths", "kept"),
    [
        (["README.md", "readme.md", "Readme.md"], ["README.md"]),
        (["A", "a/b"], ["A"]),
        (["B/x", "b"], ["B/x"]),
        (["stra\xdfe", "strasse"], ["strasse"]),
        (["x\ud800", "y"], ["y"]),
        (["dir/a", "DIR/b"], ["DIR/b", "dir/a"]),
        (["cafe\u0301.txt", "caf\xe9.txt"], ["cafe\u0301.txt"]),
        (["CAF\xc9/x", "cafe\u0301"], ["CAF\xc9/x"]),
    ],
)
def test_of_two_names_that_are_one_the_first_stays(paths: list[str], kept: list[str]) -> None:
    """Files that would be one where case or Unicode form do not count are not both written."""
    artifacts, left_out = choose([told(path) for path in paths], (), PAGE)
    assert [a.path for a in artifacts] == kept
    assert len(left_out) == len(paths) - len(kept)


def test_names_equal_but_for_their_unicode_form_end_nothing(
    hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The repository is written with the first of them; the other is told as left out."""
    hub.add_repo(REPO, dict.fromkeys(["cafe\u0301.txt", "caf\xe9.txt", "good"], b"x"))
    lock_repo(root)
    assert [a.path for a in manifest(root).artifacts] == ["cafe\u0301.txt", "good"]
    assert capsys.readouterr().err.count("left out: ") == 1


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(
    ["a/b.safetensors", "A/B.SAFETENSORS", "x.json", "x.pt", ".hidden", "all", "_", "\x7f", '"']
)


@given(st.lists(st.builds(told, NAMES, st.binary(max_size=3), st.booleans()), max_size=8))
def test_rendering_and_parsing_a_listing_is_the_identity(files: list[File]) -> None:
    """Whatever a Hub lists, what is kept of it makes a manifest that reads back the same."""
    files = [f for f in files if ".." not in f.path and f.path[0] not in "/\\"]
    try:
        artifacts, _ = choose([*files, told("zzz")], (), PAGE)
    except WrongContent:
        return
    cut = tuple(
        with_pieces(a, NAME, tiling(a.size, 1), ["5" * 64] * a.size) if a.size > 1 else a
        for a in artifacts
    )
    for some in (artifacts, cut):
        made = replace(
            Manifest(NAME, f"output/{NAME}", f"models/{NAME}", some, repo=REPO),
            revision="c" * 40,
            gated=True,
            default=("all",),
        )
        assert parse(render(made).encode(), "") == made


# ---- a manifest that is there already


def test_what_is_known_of_the_same_files_stays(hub: HubServer, root: Path) -> None:
    """Pieces, digests and their marks outlive another lock, at the same commit and at the next."""
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    fetch(root)
    lock.lock(Request(root, NAME), False, "100000")
    mine = replace(manifest(root), description="mine", destination="weights")
    write_manifest(root / "manifests" / f"{NAME}.toml", mine)
    assert "nothing to add, it has all that the Hub reports" in lock_repo(root)
    assert manifest(root) == mine
    changed = safetensors(200_000, 9)
    commit = hub.push(REPO, {TWO: changed, "new.txt": b"new", "config.json": None})
    difference = lock_repo(root)
    assert f'+revision = "{commit}"' in difference
    before = {a.path: a for a in mine.artifacts}
    after = {a.path: a for a in manifest(root).artifacts}
    assert (manifest(root).description, manifest(root).destination) == ("mine", "weights")
    assert set(after) == {*FILES, "new.txt"} - {"config.json"}
    same = set(after) - {TWO, "new.txt"}
    assert {path: after[path] for path in same} == {path: before[path] for path in same}
    assert (after[TWO].sha256, after[TWO].pieces) == (sha256(changed), ())
    assert set(after[TWO].evidence.values()) == {"H"}


def test_a_commit_that_has_changed_is_an_error(hub: HubServer, root: Path) -> None:
    """Other bytes under the same commit have exit code 4, name the file, and change nothing."""
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    other = replace(entry(root, ONE), sha256="5" * 64, blob_id=blob_id("5" * 64, len(FILES[ONE])))
    others = tuple(other if a.path == ONE else a for a in manifest(root).artifacts)
    doubtful = replace(manifest(root), artifacts=others)
    write_manifest(root / "manifests" / f"{NAME}.toml", doubtful)
    with pytest.raises(WrongContent) as caught:
        lock_repo(root)
    assert [(f.kind, f.where.endswith(ONE)) for f in caught.value.findings] == [
        (Kind.DIFFERENT, True)
    ]
    assert manifest(root) == doubtful


def test_what_differs_is_told_by_size_and_the_best_digest(hub: HubServer, root: Path) -> None:
    """A file that the manifest has by its pieces alone has no digest to tell."""
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    size = len(FILES[ONE])
    piece = Piece(f"chunks/{ONE}", 0, size + 1, "5" * 64)
    other = replace(entry(root, ONE), size=size + 1, sha256=None, blob_id=None, pieces=(piece,))
    others = tuple(other if a.path == ONE else a for a in manifest(root).artifacts)
    write_manifest(root / "manifests" / f"{NAME}.toml", replace(manifest(root), artifacts=others))
    with pytest.raises(WrongContent) as caught:
        lock_repo(root)
    [finding] = caught.value.findings
    assert finding.expected == f"{size + 1:,} bytes, pieces"
    assert finding.found == f"{size:,} bytes, {hashlib.sha256(FILES[ONE]).hexdigest()}"


@pytest.mark.parametrize("repo", [None, "other/model"])
def test_the_manifest_of_something_else_is_not_overwritten(
    hub: HubServer, root: Path, repo: str | None
) -> None:
    """A manifest of another repository, or of none, stays; another name is asked for."""
    commit = hub.add_repo(REPO, FILES)
    path = root / "manifests" / f"{NAME}.toml"
    artifacts = (artifact_of(told("a")),)
    other = Manifest(NAME, "output/x", "models/x", artifacts, repo=repo, revision=commit)
    write_manifest(path, other)
    text = path.read_text()
    with pytest.raises(UsageError, match="choose another name with --model"):
        lock_repo(root)
    assert (path.read_text(), hub.log) == (text, [])


def test_whether_two_entries_are_of_the_same_bytes() -> None:
    """Equal ids say so, one that differs says no, and without a common one nobody knows."""
    small, big = artifact_of(told("a", b"12")), artifact_of(told("a", b"12", lfs=True))
    assert is_same(small, small) is True
    assert is_same(big, big) is True
    assert is_same(small, big) is None
    assert is_same(small, artifact_of(told("a", b"13"))) is False
    assert is_same(small, artifact_of(told("a", b"123"))) is False
    assert is_same(replace(big, sha256=None), big) is True
    assert is_same(replace(big, blob_id="0" * 40), big) is False
    edition = Edition(2, sha256(b"12"), "12")
    other = replace(artifact_of(told("a", b"other", lfs=True)), alternatives=(edition,))
    assert is_same(other, small) is True
    assert is_same(other, artifact_of(told("a", b"13"))) is False
    assert with_reported(other, small) == other


def test_what_else_the_hub_tells_is_added_as_its_word() -> None:
    """An id that was not known comes with the mark H, beside those that were."""
    big = artifact_of(told("a", b"12", lfs=True))
    known = replace(big, sha256=None, evidence={"size": "A", "blob_id": "B"})
    merged = with_reported(known, big)
    assert (merged.sha256, merged.blob_id) == (big.sha256, big.blob_id)
    assert merged.evidence == {"size": "A", "blob_id": "B", "sha256": "H"}


# ---- pieces of verified files


def test_proven_files_add_pieces_and_digests(hub: HubServer, root: Path) -> None:
    """Large files get pieces, those known by a git id a sha256; all of it is A, recomputed here."""
    small = safetensors(1000, 3)
    hub.add_repo(REPO, FILES | {"small.safetensors": small}, lfs=lambda p, _: p in (ONE, TWO))
    lock_repo(root)
    fetch(root)
    difference = lock.lock(Request(root, NAME), True, "200000")
    assert entry(root, ONE).pieces == ()
    assert str(lock.lock(Request(root, NAME), False, "200000")) == str(difference)
    data, locked = FILES[ONE], entry(root, ONE)
    assert [(p.offset, p.size, p.sha256) for p in locked.pieces] == [
        (0, 200_000, sha256(data[:200_000])),
        (200_000, len(data) - 200_000, sha256(data[200_000:])),
    ]
    assert [p.part for p in locked.pieces] == [f"chunks/{NAME}/{ONE}.part-a{c}" for c in "ab"]
    assert entry(root, TWO).pieces == ()
    for artifact in manifest(root).artifacts:
        assert set(artifact.evidence.values()) == {"A"}
    found = entry(root, "small.safetensors")
    assert (found.sha256, found.git_sha1, found.blob_id) == (sha256(small), git_sha1(small), None)
    assert verify.verify(Request(root, NAME)).error is None
    state = apply.status(Request(root, NAME), check=True)
    assert state.error is None


def test_a_file_that_its_receipt_calls_good_is_hashed_all_the_same(
    hub: HubServer, root: Path
) -> None:
    """Pieces are taken only in a read that has the right whole, whatever a receipt says."""
    hub.add_repo(REPO, FILES)
    lock_repo(root)
    fetch(root)
    folder = root / "models" / NAME
    flip(folder / ONE)
    path = receipt_path(folder, ONE)
    receipt = load_receipt(path.read_text())
    assert receipt is not None
    forged = replace(receipt, fingerprint=Fingerprint.of((folder / ONE).stat()))
    path.write_text(dump_receipt(forged))
    before = manifest(root)
    for size in ("100000", "1GiB"):
        with pytest.raises(WrongContent) as caught:
            lock.lock(Request(root, NAME), False, size)
        assert {f.kind for f in caught.value.findings} == {Kind.WRONG_DIGEST}
    assert manifest(root) == before


def test_a_file_with_an_endless_name_stays_whole(hub: HubServer, root: Path) -> None:
    """A name that leaves no room for a part's ending gets no pieces, and harms nothing."""
    name = "n" * 195 + ".bin"
    hub.add_repo(REPO, {name: b"12345", "b.bin": b"12345"})
    lock_repo(root)
    fetch(root)
    lock.lock(Request(root, NAME), False, "2")
    assert (path_problem(name), len(entry(root, name).pieces)) == ("", 0)
    assert len(entry(root, "b.bin").pieces) == 3


def test_a_git_id_beside_a_sha256_stays_the_hubs_word() -> None:
    """A file verified by its sha256 says nothing about an id that was not taken."""
    artifact = replace(artifact_of(told("a", b"12", lfs=True)), git_sha1="5" * 40)
    marked = replace(artifact, evidence={"size": "H", "sha256": "H", "git_sha1": "H"})
    assert recomputed(marked, "").evidence == {"size": "A", "sha256": "A", "git_sha1": "H"}
    assert recomputed(artifact_of(told("a")), "").evidence == {"size": "A", "git_sha1": "A"}
    public = replace(marked, evidence={"size": "B", "sha256": "C"})
    assert recomputed(public, "") == public


@given(st.lists(st.integers(0, 1 << 42), max_size=9), st.integers(1, 1 << 30))
@example([640] * 100, 1)
@example([651], 1)
def test_pieces_grow_until_they_are_few_enough(sizes: list[int], piece: int) -> None:
    """At most 650 of a file and 10,000 of a manifest, by doubling, and no larger than needed."""

    def counts(size: int) -> list[int]:
        return [-(-s // size) for s in sizes if s > size]

    def few(size: int) -> bool:
        return max(counts(size), default=0) <= MAX_CHUNK_FILES and sum(counts(size)) <= MAX_PIECES

    chosen = lock_size(sizes, piece)
    assert few(chosen)
    assert chosen == piece or not few(chosen // 2)
    assert (chosen // piece).bit_count() == 1


def test_a_piece_of_nothing_is_refused() -> None:
    """A size of no bytes is a usage error."""
    with pytest.raises(UsageError):
        lock_size([10], 0)


def test_names_that_differ_in_form_only_leave_out_one(
    hub: HubServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two names that are one on macOS the second is left out and named; all else is locked."""
    names = ["e\u0301.bin", "\xe9.bin", "good.bin"]
    hub.add_repo(REPO, {name: name.encode() for name in names})
    lock_repo(root)
    assert [a.path for a in manifest(root).artifacts] == ["e\u0301.bin", "good.bin"]
    assert "left out" in capsys.readouterr().err

"""What the Hub reports of a repository, and how it may contradict itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from csm_weights.errors import CsmWeightsError, Kind, UsageError, WrongContent
from csm_weights.hashing import blob_id, git_sha1
from csm_weights.manifest.types import MAX_SIZE
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.hub_metadata import File, Listing, artifact_of, choose, list_repo
from tests.support.hub import HubServer

REPO = "org/name"
PAGE = "https://hub/org/name"
NOTHING = hashlib.sha256().hexdigest()
EMPTY_ID = git_sha1(0).hexdigest()


def in_git(path: str, data: bytes) -> File:
    return File(path, len(data), git_sha1(len(data), data).hexdigest())


def in_lfs(path: str, size: int, sha256: str = "5" * 64) -> File:
    return File(path, size, blob_id(sha256, size), sha256, size)


SMALL, LARGE = in_git("small", b"text"), in_lfs("large", 1000)


# ---- one file


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        *(
            (
                replace(LARGE, oid=digit * 40),
                [(f"git blob id {LARGE.oid}", f"git blob id {digit * 40}")],
            )
            for digit in "0f"
        ),
        (
            replace(LARGE, sha256="6" * 64),
            [(f"git blob id {blob_id('6' * 64, 1000)}", f"git blob id {LARGE.oid}")],
        ),
        *(
            (
                replace(LARGE, lfs_size=size),
                [("1,000 bytes as in the tree", f"{told} bytes in LFS")],
            )
            for size, told in ((999, "999"), (1001, "1,001"))
        ),
        *(
            (in_lfs("large", size), [(f"a size up to {MAX_SIZE:,}", str(size))])
            for size in (-1, MAX_SIZE + 1)
        ),
        (replace(LARGE, sha256="G" * 100), [("a sha256", repr("G" * 80))]),
        (replace(LARGE, oid="G" * 100), [("a git blob id", repr("G" * 80))]),
        (in_lfs("large", 0), [(f"sha256 {NOTHING}, of no bytes", f"sha256 {'5' * 64}")]),
        *(
            (
                File("large", 0, digit * 40),
                [(f"git blob id {EMPTY_ID}", f"git blob id {digit * 40}")],
            )
            for digit in "0f"
        ),
        (
            File("large", -1, "main", "x", 7),
            [
                (f"a size up to {MAX_SIZE:,}", "-1"),
                ("a git blob id", "'main'"),
                ("-1 bytes as in the tree", "7 bytes in LFS"),
                ("a sha256", "'x'"),
            ],
        ),
    ],
)
def test_figures_that_contradict_each_other_are_told(
    file: File, wrong: list[tuple[str, str]]
) -> None:
    """What follows from the other figures is told once those make sense.

    A file that was not asked for may say what it likes.
    """
    with pytest.raises(WrongContent) as caught:
        choose([SMALL, file], (), PAGE)
    findings = caught.value.findings
    assert {(f.kind, f.where) for f in findings} == {(Kind.WRONG_ANSWER, f"{PAGE} large")}
    assert [(f.expected, f.found) for f in findings] == wrong
    assert choose([SMALL, file], ["small"], PAGE) == ((artifact_of(SMALL),), ())


@pytest.mark.parametrize(
    "file",
    [
        SMALL,
        LARGE,
        in_lfs("x", 1),
        in_lfs("x", MAX_SIZE),
        in_lfs("x", 0, NOTHING),
        File("x", 0, EMPTY_ID),
        File("x", 1, "0" * 40),
    ],
)
def test_figures_that_agree_are_kept(file: File) -> None:
    """The git blob id of a file in git cannot be held against its size."""
    assert choose([file], (), PAGE) == ((artifact_of(file),), ())


@pytest.mark.parametrize(
    ("file", "format_"),
    [
        (in_lfs("x.safetensors", 1), "safetensors"),
        (in_git("x.safetensors", b"1"), "safetensors"),
        (File("x.safetensors", 0, EMPTY_ID), "opaque"),
        (in_lfs("x.bin", 1000), "opaque"),
    ],
)
def test_the_format_of_a_file_is_by_its_name(file: File, format_: str) -> None:
    """An empty one has none."""
    assert artifact_of(file).format == format_


# ---- all files


def test_where_no_name_can_be_kept_each_is_told() -> None:
    """The error is about all files of the repository, or about those that were asked for."""
    with pytest.raises(UsageError, match=r"^no file among the 1 of https://hub/org/name") as caught:
        choose([replace(SMALL, path="a.lock")], (), PAGE)
    assert [f.where for f in caught.value.findings] == [f"{PAGE} a.lock"]
    with pytest.raises(UsageError, match=r"no file like x\*, y/ among the 2 of"):
        choose([SMALL, LARGE], ["x*", "y/"], PAGE)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with a repository of three entries."""
    with HubServer() as server:
        server.add_repo(REPO, {"a": b"1", "folder/b": b"2"})
        yield server


def listed(hub: HubServer, revision: str | None = None) -> Listing:
    credentials = HubCredentials(hub.endpoint)
    return list_repo(credentials, REPO, revision, (), lambda _: None, patience=0.1)


ROW = {"path": "a", "size": 0, "oid": EMPTY_ID}


@pytest.mark.parametrize(
    "rows", [[ROW], [{**ROW, "type": "another"}], [{**ROW, "type": "zzz"}, {"type": "directory"}]]
)
def test_what_is_no_folder_is_a_file(hub: HubServer, rows: list[dict[str, object]]) -> None:
    """Whatever else its type is."""
    hub.fault("status", match="*/tree/*", code=200, body=json.dumps(rows))
    assert [artifact.path for artifact in listed(hub).artifacts] == ["a"]


@pytest.mark.parametrize(
    ("match", "body", "expected", "found"),
    [
        ("*/tree/*", {}, "a list of files", "a dict"),
        ("*/tree/*", ["a"], "a path, a size and an id", "AttributeError"),
        ("*/tree/*", [{"path": "a"}], "a path, a size and an id", "KeyError"),
        ("*/tree/*", [{**ROW, "size": "0"}], "a path, a size and an id", "TypeError"),
        ("*/tree/*", [{**ROW, "lfs": 7}], "a path, a size and an id", "TypeError"),
        ("*", [], "a commit, 40 hex digits", "None"),
        ("*", {}, "a commit, 40 hex digits", "None"),
        ("*", {"sha": 7}, "a commit, 40 hex digits", "7"),
        ("*", {"sha": "x" * 300}, "a commit, 40 hex digits", "'" + "x" * 199),
    ],
)
def test_an_answer_that_makes_no_sense_is_told(
    hub: HubServer, match: str, body: object, expected: str, found: str
) -> None:
    """The finding names the repository; of what was found it has 200 characters."""
    hub.fault("status", match=match, code=200, body=json.dumps(body))
    with pytest.raises(CsmWeightsError) as caught:
        listed(hub)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.WRONG_ANSWER, f"{hub.endpoint}/{REPO}")
    assert (finding.expected, finding.found.partition("(")[0]) == (expected, found)


@pytest.mark.parametrize("digit", ["0", "f"])
def test_another_commit_is_refused(hub: HubServer, digit: str) -> None:
    """Where a commit was asked for, the files of no other are taken."""
    asked = "5" * 40
    hub.fault("status", code=200, body=json.dumps({"sha": digit * 40}))
    with pytest.raises(WrongContent) as caught:
        listed(hub, asked)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.DIFFERENT, f"{hub.endpoint}/{REPO}")
    assert (finding.expected, finding.found) == (f"commit {asked}", f"commit {digit * 40}")


def test_the_next_page_is_asked_of_the_hub_alone(hub: HubServer) -> None:
    """A link to another host is not followed."""
    headers = {"Link": '<http://127.0.0.1:9/more>; rel="next"'}
    hub.fault("status", match="*/tree/*", code=200, body=json.dumps([ROW]), headers=headers)
    with pytest.raises(CsmWeightsError) as caught:
        listed(hub)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.found) == (Kind.REDIRECT, "a redirect to 127.0.0.1:9")

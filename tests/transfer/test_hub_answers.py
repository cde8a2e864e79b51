"""What each answer of the Hub means: the file that is pinned, another one, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.hub import Hub
from csm_weights.transfer.source import SourceError
from tests.support.network import Answering

ENDPOINT = "http://127.0.0.1:9"
PAGE = f"{ENDPOINT}/org/name"
TOKENS = f"{ENDPOINT}/settings/tokens"
TOKEN = "hf_good"

COMMIT, SHA256, GIT = "5c" * 20, "5a" * 32, "5b" * 20
LARGE = Artifact("a b.bin", "x", "opaque", 1000, SHA256)
SMALL = Artifact("a.txt", "x", "opaque", 600, git_sha1=GIT)

#: The answers about a file in LFS, which is elsewhere, and about one in git.
STORED = "http://127.0.0.1:8/file"
IN_LFS = {
    "X-Repo-Commit": COMMIT,
    "X-Linked-Etag": f'"{SHA256}"',
    "X-Linked-Size": "1000",
    "ETag": f'"{"0" * 64}"',
    "Content-Length": "77",
    "Location": f"{STORED}?signature=1",
}
IN_GIT = {"X-Repo-Commit": COMMIT, "ETag": f'"{GIT}"', "Content-Length": "600"}


def hub(answering: Answering, token: str | None = TOKEN, revision: str = COMMIT) -> Hub:
    return Hub(answering, HubCredentials(ENDPOINT, token), "org/name", revision)


def without(headers: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


def refused(answering: Answering, artifact: Artifact = LARGE, **how: Any) -> Finding:
    """Return the one finding that resolving a file ends with."""
    with pytest.raises(SourceError) as caught:
        hub(answering, **how).resolve(artifact)
    (finding,) = caught.value.findings
    return finding


# ---- refusals

FILE, NAME = "a repository or file of that name", "check the name"
SIGN_IN = "; if it is private, run hf auth login"
VISIT = f"visit {PAGE}, and {TOKENS} for what the token may do"
RENEW = f"make a new one at {TOKENS}; HF_TOKEN overrides hf auth login"
ACCEPT = f"accept the terms at {PAGE}, then run hf auth login, or set HF_TOKEN"
SCOPE = f"let the token read public gated repositories, at {TOKENS}"
KNOWN, TERMS = "a token that the Hub knows", "terms that you have accepted"

#: Status, X-Error-Code and X-Error-Message; kind, what was expected, and help.
TO_A_TOKEN = [
    (401, "", "", Kind.UNKNOWN_TOKEN, KNOWN, RENEW),
    (401, "RepoNotFound", "", Kind.UNKNOWN_TOKEN, KNOWN, RENEW),
    (401, "GatedRepo", "", Kind.UNKNOWN_TOKEN, KNOWN, RENEW),
    (404, "", "", Kind.NOT_THERE, FILE, NAME),
    (404, "", "It is gated", Kind.NOT_THERE, FILE, NAME),
    (403, "RepoNotFound", "", Kind.NOT_THERE, FILE, NAME),
    (400, "", "", Kind.FORBIDDEN, "access", VISIT),
    (400, "", "It is gated", Kind.FORBIDDEN, "access", VISIT),
    (402, "", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "Another", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "Zzz", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "", "fine-grained, awaiting, pending, rejected", Kind.FORBIDDEN, "access", VISIT),
    (405, "", "", Kind.FORBIDDEN, "access", VISIT),
    (410, "", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "", "It is Gated", Kind.TERMS, TERMS, f"accept them at {PAGE}"),
    (403, "GatedRepo", "", Kind.TERMS, TERMS, f"accept them at {PAGE}"),
    (400, "GatedRepo", "", Kind.TERMS, TERMS, f"accept them at {PAGE}"),
    (
        403,
        "GatedRepo",
        "A Fine-grained one",
        Kind.SCOPE,
        "a token that may read gated files",
        SCOPE,
    ),
    *(
        (403, "GatedRepo", told, Kind.PENDING, "granted access", "wait until its authors decide")
        for told in ("Awaiting a review", "It is Pending")
    ),
    (403, "GatedRepo", "Rejected", Kind.REJECTED, "granted access", "its authors have refused"),
]

TO_NOBODY = [
    (401, "GatedRepo", "", Kind.NO_TOKEN, "a token", ACCEPT),
    (403, "", "It is gated", Kind.NO_TOKEN, "a token", ACCEPT),
    (401, "", "", Kind.NO_TOKEN, "a token", f"{NAME}{SIGN_IN}, or set HF_TOKEN"),
    (401, "RepoNotFound", "", Kind.NOT_THERE, FILE, NAME + SIGN_IN),
    (404, "", "", Kind.NOT_THERE, FILE, NAME + SIGN_IN),
    (400, "", "", Kind.FORBIDDEN, "access", VISIT),
    (403, "", "", Kind.FORBIDDEN, "access", VISIT),
]


@pytest.mark.parametrize(
    ("token", "status", "code", "message", "kind", "expected", "help_text"),
    [*((TOKEN, *row) for row in TO_A_TOKEN), *((None, *row) for row in TO_NOBODY)],
)
def test_every_refusal_is_told_with_what_helps(
    token: str | None,
    status: int,
    code: str,
    message: str,
    kind: Kind,
    expected: str,
    help_text: str,
) -> None:
    """The status, the Hub's code and its message decide, and whether there is a token."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    finding = refused(Answering(status, headers), token=token)
    found = " ".join(filter(None, [str(status), code, message]))
    assert replace(finding, help="") == Finding(kind, PAGE, expected, found)
    assert finding.help.partition("; see ")[0] == help_text


@pytest.mark.parametrize("token", [TOKEN, None])
@pytest.mark.parametrize(
    ("code", "what"),
    [("RevisionNotFound", COMMIT), ("EntryNotFound", f"a b.bin at {COMMIT[:12]}")],
)
def test_a_revision_or_a_file_that_is_not_there_is_named(
    token: str | None, code: str, what: str
) -> None:
    """It is one of a repository that is there, so the token does not matter."""
    finding = refused(Answering(404, {"X-Error-Code": code}), token=token)
    assert (finding.kind, finding.where) == (Kind.NOT_THERE, f"{PAGE} {what}")
    assert (finding.expected, finding.help) == ("a file of that name", f"see {PAGE}/tree/main")


def test_a_long_message_is_cut_and_shows_no_token() -> None:
    """Of what the Hub says 300 characters are told."""
    finding = refused(Answering(403, {"X-Error-Message": f"{TOKEN}{'x' * 400}"}))
    assert finding.found == f"403 ***{'x' * 293}"


# ---- files


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (302, IN_LFS),
        (302, without(IN_LFS, "X-Linked-Size")),
        (302, {**IN_LFS, "X-Linked-Etag": SHA256}),
        (302, {**IN_LFS, "X-Linked-Etag": f'"{GIT}"'}),
        (302, {**without(IN_LFS, "X-Linked-Etag"), "ETag": f'W/"{SHA256}"'}),
        (302, {**without(IN_LFS, "X-Linked-Etag"), "ETag": '"none"'}),
        (200, IN_LFS),
        (302, {**IN_LFS, "Content-Type": "text/html"}),
    ],
)
def test_a_file_in_lfs_is_where_the_hub_sends_to(status: int, headers: dict[str, str]) -> None:
    """Its digest and size are those that the Hub links to, where it tells them."""
    answering = Answering(status, headers)
    source = hub(answering)
    assert source.resolve(LARGE) == f"{STORED}?signature=1"
    assert source.reached == {STORED}
    assert answering.asked == [("HEAD", f"{PAGE}/resolve/{COMMIT}/a%20b.bin")]


@pytest.mark.parametrize(
    "headers",
    [
        IN_GIT,
        {**IN_GIT, "ETag": f'W/"{GIT}"'},
        {**IN_GIT, "ETag": '"none"'},
        {**IN_GIT, "ETag": f'"{SHA256}"'},
        without(IN_GIT, "ETag"),
        without(IN_GIT, "Content-Length"),
        {**IN_GIT, "Content-Length": "1", "X-Linked-Size": "600"},
    ],
)
def test_a_file_in_git_is_at_the_hub_itself(headers: dict[str, str]) -> None:
    """An ETag that is no digest of the pinned kind says nothing."""
    url = f"{PAGE}/resolve/{COMMIT}/a.txt"
    assert hub(Answering(200, headers)).resolve(SMALL) == url


@pytest.mark.parametrize("headers", [IN_GIT, without(IN_GIT, "X-Repo-Commit")])
def test_a_branch_has_any_commit(headers: dict[str, str]) -> None:
    """Only a revision that is a commit is held against the Hub's."""
    url = f"{PAGE}/resolve/a%2Fbranch/a.txt"
    assert hub(Answering(200, headers), revision="a/branch").resolve(SMALL) == url


ODD = "X" * 100


@pytest.mark.parametrize(
    ("artifact", "status", "headers", "kind", "expected", "found"),
    [
        (
            LARGE,
            302,
            without(IN_LFS, "X-Repo-Commit"),
            Kind.DIFFERENT,
            f"commit {COMMIT}",
            "no commit",
        ),
        *(
            row
            for digit in "0f"
            for row in (
                (
                    LARGE,
                    302,
                    {**IN_LFS, "X-Repo-Commit": digit * 60},
                    Kind.DIFFERENT,
                    f"commit {COMMIT}",
                    f"commit {digit * 40}",
                ),
                (
                    LARGE,
                    302,
                    {**IN_LFS, "X-Linked-Etag": f'"{digit * 64}"'},
                    Kind.DIFFERENT,
                    f"sha256 {SHA256}",
                    f"sha256 {digit * 64}",
                ),
                (
                    SMALL,
                    200,
                    {**IN_GIT, "ETag": f'"{digit * 40}"'},
                    Kind.DIFFERENT,
                    f"git blob id {GIT}",
                    f"git blob id {digit * 40}",
                ),
            )
        ),
        (
            LARGE,
            302,
            {**IN_LFS, "X-Linked-Etag": ODD},
            Kind.WRONG_ANSWER,
            "an X-Linked-Etag of hex digits",
            repr(ODD[:80]),
        ),
        *(
            (LARGE, 302, {**IN_LFS, "X-Linked-Size": size}, Kind.WRONG_SIZE, "1,000 bytes", told)
            for size, told in (
                ("999", "999 bytes"),
                ("1", "1 bytes"),
                ("9" * 30, "9" * 20 + " bytes"),
            )
        ),
        *(
            (SMALL, 200, {**IN_GIT, "Content-Length": size}, Kind.WRONG_SIZE, "600 bytes", told)
            for size, told in (("599", "599 bytes"), ("601", "601 bytes"))
        ),
    ],
)
def test_another_file_than_the_one_pinned_is_refused(
    artifact: Artifact, status: int, headers: dict[str, str], kind: Kind, expected: str, found: str
) -> None:
    """What the Hub tells of a file is held against its commit, digest and size."""
    finding = refused(Answering(status, headers), artifact)
    assert (finding.kind, finding.where) == (kind, f"{PAGE} {artifact.path}")
    assert (finding.expected, finding.found) == (expected, found)


def test_a_web_page_in_place_of_a_file_is_a_portal() -> None:
    """It names no commit, as an HTML file of the repository would."""
    finding = refused(Answering(200, {"Content-Type": "text/html"}), SMALL)
    assert (finding.kind, finding.where) == (Kind.NO_NETWORK, PAGE)


# ---- accounts


@pytest.mark.parametrize(
    ("name", "role", "told"),
    [
        ("someone", "fineGrained", "of someone, fine-grained"),
        ("someone", "read", "of someone, read"),
        ("n" * 200, "read", f"of {'n' * 97}"),
        (TOKEN, "write", "of ***, write"),
    ],
)
def test_the_owner_of_a_token_is_told(name: str, role: str, told: str) -> None:
    """In at most 100 characters, and without the token."""
    data = {"name": name, "auth": {"accessToken": {"role": role}}}
    answering = Answering(200, data=data)
    assert hub(answering).owner() == told
    assert answering.asked == [("GET", f"{ENDPOINT}/api/whoami-v2")]


def test_without_a_token_there_is_no_owner() -> None:
    """Nobody is asked."""
    answering = Answering(200)
    assert hub(answering, token=None).owner() == ""
    assert answering.asked == []

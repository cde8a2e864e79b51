"""The Hub as it answers, and as it fails: what comes of each, and what never may."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from csm_weights.commands.split import split_file as split
from csm_weights.config import HubEnvironment
from csm_weights.errors import (
    AccessRefused,
    CsmWeightsError,
    Kind,
    MissingInput,
    NetworkFailed,
    WrongContent,
)
from csm_weights.hashing import git_sha1
from csm_weights.manifest.types import Artifact
from csm_weights.store.journal import Journal, read_journal
from csm_weights.store.receipts import VerifiedFile
from csm_weights.transfer.assemble import Assembly, assemble
from csm_weights.transfer.http.auth import HubCredentials
from csm_weights.transfer.http.client import Timeouts
from csm_weights.transfer.http.lines import SPAN
from csm_weights.transfer.http.ranges import RangeDownloader
from csm_weights.transfer.hub import Hub
from csm_weights.transfer.source import FirstOf, SourceError
from tests.support.hub import Fault, HubServer
from tests.support.network import closed_port, noted_waits

SIZE = 2 * SPAN + 300_007
DATA = random.Random(4).randbytes(SIZE)
NAME = "model.bin"
REPO = "org/name"
TOKEN = "hf_good"

#: Patience that ends within a test.
HASTY = Timeouts(connect=5, read=15, backoff=0.02, slow_seconds=2, longest_wait=30)


@dataclass
class Shop:
    """A Hub with one gated repository of one file, and a folder to fetch it to."""

    hub: HubServer
    folder: Path
    commit: str
    artifact: Artifact
    said: list[str] = field(default_factory=list)
    on_progress: Callable[[int], None] = lambda _: None

    def fetch(
        self,
        token: str | None = TOKEN,
        revision: str | None = None,
        repo: str = REPO,
        artifact: Artifact | None = None,
        patience: float = 60,
        journal: Journal | None = None,
    ) -> VerifiedFile:
        """Fetch the file, verified, as it is asked for; `journal` is what an earlier run left."""
        stop = threading.Event()
        wanted = artifact or self.artifact
        timeouts = replace(HASTY, patience=patience)
        with RangeDownloader(stop, self.said.append, timeouts) as downloader:
            credentials = HubCredentials(self.hub.endpoint, token)
            source = FirstOf(Hub(downloader, credentials, repo, revision or self.commit))
            far = frozenset(piece.offset for piece in wanted.tiles)
            resumed = (journal.pieces, journal.arrived) if journal else ((), ())
            job = Assembly(wanted, self.folder / "file", source, *resumed, remote=far)
            return assemble([job], self.on_progress, stop)[0]

    def fails(self, **how: Any) -> CsmWeightsError:
        """The error that fetching ends with."""
        with pytest.raises(CsmWeightsError) as caught:
            self.fetch(**({"patience": 1.0} | how))
        assert not (self.folder / "file").exists()
        return caught.value

    def fault(self, fault: dict[str, Any]) -> Fault:
        """Switch on a fault that is written down as its name and its options."""
        options = dict(fault)
        return self.hub.fault(options.pop("name"), **options)

    def is_right(self, made: VerifiedFile) -> bool:
        return made.path.read_bytes() == DATA and made.sha256 == self.artifact.sha256


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A fresh shop."""
    file = tmp_path / NAME
    file.write_bytes(DATA)
    artifact = replace(split(file, tmp_path, "chunks", SIZE, lambda _: None), pieces=())
    with HubServer() as hub:
        commit = hub.add_repo(REPO, {NAME: DATA, "small.txt": b"small\n"}, gated=True)
        hub.add_token(TOKEN)
        yield Shop(hub, tmp_path / "out", commit, artifact)


def once(act: Callable[[], object]) -> Callable[[int], None]:
    """Return a counter of bytes that acts when the first ones come."""
    first = iter([act])
    lock = threading.Lock()

    def count(_: int) -> None:
        with lock:
            for waiting in first:
                waiting()

    return count


# ---- what passes

PASSING: dict[str, dict[str, Any]] = {
    "one connection is reset": {"name": "reset", "host": "storage", "at": 100_000, "times": 1},
    "every connection is reset after 1 MiB": {"name": "reset", "host": "storage", "at": 1 << 20},
    "every connection ends after 3 MiB": {"name": "cut", "host": "storage", "at": 3 << 20},
    "the storage host has trouble once": {
        "name": "status",
        "host": "storage",
        "code": 503,
        "times": 1,
    },
    "the Hub has trouble once": {"name": "status", "host": "hub", "code": 500, "times": 1},
    "the Hub hangs up once": {"name": "close", "host": "hub", "times": 1},
    "the storage host hangs up twice": {"name": "close", "host": "storage", "times": 2},
    "one stream falls silent": {
        "name": "stall",
        "host": "storage",
        "at": 70_000,
        "seconds": 20,
        "times": 1,
    },
    "one stream trickles": {
        "name": "trickle",
        "host": "storage",
        "at": 70_000,
        "rate": 10,
        "times": 1,
    },
    "the storage host knows no ranges": {"name": "no-range", "host": "storage"},
    "the body comes in chunks": {"name": "chunked", "host": "storage"},
    "one answer is shorter than asked": {
        "name": "short",
        "host": "storage",
        "by": 100_000,
        "times": 1,
    },
    "every answer has at most 1 MiB": {"name": "cap", "host": "storage", "size": 1 << 20},
    "one answer is about another range": {
        "name": "wrong-range",
        "host": "storage",
        "times": 1,
    },
    "one answer is 416": {"name": "status", "host": "storage", "code": 416, "times": 1},
    "one signed URL is not there": {"name": "status", "host": "storage", "code": 404, "times": 1},
    "signed URLs live for a moment": {"name": "expire", "seconds": 0.3},
    "one answer has no Content-Range": {
        "name": "no-content-range",
        "host": "storage",
        "times": 1,
    },
    "one answer is about a larger file": {
        "name": "content-range",
        "host": "storage",
        "total": 1,
        "times": 1,
    },
    "one signed URL is refused at once": {
        "name": "status",
        "host": "storage",
        "code": 403,
        "times": 1,
    },
    "one signed URL leads to a dead address": {
        "name": "dead-address",
        "address": closed_port(),
        "times": 1,
    },
    "a span comes with a wrong byte": {"name": "flip", "offset": SPAN + 5, "times": 1},
    "wrong bytes come twice": {"name": "flip", "offset": SPAN + 5, "times": 2},
    "servers that share the load have other etags": {
        "name": "etag",
        "host": "storage",
        "value": '"other"',
        "after": 1,
    },
    "a signed URL is refused midway": {
        "name": "status",
        "host": "storage",
        "code": 403,
        "after": 1,
        "times": 1,
    },
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_outlasted(shop: Shop, fault: dict[str, Any]) -> None:
    """The file is right in the end, and what had arrived was not thrown away."""
    handle = shop.fault(fault)
    assert shop.is_right(shop.fetch())
    assert handle.hits > 0


@pytest.mark.parametrize("host", ["hub", "storage"])
def test_an_outage_within_the_patience_is_outlasted_and_told_once(shop: Shop, host: Any) -> None:
    """Closed connections for some seconds, to all streams at once, end nothing."""
    outage = shop.hub.fault("close", host=host)
    threading.Timer(3, outage.clear).start()
    assert shop.is_right(shop.fetch())
    assert outage.hits > 1
    assert len(shop.said) == 1


def test_bytes_that_come_again_are_not_counted_twice(shop: Shop) -> None:
    """Progress goes back by what was wrong, ends at the file's size and never exceeds it."""
    counts: list[int] = []
    shop.on_progress = counts.append
    shop.hub.fault("flip", offset=SPAN + 5, times=1)
    assert shop.is_right(shop.fetch())
    assert min(counts) < 0
    assert max(accumulate(counts)) == sum(counts) == SIZE


def test_bytes_of_a_slow_line_are_counted_as_they_come(shop: Shop) -> None:
    """Progress moves within two seconds where a block takes longer than that."""

    class Seen(Exception):
        pass

    def end(_: int) -> None:
        raise Seen

    shop.on_progress = end
    shop.hub.fault("trickle", host="storage", rate=50_000)
    started = monotonic()
    with pytest.raises(Seen):
        shop.fetch()
    assert monotonic() - started < 2


def test_bytes_that_were_found_wrong_are_not_looked_at_again(shop: Shop) -> None:
    """The next run fetches the piece at once; it does not hash what the journal calls refuted."""
    fault = shop.hub.fault("flip", offset=SPAN + 5)
    shop.fails()
    fault.clear()
    shop.hub.clear()
    journal = read_journal(shop.folder / "file", shop.artifact)
    assert journal == Journal(is_begun=True)
    assert shop.is_right(shop.fetch(journal=journal))
    assert shop.hub.bytes_sent() == SIZE


def test_bytes_that_arrived_after_others_were_found_wrong_are_kept(shop: Shop) -> None:
    """What a run fetched in place of wrong bytes counts for the run after it."""
    wrong = shop.hub.fault("flip", offset=SPAN + 5)
    shop.fails()
    wrong.clear()
    broken = shop.hub.fault("status", host="storage", code=500, after=1)
    shop.fails(journal=read_journal(shop.folder / "file", shop.artifact))
    broken.clear()
    shop.hub.clear()
    journal = read_journal(shop.folder / "file", shop.artifact)
    assert sum(arrival.size for arrival in journal.arrived) > 0
    assert shop.is_right(shop.fetch(journal=journal))
    assert shop.hub.bytes_sent() == SIZE - sum(arrival.size for arrival in journal.arrived)


def test_a_stream_that_breaks_often_costs_little(shop: Shop) -> None:
    """With a break every 3 MiB no more than a tenth is fetched twice."""
    shop.hub.fault("cut", host="storage", at=3 << 20)
    shop.fetch()
    assert shop.hub.bytes_sent() <= SIZE * 1.1


def test_an_expired_url_is_renewed_and_the_piece_goes_on(shop: Shop) -> None:
    """When all signed URLs expire midway, the Hub is asked again, and little is fetched twice."""
    shop.hub.fault("cut", host="storage", at=2 << 20)
    shop.on_progress = once(shop.hub.expire_urls)
    assert shop.is_right(shop.fetch())
    refused = [r for r in shop.hub.requests(host="storage") if r.status == 403]
    assert refused
    assert len(shop.hub.requests(host="hub", method="HEAD")) == 2
    assert shop.hub.bytes_sent() <= SIZE * 1.2


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=1'}],
    ids=["seconds", "RateLimit"],
)
def test_a_rate_limit_is_waited_for_and_shown(shop: Shop, headers: dict[str, str]) -> None:
    """A wait that the Hub asks for is waited, and logged."""
    shop.hub.fault("status", host="hub", code=429, headers=headers, times=1)
    started = monotonic()
    assert shop.is_right(shop.fetch())
    assert monotonic() - started >= 0.9
    assert any("rate limited" in line and "in " in line for line in shop.said)


def test_a_file_in_git_needs_no_more_than_two_requests(shop: Shop) -> None:
    """A small file comes from the Hub itself, with the token, verified by its git blob id."""
    content = b"small\n"
    digest = git_sha1(len(content))
    digest.update(memoryview(content))
    small = Artifact("small.txt", "small", "opaque", len(content), git_sha1=digest.hexdigest())
    made = shop.fetch(artifact=small)
    assert made.path.read_bytes() == content
    assert made.git_sha1 == digest.hexdigest()
    assert [r.method for r in shop.hub.log] == ["HEAD", "GET"]


def test_a_small_file_with_other_content_is_refused(shop: Shop) -> None:
    """The git blob id of a small file decides, where nothing else is pinned."""
    small = Artifact("small.txt", "small", "opaque", 6, git_sha1="7" * 40)
    assert shop.fails(artifact=small).findings[0].kind is Kind.DIFFERENT
    shop.hub.fault("etag", value='"none"')
    assert shop.fails(artifact=small).findings[0].kind is Kind.WRONG_DIGEST


# ---- what does not pass

FAILING: dict[str, tuple[dict[str, Any], Kind, type[CsmWeightsError]]] = {
    "trouble that stays": (
        {"name": "status", "host": "storage", "code": 503},
        Kind.SERVER_TROUBLE,
        NetworkFailed,
    ),
    "a Hub in trouble": (
        {"name": "status", "host": "hub", "code": 502},
        Kind.SERVER_TROUBLE,
        NetworkFailed,
    ),
    "a Hub that hangs up": ({"name": "close", "host": "hub"}, Kind.NO_NETWORK, NetworkFailed),
    "streams that trickle": (
        {"name": "trickle", "host": "storage", "rate": 10},
        Kind.TOO_SLOW,
        NetworkFailed,
    ),
    "a wait that is too long": (
        {"name": "status", "host": "hub", "code": 429, "headers": {"Retry-After": "4000"}},
        Kind.RATE_LIMITED,
        NetworkFailed,
    ),
    "a URL refused at once": (
        {"name": "status", "host": "storage", "code": 403},
        Kind.SERVER_TROUBLE,
        NetworkFailed,
    ),
    "flipped bits": ({"name": "flip", "offset": SPAN + 5}, Kind.WRONG_DIGEST, WrongContent),
    "a hole of zeros": (
        {"name": "zeros", "offset": SPAN - 100, "size": 1 << 20},
        Kind.WRONG_DIGEST,
        WrongContent,
    ),
    "other bytes": (
        {"name": "other-bytes", "host": "storage", "content": bytes(SIZE)},
        Kind.WRONG_DIGEST,
        WrongContent,
    ),
    "a web page": ({"name": "html", "host": "storage"}, Kind.WRONG_ANSWER, NetworkFailed),
    "a web page that is said to be plain text": (
        {"name": "html", "host": "storage", "kind": "text/plain", "body": b"\n<p>Sign in</p>"},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "a range that is refused": (
        {"name": "status", "host": "storage", "code": 416},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "a git-lfs pointer": (
        {"name": "lfs-pointer", "host": "storage"},
        Kind.WRONG_SIZE,
        WrongContent,
    ),
    "gzip on the fly": ({"name": "gzip", "host": "storage"}, Kind.WRONG_ANSWER, NetworkFailed),
    "too long": ({"name": "long", "host": "storage", "by": 1}, Kind.WRONG_ANSWER, NetworkFailed),
    "another range": (
        {"name": "wrong-range", "host": "storage", "shift": 1},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "no Content-Range": (
        {"name": "no-content-range", "host": "storage"},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "a Content-Range with another end": (
        {"name": "content-range", "host": "storage", "last": 1},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "a range of a larger file": (
        {"name": "content-range", "host": "storage", "total": 1},
        Kind.WRONG_SIZE,
        WrongContent,
    ),
    "a proxy that wants a password": (
        {"name": "status", "host": "hub", "code": 407},
        Kind.PROXY,
        NetworkFailed,
    ),
    "another etag of the file": (
        {"name": "etag", "host": "hub", "value": f'"{"8" * 64}"'},
        Kind.DIFFERENT,
        WrongContent,
    ),
    "a hostile etag": (
        {"name": "etag", "host": "hub", "value": '"../../../evil"'},
        Kind.WRONG_ANSWER,
        NetworkFailed,
    ),
    "another commit": (
        {"name": "commit", "host": "hub", "value": "9" * 40},
        Kind.DIFFERENT,
        WrongContent,
    ),
    "no commit": (
        {"name": "commit", "host": "hub", "value": ""},
        Kind.DIFFERENT,
        WrongContent,
    ),
    "a redirect to another scheme": (
        {"name": "redirect", "host": "storage", "location": "https://127.0.0.1:9/x", "code": 302},
        Kind.REDIRECT,
        NetworkFailed,
    ),
    "a redirect to a file": (
        {"name": "redirect", "host": "storage", "location": "file:///etc/passwd", "code": 302},
        Kind.REDIRECT,
        NetworkFailed,
    ),
    "a Hub that sends to another host": (
        {"name": "redirect", "host": "hub", "location": "http://127.0.0.1:9/x", "code": 302},
        Kind.REDIRECT,
        NetworkFailed,
    ),
    "redirects in a circle": (
        {"name": "redirect", "host": "storage", "location": "/again", "code": 302},
        Kind.REDIRECT,
        NetworkFailed,
    ),
}


@pytest.mark.parametrize(("fault", "kind", "error"), FAILING.values(), ids=FAILING)
def test_what_stays_wrong_ends_in_its_own_finding(
    shop: Shop, fault: dict[str, Any], kind: Kind, error: type[CsmWeightsError]
) -> None:
    """Each lie and each trouble has its kind and its exit code, and gives no file."""
    shop.fault(fault)
    failed = shop.fails()
    assert type(failed) is error
    assert {f.kind for f in failed.findings} == {kind}
    assert all(f.expected and f.found for f in failed.findings)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid", Kind.WRONG_SIZE, "a git-lfs pointer"),
        (f"Access to model {REPO} is restricted.", Kind.WRONG_SIZE, "the Hub's refusal in place"),
        (f"Access to model {REPO} is granted.", Kind.WRONG_SIZE, "another file"),
        ("  <p>Sign in</p>", Kind.WRONG_ANSWER, "a web page"),
    ],
)
def test_what_comes_in_place_of_a_file_is_named(
    shop: Shop, body: str, kind: Kind, words: str
) -> None:
    """The finding says what the bytes look like, and how many there are."""
    shop.hub.fault("status", host="storage", code=200, body=body)
    (finding,) = shop.fails().findings
    assert (finding.kind, finding.expected) == (kind, f"a file of {SIZE:,} bytes")
    assert finding.found.startswith(f"{len(body)} bytes: {words}")


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_of_another_size_is_not_asked_for(shop: Shop, more: int) -> None:
    """The Hub tells the size of a file before it gives it, in LFS and in git."""
    small = Artifact(
        "small.txt", "s", "opaque", 6 + more, git_sha1=git_sha1(6, b"small\n").hexdigest()
    )
    large = replace(shop.artifact, size=SIZE + more)
    for artifact, size in ((large, SIZE), (small, 6)):
        (finding,) = shop.fails(artifact=artifact).findings
        assert finding.kind is Kind.WRONG_SIZE
        assert (finding.expected, finding.found) == (f"{artifact.size:,} bytes", f"{size} bytes")
    assert not shop.hub.requests(host="storage")


@pytest.mark.parametrize(
    "body", ["[]", "{}", '{"auth": 7}', '{"auth": {"accessToken": {"role": 7}}}']
)
def test_an_account_that_is_none_is_a_wrong_answer(shop: Shop, body: str) -> None:
    """Whatever JSON comes in place of the owner of a token, it is no traceback."""
    shop.hub.fault("status", "/api/whoami-v2", code=200, body=body)
    with RangeDownloader(threading.Event(), timeouts=HASTY) as downloader:
        hub = Hub(downloader, HubCredentials(shop.hub.endpoint, TOKEN), REPO, shop.commit)
        with pytest.raises(SourceError) as caught:
            hub.owner()
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (
        Kind.WRONG_ANSWER,
        f"{shop.hub.endpoint}/api/whoami-v2",
    )
    assert (finding.expected, finding.found) == ("an account and its token", "something else")


def test_the_next_try_waits_no_longer_where_bytes_have_come(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection that brought a MiB before it broke counts as a success."""
    waits = noted_waits(monkeypatch)
    shop.hub.fault("reset", host="storage", at=1 << 20)
    assert shop.is_right(shop.fetch())
    assert set(waits) == {HASTY.backoff}


def test_a_moved_main_is_not_followed(shop: Shop) -> None:
    """Pinned to its commit, the old file comes though main has moved on."""
    shop.hub.push(REPO, {NAME: bytes(SIZE)})
    assert shop.is_right(shop.fetch())


def test_another_revision_is_held_against_the_same_digests(shop: Shop) -> None:
    """By the name of a branch the file comes while it is the same, and no longer when it is not."""
    assert shop.is_right(shop.fetch(revision="main"))
    shop.hub.push(REPO, {NAME: bytes(SIZE)})
    assert shop.fails(revision="main").findings[0].kind is Kind.DIFFERENT


def test_bytes_that_are_wrong_in_another_way_each_time_may_pass(shop: Shop) -> None:
    """Three times other wrong bytes end with the exit code of the network, in one finding."""
    for number in range(3):
        shop.hub.fault("flip", offset=SPAN + number, after=number, times=1)
    failed = shop.fails()
    assert type(failed) is NetworkFailed
    assert [f.kind for f in failed.findings] == [Kind.DAMAGED]


@pytest.mark.parametrize(("times", "is_outlasted"), [(2, True), (3, False)])
def test_an_answer_that_makes_no_sense_gets_two_more_tries(
    shop: Shop, times: int, is_outlasted: bool
) -> None:
    """Of a file of one span; that it is larger each time is its content."""
    digest = hashlib.sha256(b"small\n").hexdigest()
    small = replace(shop.artifact, path="small.txt", size=6, sha256=digest, blob_id=None)
    shop.hub.fault("content-range", method="GET", total=1, times=times)
    if is_outlasted:
        assert shop.fetch(artifact=small).path.read_bytes() == b"small\n"
    else:
        assert type(shop.fails(artifact=small)) is WrongContent


def test_a_source_whose_bytes_were_wrong_begins_afresh(shop: Shop) -> None:
    """Each request for the same piece is over a new connection, with a new signed URL."""
    shop.hub.fault("flip", offset=SPAN + 5)
    assert type(shop.fails()) is WrongContent
    signed = {r.path for r in shop.hub.requests(host="storage")}
    assert len(shop.hub.requests(host="hub")) == len(signed) == 3


# ---- refusals

VERDICTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], Kind, type[CsmWeightsError]]] = {
    "no token": (None, {"token": None}, Kind.NO_TOKEN, AccessRefused),
    "unknown token": (None, {"token": "hf_bad"}, Kind.UNKNOWN_TOKEN, AccessRefused),
    "terms": ({"access": "none"}, {}, Kind.TERMS, AccessRefused),
    "pending": ({"access": "pending"}, {}, Kind.PENDING, AccessRefused),
    "rejected": ({"access": "rejected"}, {}, Kind.REJECTED, AccessRefused),
    "scope": ({"can_read_gated": False}, {}, Kind.SCOPE, AccessRefused),
    "no such repository": ({}, {"repo": "org/none"}, Kind.NOT_THERE, MissingInput),
    "no such revision": ({}, {"revision": "a" * 40}, Kind.NOT_THERE, MissingInput),
    "no such file": ({}, {"path": "none.bin"}, Kind.NOT_THERE, MissingInput),
}


@pytest.mark.parametrize(("account", "how", "kind", "error"), VERDICTS.values(), ids=VERDICTS)
def test_every_refusal_has_its_verdict(
    shop: Shop,
    account: dict[str, Any] | None,
    how: dict[str, Any],
    kind: Kind,
    error: type[CsmWeightsError],
) -> None:
    """One finding, of its kind and exit code, with what helps, and without the token."""
    if account is not None:
        shop.hub.add_token("hf_asks", **account)
        how = {"token": "hf_asks"} | how
    if "path" in how:
        how = how | {"artifact": replace(shop.artifact, path=how["path"])}
        del how["path"]
    failed = shop.fails(**how)
    assert (type(failed), [f.kind for f in failed.findings]) == (error, [kind])
    assert "hf_" not in str(failed)
    finding = failed.findings[0]
    assert shop.hub.endpoint in finding.where + finding.help


def test_trouble_is_met_once_for_all_streams_of_a_file(shop: Shop) -> None:
    """A Hub that answers 503 is asked by one stream, and its verdict is that of the others."""
    fault = shop.hub.fault("status", host="hub", code=503)
    assert shop.fails().findings[0].kind is Kind.SERVER_TROUBLE
    assert fault.hits <= 10


def test_a_refusal_holds_for_the_repository(tmp_path: Path, shop: Shop) -> None:
    """A file of many pieces asks once, not once for each piece."""
    file = tmp_path / NAME
    pieces = split(file, tmp_path, "pieces", SIZE // 5, lambda _: None)
    shop.fails(token=None, artifact=pieces)
    assert len(shop.hub.log) == 1


# ---- the token


def test_the_token_goes_to_the_hub_and_nowhere_else(shop: Shop) -> None:
    """Each request to the Hub carries the token, no request to the storage host does."""
    shop.fetch()
    by_host = {host: shop.hub.requests(host=host) for host in ("hub", "storage")}
    assert all(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in by_host["hub"])
    assert by_host["storage"]
    assert not any(TOKEN in str(r.headers) + r.path for r in by_host["storage"])


def test_an_entry_in_netrc_changes_nothing(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials for both hosts in .netrc are sent to neither."""
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    shop.fetch()
    assert all("Basic" not in r.headers.get("authorization", "") for r in shop.hub.log)


def test_an_account_shows_no_token() -> None:
    """Its representation has the endpoint only."""
    assert "hf_secret" not in repr(HubCredentials("https://huggingface.co", "hf_secret"))


def test_a_storage_host_that_redirects_back_gets_no_token_sent(shop: Shop) -> None:
    """Bytes that come by way of the storage host never carry the token, wherever it sends us."""
    target = f"{shop.hub.endpoint}/elsewhere"
    shop.hub.fault("redirect", host="storage", location=target, code=302)
    shop.fails()
    elsewhere = shop.hub.requests(host="hub", contains="elsewhere")
    assert elsewhere and not any("authorization" in r.headers for r in elsewhere)


def test_no_token_is_read_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is sent, so that a library that may fail, or ask a server, is not called."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("it was asked"))
    environment = HubEnvironment.read({"HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "1"})
    assert HubCredentials.from_environment(environment).token is None


def test_a_token_that_cannot_be_exchanged_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library fails to get a token, access is refused, and its words are not repeated."""

    def fails() -> str:
        raise RuntimeError("hf_secret was refused")

    environment = HubEnvironment.read({"HF_OIDC_RESOURCE": "org"})
    monkeypatch.setattr("huggingface_hub.get_token", fails)
    with pytest.raises(AccessRefused) as caught:
        HubCredentials.from_environment(environment)
    assert "hf_secret" not in str(caught.value)

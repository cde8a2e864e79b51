"""A fleet of real nodes on loopback, in one process: what is right at the end, and the report."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text
from csm_weights.errors import Finding, Kind, MissingInput, NetworkFailed, NoSpace, SmokeFailed
from csm_weights.fleet import cluster, coordinator, node, planner, server
from csm_weights.fleet.files import Files
from csm_weights.fleet.job import Act, Answer, Job, NodeReport, Status, Task
from csm_weights.fleet.node import Node
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin
from tests.support.clone import REPOSITORY, copy_tiny
from tests.support.fleet import Fleet
from tests.support.network import be_hasty
from tests.support.schema import checked
from tests.support.servers import serving
from tests.support.toy import Toy, flip


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the nodes' folders: outside the checkout."""
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are expected, and given, more often."""
    monkeypatch.setattr(coordinator, "SILENCE", 1.5)
    monkeypatch.setattr(node, "BEAT", 0.3)
    monkeypatch.setattr(node, "PAUSE", 0.01)
    monkeypatch.setattr(node, "QUIET", 3.0)
    be_hasty(monkeypatch)


def give(toy: Toy, folder: Path) -> None:
    """Install the toy model in a folder, as a first holder has it."""
    assert apply.weights(toy.request("all", dest=str(folder)), smoke=False).error is None


def assert_right(toy: Toy, folder: Path) -> None:
    """Check the bytes of all files in a folder, and that a status trusts their receipts."""
    for artifact in toy.manifest.artifacts:
        assert (folder / artifact.path).read_bytes() == toy.good(artifact.path)
    assert apply.status(toy.request("all", dest=str(folder))).plan.is_verified


def assert_all_right(toy: Toy, fleet: Fleet, *nodes: int) -> None:
    """Check the files and reports of these nodes, or of all."""
    for number in nodes or range(fleet.job.nodes):
        report = fleet.reports[number]
        assert report.status is Status.VERIFIED, report
        assert {result.ok for result in report.gates} <= {True, None}
        assert_right(toy, fleet.folder(number))


def size_of(fleet: Fleet) -> int:
    return sum(artifact.size for artifact in fleet.job.layout.artifacts)


def assert_nothing_installed(folder: Path) -> None:
    assert [p.name for p in folder.glob("*.bin")] == []


def test_one_holder_serves_all(toy: Toy, base: Path) -> None:
    """Three nodes get every file from the one that has them; a second run moves no byte."""
    fleet = Fleet(base, toy.manifest, 4)
    give(toy, fleet.folder(0))
    fleet.run()
    assert_all_right(toy, fleet)
    assert [r.from_nodes for n, r in sorted(fleet.reports.items())] == [0, *[size_of(fleet)] * 3]
    again = Fleet(base, toy.manifest, 4)
    again.run()
    assert_all_right(toy, again)
    assert {r.from_disk for r in again.reports.values()} == {size_of(fleet)}


def test_what_nobody_has_is_fetched_once(toy: Toy, base: Path) -> None:
    """Empty nodes fetch each byte from the mirror once, all together."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 3, remote=(mirror.url,))
        fleet.run()
    assert_all_right(toy, fleet)
    assert sum(r.from_origin for r in fleet.reports.values()) == size_of(fleet)


def test_a_fleet_of_one_fetches_alone(toy: Toy, base: Path) -> None:
    """One node without others does the same as one machine."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 1, remote=(mirror.url,))
        fleet.run()
    assert_all_right(toy, fleet)


def test_what_is_on_a_nodes_own_disk_counts_first(toy: Toy, base: Path) -> None:
    """Chunk files of a checkout and a damaged copy are used; only a wrong piece is fetched."""
    fleet = Fleet(base, toy.manifest, 2)
    give(toy, fleet.folder(0))
    give(toy, fleet.folder(1))
    flip(fleet.folder(1) / "a.bin")
    for part in toy.root.glob("chunks/toy/b.bin/*"):
        part.unlink()
    (fleet.folder(1) / "b.bin").unlink()
    fleet.run(jobs={1: replace(fleet.job, root=str(toy.root))})
    assert_all_right(toy, fleet)
    assert fleet.reports[1].from_nodes == toy.artifact("b.bin").size


def test_chunk_files_that_all_nodes_share_are_read_once(toy: Toy, base: Path) -> None:
    """On a shared file system they count as the origin: no node reads what another one has."""
    fleet = Fleet(base, toy.manifest, 3, root=str(toy.root), is_shared=True)
    fleet.run()
    assert_all_right(toy, fleet)
    assert sum(r.from_origin for r in fleet.reports.values()) == size_of(fleet)
    assert sum(r.from_disk for r in fleet.reports.values()) == 0


def test_a_node_tells_the_verdict_of_its_smoke_test(tmp_path: Path, base: Path) -> None:
    """It is that of the files in its folder; without them the test is not run."""
    pytest.importorskip("torch")
    root = copy_tiny(tmp_path)
    shutil.copy(REPOSITORY / "manifests" / "csm-tiny.golden.json", root / "manifests")
    request = Request(root, "csm-tiny", dest=str(base / "tiny"))
    outcome = apply.weights(request, smoke=False)
    assert outcome.error is None
    job = Job(begin(request).manifest, ("model.safetensors",), str(root), "")
    assert node.smoke(job, str(base / "tiny")) == ("passed", ())
    verdict, findings = node.smoke(job, str(base / "nothing"))
    assert verdict == "not run" and findings


class Garbage(server.Handler):
    """A server that inverts the first byte of all that it sends."""

    def send_body(self, fd: int, start: int, end: int) -> None:
        data = bytearray(end - start)
        with open(fd, "rb", closefd=False) as file:
            file.seek(start)
            file.readinto(data)
        data[0] ^= 0xFF
        self.wfile.write(data)


class Liar(Node):
    """A node that serves wrong bytes."""

    handler = Garbage


@pytest.mark.usefixtures("hasty")
def test_a_node_that_serves_wrong_bytes_is_shut_out(toy: Toy, base: Path) -> None:
    """No wrong byte stays anywhere; the report counts the refused blocks and names the node."""
    fleet = Fleet(base, toy.manifest, 5)
    give(toy, fleet.folder(0))
    give(toy, fleet.folder(1))
    fleet.run(kinds={1: Liar})
    assert_all_right(toy, fleet)
    assert sum(r.refused for r in fleet.reports.values()) >= 2
    assert "node 1 serves no more: served wrong bytes" in fleet.coordinator.events


class FalseList(Node):
    """A holder with wrong bytes that lists their digests as if they were right."""

    def _do(self, task: Task) -> Answer:
        answer = super()._do(task)
        if task.act is Act.HASH:
            block = self.files.layout.of_piece[task.number][0]
            with self.files.open[block.artifact.path].path.open("r+b") as file:
                file.seek(block.start)
                file.write(b"wrong")
            digests = (self.files.digest(block), *answer.digests[1:])
            return replace(answer, digests=digests)
        return answer

    def _install(self) -> None:
        """Claim that all is well."""


@pytest.mark.usefixtures("hasty")
def test_a_wrong_list_of_digests_is_found_by_the_piece(toy: Toy, base: Path) -> None:
    """Its giver is shut out, and the others get the piece from the mirror."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 3, remote=(mirror.url,))
        give(toy, fleet.folder(0))
        fleet.run(kinds={0: FalseList})
    assert_all_right(toy, fleet, 1, 2)
    assert any("node 0 serves no more: gave digests" in e for e in fleet.coordinator.events)


class BadFetch(Node):
    """A node that damages the first block that it fetches, and gives its digest."""

    damaged = threading.Event()

    def _do(self, task: Task) -> Answer:
        answer = super()._do(task)
        if task.act is Act.FETCH and not self.damaged.is_set():
            self.damaged.set()
            block = self.files.layout.blocks[task.number]
            self.files.keep(block, memoryview(bytes(block.end - block.start)))
            return replace(answer, digests=(self.files.digest(block),))
        return answer


class Patient(Node):
    """A node that fetches only after that one."""

    def _do(self, task: Task) -> Answer:
        if task.act is Act.FETCH:
            BadFetch.damaged.wait(30)
        return super()._do(task)


@pytest.mark.usefixtures("hasty")
def test_a_wrong_digest_of_a_fetched_block_is_found(toy: Toy, base: Path) -> None:
    """The piece is wrong everywhere; one node fetches it whole, and the giver is shut out."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 3, remote=(mirror.url,))
        fleet.run(kinds={0: Patient, 1: BadFetch, 2: Patient})
    assert_all_right(toy, fleet)
    assert any("node 1 serves no more: gave a wrong" in e for e in fleet.coordinator.events)


@pytest.mark.usefixtures("hasty")
def test_a_wrong_manifest_installs_nothing(toy: Toy, base: Path) -> None:
    """Where the bytes are not those that are pinned, every node fails and says so."""
    artifact = toy.artifact("a.bin")
    pieces = (replace(artifact.pieces[0], sha256="0" * 64), *artifact.pieces[1:])
    others = [a for a in toy.manifest.artifacts if a is not artifact]
    wrong = replace(toy.manifest, artifacts=(replace(artifact, pieces=pieces), *others))
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, wrong, 3, remote=(mirror.url,))
        fleet.run()
    for number, report in fleet.reports.items():
        assert report.status is Status.FAILED
        assert Kind.WRONG_DIGEST in {finding.kind for finding in report.findings}
        assert_nothing_installed(fleet.folder(number))


class Quitter(Node):
    """A node whose disk is full after some blocks."""

    left = 5

    def _do(self, task: Task) -> Answer:
        self.left -= 1
        if self.left <= 0:
            raise NoSpace("the disk is full")
        return super()._do(task)


@pytest.mark.usefixtures("hasty")
def test_a_full_disk_fails_that_node_alone(toy: Toy, base: Path) -> None:
    """The others finish; a later run goes on with the blocks that arrived."""
    fleet = Fleet(base, toy.manifest, 3)
    give(toy, fleet.folder(0))
    fleet.run(kinds={2: Quitter})
    assert_all_right(toy, fleet, 0, 1)
    assert fleet.reports[2].status is Status.FAILED
    assert "the disk is full" in fleet.reports[2].findings[0].found
    assert_nothing_installed(fleet.folder(2))
    again = Fleet(base, toy.manifest, 3)
    again.run()
    assert_all_right(toy, again)
    assert again.reports[2].from_nodes <= size_of(fleet) - fleet.reports[2].from_nodes


class Hanging(Node):
    """A node that is heard of no more after some blocks, until the others are done."""

    left = 5
    others_are_done = threading.Event()

    def _beat(self, call: Callable[..., Any]) -> None:
        """Give no sign of life."""

    def _do(self, task: Task) -> Answer:
        self.left -= 1
        if self.left <= 0:
            self.others_are_done.wait(30)
        return super()._do(task)


@pytest.mark.usefixtures("hasty")
def test_a_node_that_falls_silent_is_given_up(toy: Toy, base: Path) -> None:
    """The others finish without it; it does not count as good when it is back too late."""
    fleet, ended = Fleet(base, toy.manifest, 3), list[NodeReport]()

    class Noting(Node):
        def run(self, call: Callable[..., Any]) -> NodeReport:
            ended.append(super().run(call))
            if len(ended) == 2:
                Hanging.others_are_done.set()
            return ended[-1]

    give(toy, fleet.folder(0))
    fleet.run(kinds={0: Noting, 1: Noting, 2: Hanging})
    assert_all_right(toy, fleet, 0, 1)
    assert any("node 2 gave no sign of life" in event for event in fleet.coordinator.events)


@pytest.mark.usefixtures("hasty")
def test_without_its_holder_a_fleet_says_what_is_missing(toy: Toy, base: Path) -> None:
    """Where the only holder fails and there is no source, no node waits for ever."""
    fleet = Fleet(base, toy.manifest, 3)
    give(toy, fleet.folder(0))
    fleet.run(kinds={0: Quitter})
    assert [r.status for r in fleet.reports.values()] == [Status.FAILED] * 3
    assert fleet.reports[1].findings[0].kind is Kind.MISSING
    assert "no node that is left has them" in fleet.reports[1].findings[0].found


@pytest.mark.usefixtures("hasty")
def test_the_origin_takes_over_from_a_holder_that_fails(toy: Toy, base: Path) -> None:
    """From the mirror come only blocks that no survivor holds."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 3, remote=(mirror.url,))
        give(toy, fleet.folder(0))
        fleet.run(kinds={0: Quitter})
    assert_all_right(toy, fleet, 1, 2)
    assert 0 < sum(r.from_origin for r in fleet.reports.values()) <= size_of(fleet)


def test_a_source_that_refuses_is_named(toy: Toy, base: Path) -> None:
    """Where nothing can be fetched, each node has the reason in its report."""
    (base / "empty").mkdir()
    with serving(base / "empty", ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 2, remote=(mirror.url,))
        fleet.run()
    assert [r.status for r in fleet.reports.values()] == [Status.FAILED] * 2
    assert fleet.reports[0].findings


def test_another_version_of_the_package_is_refused(toy: Toy, base: Path) -> None:
    """A node with another version fails alone, with both versions in its report."""
    fleet = Fleet(base, toy.manifest, 2)
    give(toy, fleet.folder(0))
    fleet.run(jobs={1: replace(fleet.job, version="0.0.1")})
    assert_all_right(toy, fleet, 0)
    assert fleet.reports[1].findings[0].expected == "csm-weights 0.0.1"


def test_secrets_go_only_to_nodes_that_fetch(
    toy: Toy, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three nodes one fetches; it shows the mirror what it was given, and no other gets it."""
    monkeypatch.setattr(planner, "FETCHERS", 1)
    monkeypatch.setenv("CSM_MIRROR_HEADERS", "")
    monkeypatch.delenv("CSM_MIRROR_HEADERS")
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(base, toy.manifest, 3, remote=(mirror.url,))
        fleet.coordinator.credentials = {"CSM_MIRROR_HEADERS": "X-Job: 1"}
        fleet.run()
        assert {request.headers.get("x-job") for request in mirror.gets()} == {"1"}
    assert_all_right(toy, fleet)
    given = [asyncio.run(fleet.coordinator.give_credentials(number)) for number in range(3)]
    fetched = [fleet.reports[number].from_origin > 0 for number in range(3)]
    assert [bool(found) for found in given] == fetched
    assert sum(fetched) == 1


def test_a_server_gives_verified_blocks_to_those_with_the_secret_only(tmp_path: Path) -> None:
    """Without the secret 403, without a range 416, for what is not verified 404."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:

        def find(name: str, start: int, end: int) -> int | None:
            found = (name, start, end) in (("a b/file", 2, 6), ("a b/file", 5, 20))
            return os.dup(file.fileno()) if found else None

        with server.serving("127.0.0.1", "s3cret", find) as url:

            def get(
                name: str, secret: str = "s3cret", span: str = "bytes=2-5"
            ) -> tuple[int, bytes]:
                headers = {"Authorization": f"Bearer {secret}", "Range": span}
                answer = requests.get(f"{url}/{name}", headers=headers, timeout=5)
                return answer.status_code, answer.content

            assert get("a%20b/file") == (206, b"2345")
            assert get("a%20b/file", secret="wrong") == (403, b"")
            assert get("a%20b/file", secret="") == (403, b"")
            assert get("a%20b/file", span="bytes=2-6") == (404, b"")
            assert get("../file") == (404, b"")
            assert get("a%20b/file", span="bytes=5-2") == (416, b"")
            assert get("a%20b/file", span="") == (416, b"")
            assert requests.put(url, data=b"x", timeout=5).status_code == 501
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                get("a%20b/file", span="bytes=5-19")


def test_closed_files_are_not_served(toy: Toy, base: Path) -> None:
    """After the end no descriptor is given; one given before still has the same file's bytes."""
    fleet = Fleet(base, toy.manifest, 1)
    give(toy, fleet.folder(0))
    session, layout = node.session_of(fleet.job, str(fleet.folder(0))), fleet.job.layout
    files = Files(layout, {item.artifact.path: item for item in session.inspect().artifacts})
    block = layout.of_piece[0][0]
    wanted = block.artifact.path, block.start, block.end
    assert files.find(*wanted) is None
    files.hash(0)
    fd = files.find(*wanted)
    assert fd is not None
    files.close()
    assert files.find(*wanted) is None
    data = os.pread(fd, block.end - block.start, block.start)
    os.close(fd)
    assert data == toy.good(block.artifact.path)[block.start : block.end]


def test_without_ray_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, and is a missing input."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingInput, match=r"needs Ray: .*\[fleet\]"), cluster.connected("auto"):
        pass


def test_without_a_cluster_the_error_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first line of Ray's own message is quoted."""

    def init(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore words.")

    ray = types.SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(MissingInput, match="ray start --head") as raised, cluster.connected("auto"):
        pass
    assert raised.value.findings[0].found == "Could not find any running Ray instance."


def test_the_report_has_a_line_for_each_node_and_the_worst_exit_code() -> None:
    """A node that vanished is no good node; text and JSON tell of it."""
    gone = Finding(Kind.NO_NETWORK, "", "a node until the end of the job", "its process is gone")
    reports = (
        NodeReport("node 0", "a 10.0.0.1", Status.VERIFIED, 1.0, from_nodes=5 << 20),
        NodeReport("node 1", "b 10.0.0.2", Status.LOST, 0.0, findings=(gone,)),
    )
    error = cluster.error_of("toy", reports)
    assert isinstance(error, NetworkFailed)
    assert error.findings[0].where == "node 1 (b 10.0.0.2)"
    outcome = cluster.FleetOutcome("toy", reports, 1.5, ("node 1 gave no sign of life",), error)
    shown = text.render(outcome)
    assert re.search("node 0 .*verified .*5.0 MiB", shown)
    assert re.search("node 1 .*lost", shown)
    assert "OK" not in shown.replace("NOT OK", "")
    data = checked(as_json.render(outcome, "fleet"))
    assert [node["status"] for node in data["nodes"]] == ["verified", "lost"]
    assert data["exit_code"] == 6
    smoked = (replace(reports[0], smoke="failed"),)
    assert isinstance(cluster.error_of("toy", smoked), SmokeFailed)
    assert cluster.error_of("toy", reports[:1]) is None


def test_blocks_tile_every_piece(toy: Toy) -> None:
    """The blocks of a layout cover each piece once, and files with a known text are left out."""
    layout = Job(toy.manifest, ("a.bin", "b.bin", "note.txt"), "", "").layout
    assert {a.path for a in layout.artifacts} == {"a.bin", "b.bin"}
    for number, (_, piece) in enumerate(layout.pieces):
        blocks = layout.of_piece[number]
        assert (blocks[0].start, blocks[-1].end) == (piece.offset, piece.end)
        assert all(a.end == b.start for a, b in pairwise(blocks))

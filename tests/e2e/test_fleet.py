"""A cluster of Ray on this machine, with a head and four nodes: `make test-fleet`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_weights.errors import NetworkFailed, NoSpace, WrongContent
from csm_weights.fleet import cluster, server
from csm_weights.fleet.job import Answer, Status, Task
from csm_weights.fleet.node import Node
from csm_weights.pipeline.request import Request
from tests.support.cluster import RayCluster, ray_cluster
from tests.support.schema import checked
from tests.support.servers import FileServer, serving
from tests.support.toy import Toy

pytestmark = pytest.mark.fleet
pytest.importorskip("ray")

TOKEN = "hf_GeheimFuerRay"


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head and four nodes, which all tests of this file share."""
    with ray_cluster(tmp_path_factory.mktemp("ray"), 4) as running:
        yield running


@pytest.fixture
def mirror(toy: Toy) -> Iterator[FileServer]:
    """The toy's chunk files behind a server."""
    with serving(toy.root, ranges=True) as server:
        yield server


def run(
    ray: RayCluster, toy: Toy, folder: str, *urls: str, **options: object
) -> cluster.FleetOutcome:
    """Run the toy model's job into a folder of each node, with these mirrors or without any."""
    empty = toy.root / "empty"
    empty.mkdir(exist_ok=True)
    request = Request(
        empty, str(toy.manifest.where), ("all",), source="mirror" if urls else "chunks", urls=urls
    )
    return cluster.run(request, ray.address, f"$FLEET_DIR/{folder}", **options)  # type: ignore[arg-type]


def assert_right(toy: Toy, outcome: cluster.FleetOutcome, but: int = 0) -> None:
    """Check the files of all nodes but so many."""
    good = [report for report in outcome.nodes if report.status is Status.VERIFIED]
    assert len(good) == 5 - but, outcome
    for report in good:
        for artifact in toy.manifest.artifacts:
            assert (Path(report.directory) / artifact.path).read_bytes() == toy.good(artifact.path)


def test_a_full_run_and_a_second_one(ray: RayCluster, toy: Toy, mirror: FileServer) -> None:
    """All nodes get all files, each byte leaves the mirror once; a second run moves nothing."""
    outcome = run(ray, toy, "full", mirror.url)
    assert outcome.error is None
    assert_right(toy, outcome)
    size = sum(a.size for a in toy.manifest.artifacts if a.path != "note.txt")
    assert sum(report.from_origin for report in outcome.nodes) == size
    again = run(ray, toy, "full")
    assert again.error is None
    assert {report.from_disk for report in again.nodes} == {size}
    assert max(report.seconds for report in again.nodes) < 5


class Garbage(server.Handler):
    """A server that inverts the first byte of all that it sends."""

    def send_body(self, fd: int, start: int, end: int) -> None:
        data = bytearray(os.pread(fd, end - start, start))
        data[0] ^= 0xFF
        self.wfile.write(data)


class Faulty(Node):
    """A node that has the fault that a file in its folder names."""

    count = 0

    def _do(self, task: Task) -> Answer:
        self.count += 1
        fault = Path(self._directory).with_suffix(".fault")
        if self.count > 3 and fault.exists():
            if fault.read_text() == "full":
                raise NoSpace("the disk is full")
            os.kill(os.getpid(), 9)
        time.sleep(0.05)
        return super()._do(task)


class Lying(Node):
    """A node that serves garbage where its folder is that of node 2."""

    def run(self, call):  # type: ignore[no-untyped-def]
        if "node2" in os.environ["FLEET_DIR"]:
            self.handler = Garbage
        return super().run(call)


def test_a_node_that_serves_garbage(ray: RayCluster, toy: Toy, mirror: FileServer) -> None:
    """No wrong byte stays on any node, and the event names the node."""
    outcome = run(ray, toy, "garbage", mirror.url, kind=Lying)
    assert outcome.error is None, outcome
    assert_right(toy, outcome)
    assert any("served wrong bytes" in event for event in outcome.events)
    assert sum(report.refused for report in outcome.nodes) >= 2


@pytest.mark.parametrize(
    ("fault", "error", "status"),
    [("full", NoSpace, Status.FAILED), ("killed", NetworkFailed, Status.LOST)],
)
def test_one_bad_node(
    ray: RayCluster, toy: Toy, mirror: FileServer, fault: str, error: type, status: Status
) -> None:
    """A full disk, or a killed process, fails that node alone; the exit code says so."""
    ray.folder(3).mkdir(exist_ok=True)
    ray.folder(3).joinpath(f"one-{fault}.fault").write_text(fault)
    outcome = run(ray, toy, f"one-{fault}", mirror.url, kind=Faulty)
    assert_right(toy, outcome, but=1)
    assert type(outcome.error) is error
    assert [r.status for r in outcome.nodes if r.status is not Status.VERIFIED] == [status]


def test_a_wrong_manifest(ray: RayCluster, toy: Toy, mirror: FileServer) -> None:
    """Where the bytes are not those that are pinned, no node has a file, and the code is 4."""
    text = Path(toy.manifest.where).read_text()
    wrong = toy.root / "manifests" / "wrong.toml"
    digest = toy.artifact("a.bin").pieces[0].sha256
    wrong.write_text(text.replace(digest, "0" * 64).replace('"toy"', '"wrong"'))
    request = Request(toy.root / "x", str(wrong), ("a.bin",), source="mirror", urls=(mirror.url,))
    outcome = cluster.run(request, ray.address, "$FLEET_DIR/wrong")
    assert isinstance(outcome.error, WrongContent)
    assert [report.status for report in outcome.nodes] == [Status.FAILED] * 5
    assert not (ray.folder(1) / "wrong" / "a.bin").exists()


def test_a_node_that_never_comes(
    ray: RayCluster, toy: Toy, mirror: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where six nodes are expected and five are there, the sixth is reported as lost."""
    monkeypatch.setattr(cluster, "ARRIVAL", 0.1)
    outcome = run(ray, toy, "full", mirror.url, nodes=6)
    assert [r.status for r in outcome.nodes] == [Status.VERIFIED] * 5 + [Status.LOST]
    assert isinstance(outcome.error, NetworkFailed)


def test_the_task_prints_a_line_and_an_object_for_each_node(
    ray: RayCluster, toy: Toy, mirror: FileServer
) -> None:
    """`inv fleet` ends with 0 and a table; with --json it is as its schema says.

    A token in the environment is in no file of Ray's.
    """
    environment = dict(os.environ, HF_TOKEN=TOKEN, CSM_MIRROR_HEADERS=f"X-Secret: {TOKEN}")
    program = "from csm_weights.commands.cli import main; main()"
    options = ["--model", str(toy.manifest.where), "--only=all", f"--url={mirror.url}"]
    command = [sys.executable, "-c", program, "fleet", "--address", ray.address, *options]
    command += ["--dir", "$FLEET_DIR/task"]
    elsewhere = toy.root / "elsewhere"  # where there are no chunk files
    elsewhere.mkdir()
    for form in ([], ["--json"]):
        done = subprocess.run(
            [*command, *form],
            capture_output=True,
            text=True,
            env=environment,
            cwd=elsewhere,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if form:
            result = checked(done.stdout)
            assert [node["status"] for node in result["nodes"]] == ["verified"] * 5
        else:
            assert "OK: verified on 5 nodes" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
    session = Path(ray.cluster.head_node.get_session_dir_path())
    for path in [*session.rglob("*"), *Path("/dev/shm").glob("plasma*")]:
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert any(request.headers.get("x-secret") == TOKEN for request in mirror.gets())


def test_one_machine_alone(
    toy: Toy, mirror: FileServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A cluster of one that is started for the job ends with it, and touches no other process."""
    folder = tmp_path_factory.mktemp("alone")
    bystander = subprocess.Popen(["sleep", "600"])
    program = "from csm_weights.commands.cli import main; main()"
    command = [sys.executable, "-c", program, "fleet", "--address", "local", "--model"]
    command += [
        str(toy.manifest.where),
        "--only=all",
        f"--url={mirror.url}",
        "--dir",
        str(folder / "m"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=toy.root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "m" / "a.bin").read_bytes() == toy.good("a.bin")
    assert bystander.poll() is None
    bystander.kill()

"""recipes/slurm under a real slurmctld and two slurmd: `make test-fleet`, as root."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clone import REPOSITORY
from tests.support.servers import serving
from tests.support.toy import Toy

pytestmark = pytest.mark.fleet
pytest.importorskip("ray")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
    pytest.skip("needs root, slurmctld, slurmd and munge", allow_module_level=True)

CONFIG = """ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/%n
SlurmctldPidFile={base}/controller.pid
SlurmdPidFile={base}/%n.pid
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A controller and two nodes; yields the environment of its clients."""
    for folder in ("state", "n1", "n2"):
        (tmp_path / folder).mkdir()
    config = tmp_path / "slurm.conf"
    words = {"host": socket.gethostname(), "base": tmp_path, "ports": free_ports(3)}
    config.write_text(CONFIG.format(**words))
    environment = {**os.environ, "SLURM_CONF": str(config)}
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    commands = [
        ["runuser", "-u", "munge", "--", "munged", "--foreground"],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    running = []
    try:
        for command in commands:
            log = (tmp_path / "log").open("a")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(60):
            command = ["sinfo", "-h", "-o", "%T %D"]
            shown = subprocess.run(command, env=environment, capture_output=True, text=True)
            if shown.stdout.strip() == "idle 2":
                break
            time.sleep(0.5)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def test_the_recipe_brings_a_model_to_both_nodes(
    slurm: dict[str, str], toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The job ends with 0, and with a report that has both nodes, each with a folder of its own."""
    base = tmp_path_factory.mktemp("slurm")
    programs = base / "venv" / "bin"
    programs.mkdir(parents=True)
    job = base / "job"
    job.mkdir()
    (programs / "ray").symlink_to(Path(sys.executable).parent / "ray")
    main = "from csm_weights.commands.cli import main; main()"
    (programs / "inv").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{main}" "$@"\n')
    (programs / "inv").chmod(0o755)
    environment = slurm | {
        "VENV": str(programs.parent),
        "DIR": f"{base}/nodes/$SLURMD_NODENAME",
        "PORT": str(free_ports(1)[0]),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "disabled",
    }
    recipe = str(REPOSITORY / "recipes" / "slurm" / "fleet.sbatch")
    model = ["--model", toy.manifest.where, "--only", "all"]
    with serving(toy.root, ranges=True) as mirror:
        command = ["sbatch", "--wait", "--parsable", "--nodes=2", "--cpus-per-task=1", recipe]
        command += [*model, "--url", mirror.url]
        done = subprocess.run(
            command, env=environment, cwd=job, capture_output=True, text=True, timeout=200
        )
    log = job / f"slurm-{done.stdout.strip()}.out"
    assert done.returncode == 0, log.read_text()
    report = json.loads((job / f"fleet-{done.stdout.strip()}.json").read_text())
    assert [node["status"] for node in report["nodes"]] == ["verified"] * 2
    for name in ("n1", "n2"):
        assert (base / "nodes" / name / "a.bin").read_bytes() == toy.good("a.bin")

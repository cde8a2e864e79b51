"""Run a job on a cluster of Ray: an actor for each node, one for the coordinator, and the report.

The only module that imports Ray, and only when it is called. Ray says who, where and when; the
bytes go by plain connections between the nodes.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from csm_weights.config import MIRROR_HEADERS, HubEnvironment, pip_command
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    SmokeFailed,
    SmokeUnavailable,
    error_for,
)
from csm_weights.fleet.coordinator import Coordinator, State
from csm_weights.fleet.job import Job, NodeReport, Status
from csm_weights.fleet.node import Node, smoke
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Session, begin
from csm_weights.progress import Progress
from csm_weights.store.inspect import filesystem_type
from csm_weights.transfer.policy import HUB, PieceSource

#: Seconds: between two looks at the job; until --nodes are there; until a node that is no longer
#: heard of, but whose process is there, has ended; that a smoke test may take and wait for a GPU.
LOOK = 0.5
ARRIVAL = 60.0
ENDING = 15.0
SMOKE = 1800.0

#: File systems of which all nodes see the same one: what is there is asked once, as the origin.
SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "gpfs", "beegfs", "glusterfs"})


@dataclass(frozen=True)
class FleetOutcome:
    """What became of all expected nodes; `events` are what happened on the way."""

    model: str
    nodes: tuple[NodeReport, ...]
    seconds: float
    events: tuple[str, ...]
    error: CsmWeightsError | None = None


class Agent:
    """A node as an actor of Ray."""

    def run(self, number: int, job: Job, coordinator: Any, kind: type[Node]) -> NodeReport:
        """Take part in a job; return the node's report."""
        import ray

        def call(method: str, *arguments: Any) -> Any:
            return ray.get(getattr(coordinator, method).remote(number, *arguments), timeout=60)

        return kind(job, f"node {number}", ray.util.get_node_ip_address()).run(call)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster of Ray, or start one of this machine alone; end what was started.

    Raises MissingInput where there is no Ray, or no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise MissingInput(f"inv fleet needs Ray: {pip_command('fleet')}") from None
    # Read when a cluster is started: nothing is reported to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_own = address == "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address, **options, **({"include_dashboard": False} if is_own else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        found = str(error).partition("\n")[0][:200] or "no answer"
        help_text = "ray start --head on one machine, ray start --address on the others"
        finding = Finding(Kind.NOT_THERE, address, "a cluster of Ray", found, help_text)
        advice = "For this machine alone: inv fleet --address local"
        raise error_for("there is no cluster", [finding], advice) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def run(
    request: Request,
    address: str = "auto",
    directory: str = "",
    nodes: int = 0,
    smoke_test: bool = False,
    require_gpu: bool = False,
    kind: type[Node] = Node,
) -> FleetOutcome:
    """Bring the chosen files of a model to every node of a cluster, verified.

    `directory` is where on each node, by default where one machine would install them. At least
    `nodes` nodes are expected. `kind` is the class of a node.
    """
    session = begin(request)
    started = time.monotonic()
    job = Job(
        manifest=session.manifest,
        paths=tuple(artifact.path for artifact in session.chosen),
        root=str(session.paths.root.resolve()),
        directory=directory or str(session.paths.destination.resolve()),
        source=request.source,
        urls=request.urls,
        remote=session.policy.remote,
        is_shared=_is_shared(session),
        patience=request.patience,
        secret=secrets.token_hex(32),
        version=version("csm-weights"),
        smoke=smoke_test,
        require_gpu=require_gpu,
    )
    with connected(address) as ray:
        run = _Run(ray, job, nodes, kind)
        try:
            reports = run.run(_credentials(job))
            if smoke_test:
                reports = run.smoke(reports)
        finally:
            run.close()
    seconds = time.monotonic() - started
    return FleetOutcome(
        job.manifest.name, tuple(reports), seconds, run.events, error_of(job.manifest.name, reports)
    )


def _is_shared(session: Session) -> bool:
    """Return whether there are chunk files on a file system that all nodes share."""
    if filesystem_type(session.paths.root) not in SHARED:
        return False
    origins = session.plan(Target.BOTH).origins.values()
    return any(origin.source is PieceSource.CHUNK for some in origins for origin in some)


def _credentials(job: Job) -> dict[str, str]:
    """Return the variables that nodes need to fetch as this machine would."""
    names = ("HF_ENDPOINT", MIRROR_HEADERS)
    found = {name: value for name in names if (value := os.environ.get(name))}
    if HUB in job.remote:
        from csm_weights.transfer.http.auth import HubCredentials

        if token := HubCredentials.from_environment(HubEnvironment.read()).token:
            found["HF_TOKEN"] = token
    return found


class _Run:
    """The actors of one job; `events` are what happened, for the report."""

    def __init__(self, ray: Any, job: Job, nodes: int, kind: type[Node]) -> None:
        self.ray, self.kind = ray, kind
        self.events: tuple[str, ...] = ()
        self._actors: list[Any] = []
        self.nodes = self._await(nodes)
        self.job = replace(job, nodes=max(nodes, len(self.nodes)))
        self.hosts = [f"{n['NodeManagerHostname']} {n['NodeManagerAddress']}" for n in self.nodes]

    def _await(self, count: int) -> list[dict[str, Any]]:
        """Return the nodes of the cluster, once as many as are expected are there, or in vain."""
        deadline = time.monotonic() + ARRIVAL
        while True:
            alive = [node for node in self.ray.nodes() if node["Alive"]]
            if len(alive) >= count or time.monotonic() > deadline:
                return sorted(alive, key=lambda n: (n["NodeManagerAddress"], n["NodeManagerPort"]))
            time.sleep(LOOK)

    def _on(self, node_id: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node_id, soft=False)

    def run(self, credentials: Mapping[str, str]) -> list[NodeReport]:
        """Run the job on every node; return a report for each that is expected."""
        ray, count = self.ray, self.job.nodes
        here = self._on(ray.get_runtime_context().get_node_id())
        options = {"num_cpus": 0, "max_concurrency": 4 * count + 100, "scheduling_strategy": here}
        # Ray keeps what actors are made of. Secrets are arguments of calls, which it passes on.
        made = replace(self.job, secret="")
        coordinator = ray.remote(Coordinator).options(**options).remote(made)
        self._actors.append(coordinator)
        ray.get(coordinator.trust.remote(credentials))
        running: dict[Any, int] = {}
        for number, node in enumerate(self.nodes):
            strategy = self._on(node["NodeID"])
            agent = ray.remote(Agent).options(num_cpus=0, scheduling_strategy=strategy).remote()
            self._actors.append(agent)
            running[agent.run.remote(number, self.job, coordinator, self.kind)] = number
        reports = {}
        for number in range(len(self.nodes), count):
            reports[number] = self._lost(number, "it never came")
            ray.get(coordinator.leave.remote(number, reports[number].findings))
        with _Bar(len(self.nodes), [b.end - b.start for b in self.job.layout.blocks]) as bar:
            over_since: float | None = None
            while running:
                done, _ = ray.wait(list(running), timeout=LOOK)
                for ref in done:
                    number = running.pop(ref)
                    try:
                        reports[number] = replace(ray.get(ref), host=self.hosts[number])
                    except ray.exceptions.RayError as error:
                        why = str(error).strip().partition("\n")[0][:200]
                        reports[number] = self._lost(number, why)
                        ray.get(coordinator.leave.remote(number, reports[number].findings))
                state: State = ray.get(coordinator.state.remote())
                self.events = state.events
                bar.show(state)
                over_since = over_since or (time.monotonic() if state.is_over else None)
                if over_since and time.monotonic() - over_since > ENDING:
                    for number in running.values():
                        why = "no sign of life; the other nodes are done"
                        reports[number] = self._lost(number, why)
                    break
        return [reports[number] for number in range(count)]

    def _lost(self, number: int, why: str) -> NodeReport:
        name, host = f"node {number}", self.hosts[number] if number < len(self.hosts) else ""
        help_text = "see the state of the machine, and the logs of Ray there"
        finding = Finding(Kind.NO_NETWORK, "", "a node until the end of the job", why, help_text)
        return NodeReport(name, host, Status.LOST, 0.0, self.job.directory, findings=(finding,))

    def smoke(self, reports: Sequence[NodeReport]) -> list[NodeReport]:
        """Run the smoke test on every node with the files, each in a process of its own."""
        ray, running = self.ray, {}
        for number, report in enumerate(reports):
            if report.status is Status.VERIFIED:
                node = self.nodes[number]
                gpus = 1 if node["Resources"].get("GPU") else 0
                strategy = self._on(node["NodeID"])
                options = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy}
                task = ray.remote(smoke).options(max_retries=0, **options)
                running[number] = task.remote(replace(self.job, secret=""), report.directory)
        tested = list(reports)
        deadline = time.monotonic() + SMOKE
        for number, ref in running.items():
            try:
                verdict, findings = ray.get(ref, timeout=max(1, deadline - time.monotonic()))
            except (ray.exceptions.RayError, TimeoutError) as error:
                ray.cancel(ref, force=True)
                words = ("a smoke test that ends", str(error).partition("\n")[0][:200])
                verdict, findings = "not run", (Finding(Kind.NOT_INSTALLED, "", *words),)
            known = (*tested[number].findings, *findings)
            tested[number] = replace(tested[number], smoke=verdict, findings=known)
        return tested

    def close(self) -> None:
        """End the actors of this job, and nothing else."""
        for actor in self._actors:
            with suppress(Exception):
                self.ray.kill(actor)


class _Bar:
    """The progress of a fleet: nodes that are done, bytes of all, the slowest node."""

    def __init__(self, nodes: int, sizes: Sequence[int]) -> None:
        self._nodes = nodes
        self._size = sum(sizes) / max(1, len(sizes))
        self._count, self._shown = len(sizes), 0
        self._progress = Progress(self._label(0, ""), sum(sizes) * nodes)

    def _label(self, done: int, slowest: str) -> str:
        return f"fleet: {done} of {self._nodes} nodes done{slowest}"

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def show(self, state: State) -> None:
        """Show the state."""
        have = dict(enumerate(state.have[: self._nodes]))
        working = {n: count for n, count in have.items() if n not in state.given_up}
        slowest, least = "", min(working, key=working.__getitem__, default=None)
        if least is not None and working[least] < self._count:
            slowest = f", slowest node {least} at {working[least] / self._count:.0%}"
        self._progress.rename(self._label(state.installed, slowest))
        done = round(sum(have.values()) * self._size)
        self._progress.advance(done - self._shown)
        self._shown = done


def error_of(model: str, reports: Sequence[NodeReport]) -> CsmWeightsError | None:
    """Return the one error for all nodes that are not good."""
    bad = [report for report in reports if report.status is not Status.VERIFIED]
    findings = [
        replace(f, where=f"{report.node} ({report.host}): {f.where}".removesuffix(": "))
        for report in reports
        for f in report.findings
    ]
    good = len(reports) - len(bad)
    message = f"{model}: verified on {good} of {len(reports)} nodes"
    if bad:
        return error_for(message, findings)
    failed = [report for report in reports if report.smoke not in ("", "passed")]
    if failed:
        message = f"{message}; the smoke test passed on {len(reports) - len(failed)}"
        if any(report.smoke == "failed" for report in failed):
            return SmokeFailed(message, findings)
        return SmokeUnavailable(message, findings)
    return None

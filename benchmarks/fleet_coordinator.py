"""Measure a fleet's coordinator: `python -m benchmarks.fleet_coordinator [--nodes 64]`.

Actors of Ray on this machine ask the coordinator for tasks as nodes do, and answer each at once,
without moving a byte. What they take is then the cost of decisions and of calls alone.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from typing import Any

from benchmarks.common import ROOT
from csm_weights.fleet.coordinator import Coordinator
from csm_weights.fleet.job import Act, Answer, Hello, Job, Result, Task
from csm_weights.manifest.types import Artifact, Manifest

#: Bytes of the file that is not there; the layout of its blocks is that of CSM-1B's.
SIZE = 6_211_186_784


class Measured(Coordinator):
    """A coordinator that tells what it has cost."""

    async def processor_seconds(self) -> float:
        """Return the processor time of this process."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime


class Caller:
    """A node that answers at once."""

    def ready(self) -> None:
        """Return once the process is there."""

    def run(self, number: int, job: Job, coordinator: Any, has_all: bool) -> int:
        """Do tasks until the job is over; return how many pulls there were."""
        import ray

        pulls, layout = [0, 0], job.layout

        def call(method: str, *arguments: Any) -> Any:
            return ray.get(getattr(coordinator, method).remote(number, *arguments))

        def slot(is_first: bool) -> None:
            answer: Answer | None = None
            while True:
                task: Task = call("next", is_first, answer)
                answer = None
                if task.act is Act.LEAVE:
                    return
                if task.act is Act.INSTALL:
                    call("installed")
                    if not is_first:
                        return
                elif task.act is Act.HASH:
                    digests = tuple(str(b.number) for b in layout.of_piece[task.number])
                    answer = Answer(task, Result.DONE, digests)
                elif task.act is not Act.WAIT:
                    pulls[is_first] += 1
                    answer = Answer(task, Result.DONE, (str(task.number),))

        pieces = tuple(range(len(layout.pieces))) if has_all else ()
        call("join", Hello(f"http://{number}", pieces, (), ()))
        slots = [threading.Thread(target=slot, args=(first,)) for first in (True, False)]
        for one in slots:
            one.start()
        for one in slots:
            one.join()
        return sum(pulls)


def main() -> None:
    """Run one job of callers and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    nodes = parser.parse_args().nodes
    import ray

    artifact = Artifact("model.safetensors", "safetensors", "safetensors", SIZE, "0" * 64)
    manifest = Manifest("csm", "output/csm", "models/csm", (artifact,))
    job = Job(manifest, (artifact.path,), "", "", nodes=nodes)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", runtime_env=environment)  # fmt: skip
    options = {"num_cpus": 0, "max_concurrency": 4 * nodes + 100}
    coordinator = ray.remote(Measured).options(**options).remote(job)
    callers = [ray.remote(Caller).options(num_cpus=0).remote() for _ in range(nodes)]
    ray.get([caller.ready.remote() for caller in callers])
    before, started = ray.get(coordinator.processor_seconds.remote()), time.perf_counter()
    running = [c.run.remote(n, job, coordinator, n == 0) for n, c in enumerate(callers)]
    pulls = sum(ray.get(running))
    seconds = time.perf_counter() - started
    used = ray.get(coordinator.processor_seconds.remote()) - before
    ray.shutdown()
    print(
        f"{nodes} actors, {len(job.layout.blocks)} blocks: {pulls:,} pulls in {seconds:.1f} s,"
        f" {pulls / seconds:,.0f} a second; the coordinator's process took"
        f" {1000 * used / pulls:.2f} ms each"
    )


if __name__ == "__main__":
    main()

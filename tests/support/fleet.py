"""A fleet in one process: real nodes with real servers on loopback, and the real coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from csm_weights.fleet.coordinator import Coordinator, State
from csm_weights.fleet.job import Job, NodeReport
from csm_weights.fleet.node import Node
from csm_weights.manifest.types import Manifest


class Fleet:
    """Nodes 0, 1, ... with folders of their own below `base`, and a coordinator on a thread."""

    def __init__(self, base: Path, manifest: Manifest, nodes: int, **options: Any) -> None:
        paths = tuple(artifact.path for artifact in manifest.artifacts)
        self.base = base
        common = {"root": str(base / "none"), "secret": "s3cret", "version": "0.1.0"}
        self.job = Job(manifest, paths, directory="", nodes=nodes, **(common | options))
        self.reports: dict[int, NodeReport] = {}
        self.loop = asyncio.new_event_loop()
        self.coordinator = Coordinator(self.job)

    def folder(self, node: int) -> Path:
        """Return the folder of a node's files."""
        return self.base / f"node{node}"

    def call(self, node: int, method: str, *args: Any) -> Any:
        """Call a method of the coordinator on behalf of a node, and wait for its answer."""
        called = getattr(self.coordinator, method)(node, *args)
        return asyncio.run_coroutine_threadsafe(called, self.loop).result(30)

    def state(self) -> State:
        """Return the coordinator's state."""
        return asyncio.run_coroutine_threadsafe(self.coordinator.state(), self.loop).result(30)

    def run(
        self,
        kinds: Mapping[int, type[Node]] | None = None,
        jobs: Mapping[int, Job] | None = None,
        around: Callable[[int, Callable[..., Any]], Callable[..., Any]] = lambda _, call: call,
    ) -> dict[int, NodeReport]:
        """Run all nodes to their ends; return their reports.

        `kinds` and `jobs` are other classes and jobs of single nodes; `around` wraps their calls.
        """
        looping = threading.Thread(target=self.loop.run_forever, daemon=True)
        looping.start()

        def one(node: int) -> None:
            job = (jobs or {}).get(node, self.job)
            job = replace(job, directory=job.directory or str(self.folder(node)))
            made = (kinds or {}).get(node, Node)(job, f"node {node}", "127.0.0.1")
            call = around(node, lambda method, *args: self.call(node, method, *args))
            self.reports[node] = made.run(call)

        threads = [threading.Thread(target=one, args=(n,)) for n in range(self.job.nodes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), self.state()
        self.loop.call_soon_threadsafe(self.loop.stop)
        looping.join()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(task)
        self.loop.close()
        return self.reports

"""A cluster of Ray on this machine: a head and nodes, each with a folder of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class RayCluster:
    """A running cluster: node N has its folder, `FLEET_DIR` for the processes on it."""

    base: Path
    address: str
    cluster: Any
    nodes: list[Any]

    def folder(self, node: int) -> Path:
        """Return the folder of a node, 0 being the head."""
        return self.base / f"node{node}"


@contextlib.contextmanager
def ray_cluster(base: Path, nodes: int) -> Iterator[RayCluster]:
    """Start a head and further nodes; end them, and nothing else."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    started = []
    try:
        for number in range(nodes + 1):
            options = {"include_dashboard": False} if number == 0 else {}
            started.append(
                cluster.add_node(
                    num_cpus=1,
                    object_store_memory=80 << 20,
                    env_vars={"FLEET_DIR": str(base / f"node{number}")},
                    **options,
                )
            )
        cluster.wait_for_nodes()
        yield RayCluster(base, cluster.address, cluster, started)
    finally:
        cluster.shutdown()

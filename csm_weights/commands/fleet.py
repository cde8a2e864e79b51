"""Bring a model to every node of a cluster of Ray, verified."""

from csm_weights.errors import UsageError
from csm_weights.fleet import cluster
from csm_weights.pipeline.request import Request


def fleet(
    request: Request,
    address: str = "auto",
    dir: str = "",
    nodes: int = 0,
    smoke: bool = False,
    require_gpu: bool = False,
) -> cluster.FleetOutcome:
    """Run the job on the cluster at an address; see `cluster.run`.

    Raises UsageError for a folder that nodes could not find.
    """
    if dir and not dir.startswith(("/", "~", "$")):
        raise UsageError(f"--dir {dir!r} is relative; give an absolute path, or ~/... or $NAME/...")
    if nodes < 0:
        raise UsageError(f"--nodes {nodes} is not a number of nodes")
    return cluster.run(request, address, dir, nodes, smoke or require_gpu, require_gpu)

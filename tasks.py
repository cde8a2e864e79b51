"""The tasks of csm-weights: `inv --list` shows them, `inv --help TASK` explains one."""

from __future__ import annotations

from pathlib import Path

from csm_weights.commands.cli import collection, task


@task(name="which stand-in: csm-1b-standin (12.4 GB) or csm-tiny")
def standin(root: Path, name: str = "csm-1b-standin", dry: bool = False) -> object:
    """Write a stand-in of CSM-1B with random weights, its parts and manifest."""
    from tools.standin import make_standin

    return make_standin(root, name, dry)


namespace = collection(Path(__file__).resolve().parent, standin)

"""The tasks of csm-weights: `inv --list` shows them, `inv --help TASK` explains one."""

from __future__ import annotations

import sys
from pathlib import Path

# Invoke lets Python keep no bytecode; without it each call would compile all modules anew.
sys.dont_write_bytecode = bool(sys.flags.dont_write_bytecode)

from csm_weights.commands.cli import collection  # noqa: E402
from csm_weights.commands.program import start  # noqa: E402
from csm_weights.commands.task import task  # noqa: E402


@task("dry", name=("csm-1b-standin", "the stand-in: csm-1b-standin (12.4 GB) or csm-tiny"))
def standin(root: Path, name: str, dry: bool) -> object:
    """Write a stand-in of CSM-1B with random weights: chunk files and manifest."""
    sys.path.append(str(ROOT))
    from tools.standin import make_standin

    sys.path.remove(str(ROOT))
    return make_standin(root, name, dry)


ROOT = Path(__file__).resolve().parent
namespace = collection(ROOT, standin)

# This folder takes the files of models; nothing else is imported from it.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

if Path(sys.argv[0]).name in ("inv", "invoke") or sys.argv[0].endswith("invoke/__main__.py"):
    start(namespace)

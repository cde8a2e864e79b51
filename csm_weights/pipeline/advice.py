"""Advice: the ways to get what is missing, and to go on without it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from csm_weights.files import read_bounded
from csm_weights.manifest.types import Artifact
from csm_weights.store.inspect import FileState
from csm_weights.transfer.policy import SourcePolicy

if TYPE_CHECKING:
    from csm_weights.pipeline.plan import Plan

#: Most bytes read of .gitattributes.
MAX_ATTRIBUTES = 1 << 16


def way_around(artifacts: Iterable[Artifact]) -> str:
    """Return how to go on with these files alone, where weights are among them."""
    by_path = {artifact.path: artifact for artifact in artifacts}
    if not any(artifact.is_weights for artifact in by_path.values()):
        return ""
    return f"No file was installed. To go on without the rest: --only={','.join(by_path)}"


def ways_to_get(plan: Plan, policy: SourcePolicy) -> str:
    """Return the ways to get the first file that the plan cannot get, in a few lines."""
    possible = {action.artifact.path for action in plan.actions}
    items = [item for item in plan.state.artifacts if item.artifact.path not in possible]
    wanted = [i.artifact for i in items if i.installed.state is not FileState.VERIFIED]
    if not wanted:
        return ""
    manifest, command = plan.state.manifest, plan.state.paths.command("weights")
    artifact = next((artifact for artifact in wanted if artifact.is_weights), wanted[0])
    ways = []
    if artifact.pieces:
        folder = PurePosixPath(artifact.pieces[0].part).parent
        is_lfs = _is_lfs(plan.state.paths.root, artifact.pieces[0].part)
        git = "git lfs pull" if is_lfs else f"git restore {folder}"
        ways = [f"chunk files: put them in {folder}/; in a clone that has them, {git}"]
    if manifest.repo:
        first = next((f"{problem.help}, then " for problem in policy.problems if problem.help), "")
        ways.append(f"the Hub: {first}{command} --source=hf")
    ways += [
        f"a mirror: {command} --source=mirror --url=https://...",
        f"a copy from anywhere: put it at {manifest.staging}/{artifact.path}",
    ]
    lines = [f"  {number}. {way}" for number, way in enumerate(ways, start=1)]
    last = "Then run the same command again: every file is verified before it is used."
    return "\n".join([f"Ways to get {artifact.path}:", *lines, last])


def _is_lfs(root: Path, path: str) -> bool:
    """Return whether git-lfs keeps a file of the checkout, by its attributes."""
    try:
        lines = read_bounded(root / ".gitattributes", MAX_ATTRIBUTES).decode(errors="replace")
    except OSError:
        return False
    kept = [words[0] for line in lines.splitlines() if "filter=lfs" in (words := line.split())]
    names = (path, PurePosixPath(path).name)
    return any(fnmatch.fnmatch(name, pattern) for pattern in kept for name in names)

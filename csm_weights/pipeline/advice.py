"""Advice: the ways to get what is missing, and to go on without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from csm_weights.manifest.types import Artifact
from csm_weights.store.inspect import FileState, State
from csm_weights.transfer.policy import SourcePolicy


def way_around(artifacts: Iterable[Artifact]) -> str:
    """Return how to go on with these files alone, where weights are among them."""
    by_path = {artifact.path: artifact for artifact in artifacts}
    if not any(artifact.is_weights for artifact in by_path.values()):
        return ""
    return f"No file was installed. To go on without the rest: --only {','.join(by_path)}"


def ways_to_get(state: State, policy: SourcePolicy) -> str:
    """Return the ways to get the first file that is missing, in a few lines."""
    wanted = [s.artifact for s in state.artifacts if s.installed.state is not FileState.VERIFIED]
    if not wanted:
        return ""
    manifest, artifact = state.manifest, next((a for a in wanted if a.is_weights), wanted[0])
    ways = []
    if artifact.pieces:
        folder = Path(artifact.pieces[0].part).parent.as_posix()
        ways = [f"chunk files: put them in {folder}/; in a clone that has them, git lfs pull"]
    if manifest.repo:
        first = next((f"{problem.help}, then " for problem in policy.problems if problem.help), "")
        ways.append(f"the Hub: {first}inv weights --model {manifest.name} --source=hf")
    ways += [
        f"a mirror: inv weights --model {manifest.name} --source=mirror --url=https://...",
        f"a copy from anywhere: put it at {manifest.staging}/{artifact.path}",
    ]
    lines = [f"  {number}. {way}" for number, way in enumerate(ways, start=1)]
    last = "Then run the same command again: every file is verified before it is used."
    return "\n".join([f"Ways to get {artifact.path}:", *lines, last])

"""The steps of the GitHub Action in action.yml: choose what to fetch, then fetch and verify it.

The steps run as `python -m csm_weights.commands.action choose` and `fetch`, in the
folder of the checkout. What they are asked for, and GitHub's own settings, are
variables of the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csm_weights.commands import console, reports
from csm_weights.commands.render import github
from csm_weights.commands.task import make_request
from csm_weights.errors import Kind, UsageError
from csm_weights.files import read_file
from csm_weights.manifest.render import render
from csm_weights.pipeline import apply, smoke_test
from csm_weights.pipeline.actions import total
from csm_weights.pipeline.plan import Plan, Target
from csm_weights.pipeline.request import Request, find_manifest
from csm_weights.pipeline.session import Outcome, Session, begin

#: Bytes that GitHub keeps of all caches of a repository.
CACHE_LIMIT = 10_000_000_000

#: Most bytes of the file with a run's event.
MAX_EVENT = 64 << 20

#: The model with CSM's architecture whose chunk files come with this action.
TINY = "csm-tiny"


def main() -> None:
    """Run the step that is named on the command line."""
    os.environ[console.TYPED] = "csm-weights"
    step = {"choose": choose, "fetch": fetch}[sys.argv[1]]
    root, model = Path.cwd(), os.environ["INPUT_MODEL"]
    sys.exit(console.run(lambda: step(root, os.environ), command=sys.argv[1], model=(root, model)))


def choose(root: Path, environ: Mapping[str, str]) -> str:
    """Decide which model a job gets, and which of its files come from the cache of GitHub.

    A pull request from a fork has no secrets. Where only a token is missing,
    it gets the tiny model, and a notice is returned. Any other job is left to ask the
    Hub, and to fail unless the cache has all files: it must not pass with another model.
    """
    request, notices = _request(root, environ), list[str]()
    session, plan = _planned(request)
    if _lacks_only_a_token(session, plan):
        instead = {"INPUT_SOURCE": "hf"}
        if is_from_fork(environ):
            title = f"{session.manifest.name} needs a token"
            words = f"no secrets are given to this pull request, so {TINY} takes its place:"
            words += " a random model of the same architecture"
            notices.append(github.notice(title, words))
            instead = {"INPUT_MODEL": TINY, "INPUT_ONLY": "", "INPUT_SOURCE": "auto"}
        request = _request(root, {**environ, **instead})
        session, plan = _planned(request)
    chosen = {"model": request.model, "only": ",".join(request.only), "source": request.source}
    is_remote = bool(plan.findings) or total(plan.actions, "fetched") > 0
    if _is_true(environ, "INPUT_CACHE") and is_remote:
        cached, left_out = _cached(session)
        paths = [str(session.paths.destination / path) for path in cached]
        name, digest = session.manifest.name, _digest(session)
        keys = {"key": f"csm-weights-{name}-{digest}", "older": f"csm-weights-{name}-"}
        chosen |= keys | {"paths": "\n".join(paths)}
        if left_out:
            words = f"more than the {CACHE_LIMIT:,} bytes of all caches: {', '.join(left_out)}"
            notices.append(github.notice("fetched anew by every job", words))
    _output(environ, chosen)
    return "\n".join(notices)


def fetch(root: Path, environ: Mapping[str, str]) -> Outcome:
    """Fetch what is missing, verify all of it, and tell the job where it is."""
    outcome = apply.weights(_request(root, environ), smoke=False)
    if not outcome.error:
        files = [(item.artifact.path, item.installed.receipt) for item in outcome.state.artifacts]
        digests = {path: receipt.sha256 for path, receipt in files if receipt}
        path = str(outcome.state.paths.destination)
        _output(environ, {"path": path, "digests": json.dumps(digests)})
    return outcome


def is_from_fork(environ: Mapping[str, str]) -> bool:
    """Return whether a run is of a pull request without secrets: of a fork, or Dependabot's."""
    if environ.get("GITHUB_EVENT_NAME") != "pull_request":
        return False
    if environ.get("GITHUB_ACTOR") == "dependabot[bot]":
        return True
    data = read_file(Path(environ.get("GITHUB_EVENT_PATH", "")), MAX_EVENT, "the event of a run")
    try:
        ends: Any = json.loads(data)["pull_request"]
        head, base = (ends[end]["repo"] or {} for end in ("head", "base"))
        return bool(head.get("full_name") != base["full_name"])  # a fork may be gone
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _request(root: Path, environ: Mapping[str, str]) -> Request:
    """Return what the inputs ask for, in the folder that GitHub empties after a job.

    Files of the checkout count, and chunk files in the checkout of this action.
    """
    model, only, source = (environ[f"INPUT_{name}"] for name in ("MODEL", "ONLY", "SOURCE"))
    folder = Path(environ["RUNNER_TEMP"]) / "csm-weights"
    name = find_manifest(root, model).name
    asked = {"dest": str(folder / "models" / name), "staging": str(folder / "unfinished" / name)}
    own = Path(environ["GITHUB_ACTION_PATH"]).resolve().as_uri()
    url = [own] if source == "auto" else []
    return make_request(root, model=model, only=only, source=source, url=url, **asked)


def _planned(request: Request) -> tuple[Session, Plan]:
    session = begin(request)
    return session, session.plan(Target.BOTH)


def _lacks_only_a_token(session: Session, plan: Plan) -> bool:
    """Return whether a CSM could be fetched with a token, and cannot without."""
    is_asked_for = any(problem.kind is Kind.NO_TOKEN for problem in session.policy.problems)
    return bool(plan.findings) and is_asked_for and smoke_test.is_for(session.manifest)


def _cached(session: Session) -> tuple[list[str], list[str]]:
    """Return the paths of the chosen files that fit into the caches, and of those that do not."""
    fitting, left_out, size = list[str](), list[str](), 0
    for artifact in session.chosen:
        fits = size + artifact.size <= CACHE_LIMIT
        (fitting if fits else left_out).append(artifact.path)
        size += artifact.size if fits else 0
    return fitting, left_out


def _digest(session: Session) -> str:
    """Return the digest of the manifest and of the choice among its files."""
    chosen = "\n".join(artifact.path for artifact in session.chosen)
    return hashlib.sha256(f"{render(session.manifest)}\n{chosen}".encode()).hexdigest()[:32]


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    if (word := environ[name]) not in ("true", "false"):
        raise UsageError(f"the input cache is true or false, not {word!r}")
    return word == "true"


def _output(environ: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Set outputs of this step; a value may have several lines."""
    mark = f"end-{uuid.uuid4()}"
    lines = [f"{name}<<{mark}\n{value}\n{mark}\n" for name, value in values.items()]
    reports.append(Path(environ["GITHUB_OUTPUT"]), "".join(lines))


if __name__ == "__main__":
    main()

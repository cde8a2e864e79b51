"""The order of things: inspect the disk, plan, apply, inspect again.

Every round takes the cheapest kind of action that the plan has, and carries
what it found out into the next inspection: a file whose hash was wrong is
planned around.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from csm_weights.errors import Category, CsmWeightsError, Finding, Kind, error_for
from csm_weights.files import read_bounded
from csm_weights.pipeline import smoke_test
from csm_weights.pipeline.actions import Action, Keep, way_around
from csm_weights.pipeline.plan import Plan, Target
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, Session, StatusReport, begin, gate_error
from csm_weights.progress import Progress, label_for
from csm_weights.store.inspect import FileState
from csm_weights.store.leftovers import leftovers
from csm_weights.store.lock import locked
from csm_weights.transfer.policy import SourcePolicy
from csm_weights.verify import gates


def status(request: Request, check: bool = False) -> StatusReport:
    """Return what is here and what `weights` would do; the content of no file is read.

    With `check` the report has an error unless everything is verified and in
    place, and passes the gates: they read the headers of weights.
    """
    return status_of(begin(request), check)


def status_of(session: Session, check: bool = False) -> StatusReport:
    """Return the status of a session; see `status`."""
    plan = session.plan(Target.BOTH)
    advice = _ways_to_get(plan, session.policy) if _is_missing(plan.findings) else ""
    report = StatusReport(plan.state, plan, advice)
    if not check:
        return report
    if plan.is_verified:
        results = _gate_all(session, plan)
        if error := gate_error(results):
            refused = frozenset(result.path for result in results if result.ok is False)
            return replace(report, error=error, refused=refused)
    if plan.is_done:
        return report
    steps: dict[str, list[Action]] = {}
    for action in plan.actions:
        if not isinstance(action, Keep):
            steps.setdefault(action.artifact.path, []).append(action)
    to_do = []
    for path, actions in steps.items():
        kind, found = Kind.MISSING, f"still to do: {', then '.join(a.verb for a in actions)}"
        if any(action.file.receipt for action in actions):
            kind, found = Kind.EDITED, f"another size or time of change; {found}"
        help_text = plan.state.paths.command("weights")
        to_do.append(Finding(kind, path, "a verified, installed file", found, help_text))
    findings = [*plan.findings, *plan.notes, *to_do]
    return replace(report, error=error_for("not everything is verified", findings))


def plan(request: Request, target: Target) -> StatusReport:
    """Return what `apply` would do: a dry run, in which the content of no file is read.

    Raises the error of what stands in the way, as far as that shows without reading.
    """
    session = begin(request)
    made = session.plan(target)
    _require(made, made.findings, session)
    return StatusReport(made.state, made)


def apply(request: Request, target: Target) -> Outcome:
    """Bring the chosen artifacts where `target` wants them, verified.

    Raises the error of what stands in the way; nothing that was good is lost.
    """
    return run(begin(request), target)


def weights(
    request: Request, smoke: bool = True, require_gpu: bool = False, require_fast: bool = False
) -> Outcome:
    """Fetch, install, gate and smoke-test a model; a second run has nothing to do.

    Without weights among what is chosen there is nothing to smoke-test, and for
    models other than CSM there is no smoke test.
    """
    session = begin(request)
    outcome = run(session, Target.BOTH)
    outcome = replace(outcome, results=session.gate(outcome.state, rehash=False))
    if error := gate_error(outcome.results):
        return replace(outcome, error=error)
    if not smoke or not any(item.artifact.is_weights for item in outcome.state.artifacts):
        return outcome
    if not smoke_test.is_for(session.manifest):
        Progress("smoke").log("there is no smoke test for this model; it is not run")
        return outcome
    if known := smoke_test.known_report(outcome.state, require_gpu, require_fast):
        return replace(outcome, smoke=known, smoke_is_known=True)
    return smoke_test.run(outcome, require_gpu=require_gpu, require_fast=require_fast)


def run(session: Session, target: Target) -> Outcome:
    """Apply the plan of a session, a round at a time; see `apply`."""
    is_staged = target is Target.STAGED
    for _ in range(3):  # another run may be moving what is missing just then
        plan = session.plan(target)
        if not plan.findings:
            break
    _require_all(plan, session)
    if plan.is_done and not leftovers(plan.state, is_staged):
        return Outcome(plan.state, notes=plan.notes)
    done: list[Action] = []
    with locked(session.paths, with_destination=not is_staged):
        for _ in range(12):  # more are needed only where something else keeps changing the files
            plan = session.plan(target)
            session.notes += plan.notes
            _require_all(plan, session)
            if not plan.ready:
                is_tidied = session.remove_leftovers(plan.state, is_staged)
                state = session.inspect() if is_tidied else plan.state
                return Outcome(state, tuple(done), tuple(dict.fromkeys(session.notes)))
            if plan.is_verified and (error := gate_error(_gate_all(session, plan))):
                raise error
            kind, paths = type(plan.ready[0]), [action.artifact.path for action in plan.ready]
            with Progress(label_for(kind.verb.partition(",")[0], paths)):
                kind.apply(plan.ready, session)
            done += plan.ready
    raise CsmWeightsError("the files keep changing; is another program writing to them?")


def _gate_all(session: Session, plan: Plan) -> Sequence[gates.GateResult]:
    """Run the gates over files before they are moved: where one fails, none is installed."""
    return session.gate(plan.state, rehash=False, staged=True)


def _is_missing(findings: Iterable[Finding]) -> bool:
    """Check whether all that stands in the way is that something is not here."""
    return {finding.kind.category for finding in findings} == {Category.MISSING}


def _require_all(plan: Plan, session: Session) -> None:
    """Raise what stands in the way, with what hashing finds wrong with other chunk files.

    Someone who has to mend one chunk file is told of all that have to be mended.
    """
    if not plan.findings:
        return
    blocked = {finding.where for finding in plan.findings}
    pairs = [
        (piece, part.path)
        for item in plan.state.artifacts
        if blocked.intersection(p.part for p in item.artifact.pieces)
        for piece, part in zip(item.artifact.pieces, item.chunks, strict=True)
        if part.state is FileState.UNVERIFIED
    ]
    with Progress("verifying the chunk files", sum(p.size for p, _ in pairs)) as progress:
        wrong = gates.check_chunk_files(pairs, progress.advance)
    _require(plan, [*plan.findings, *wrong], session)


def _require(plan: Plan, findings: Sequence[Finding], session: Session) -> None:
    """Raise what stands in the way of a plan, with the ways out of it."""
    name = session.manifest.name
    if _is_missing(findings):
        ways = _ways_to_get(plan, session.policy)
        raise error_for(f"{name}: not all files are here", findings, ways)
    if findings:
        possible = {action.artifact.path: action.artifact for action in plan.actions}
        is_way = len(possible) < len(plan.state.artifacts)
        advice = way_around(possible.values()) if is_way else ""
        raise error_for(f"{name}: cannot be completed", findings, advice)


def _ways_to_get(plan: Plan, policy: SourcePolicy) -> str:
    """Return the ways to get the first file that the plan cannot get, in a few lines."""
    possible = {action.artifact.path for action in plan.actions}
    wanted = [i.artifact for i in plan.state.artifacts if i.artifact.path not in possible]
    manifest, paths = plan.state.manifest, plan.state.paths
    command, staging = paths.command("weights"), paths.staging
    if staging.is_relative_to(paths.root):
        staging = staging.relative_to(paths.root)
    artifact = next((artifact for artifact in wanted if artifact.is_weights), wanted[0])
    ways = []
    if artifact.pieces:
        part = PurePosixPath(artifact.pieces[0].part)
        attributes = ""
        with contextlib.suppress(OSError):
            path = paths.root / ".gitattributes"
            attributes = read_bounded(path, 1 << 16).decode(errors="replace")
        words = [line.split() for line in attributes.splitlines() if "filter=lfs" in line.split()]
        names = (str(part), part.name)
        is_lfs = any(fnmatch.fnmatch(name, pattern) for pattern, *_ in words for name in names)
        git = "git lfs pull" if is_lfs else f"git restore {part.parent}"
        ways = [f"chunk files: put them in {part.parent}/; in a clone that has them, {git}"]
    if manifest.repo:
        first = next((f"{problem.help}, then " for problem in policy.problems if problem.help), "")
        ways.append(f"the Hub: {first}{command} --source=hf")
    ways += [
        f"a mirror: {command} --source=mirror --url=https://...",
        f"a disk: insert it, then {command} --url=file:///... with its folder",
        f"a copy from anywhere: put it at {staging / artifact.path}",
    ]
    lines = [f"  {number}. {way}" for number, way in enumerate(ways, start=1)]
    last = "Then run the same command again: every file is verified before it is used."
    return "\n".join([f"Ways to get {artifact.path}:", *lines, last])

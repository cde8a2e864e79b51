"""Look, plan, act, look again: the only module that knows the order of things.

Every acting command repeats one round until nothing is left to do: look at
the disk, plan, and take the cheapest kind of step there is. What a round
found out by hashing is carried into the next look, so a file that was
refuted is planned around, not stumbled over.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import Category, CsmWeightsError, Finding, Kind, error_for
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.pipeline import smoke_test, sources
from csm_weights.pipeline.outcome import Outcome, StatusReport
from csm_weights.pipeline.plan import Plan, Step, Target, Verb
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Session, begin, gate_error
from csm_weights.progress import Progress, label_for
from csm_weights.store import atomic, install, receipts
from csm_weights.store.inspect import (
    ArtifactState,
    FileState,
    FileStatus,
    State,
    holds_consumed,
    leftovers,
    unfinished,
)
from csm_weights.store.lock import NAME, are_real, locked
from csm_weights.store.receipts import Receipt
from csm_weights.transfer import consume
from csm_weights.transfer.assemble import Assembly, VerifiedFile, assemble, write_text
from csm_weights.transfer.local import WholeFile
from csm_weights.transfer.source import Source, first_of
from csm_weights.verify import gates

#: More rounds than this mean that something else keeps changing the files.
MAX_ROUNDS = 12

#: Looks until what is missing is believed to be: another run may be moving it just then.
LOOKS = 3

#: Seconds until a run that another one has overtaken looks again.
PATIENCE = 0.1


def weights(request: Request, smoke: bool = True, require_gpu: bool = False) -> Outcome:
    """The whole line: fetch, place, gate, smoke; a second run has nothing to do.

    Without weights among what is chosen there is nothing to smoke-test, and for
    models other than CSM there is no smoke test.
    """
    session = begin(request)
    outcome = _apply(session, Target.BOTH)
    outcome = replace(outcome, results=session.gate(outcome.state, rehash=False))
    if error := gate_error(outcome.results):
        return replace(outcome, error=error)
    if not smoke or not any(item.artifact.is_weights for item in outcome.state.artifacts):
        return outcome
    if not smoke_test.is_for(session.manifest):
        with Progress("smoke", 0) as progress:
            progress.log("there is no smoke test for this model; it is not run")
        return outcome
    if known := smoke_test.known_report(outcome.state, require_gpu):
        return replace(outcome, smoke=known)
    return smoke_test.run(outcome, require_gpu=require_gpu)


def status(request: Request, goal: Target = Target.BOTH, check: bool = False) -> StatusReport:
    """What is there and what `goal` would do; with `check`, an error unless all is proven."""
    run = begin(request)
    state = run.inspect()
    plan = run.plan(state, goal)
    error = None
    if check and not plan.is_done:
        mend = f"inv weights --model {run.manifest.name}"
        unproven = [_unproven(step, mend) for step in plan.steps if step.verb is not Verb.KEEP]
        error = error_for("not everything is proven", [*plan.findings, *plan.notes, *unproven])
    return StatusReport(state, plan, _ways_to_get(run) if _is_missing(plan) else "", error)


def plan(request: Request, goal: Target) -> StatusReport:
    """A dry run: what `apply` would do, or the error that it would end with."""
    run = begin(request)
    state = run.inspect()
    found = run.plan(state, goal)
    _require(run, found)
    return StatusReport(state, found)


def _unproven(step: Step, mend: str) -> Finding:
    found = f"to be done: {step.verb}"
    kind = Kind.CHANGED if step.look.receipt else Kind.MISSING
    return Finding(kind, step.artifact.path, "a proven file in place", found, mend)


def apply(request: Request, goal: Target) -> Outcome:
    """Brings the chosen artifacts where `goal` wants them, proven.

    Raises the error of what stands in the way; nothing that was good is lost.
    """
    return _apply(begin(request), goal)


def _apply(run: Session, goal: Target) -> Outcome:
    state, plan = _first_look(run, goal)
    _require(run, plan)
    if plan.is_done and not leftovers(state, goal is Target.STAGED):
        return Outcome(state, notes=plan.notes)
    acts: list[Step] = []
    with locked(run.paths, goal is not Target.STAGED):
        for number in range(MAX_ROUNDS):
            try:
                state = run.inspect()
                plan = run.plan(state, goal)
                run.note(plan.notes)
                _require(run, plan)
                taken = _round(run, plan)
            except CsmWeightsError:
                if number == MAX_ROUNDS - 1 or not _is_overtaken(run, goal):
                    raise
                continue
            if not taken:
                if run.remove_leftovers(state, goal is Target.STAGED):
                    state = run.inspect()
                return Outcome(state, tuple(acts), tuple(run.notes))
            acts += taken
    raise CsmWeightsError("the files keep changing; is another program writing to them?")


def _first_look(run: Session, goal: Target) -> tuple[State, Plan]:
    """A look without the lock, taken anew where a file may have moved while it was taken."""
    for _ in range(LOOKS):
        state = run.inspect()
        plan = run.plan(state, goal)
        if not plan.findings:
            break
    return state, plan


def _is_overtaken(run: Session, goal: Target) -> bool:
    """Whether another run may be the cause of an error: where locks keep nobody out."""
    if are_real(run.paths.staging / NAME):
        return False
    time.sleep(PATIENCE)
    run.known_bad.clear()
    return not run.plan(run.inspect(), goal).findings


def clean(request: Request, dry: bool) -> str:
    """Removes what interrupted runs have left unfinished; returns what that was."""
    state = begin(request).inspect()
    left = unfinished(state)
    held = [item for item in state.artifacts if holds_consumed(item)]
    if left and not dry:
        with locked(state.paths, with_destination=True):
            for path in left:
                with atomic.writing(path):
                    shutil.rmtree(path) if _is_folder(path) else path.unlink(missing_ok=True)
    lines = [*map(str, left), *map(_why_held, held)]
    return "\n".join(lines) or "nothing unfinished"


def _why_held(item: ArtifactState) -> str:
    partial = receipts.partial_path(item.staged.path)
    return f"kept, for it has the bytes of consumed parts: {partial}; inv weights goes on with it"


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _round(run: Session, plan: Plan) -> tuple[Step, ...]:
    """Takes the cheapest kind of step there is, and returns the steps taken."""
    kinds: tuple[tuple[Callable[[Session, Sequence[Step]], None], Verb], ...] = (
        (_prove, Verb.PROVE),
        (_write, Verb.WRITE),
        (_adopt, Verb.ADOPT),
        (_assemble, Verb.ASSEMBLE),
        (_consume, Verb.CONSUME),
        (_move, Verb.MOVE),
        (_copy, Verb.COPY),
    )
    for take, verb in kinds:
        if steps := plan.having(verb):
            take(run, steps)
            return steps
    return ()


def _prove(run: Session, steps: Sequence[Step]) -> None:
    """Hashes files that lie where they should; the right ones get their receipt."""
    for step, proven in _proven(run, steps):
        install.record(_folder(step.look, step.artifact), run.receipt(step.artifact, proven))


def _proven(run: Session, steps: Sequence[Step]) -> list[tuple[Step, VerifiedFile]]:
    """The steps whose files are right; the other files are refuted."""
    found = run.verify([(step.artifact, step.look) for step in steps])
    return [(step, proven) for step, proven in zip(steps, found, strict=True) if proven]


def _adopt(run: Session, steps: Sequence[Step]) -> None:
    """Files of the Hub's cache, once proven, by a link of their own; no byte is copied."""
    for step, proven in _proven(run, steps):
        partial = receipts.partial_path(step.state.staged.path)
        with atomic.writing(partial):
            atomic.make_folder(partial.parent)
            partial.unlink(missing_ok=True)
        try:
            os.link(proven.partial, partial)
        except OSError:
            # A file system, or a setting, without hard links.
            _assemble(run, [step])
            continue
        _install(run, step.artifact, replace(proven, partial=partial))


def _folder(file: FileStatus, artifact: Artifact) -> Path:
    """The folder below which `artifact.path` is the file."""
    return file.path.parents[len(Path(artifact.path).parts) - 1]


def _write(run: Session, steps: Sequence[Step]) -> None:
    for step in steps:
        edition = next(e for e in step.artifact.editions if e.text is not None)
        _install(run, step.artifact, write_text(step.look.path, edition.text or ""))


def _consume(run: Session, steps: Sequence[Step]) -> None:
    """Files whose parts go as they grow, one after the other, once all parts are proven."""
    subjects = [sources.subject(run, step) for step in steps]
    sources.require_punching(subjects)
    _require_locks(run)
    total = sum(p.size for s in subjects for p in s.artifact.pieces if p.offset in s.moved)
    with Progress("checking the parts", total) as progress:
        proofs = consume.verify(subjects, progress.advance)
    wrong = {path: f for proof in proofs for path, f in proof.findings.items()}
    whole = {subject.partial for subject in subjects}
    # What cannot be read may be the only copy, so nothing is fetched over it.
    if stuck := [f for p, f in wrong.items() if p in whole or f.kind is Kind.UNREADABLE]:
        raise error_for(f"{run.manifest.name}: cannot go on", stuck)
    run.known_bad.update(wrong)
    if not wrong:
        for step, proof in zip(steps, proofs, strict=True):
            _assemble(run, [step], proof.stakes)


def _require_locks(run: Session) -> None:
    """Two that consume at once would write holes over the only copy."""
    if not are_real(run.paths.staging / NAME):
        words = ("a file system with locks that keep others out", "locks that do nothing")
        help_text = "leave --consume out, or put the checkout on a local disk"
        finding = Finding(Kind.NOT_CONSUMABLE, str(run.paths.staging), *words, help_text)
        raise error_for(f"{run.manifest.name}: its parts cannot be consumed there", [finding])


def _assemble(
    run: Session, steps: Sequence[Step], stakes: Mapping[int, consume.Stake] | None = None
) -> None:
    cancel = threading.Event()
    total = sum(s.artifact.size if stakes else s.reads + s.fetches for s in steps)
    verb = "fetching" if any(step.far for step in steps) else "assembling"
    try:
        with (
            Progress(label_for(verb, [s.artifact.path for s in steps]), total) as progress,
            sources.far(run, cancel, progress.log) as servers,
        ):
            jobs = [_assembly(run, step, servers, stakes or {}) for step in steps]
            done = assemble(jobs, progress.advance, cancel)
    except CsmWeightsError as error:
        bad = {finding.where for finding in error.findings}
        # Of what a server did wrong there is no telling which file to leave out.
        if bad <= set[str]().union(*map(_names, steps)):
            error.advice = _way_around(s.artifact for s in steps if not bad & _names(s))
        raise
    for step, assembled in zip(steps, done, strict=True):
        run.note(assembled.notes)
        if stakes:
            consume.remove_parts(run.paths.root, assembled.partial, _consumed(step))
        _install(run, step.artifact, assembled)


def _assembly(
    run: Session, step: Step, servers: Sequence[Source], stakes: Mapping[int, consume.Stake]
) -> Assembly:
    item = step.state
    return Assembly(
        item.artifact,
        item.staged.path,
        sources.sources_for(run, step, servers),
        item.partial,
        item.arrived,
        step.far,
        consume.Consuming(run.paths.root, stakes),
        frozenset(stakes),
    )


def _consumed(step: Step) -> list[Piece]:
    """The pieces whose parts have gone, or were begun and found wrong."""
    gone = step.consumes | {record.offset for record in step.state.consumed}
    return [piece for piece in step.artifact.pieces if piece.offset in gone]


def _names(step: Step) -> set[str]:
    """What findings about the assembling of a file are about: its parts, its partial."""
    parts = {piece.part for piece in step.artifact.pieces}
    return {*parts, str(receipts.partial_path(step.state.staged.path))}


def _install(run: Session, artifact: Artifact, assembled: VerifiedFile) -> None:
    run.install(assembled.partial, run.paths.staging, run.receipt(artifact, assembled))


def _move(run: Session, steps: Sequence[Step]) -> None:
    for step in steps:
        receipt = _staged_receipt(step)
        try:
            run.install(step.look.path, run.paths.destination, receipt)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # One device, but two mounts of it, as containers have them.
            _copy(run, [step])
        else:
            install.forget(run.paths.staging, receipt.path)


def _copy(run: Session, steps: Sequence[Step]) -> None:
    """Staged files to another file system: proven as written there, then removed here."""
    jobs = []
    for step in steps:
        receipt, target = _staged_receipt(step), run.paths.destination / step.artifact.path
        source = first_of(WholeFile(step.look.path))
        artifact = _as_staged(step.artifact, receipt)
        jobs.append(Assembly(artifact, target, source, step.state.copied))
    label = label_for("copying", [job.artifact.path for job in jobs])
    with Progress(label, sum(job.artifact.size for job in jobs)) as progress:
        done = assemble(jobs, progress.advance)
    for step, copied in zip(steps, done, strict=True):
        receipt = replace(_staged_receipt(step), fingerprint=copied.fingerprint)
        run.install(copied.partial, run.paths.destination, receipt)
        step.look.path.unlink()
        # A file that came back after a power cut should find its receipt.
        atomic.sync(step.look.path.parent)
        install.forget(run.paths.staging, receipt.path)


def _as_staged(artifact: Artifact, receipt: Receipt) -> Artifact:
    """The artifact as it was proven in staging, in the pieces that were proven there."""
    pieces = tuple(Piece(r.source, r.offset, r.size, r.sha256) for r in receipt.pieces)
    pieces = pieces or (Piece(receipt.path, 0, receipt.size, receipt.sha256),)
    pinned = receipt.size == artifact.size
    return replace(
        artifact,
        size=receipt.size,
        sha256=receipt.sha256,
        blob_id=artifact.blob_id if pinned else None,
        pieces=pieces,
    )


def _staged_receipt(step: Step) -> Receipt:
    assert step.look.receipt is not None, "a step moves only what has a receipt"
    return step.look.receipt


def _require(run: Session, plan: Plan) -> None:
    """Raises what stands in the way of a plan, with the ways out of it."""
    if not plan.findings:
        return
    name, findings = run.manifest.name, [*plan.findings, *_wrong_parts(run, plan)]
    if all(f.kind.category is Category.MISSING for f in findings):
        raise error_for(f"{name}: not all of it is here", findings, _ways_to_get(run))
    advice = _way_around(step.artifact for step in plan.steps)
    raise error_for(f"{name}: cannot go on", findings, advice)


def _wrong_parts(run: Session, plan: Plan) -> list[Finding]:
    """What hashing finds wrong with the other parts of files that cannot be assembled.

    A person who has to mend one part is told of all that have to be mended.
    """
    blocked = {f.where for f in plan.findings}
    pairs = [
        (piece, part)
        for item in run.inspect().artifacts
        if blocked.intersection(p.part for p in item.artifact.pieces)
        for piece, part in zip(item.artifact.pieces, item.parts, strict=True)
        if part.finding is None
    ]
    with Progress("checking the other parts", sum(piece.size for piece, _ in pairs)) as progress:
        return gates.check_parts([(p, part.path) for p, part in pairs], progress.advance)


def _is_missing(plan: Plan) -> bool:
    """Whether what stands in the way is only that something is not here."""
    categories = {finding.kind.category for finding in plan.findings}
    return categories == {Category.MISSING}


def _way_around(artifacts: Iterable[Artifact]) -> str:
    """How to go on with these files, where the weights of one format are among them."""
    by_path = {artifact.path: artifact for artifact in artifacts}
    if not any(artifact.is_weights for artifact in by_path.values()):
        return ""
    return f"No file was placed. To go on without the rest: --only {','.join(by_path)}"


def _ways_to_get(run: Session) -> str:
    """The ways to get the missing files, in a few lines."""
    manifest, staging = run.manifest, run.manifest.staging
    state = run.inspect()
    wanted = [s.artifact for s in state.artifacts if s.installed.state is not FileState.VERIFIED]
    if not wanted:
        return ""
    artifact = next((a for a in wanted if a.is_weights), wanted[0])
    ways = [
        f"a mirror: inv weights --model {manifest.name} --source=mirror --url=https://...",
        f"a copy, whatever its origin: put it at {staging}/{artifact.path}",
    ]
    if manifest.repo:
        ways.insert(0, f"the Hub: {_way_to_the_hub(run)}")
    if artifact.pieces:
        folder = Path(artifact.pieces[0].part).parent.as_posix()
        ways.insert(0, f"parts: put them in {folder}/; in a clone that has them, git lfs pull")
    lines = [f"Ways to get {artifact.path}:"]
    lines += [f"  {number}. {way}" for number, way in enumerate(ways, start=1)]
    lines.append("Then run the same command again: what came is proven before it is used.")
    return "\n".join(lines)


def _way_to_the_hub(run: Session) -> str:
    """What has to be done so that the Hub can be asked."""
    problems = [f for f in run.sourcing.problems if f.help]
    first = f"{problems[0].help}, then " if problems else ""
    return f"{first}inv weights --model {run.manifest.name} --source=hf"

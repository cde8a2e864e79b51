"""Look, plan, act, look again: the only module that knows the order of things.

Every acting command repeats one round until nothing is left to do: look at
the disk, plan, and take the cheapest kind of step there is. What a round
found out by hashing is carried into the next look, so a file that was
refuted is planned around, not stumbled over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csm_weights import files, gates, place, publish, records
from csm_weights.assemble import Assembled, Assembly, assemble, write_text
from csm_weights.digest import Measure, measure
from csm_weights.errors import (
    NOT_HERE,
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    SmokeFailed,
    UsageError,
    error_for,
)
from csm_weights.manifest import Artifact, Manifest, Piece, load, path_problem
from csm_weights.plan import Goal, Plan, Step, Verb, default_selection, make_plan, with_config
from csm_weights.progress import Progress
from csm_weights.records import Receipt, SmokeReport
from csm_weights.smoke import record_golden as write_golden
from csm_weights.smoke import run as run_smoke
from csm_weights.sources import first_of
from csm_weights.sources.local import Chunks, WholeFile
from csm_weights.state import Condition, FileLook, Places, State, look, unfinished

#: Name of the digest list beside placed files.
SUMS = "SHA256SUMS"

#: Words for where pieces come from; auto is every source there is.
SOURCES = ("auto", "chunks")

#: Frames that a smoke test makes: 0.64 seconds of audio.
SMOKE_FRAMES = 8

#: More rounds than this mean that something else keeps changing the files.
MAX_ROUNDS = 12


@dataclass(frozen=True)
class Request:
    """What is asked for: a model, by name or manifest path, below a repository root.

    `only` are words that `Manifest.select` knows; none means the default
    selection. `dest` overrides the manifest's destination.
    """

    root: Path
    model: str = "csm-1b"
    only: tuple[str, ...] = ()
    dest: str | None = None


@dataclass(frozen=True)
class Survey:
    """A look at the disk and the plan that follows from it.

    `advice` says how to get what is missing.
    """

    state: State
    plan: Plan
    advice: str = ""
    error: CsmWeightsError | None = None


@dataclass(frozen=True)
class Outcome:
    """What a command did and what is proven now.

    `acts` are the steps taken, in order. `smoke` is the last smoke report of
    these very files, perhaps an earlier run's.
    """

    state: State
    acts: tuple[Step, ...] = ()
    notes: tuple[Finding, ...] = ()
    results: tuple[gates.GateResult, ...] = ()
    smoke: SmokeReport | None = None
    error: CsmWeightsError | None = None


@dataclass
class _Run:
    """One run of a command: what was asked, and what it has learnt so far."""

    manifest: Manifest
    places: Places
    chosen: tuple[Artifact, ...]
    refuted: dict[Path, Finding] = field(default_factory=dict)

    def look(self) -> State:
        return look(self.manifest, self.chosen, self.places, self.refuted)

    def receipt(self, artifact: Artifact, proven: Assembled) -> Receipt:
        """The receipt of a file that has just been proven; size in bytes."""
        return Receipt(
            path=artifact.path,
            model=self.manifest.name,
            size=proven.fingerprint.size,
            sha256=proven.sha256,
            pieces=proven.records,
            fingerprint=proven.fingerprint,
            proven_at=now(),
            tool=f"csm-weights {version('csm-weights')}",
        )

    def install(self, proven: Path, directory: Path, receipt: Receipt) -> None:
        """Gives a proven file its final name; what was known of that name is over."""
        place.install(proven, directory, receipt)
        final = directory / receipt.path
        self.refuted.pop(final, None)
        records.journal_path(final).unlink(missing_ok=True)


def find_manifest(root: Path, model: str) -> Manifest:
    """The manifest called `model` in manifests/, or at that path.

    Raises UsageError, naming those there are, when there is none.
    """
    by_path = model.endswith(".toml") or "/" in model
    path = Path(model) if by_path else root / "manifests" / f"{model}.toml"
    if not by_path and path_problem(model):
        raise UsageError(f"{model!r} is not a model's name")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (root / "manifests").glob("*.toml")))
        raise UsageError(
            f"no manifest for model {model!r}; there are {known}, or give a .toml path"
        )
    return load(path)


def rehearse(request: Request, goal: Goal) -> Survey:
    """A dry run: what `act` would do, or the error that it would end with."""
    run = _begin(request)
    state = run.look()
    plan = make_plan(state, goal)
    _require(run, plan)
    return Survey(state, plan)


def survey(request: Request, goal: Goal = Goal.BOTH, check: bool = False) -> Survey:
    """What is there and what `goal` would do; with `check`, an error unless all is proven."""
    run = _begin(request)
    state = run.look()
    plan = make_plan(state, goal)
    error = None
    if check and not plan.is_done:
        mend = f"inv weights --model {run.manifest.name}"
        unproven = [_unproven(step, mend) for step in plan.steps if step.verb is not Verb.KEEP]
        error = error_for("not everything is proven", [*plan.findings, *plan.notes, *unproven])
    return Survey(state, plan, _ways_to_get(run) if _is_missing(plan) else "", error)


def _unproven(step: Step, mend: str) -> Finding:
    found = f"to be done: {step.verb}"
    kind = Kind.CHANGED if step.look.receipt else Kind.MISSING
    return Finding(kind, step.artifact.path, "a proven file in place", found, mend)


def act(request: Request, goal: Goal) -> Outcome:
    """Brings the chosen artifacts where `goal` wants them, proven.

    Raises the error of what stands in the way; nothing that was good is lost.
    """
    run = _begin(request)
    plan = make_plan(run.look(), goal)
    _require(run, plan)
    if plan.is_done:
        return Outcome(run.look(), notes=plan.notes)
    acts: list[Step] = []
    notes: list[Finding] = []
    with _locked(run.places):
        for _ in range(MAX_ROUNDS):
            state = run.look()
            plan = make_plan(state, goal)
            notes += [note for note in plan.notes if note not in notes]
            _require(run, plan)
            taken = _round(run, plan)
            if not taken:
                return Outcome(state, tuple(acts), tuple(notes))
            acts += taken
    raise CsmWeightsError("the files keep changing; is another program writing to them?")


def _round(run: _Run, plan: Plan) -> tuple[Step, ...]:
    """Takes the cheapest kind of step there is, and returns the steps taken."""
    kinds: tuple[tuple[Callable[[_Run, Sequence[Step]], None], Verb], ...] = (
        (_prove, Verb.PROVE),
        (_write, Verb.WRITE),
        (_assemble, Verb.ASSEMBLE),
        (_move, Verb.MOVE),
        (_copy, Verb.COPY),
    )
    for take, verb in kinds:
        if steps := plan.having(verb):
            take(run, steps)
            return steps
    return ()


def _prove(run: _Run, steps: Sequence[Step]) -> None:
    """Hashes files that lie where they should; the right ones get their receipt."""
    subjects = [_subject(step.artifact, step.look, run.manifest.name) for step in steps]
    with Progress("proving", sum(step.reads for step in steps)) as progress:
        proofs = gates.prove(subjects, progress.tick)
    for step, proof in zip(steps, proofs, strict=True):
        if finding := proof.finding():
            run.refuted[step.look.path] = finding
            continue
        assert proof.sha256 and proof.fingerprint, "a proof without findings is whole"
        proven = Assembled(step.look.path, proof.sha256, proof.records, proof.fingerprint)
        place.record(_folder(step.look, step.artifact), run.receipt(step.artifact, proven))


def _write(run: _Run, steps: Sequence[Step]) -> None:
    for step in steps:
        edition = next(e for e in step.artifact.editions if e.text is not None)
        _install(run, step.artifact, write_text(step.look.path, edition.text or ""))


def _assemble(run: _Run, steps: Sequence[Step]) -> None:
    source = first_of(Chunks(run.places.root))
    jobs = [Assembly(s.artifact, s.look.path, source, s.state.partial) for s in steps]
    with Progress("assembling", sum(step.reads for step in steps)) as progress:
        done = assemble(jobs, progress.tick)
    for step, assembled in zip(steps, done, strict=True):
        _install(run, step.artifact, assembled)


def _install(run: _Run, artifact: Artifact, assembled: Assembled) -> None:
    run.install(assembled.partial, run.places.staging, run.receipt(artifact, assembled))


def _move(run: _Run, steps: Sequence[Step]) -> None:
    for step in steps:
        receipt = _staged_receipt(step)
        try:
            run.install(step.look.path, run.places.destination, receipt)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # One device, but two mounts of it, as containers have them.
            _copy(run, [step])
        else:
            place.forget(run.places.staging, receipt.path)


def _copy(run: _Run, steps: Sequence[Step]) -> None:
    """Staged files to another file system: proven as written there, then removed here."""
    jobs = []
    for step in steps:
        receipt, target = _staged_receipt(step), run.places.destination / step.artifact.path
        source = first_of(WholeFile(step.look.path))
        artifact = _as_staged(step.artifact, receipt)
        jobs.append(Assembly(artifact, target, source, step.state.copied))
    with Progress("copying", sum(job.artifact.size for job in jobs)) as progress:
        done = assemble(jobs, progress.tick)
    for step, copied in zip(steps, done, strict=True):
        receipt = replace(_staged_receipt(step), fingerprint=copied.fingerprint)
        run.install(copied.partial, run.places.destination, receipt)
        step.look.path.unlink()
        place.forget(run.places.staging, receipt.path)


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


def weights(request: Request, smoke: bool = True, require_gpu: bool = False) -> Outcome:
    """The whole line: fetch, place, gate, smoke; a second run has nothing to do.

    Without weights among what is chosen there is nothing to smoke-test.
    """
    outcome = act(request, Goal.BOTH)
    outcome = replace(outcome, results=_gate(outcome.state, rehash=False))
    if error := _gate_error(outcome.results):
        return replace(outcome, error=error)
    if smoke and any(item.artifact.is_weights for item in outcome.state.artifacts):
        return _speak_unless_known(outcome, request, require_gpu)
    return outcome


def verify(request: Request, sums: str | None = None, write_sums: bool = False) -> Outcome:
    """Hashes everything that is in place and runs every gate.

    `sums` is a SHA256SUMS file whose digests are held against the files as
    well. With `write_sums`, one is written beside files that passed; nothing
    else is ever written.
    """
    state = _begin(request).look()
    results = list(_gate(state, rehash=True))
    folder = state.places.destination
    if sums:
        results += _gate_sums(results, Path(sums), folder)
    outcome = Outcome(state, results=tuple(results), error=_gate_error(results))
    if write_sums and not outcome.error:
        digests = {r.path: r.sha256 for r in results if r.gate is gates.Gate.DIGEST and r.sha256}
        _write_sums(folder / SUMS, digests)
    return outcome


def _write_sums(path: Path, digests: dict[str, str]) -> None:
    """Writes SHA256SUMS; lines that are there about other files stay."""
    others = publish.parse_sums(path.read_text(), str(path)) if path.is_file() else {}
    files.write_whole(path, publish.render_sums({**others, **digests}))


def _gate_sums(
    results: Sequence[gates.GateResult], sums: Path, folder: Path
) -> list[gates.GateResult]:
    """A result for each line of a SHA256SUMS file, hashing only what is not hashed yet."""
    try:
        listed = publish.parse_sums(sums.read_text(encoding="utf-8", errors="replace"), str(sums))
    except OSError as error:
        finding = Finding(Kind.MISSING, str(sums), "a SHA256SUMS file", str(error.strerror))
        raise MissingInput("there is nothing to check against", [finding]) from None
    known = {r.path: r.sha256 for r in results if r.sha256}
    return [gates.check_sum(folder, path, d, known.get(path)) for path, d in listed.items()]


def _gate(state: State, rehash: bool) -> tuple[gates.GateResult, ...]:
    subjects = [
        _subject(item.artifact, item.placed, state.manifest.name) for item in state.artifacts
    ]
    to_hash = sum(s.size or 0 for s in subjects if not s.finding and (rehash or not s.trusted))
    with Progress("verifying", to_hash) as progress:
        return tuple(gates.check(subjects, rehash, progress.tick))


def _gate_error(results: Sequence[gates.GateResult]) -> CsmWeightsError | None:
    findings = list(dict.fromkeys(f for r in results for f in r.findings))
    return error_for("the gates are closed", findings) if findings else None


def _subject(artifact: Artifact, file: FileLook, model: str) -> gates.Subject:
    mend = f"inv weights --model {model}"
    finding = file.finding
    if file.condition is Condition.ABSENT:
        size = f"{artifact.size:,} bytes"
        finding = Finding(Kind.MISSING, str(file.path), size, "no such file", mend)
    trusted = file.condition is Condition.PROVEN
    return gates.Subject(artifact, file.path, file.size, finding, file.receipt, trusted, mend)


def _folder(file: FileLook, artifact: Artifact) -> Path:
    """The folder below which `artifact.path` is the file."""
    return file.path.parents[len(Path(artifact.path).parts) - 1]


def _begin(request: Request) -> _Run:
    manifest = find_manifest(request.root, request.model)
    places = Places.of(manifest, request.root, request.dest)
    chosen = manifest.select(request.only) if request.only else ()
    if not chosen:
        chosen = default_selection(look(manifest, manifest.artifacts, places, {}))
    return _Run(manifest, places, with_config(manifest, chosen))


def _require(run: _Run, plan: Plan) -> None:
    """Raises what stands in the way of a plan, with the ways out of it."""
    if not plan.findings:
        return
    name, findings = run.manifest.name, [*plan.findings, *_wrong_parts(run, plan)]
    if all(f.kind in NOT_HERE for f in findings):
        raise error_for(f"{name}: not all of it is here", findings, _ways_to_get(run))
    raise error_for(f"{name}: cannot go on", findings, _way_around(run, plan))


def _wrong_parts(run: _Run, plan: Plan) -> list[Finding]:
    """What hashing finds wrong with the other parts of files that cannot be assembled.

    A person who has to mend one part is told of all that have to be mended.
    """
    blocked = {f.where for f in plan.findings}
    pairs = [
        (piece, part)
        for item in run.look().artifacts
        if blocked.intersection(p.part for p in item.artifact.pieces)
        for piece, part in zip(item.artifact.pieces, item.parts, strict=True)
        if part.finding is None
    ]
    with Progress("checking the other parts", sum(piece.size for piece, _ in pairs)) as progress:
        return gates.check_parts([(p, part.path) for p, part in pairs], progress.tick)


def _way_around(run: _Run, plan: Plan) -> str:
    """How to go on with the files that could be had, where there are some."""
    paths = list(dict.fromkeys(step.artifact.path for step in plan.steps))
    if not any(a.is_weights for a in run.chosen if a.path in paths):
        return ""
    return f"Nothing was done. To go on without the rest: --only {','.join(paths)}"


def _is_missing(plan: Plan) -> bool:
    """Whether what stands in the way is only that something is not here."""
    return bool(plan.findings) and all(f.kind in NOT_HERE for f in plan.findings)


def _ways_to_get(run: _Run) -> str:
    """The ways to get the missing files, in a few lines."""
    manifest, staging = run.manifest, run.manifest.staging
    state = run.look()
    wanted = [s.artifact for s in state.artifacts if s.placed.condition is not Condition.PROVEN]
    artifact = next((a for a in wanted if a.is_weights), wanted[0])
    ways = [f"a copy, whatever its origin: put it at {staging}/{artifact.path}"]
    if manifest.repo:
        ways.insert(
            0,
            f"the Hub: accept the terms at https://huggingface.co/{manifest.repo}, log in with"
            f" `hf auth login`, then\n     hf download {manifest.repo} {artifact.path}"
            f" --revision {manifest.revision} --local-dir {staging}",
        )
    if artifact.pieces:
        folder = Path(artifact.pieces[0].part).parent.as_posix()
        ways.insert(0, f"parts: put them in {folder}/; in a clone that has them, git lfs pull")
    lines = [f"Ways to get {artifact.path}:"]
    lines += [f"  {number}. {way}" for number, way in enumerate(ways, start=1)]
    lines.append("Then run the same command again: what came is proven before it is used.")
    return "\n".join(lines)


@contextmanager
def _locked(places: Places) -> Iterator[None]:
    """One acting run at a time on one staging folder; a second one waits."""
    from filelock import FileLock, Timeout

    path = places.staging / ".lock"
    os.close(files.create(path))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with Progress(f"waiting for another run in {places.staging}", 0) as progress:
            progress.say("it holds the lock; this one goes on when it ends")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def smoke(
    request: Request,
    device: str | None = None,
    require_gpu: bool = False,
    frames: int = SMOKE_FRAMES,
) -> Outcome:
    """Gates the model that is in place, loads it and lets it speak."""
    state = _begin(request).look()
    results = _gate(state, rehash=False)
    outcome = Outcome(state, results=results, error=_gate_error(results))
    return outcome if outcome.error else _speak(outcome, request, device, require_gpu, frames)


def record_golden(request: Request, frames: int) -> Path:
    """Records the golden frames of a model that passes its gates; returns their file."""
    state = _begin(request).look()
    if error := _gate_error(_gate(state, rehash=True)):
        raise error
    path = request.root / "manifests" / f"{state.manifest.name}.golden.json"
    write_golden(state.places.destination, path, frames)
    return path


def _speak_unless_known(outcome: Outcome, request: Request, require_gpu: bool) -> Outcome:
    """The smoke report of these very files: an earlier run's where there is one."""
    known = outcome.state.smoke
    if known and known.ok and known.bound_to == _binding(request, outcome.state):
        is_on_gpu = not known.device.startswith("cpu")
        if is_on_gpu or not (require_gpu or _may_have_gpu()):
            return replace(outcome, smoke=known)
    return _speak(outcome, request, None, require_gpu, SMOKE_FRAMES)


def _may_have_gpu() -> bool:
    """Whether a GPU may be here that an earlier run on the CPU did not have; without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and Path("/dev/nvidiactl").exists()


def _speak(
    outcome: Outcome, request: Request, device: str | None, require_gpu: bool, frames: int
) -> Outcome:
    state = outcome.state
    try:
        report = run_smoke(
            state.places.destination,
            device=device,
            require_gpu=require_gpu,
            frames=frames,
            golden=_golden(request, state),
            weights=_weights_word(state),
        )
    except CsmWeightsError as error:
        return replace(outcome, error=error)
    report = replace(report, bound_to=_binding(request, state), made_at=now())
    if not report.ok:
        wrong = ", ".join(check.name for check in report.checks if not check.ok)
        return replace(outcome, smoke=report, error=SmokeFailed(f"NOT OK: {wrong}"))
    try:
        path = records.smoke_path(state.places.destination)
        files.write_whole(path, records.dump(report) + "\n")
    except CsmWeightsError as error:
        # A folder that may only be read can hold a good model all the same.
        return replace(outcome, smoke=report, notes=(*outcome.notes, *error.findings))
    return replace(outcome, smoke=report)


def _golden(request: Request, state: State) -> Path | None:
    golden = state.manifest.golden
    return request.root / "manifests" / golden if golden else None


def _weights_word(state: State) -> str:
    """Which of the chosen weight files is loaded: the first of the manifest's order."""
    chosen = [item.artifact for item in state.artifacts if item.artifact.is_weights]
    if not chosen:
        raise UsageError("the smoke test needs weights; name safetensors or ckpt with --only")
    return "safetensors" if chosen[0].format == "safetensors" else "ckpt"


def _binding(request: Request, state: State) -> tuple[tuple[str, str], ...]:
    """What a smoke report holds for: the files, the golden frames, torch, this package."""
    receipts = [item.placed.receipt for item in state.artifacts]
    bound = [(r.path, r.sha256) for r in receipts if r]
    golden = _golden(request, state)
    if golden and golden.is_file():
        whole = measure([Measure(golden, golden.stat().st_size, (), True)], lambda _: None)
        bound.append(("golden", whole[0].whole or ""))
    for package in ("torch", "csm-weights"):
        with contextlib.suppress(PackageNotFoundError):
            bound.append((package, version(package)))
    return tuple(bound)


def check_source(word: str) -> None:
    """Raises UsageError unless `word` is a source that `fetch` has."""
    if word not in SOURCES:
        raise UsageError(f"no source called {word!r}; there are {' and '.join(SOURCES)}")


def clean(request: Request, dry: bool) -> str:
    """Removes what interrupted runs have left unfinished; returns what that was."""
    state = _begin(request).look()
    left = unfinished(state)
    if left and not dry:
        with _locked(state.places):
            for path in left:
                with files.writing(path):
                    shutil.rmtree(path) if _is_folder(path) else path.unlink(missing_ok=True)
    return "\n".join(map(str, left)) or "nothing unfinished"


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()

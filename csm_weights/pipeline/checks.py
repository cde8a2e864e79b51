"""What is said of files that are in place: the gates, and the smoke test of the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    SmokeFailed,
    UsageError,
    error_for,
)
from csm_weights.hashing import sha256_of
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.model.smoke import record_golden as write_golden
from csm_weights.model.smoke import run as run_smoke
from csm_weights.pipeline.request import Outcome, Request, Session, begin, now
from csm_weights.progress import Progress
from csm_weights.store import atomic, receipts
from csm_weights.store.inspect import FileState, FileStatus, State, leftovers
from csm_weights.transfer.assemble import VerifiedFile
from csm_weights.verify import gates
from csm_weights.verify.sums import parse_sums, render_sums

#: Name of the digest list beside placed files.
SUMS = "SHA256SUMS"

#: Frames that a smoke test makes: 0.64 seconds of audio.
SMOKE_FRAMES = 8


def verify(request: Request, sums: str | None = None, write_sums: bool = False) -> Outcome:
    """Hashes everything that is in place and runs every gate.

    `sums` is a SHA256SUMS file whose digests are held against the files as
    well. With `write_sums`, one is written beside files that passed; nothing
    else is ever written.
    """
    state = begin(request).inspect()
    results = list(gate(state, rehash=True))
    folder = state.paths.destination
    if sums:
        results += _gate_sums(results, Path(sums), folder)
    outcome = Outcome(state, results=tuple(results), error=gate_error(results))
    if write_sums and not outcome.error:
        write_sums_of(outcome)
    return outcome


def write_sums_of(outcome: Outcome) -> None:
    """Writes SHA256SUMS beside files that have just passed every gate."""
    _write_sums(outcome.state.paths.destination / SUMS, digests_of(outcome.results))


def digests_of(results: Sequence[gates.GateResult]) -> dict[str, str]:
    """The sha256 of every file that has passed its digest gate, by path."""
    return {r.path: r.sha256 for r in results if r.gate is gates.Gate.DIGEST and r.sha256}


def _write_sums(path: Path, digests: dict[str, str]) -> None:
    """Writes SHA256SUMS; lines that are there about other files stay."""
    others = {}
    if path.is_file():
        others = parse_sums(path.read_text(errors="replace"), str(path))
    atomic.write_whole(path, render_sums({**others, **digests}))


def _gate_sums(
    results: Sequence[gates.GateResult], sums: Path, folder: Path
) -> list[gates.GateResult]:
    """A result for each line of a SHA256SUMS file, hashing only what is not hashed yet."""
    try:
        listed = parse_sums(sums.read_text(encoding="utf-8", errors="replace"), str(sums))
    except OSError as error:
        finding = Finding(Kind.MISSING, str(sums), "a SHA256SUMS file", str(error.strerror))
        raise MissingInput("there is nothing to check against", [finding]) from None
    known = {r.path: r.sha256 for r in results if r.sha256}
    return [gates.check_sum(folder, path, d, known.get(path)) for path, d in listed.items()]


def smoke(
    request: Request,
    device: str | None = None,
    require_gpu: bool = False,
    frames: int = SMOKE_FRAMES,
    dtype: str | None = None,
) -> Outcome:
    """Gates the model that is in place, loads it and lets it speak."""
    state = begin(request).inspect()
    _require_smoke_test(state.manifest)
    results = gate(state, rehash=False)
    outcome = Outcome(state, results=results, error=gate_error(results))
    return (
        outcome if outcome.error else _speak(outcome, request, device, require_gpu, frames, dtype)
    )


def record_golden(request: Request, frames: int) -> Path:
    """Records the golden frames of a model that passes its gates; returns their file."""
    state = begin(request).inspect()
    _require_smoke_test(state.manifest)
    if error := gate_error(gate(state, rehash=True)):
        raise error
    path = request.root / "manifests" / f"{state.manifest.name}.golden.json"
    write_golden(state.paths.destination, path, frames)
    return path


def has_smoke_test(manifest: Manifest) -> bool:
    """Whether the model is one that can be let speak: CSM, by the config that describes it."""
    return any(artifact.format == "config" for artifact in manifest.artifacts)


def _require_smoke_test(manifest: Manifest) -> None:
    if not has_smoke_test(manifest):
        raise UsageError(f"there is no smoke test for {manifest.name}; inv verify proves its files")


def prove(run: Session, files: Sequence[tuple[Artifact, FileStatus]]) -> list[VerifiedFile | None]:
    """Hashes files: what is proven of each, or None for one that the run has now refuted."""
    subjects = [subject_of(artifact, look, run.manifest.name) for artifact, look in files]
    with Progress("proving", sum(subject.size or 0 for subject in subjects)) as progress:
        proofs = gates.prove(subjects, progress.advance)
    return [_judged(run, proof) for proof in proofs]


def _judged(run: Session, proof: gates.Proof) -> VerifiedFile | None:
    path = proof.subject.path
    if finding := proof.finding():
        run.known_bad[path], run.good[path] = finding, proof.good
        return None
    assert proof.sha256 and proof.fingerprint, "a proof without findings is whole"
    whole = (proof.records, proof.fingerprint, proof.git_sha1)
    return VerifiedFile(path, proof.sha256, *whole)


def tidy(state: State, is_staged: bool) -> bool:
    """Removes `state.leftovers`, each durably before the next; returns whether there were any."""
    left = leftovers(state, is_staged)
    for path in left:
        with atomic.writing(path):
            path.unlink(missing_ok=True)
        atomic.sync(path.parent)
    return bool(left)


def gate(state: State, rehash: bool) -> tuple[gates.GateResult, ...]:
    """What every gate says of the files in place; see `gates.check`."""
    subjects = [
        subject_of(item.artifact, item.installed, state.manifest.name) for item in state.artifacts
    ]
    to_hash = sum(s.size or 0 for s in subjects if not s.finding and (rehash or not s.trusted))
    with Progress("verifying", to_hash) as progress:
        return tuple(gates.check(subjects, rehash, progress.advance))


def gate_error(results: Sequence[gates.GateResult]) -> CsmWeightsError | None:
    """The one error for all that the gates found, each finding once."""
    findings = list(dict.fromkeys(f for r in results for f in r.findings))
    return error_for("the gates are closed", findings) if findings else None


def subject_of(artifact: Artifact, file: FileStatus, model: str) -> gates.Subject:
    """A file as a look found it, to be gated; `model` is for the command that mends it."""
    mend = f"inv weights --model {model}"
    finding = file.finding
    if file.state is FileState.ABSENT:
        finding = Finding.missing(file.path, artifact.size, mend)
    trusted = file.state is FileState.VERIFIED
    return gates.Subject(artifact, file.path, file.size, finding, file.receipt, trusted, mend)


def speak_unless_known(outcome: Outcome, request: Request, require_gpu: bool) -> Outcome:
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
    outcome: Outcome,
    request: Request,
    device: str | None,
    require_gpu: bool,
    frames: int,
    dtype: str | None = None,
) -> Outcome:
    state = outcome.state
    try:
        report = run_smoke(
            state.paths.destination,
            device=device,
            require_gpu=require_gpu,
            frames=frames,
            golden=_golden(request, state),
            weights=_weights_word(state),
            dtype=dtype,
        )
    except CsmWeightsError as error:
        return replace(outcome, error=error)
    report = replace(report, bound_to=_binding(request, state), made_at=now())
    if not report.ok:
        wrong = ", ".join(check.name for check in report.checks if not check.ok)
        return replace(outcome, smoke=report, error=SmokeFailed(f"NOT OK: {wrong}"))
    try:
        path = receipts.smoke_path(state.paths.destination)
        atomic.write_whole(path, receipts.dump(report) + "\n")
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
    receipts = [item.installed.receipt for item in state.artifacts]
    bound = [(r.path, r.sha256) for r in receipts if r]
    golden = _golden(request, state)
    if golden and golden.is_file():
        bound.append(("golden", sha256_of(golden)))
    for package in ("torch", "csm-weights"):
        with contextlib.suppress(PackageNotFoundError):
            bound.append((package, version(package)))
    return tuple(bound)

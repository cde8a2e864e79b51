"""The smoke test of an installed model, and the report of an earlier one."""

import contextlib
import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csm_weights.errors import CsmWeightsError, Finding, Kind, SmokeFailed, UsageError
from csm_weights.hashing import sha256_of
from csm_weights.manifest.types import Manifest
from csm_weights.model import smoke_report
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.session import Outcome, now
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import State
from csm_weights.untrusted import dump_record

#: Frames that a smoke test generates: 0.64 seconds of audio.
FRAMES = 8

#: What holds whatever the smoke test ends in: the gates come before it.
VERIFIED = "The files are installed and verified."


def is_for(manifest: Manifest) -> bool:
    """Return whether a model is CSM, by the config that describes it: others have no test."""
    return any(artifact.format == "config" for artifact in manifest.artifacts)


def known_report(state: State, require_gpu: bool, require_fast: bool = False) -> SmokeReport | None:
    """Return the good report of an earlier run of these very files, where it still holds.

    A report made on the CPU does not hold where a GPU is required, or may be here, nor
    one with a wrong fast path where those are required.
    """
    known = smoke_report.read_report(smoke_report.report_path(state.paths.destination))
    if require_fast and known and not (known.paths and all(one.ok for one in known.paths)):
        return None
    if known is None or not known.ok or known.bound_to != _binding(state):
        return None
    # Whether a GPU may be here, without torch: an earlier run may have had none.
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    may_have_gpu = not is_hidden and Path("/dev/nvidiactl").exists()
    is_on_gpu = not known.device.startswith("cpu")
    return known if is_on_gpu or not (require_gpu or may_have_gpu) else None


def run(
    outcome: Outcome,
    device: str | None = None,
    require_gpu: bool = False,
    frames: int = FRAMES,
    dtype: str | None = None,
    max_rtf: float | None = None,
    require_fast: bool = False,
) -> Outcome:
    """Load the installed model, generate some frames, and record the report.

    The first weight file of the manifest's order is loaded. `max_rtf` is the largest
    real-time factor that passes; None leaves the speed unchecked. A fast path of the
    GPU that is wrong is a note, or an error with `require_fast`. Returns the
    outcome with the report, or with the error that the test ends in.
    """
    state = outcome.state
    try:
        from csm_weights.model import smoke

        chosen = [item.artifact for item in state.artifacts if item.artifact.is_weights]
        if not chosen:
            raise UsageError("the smoke test needs weights; name safetensors or ckpt with --only")
        with Progress("loading the model and generating frames"):
            report = smoke.run(
                state.paths.destination / chosen[0].path,
                device=device,
                require_gpu=require_gpu or require_fast,
                frames=frames,
                golden=_golden(state),
                dtype=dtype,
                max_rtf=max_rtf,
            )
    except CsmWeightsError as error:
        error.advice = "\n".join(filter(None, [error.advice, VERIFIED]))
        return replace(outcome, error=error)
    report = replace(report, bound_to=_binding(state), made_at=now())
    wrong = [f"{c.name}: {c.value}, limit {c.limit}" for c in report.checks if not c.ok]
    taken = next((one.name for one in report.paths if one.ok), "eager")
    mend = f"the model is right; it is decoded by the path {taken!r} on this machine"
    slow = [
        Finding(Kind.FAST_PATH, f"path {one.name}", one.limit, one.found, mend)
        for one in report.paths
        if not one.ok
    ]
    if wrong or not report.ok or (require_fast and slow):
        wrong += [f"{f.where}: {f.found}" for f in slow if require_fast]
        failed = SmokeFailed(f"the smoke test failed: {'; '.join(wrong)}", advice=VERIFIED)
        return replace(outcome, smoke=report, error=failed)
    outcome = replace(outcome, notes=(*outcome.notes, *slow))
    try:
        folder, f = state.paths.destination, report.figures
        paths = [smoke_report.report_path(folder)]
        if report.paths:
            # which fast path may be taken is remembered for each card
            key = (f.machine, f.driver, f.torch, f.dtype)
            paths.append(smoke_report.path_report_path(folder, *key))
        for path in paths:
            atomic.write_whole(path, dump_record(report) + "\n")
    except CsmWeightsError as error:
        # A folder that may only be read can hold a good model all the same.
        return replace(outcome, smoke=report, notes=(*outcome.notes, *error.findings))
    return replace(outcome, smoke=report)


def _golden(state: State) -> Path | None:
    golden = state.manifest.golden
    return Path(state.manifest.where).parent / golden if golden else None


def _binding(state: State) -> tuple[tuple[str, str], ...]:
    """Return what a report holds for: the files, the golden frames, torch, this package."""
    receipts = [item.installed.receipt for item in state.artifacts]
    bound = [(r.path, r.sha256) for r in receipts if r]
    golden = _golden(state)
    if golden and golden.is_file():
        bound.append(("golden", sha256_of(golden)))
    for package in ("torch", "csm-weights"):
        with contextlib.suppress(PackageNotFoundError):
            bound.append((package, version(package)))
    return tuple(bound)

"""Results as JSON for a machine. Pure: prints nothing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import singledispatch
from typing import Any

from csm_weights.commands.attest import Attesting
from csm_weights.commands.doctor import DoctorReport
from csm_weights.commands.render.text import _sum, origin_words
from csm_weights.commands.seed_cache import Seeding
from csm_weights.errors import CsmWeightsError
from csm_weights.formats.compare import Comparison, Difference
from csm_weights.formats.transformers_layout import Value
from csm_weights.pipeline.actions import Action
from csm_weights.pipeline.outcome import Outcome, StatusReport
from csm_weights.pipeline.plan import Plan
from csm_weights.store.inspect import ArtifactState, FileState


@singledispatch
def render(result: object) -> str:
    """Return what a task prints of its result, or of an error, with --json."""
    raise TypeError(f"{type(result).__name__} has no JSON")


@render.register
def _survey(survey: StatusReport) -> str:
    """`status --json`: what is there, the steps, the bytes; sizes in bytes."""
    state, plan = survey.state, survey.plan
    return dump(
        model=state.manifest.name,
        ok=plan.is_done,
        exit_code=survey.error.exit_code if survey.error else 0,
        destination=str(state.paths.destination),
        artifacts=[_artifact_data(item, plan) for item in state.artifacts],
        steps=[_step_data(step) for step in plan.actions],
        bytes_to_read=_sum(plan.actions, "bytes_read"),
        bytes_to_write=_sum(plan.actions, "bytes_written"),
        bytes_to_fetch=_sum(plan.actions, "bytes_fetched"),
        bytes_freed_meanwhile=_sum(plan.actions, "bytes_freed"),
        bytes_free=state.free_staging,
        findings=[asdict(f) for f in (survey.error or plan).findings],
        notes=[asdict(f) for f in plan.notes],
        advice=survey.advice,
    )


def _artifact_data(item: ArtifactState, plan: Plan) -> dict[str, Any]:
    pieces = item.artifact.pieces
    origins = {o.piece.offset: origin_words(o) for o in plan.origins.get(item.artifact.path, ())}
    return {
        "path": item.artifact.path,
        "size": item.artifact.size,
        "evidence": dict(item.artifact.evidence),
        "placed": str(item.installed.state),
        "staged": str(item.staged.state),
        "pieces": [
            {"part": p.part, "offset": p.offset, "size": p.size, "from": origins.get(p.offset, "")}
            for p in pieces
        ],
    }


def _step_data(step: Action) -> dict[str, Any]:
    return {
        "path": step.artifact.path,
        "verb": str(step.verb),
        "detail": step.detail,
        "reads": step.bytes_read,
        "writes": step.bytes_written,
        "fetches": step.bytes_fetched,
    }


@render.register
def _outcome(outcome: Outcome) -> str:
    """Return what a command did and the result of every gate, expected and found."""
    state, error = outcome.state, outcome.error
    return dump(
        model=state.manifest.name,
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        destination=str(state.paths.destination),
        files=[_file_data(item) for item in state.artifacts],
        steps=[_step_data(step) for step in outcome.actions],
        gates=[asdict(result) for result in outcome.results],
        smoke=asdict(outcome.smoke) if outcome.smoke else None,
        sealed=[asdict(one) for one in outcome.sealed],
        attested=_attested_data(outcome),
        findings=[asdict(f) for f in error.findings] if error else [],
        notes=[asdict(f) for f in outcome.notes],
    )


def _attested_data(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.attested is None:
        return None
    signer = outcome.attested.signer
    data = asdict(outcome.attested)
    return data | {"signer": signer._asdict() if signer else None}


def _file_data(item: ArtifactState) -> dict[str, Any]:
    look = item.installed if item.installed.state is not FileState.ABSENT else item.staged
    return {
        "path": item.artifact.path,
        "file": str(look.path),
        "size": look.size,
        "state": str(look.state),
        "receipt": asdict(look.receipt) if look.receipt else None,
    }


@render.register
def _error(error: CsmWeightsError) -> str:
    """An error as the result of a command."""
    return dump(
        ok=False,
        exit_code=error.exit_code,
        message=error.message,
        findings=[asdict(f) for f in error.findings],
        advice=error.advice,
    )


def dump(**data: Any) -> str:
    """A result as JSON, in ASCII."""
    return json.dumps(data, indent=2, ensure_ascii=True)


@render.register
def _attesting(done: Attesting) -> str:
    """`inv attest --json`."""
    return dump(
        model=done.model,
        ok=True,
        exit_code=0,
        attestation=str(done.file),
        subjects=dict(done.subjects),
        key=done.signer.keyid if done.signer else None,
        scheme=done.signer.scheme if done.signer else None,
        new_keys=[str(path) for path in done.new_keys],
    )


@render.register
def _comparison(comparison: Comparison) -> str:
    """`compare --json`: both sides, and every difference with index, numbers and bits."""
    error = comparison.error
    return dump(
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        first=asdict(comparison.first),
        second=asdict(comparison.second),
        equal=comparison.equal,
        bytes_equal=comparison.nbytes,
        differences=[_difference_data(d) for d in comparison.differences],
        findings=[asdict(finding) for finding in error.findings] if error else [],
    )


def _difference_data(difference: Difference) -> dict[str, Any]:
    values = difference.values
    return {
        "name": difference.name,
        "what": str(difference.what),
        "first": difference.first,
        "second": difference.second,
        "index": difference.index,
        "values": [_value_data(value) for value in values] if values else None,
    }


def _value_data(value: Value) -> dict[str, Any]:
    """A number that JSON does not have is text."""
    number = value.number
    is_json = not isinstance(number, complex) and math.isfinite(number)
    return {"number": number if is_json else repr(number), "bits": value.bits}


@render.register
def _diagnosis(diagnosis: DoctorReport) -> str:
    """`doctor --json`: every check with its findings, and the exit code of `inv weights`."""
    error = diagnosis.error
    return dump(
        subject=diagnosis.subject,
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        checks=[asdict(check) for check in diagnosis.checks],
        findings=[asdict(finding) for finding in error.findings] if error else [],
        advice=error.advice if error else "",
    )


@render.register
def _seeding(seeding: Seeding) -> str:
    """`seed-cache --json`: each file's path in the repository, its blob, and how it came."""
    return dump(
        model=seeding.manifest.name,
        ok=True,
        exit_code=0,
        repo=seeding.manifest.repo,
        revision=seeding.manifest.revision,
        main=seeding.main,
        cache=str(seeding.cache),
        files=[
            {"path": file.path, "how": str(file.how), "blob": str(file.blob)}
            for file in seeding.files
        ],
        notes=list(seeding.notes),
    )

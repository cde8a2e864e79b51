"""Results as JSON for a machine, by the schema docs/json-schema/v1.json. Pure: prints nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from csm_weights.commands.render.text import origin_words, total
from csm_weights.errors import CsmWeightsError
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action
from csm_weights.pipeline.plan import Plan
from csm_weights.pipeline.session import Outcome, StatusReport
from csm_weights.store.inspect import ArtifactState, FileState

if TYPE_CHECKING:  # what a task does not show need not be imported for it
    from csm_weights.commands.attest import Attesting
    from csm_weights.commands.doctor import DoctorReport
    from csm_weights.commands.seed_cache import Seeding
    from csm_weights.formats.compare import Comparison, Difference
    from csm_weights.formats.transformers_layout import Value

#: The version of the schema: keys are added to it; one that goes or changes makes a new version.
SCHEMA = 1

#: A number by itself, or what a limit begins with.
_NUMBER = re.compile(r"(?:at most )?(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:,.*)?")


def render(result: object, command: str = "") -> str:
    """Return what a task prints of its result, or of an error, with --json; in ASCII.

    Every object has the same first keys; after them come those of its command.
    """
    error = result if isinstance(result, CsmWeightsError) else getattr(result, "error", None)
    shared = {
        "schema": SCHEMA,
        "command": command,
        "model": None,
        "ok": error is None,
        "exit_code": error.exit_code if error else 0,
        "message": error.message if error else "",
        "findings": [asdict(finding) for finding in error.findings] if error else [],
        "notes": [],
        "advice": error.advice if error else "",
    }
    return json.dumps(shared | _keys(result), indent=2, ensure_ascii=True)


def _keys(result: object) -> dict[str, Any]:
    """Return the keys of a result that are its own, and the shared ones that differ."""
    if isinstance(result, CsmWeightsError):
        return {}
    renderers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "StatusReport": _status,
        "Outcome": _outcome,
        "Attesting": _attesting,
        "Comparison": _comparison,
        "DoctorReport": _doctor,
        "Seeding": _seeding,
    }
    name = type(result).__name__
    if name not in renderers:
        raise TypeError(f"{name} has no JSON")
    return renderers[name](result)


def _status(report: StatusReport) -> dict[str, Any]:
    state, plan = report.state, report.plan
    return {
        "model": state.manifest.name,
        "ok": plan.is_done,
        "findings": [asdict(finding) for finding in (report.error or plan).findings],
        "notes": [asdict(finding) for finding in plan.notes],
        "advice": report.advice,
        "destination": str(state.paths.destination),
        "artifacts": [_artifact(item, plan) for item in state.artifacts],
        "steps": [_step(action) for action in plan.actions],
        "bytes_to_read": total(plan.actions, "read"),
        "bytes_to_write": total(plan.actions, "written"),
        "bytes_to_fetch": total(plan.actions, "fetched"),
        "bytes_freed_meanwhile": total(plan.actions, "freed"),
        "bytes_free": state.free_staging,
    }


def _artifact(item: ArtifactState, plan: Plan) -> dict[str, Any]:
    origins = {o.piece.offset: origin_words(o) for o in plan.origins.get(item.artifact.path, ())}
    return {
        "path": item.artifact.path,
        "size": item.artifact.size,
        "evidence": dict(item.artifact.evidence),
        "placed": str(item.installed.state),
        "staged": str(item.staged.state),
        "pieces": [
            {"part": p.part, "offset": p.offset, "size": p.size, "from": origins.get(p.offset, "")}
            for p in item.artifact.pieces
        ],
    }


def _step(action: Action) -> dict[str, Any]:
    return {
        "path": action.artifact.path,
        "verb": str(action.verb),
        "detail": action.detail,
        "reads": action.cost.read,
        "writes": action.cost.written,
        "fetches": action.cost.fetched,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    state, attested = outcome.state, outcome.attested
    signer = attested.signer._asdict() if attested and attested.signer else None
    return {
        "model": state.manifest.name,
        "notes": [asdict(finding) for finding in outcome.notes],
        "destination": str(state.paths.destination),
        "files": [_file(item) for item in state.artifacts],
        "steps": [_step(action) for action in outcome.actions],
        "gates": [asdict(result) for result in outcome.results],
        "smoke": _smoke(outcome.smoke, outcome.smoke_is_known) if outcome.smoke else None,
        "sealed": [asdict(one) for one in outcome.sealed],
        "attested": asdict(attested) | {"signer": signer} if attested else None,
    }


def _file(item: ArtifactState) -> dict[str, Any]:
    found = item.installed if item.installed.state is not FileState.ABSENT else item.staged
    return {
        "path": item.artifact.path,
        "file": str(found.path),
        "size": found.size,
        "state": str(found.state),
        "receipt": asdict(found.receipt) if found.receipt else None,
    }


def _smoke(report: SmokeReport, is_known: bool) -> dict[str, Any]:
    checks = [
        asdict(check) | {"value": _number(check.value), "limit": _number(check.limit)}
        for check in report.checks
    ]
    return asdict(report) | {"earlier": is_known, "checks": checks}


def _number(text: str) -> float | str:
    """Return the number that a text is, or that a limit begins with, or else the text."""
    found = _NUMBER.fullmatch(text)
    return json.loads(found[1]) if found else text


def _attesting(done: Attesting) -> dict[str, Any]:
    return {
        "model": done.model,
        "attestation": str(done.file),
        "subjects": dict(done.subjects),
        "key": done.signer.keyid if done.signer else None,
        "scheme": done.signer.scheme if done.signer else None,
        "new_keys": [str(path) for path in done.new_keys],
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "first": asdict(comparison.first),
        "second": asdict(comparison.second),
        "equal": comparison.equal,
        "bytes_equal": comparison.nbytes,
        "differences": [_difference(difference) for difference in comparison.differences],
    }


def _difference(difference: Difference) -> dict[str, Any]:
    values = difference.values
    return {
        "name": difference.name,
        "what": str(difference.what),
        "first": difference.first,
        "second": difference.second,
        "index": difference.index,
        "values": [_value(value) for value in values] if values else None,
    }


def _value(value: Value) -> dict[str, Any]:
    """Return a number with its bits; one that JSON does not have is text."""
    number = value.number
    is_json = not isinstance(number, complex) and math.isfinite(number)
    return {"number": number if is_json else repr(number), "bits": value.bits}


def _doctor(report: DoctorReport) -> dict[str, Any]:
    return {"subject": report.subject, "checks": [asdict(check) for check in report.checks]}


def _seeding(seeding: Seeding) -> dict[str, Any]:
    return {
        "model": seeding.manifest.name,
        "repo": seeding.manifest.repo,
        "revision": seeding.manifest.revision,
        "main": seeding.main,
        "cache": str(seeding.cache),
        "files": [
            {"path": file.path, "how": str(file.how), "blob": str(file.blob)}
            for file in seeding.files
        ],
        "remarks": list(seeding.notes),
    }

"""Results as JSON for a machine, by the schema docs/json-schema/v1.json. Pure: prints nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from csm_weights.commands.render.text import origin_words
from csm_weights.errors import CsmWeightsError
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action, total
from csm_weights.pipeline.session import Outcome, StatusReport
from csm_weights.store.inspect import FileState

if TYPE_CHECKING:  # what a task does not show need not be imported for it
    from csm_weights.commands.attest import Attesting
    from csm_weights.commands.seed_cache import Seeding
    from csm_weights.fleet.cluster import FleetOutcome
    from csm_weights.formats.compare import Comparison
    from csm_weights.formats.transformers_layout import Value

#: The version of the schema: keys are added to it; one that goes or changes makes a new version.
SCHEMA = 1


def render(result: object, command: str = "", model: str | None = None) -> str:
    """Return what a task prints of its result, or of an error about `model`, with --json; in ASCII.

    Every object has the same first keys; after them come those of its command.
    """
    error = result if isinstance(result, CsmWeightsError) else getattr(result, "error", None)
    renderers: dict[str, Callable[[Any], dict[str, Any]]] = {
        "StatusReport": _status,
        "Outcome": _outcome,
        "Attesting": _attesting,
        "Comparison": _comparison,
        "Identification": lambda found: {
            "files": [asdict(one) | {"verdict": one.verdict} for one in found.files]
        },
        "DoctorReport": lambda report: {
            "subject": report.subject,
            "checks": [asdict(check) for check in report.checks],
        },
        "FleetOutcome": _fleet,
        "Seeding": _seeding,
        "Summary": lambda summary: {"model": summary.model, **summary.values},
    }
    shared = {
        "schema": SCHEMA,
        "command": command,
        "model": model,
        "ok": error is None,
        "exit_code": error.exit_code if error else 0,
        "message": error.message if error else "",
        "findings": [asdict(finding) for finding in error.findings] if error else [],
        "notes": [],
        "advice": error.advice if error else "",
    }
    own = {} if result is error else renderers[type(result).__name__](result)
    return json.dumps(shared | own, indent=2, default=str)  # of other types there are only paths


def _status(report: StatusReport) -> dict[str, Any]:
    state, plan = report.state, report.plan
    artifacts = []
    for item in state.artifacts:
        path = item.artifact.path
        origins = {o.piece.offset: origin_words(o) for o in plan.origins.get(path, ())}
        pieces = [
            {"part": p.part, "offset": p.offset, "size": p.size, "from": origins.get(p.offset, "")}
            for p in item.artifact.pieces
        ]
        artifacts.append(
            {
                "path": path,
                "size": item.artifact.size,
                "evidence": dict(item.artifact.evidence),
                "placed": item.installed.state,
                "staged": item.staged.state,
                "pieces": pieces,
            }
        )
    return {
        "model": state.manifest.name,
        "ok": plan.is_done and report.error is None,
        "findings": [asdict(finding) for finding in (report.error or plan).findings],
        "notes": [asdict(finding) for finding in plan.notes],
        "advice": report.advice,
        "destination": state.paths.destination,
        "artifacts": artifacts,
        "steps": [_step(action) for action in plan.actions],
        "bytes_to_read": total(plan.actions, "read"),
        "bytes_to_write": total(plan.actions, "written"),
        "bytes_to_fetch": total(plan.actions, "fetched"),
        "bytes_freed_meanwhile": total(plan.actions, "freed"),
        "bytes_free": state.free_staging,
        "also": [_status(one) for one in report.also],
    }


def _step(action: Action) -> dict[str, Any]:
    return {
        "path": action.artifact.path,
        "verb": action.verb,
        "detail": action.detail,
        "reads": action.cost.read,
        "writes": action.cost.written,
        "fetches": action.cost.fetched,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    state, attested = outcome.state, outcome.attested
    signer = attested.signer._asdict() if attested and attested.signer else None
    files = []
    for item in state.artifacts:
        found = item.installed if item.installed.state is not FileState.ABSENT else item.staged
        files.append(
            {
                "path": item.artifact.path,
                "file": found.path,
                "size": found.size,
                "state": found.state,
                "receipt": asdict(found.receipt) if found.receipt else None,
            }
        )
    return {
        "model": state.manifest.name,
        "notes": [asdict(finding) for finding in outcome.notes],
        "destination": state.paths.destination,
        "files": files,
        "steps": [_step(action) for action in outcome.actions],
        "gates": [asdict(result) for result in outcome.results],
        "smoke": _smoke(outcome.smoke, outcome.smoke_is_known) if outcome.smoke else None,
        "sealed": [asdict(one) for one in outcome.sealed],
        "attested": asdict(attested) | {"signer": signer} if attested else None,
        "also": [_outcome(one) for one in outcome.also],
    }


def _smoke(report: SmokeReport, is_known: bool) -> dict[str, Any]:
    checks = [
        asdict(check) | {"value": _number(check.value), "limit": _number(check.limit)}
        for check in report.checks
    ]
    return asdict(report) | {"earlier": is_known, "checks": checks}


def _number(text: str) -> float | str:
    """Return the number that a text is, or that a limit begins with, or else the text."""
    found = re.fullmatch(r"(?:at most )?(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:,.*)?", text)
    return json.loads(found[1]) if found else text


def _attesting(done: Attesting) -> dict[str, Any]:
    return {
        "model": done.model,
        "attestation": done.file,
        "subjects": dict(done.subjects),
        "key": done.signer.keyid if done.signer else None,
        "scheme": done.signer.scheme if done.signer else None,
        "new_keys": done.new_keys,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    differences = []
    for difference in comparison.differences:
        values = difference.values
        shown = [_value(value) for value in values] if values else None
        differences.append(asdict(difference) | {"values": shown})
    return {
        "first": asdict(comparison.first),
        "second": asdict(comparison.second),
        "equal": comparison.equal,
        "bytes_equal": comparison.nbytes,
        "differences": differences,
    }


def _value(value: Value) -> dict[str, Any]:
    """Return a number with its bits; one that JSON does not have is text."""
    number = value.number
    is_json = not isinstance(number, complex) and math.isfinite(number)
    return {"number": number if is_json else repr(number), "bits": value.bits}


def _seeding(seeding: Seeding) -> dict[str, Any]:
    return {
        "model": seeding.manifest.name,
        "repo": seeding.manifest.repo,
        "revision": seeding.manifest.revision,
        "main": seeding.main,
        "cache": seeding.cache,
        "files": [asdict(file) for file in seeding.files],
        "remarks": seeding.notes,
    }


def _fleet(outcome: FleetOutcome) -> dict[str, Any]:
    return {
        "model": outcome.model,
        "seconds": outcome.seconds,
        "nodes": [asdict(report) for report in outcome.nodes],
        "events": outcome.events,
    }

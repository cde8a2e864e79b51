"""Results as text for a person and JSON for a machine. Pure: prints nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from csm_weights.errors import CsmWeightsError, Finding, printable
from csm_weights.pipeline.outcome import Outcome, StatusReport
from csm_weights.pipeline.plan import PieceOrigin, PieceSource, Plan, Step, Verb, extra
from csm_weights.store.inspect import ArtifactState, FileState
from csm_weights.store.receipts import SmokeReport
from csm_weights.verify.gates import Gate, GateResult

#: Hex digits of a digest in a table; JSON and SHA256SUMS have them all.
SHORT = 16


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of words in columns, as wide as they need to be."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = ["  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(printable(text.rstrip()) for text in texts)


def survey_text(survey: StatusReport) -> str:
    """What `status` and a dry run show."""
    state, plan = survey.state, survey.plan
    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.artifact.path, []).append(step)
    rows = [
        (
            item.artifact.path,
            f"{item.artifact.size:,}",
            str(item.installed.state),
            str(item.staged.state),
            _next(steps.get(item.artifact.path, [])),
        )
        for item in state.artifacts
    ]
    blocks = [
        printable(f"{state.manifest.name} -> {state.paths.destination}"),
        table(("file", "bytes", "in place", "staged", "next"), rows),
    ]
    blocks += [
        table((f"piece of {path}", "bytes", "from"), map(_piece_row, origins))
        for path, origins in plan.origins.items()
        if len(origins) > 1
    ]
    reads, writes, fetches = (_sum(plan.steps, name) for name in ("reads", "writes", "fetches"))
    over_network = f"to fetch {fetches:,} bytes, " if fetches else ""
    blocks.append(
        f"{over_network}to read {reads:,} bytes, to write {writes:,}, free {state.free_staging:,}"
    )
    if consuming := plan.having(Verb.CONSUME):
        paths = ", ".join(step.artifact.path for step in consuming)
        blocks.append(
            printable(
                f"consuming: the parts of {paths} go as it grows, and need at most"
                f" {extra(consuming):,} bytes of disk besides; inv split brings them back"
            )
        )
    blocks += _finding_blocks(plan.findings, plan.notes)
    if survey.advice:
        blocks.append(survey.advice)
    return "\n\n".join(blocks)


def _next(steps: Sequence[Step]) -> str:
    words = [f"{s.verb} {s.detail}".rstrip() for s in steps]
    return ", then ".join(words) or "nothing to take it from"


def _piece_row(origin: PieceOrigin) -> tuple[str, str, str]:
    piece = origin.piece
    return f"[{piece.offset:,}, {piece.end:,})", f"{piece.size:,}", _origin_words(origin)


def _origin_words(origin: PieceOrigin) -> str:
    """Where a piece comes from, as a person and a machine read it."""
    return {
        PieceSource.KEPT: "the unfinished file, proven in an earlier run",
        PieceSource.SALVAGED: f"the damaged file {origin.where}",
        PieceSource.CACHED: f"the Hub's cache {origin.where}",
        PieceSource.CONSUMED: f"the unfinished file, and the rest of {origin.where}",
        PieceSource.NOWHERE: f"nowhere: {origin.where}",
    }.get(origin.origin, origin.where)


def _sum(steps: Iterable[Step], name: str) -> int:
    return sum(getattr(step, name) for step in steps)


def outcome_text(outcome: Outcome) -> str:
    """What a command did, and the short table of what is proven."""
    state = outcome.state
    blocks = [printable(f"{state.manifest.name} -> {state.paths.destination}")]
    if outcome.acts:
        acts = [(step.artifact.path, f"{step.verb} {step.detail}".strip()) for step in outcome.acts]
        blocks.append(table(("file", "done"), acts))
    blocks.append(table(("file", "bytes", "state", "sha256", "from"), map(_file, state.artifacts)))
    if outcome.sealed:
        blocks.append(table(("file", "sealed"), [(s.path, s.how) for s in outcome.sealed]))
    if outcome.results:
        blocks.append(_gates(outcome.results))
    if outcome.attested:
        blocks.append("\n".join(map(printable, outcome.attested.lines())))
    if outcome.smoke:
        blocks.append(smoke_text(outcome.smoke))
    findings = outcome.error.findings if outcome.error else ()
    blocks += _finding_blocks(findings, outcome.notes)
    blocks.append(_verdict(outcome))
    return "\n\n".join(blocks)


def _file(item: ArtifactState) -> tuple[str, ...]:
    look = item.installed if item.installed.state is not FileState.ABSENT else item.staged
    where = str(look.state)
    if look is item.staged and look.state is not FileState.ABSENT:
        where = f"{where}, staged"
    receipt = look.receipt if look.state is FileState.VERIFIED else None
    size = "-" if look.size is None else f"{look.size:,}"
    digest = receipt.sha256[:SHORT] if receipt else "-"
    return item.artifact.path, size, where, digest, _origin(item, look.state)


def _origin(item: ArtifactState, condition: FileState) -> str:
    receipt = item.installed.receipt or item.staged.receipt
    if not receipt or condition is not FileState.VERIFIED:
        return "-"
    sources = dict.fromkeys(record.source.rpartition("/")[0] for record in receipt.pieces)
    if not receipt.pieces:
        return "-"
    return f"{len(receipt.pieces)} pieces, {', '.join(s or 'in place' for s in sources)}"


def _gates(results: Sequence[GateResult]) -> str:
    rows = []
    for gate in Gate:
        of_gate = [r for r in results if r.gate is gate]
        bad = [r for r in of_gate if r.ok is False]
        good = [r for r in of_gate if r.ok]
        verdict = "NOT OK" if bad else "OK" if len(good) == len(of_gate) else "not run"
        if not of_gate:
            continue
        words = f"{len(good)} of {len(of_gate)} files"
        rows.append((gate.value, verdict, "; ".join([words, *map(_gate_words, bad[:3])])))
    return table(("gate", "verdict", ""), rows)


def _gate_words(bad: GateResult) -> str:
    return f"{bad.path}: {_cut(bad.found)}"


def _cut(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."


def smoke_text(report: SmokeReport) -> str:
    """What was measured, each check with its limit and verdict."""
    rows = [(check.name, check.value, check.limit, check.verdict) for check in report.checks]
    made = f", {report.made_at}" if report.made_at else ""
    head = printable(f"smoke test on {report.device}{made}")
    return f"{head}\n{table(('check', 'found', 'limit', ''), rows)}\n\n{_figures(report)}"


def _figures(report: SmokeReport) -> str:
    f = report.figures
    driver = f", driver {f.driver}" if f.driver != "-" else ""
    seconds = f"{report.load_seconds:.2f} s"
    loaded = f"mapped in {seconds}, and read as it is used"
    if f.loaded_bytes:
        rate = f.loaded_bytes / report.load_seconds
        bus = f", {rate / f.bus_rate:.0%} of the bus at {_rate(f.bus_rate)}" if f.bus_rate else ""
        loaded = f"{_gigabytes(f.loaded_bytes)} in {seconds}, {_rate(rate)}{bus}"
    reached = f.frame_bytes * report.frames_per_second
    share = f"{reached / f.memory_rate:.0%} of the roofline" if f.memory_rate else "no roofline"
    wall = f"{_gigabytes(f.frame_bytes)} of weights a frame at {_rate(f.memory_rate)}"
    device = f", device {_gigabytes(f.peak_device)}" if f.peak_device else ""
    rows = [
        ("machine", f"{f.machine}{driver}, torch {f.torch}, {f.dtype}"),
        ("loading", loaded),
        ("a frame", f"{1000 / report.frames_per_second:.3g} ms, {share}: {wall}"),
        ("peak memory", f"host {_gigabytes(f.peak_host)}{device}"),
    ]
    return table(("figure", "measured"), rows)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _verdict(outcome: Outcome) -> str:
    if outcome.error:
        return printable(f"NOT OK: {outcome.error.message}")
    if outcome.smoke:
        return "OK: in place, proven, and it speaks"
    if outcome.results:
        return "OK: in place and proven"
    return "OK: proven"


def _finding_blocks(findings: Sequence[Finding], notes: Sequence[Finding]) -> list[str]:
    blocks = []
    for title, some in (
        ("missing or wrong:", findings),
        ("noticed, and mended on the way:", notes),
    ):
        if some:
            blocks.append("\n".join([title, *(f"  {f.line()}" for f in some)]))
    return blocks


def survey_json(survey: StatusReport) -> str:
    """`status --json`: what is there, the steps, the bytes; sizes in bytes."""
    state, plan = survey.state, survey.plan
    return dump(
        model=state.manifest.name,
        ok=plan.is_done,
        exit_code=survey.error.exit_code if survey.error else 0,
        destination=str(state.paths.destination),
        artifacts=[_artifact_data(item, plan) for item in state.artifacts],
        steps=[_step_data(step) for step in plan.steps],
        bytes_to_read=_sum(plan.steps, "reads"),
        bytes_to_write=_sum(plan.steps, "writes"),
        bytes_to_fetch=_sum(plan.steps, "fetches"),
        bytes_freed_meanwhile=_sum(plan.steps, "frees"),
        bytes_free=state.free_staging,
        findings=[asdict(f) for f in (survey.error or plan).findings],
        notes=[asdict(f) for f in plan.notes],
        advice=survey.advice,
    )


def _artifact_data(item: ArtifactState, plan: Plan) -> dict[str, Any]:
    pieces = item.artifact.pieces
    origins = {o.piece.offset: _origin_words(o) for o in plan.origins.get(item.artifact.path, ())}
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


def _step_data(step: Step) -> dict[str, Any]:
    return {
        "path": step.artifact.path,
        "verb": str(step.verb),
        "detail": step.detail,
        "reads": step.reads,
        "writes": step.writes,
        "fetches": step.fetches,
    }


def outcome_json(outcome: Outcome) -> str:
    """What a command did and what every gate says, expected and found."""
    state, error = outcome.state, outcome.error
    return dump(
        model=state.manifest.name,
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        destination=str(state.paths.destination),
        files=[_file_data(item) for item in state.artifacts],
        steps=[_step_data(step) for step in outcome.acts],
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


def error_json(error: CsmWeightsError) -> str:
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

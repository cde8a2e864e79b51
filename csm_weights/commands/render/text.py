"""Results as text for a person. Pure: prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch

from csm_weights.commands.attest import Attesting
from csm_weights.commands.doctor import CheckResult, DoctorReport, Verdict
from csm_weights.commands.seed_cache import Seeding
from csm_weights.errors import Finding, printable
from csm_weights.formats.compare import Comparison, Difference
from csm_weights.formats.tensor_index import MAX_FINDINGS
from csm_weights.formats.transformers_layout import Layout, Summary
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action, Consume
from csm_weights.pipeline.outcome import Outcome, StatusReport
from csm_weights.pipeline.plan import room
from csm_weights.store.inspect import ArtifactState, FileState
from csm_weights.transfer.policy import PieceOrigin, PieceSource
from csm_weights.verify.gates import Gate, GateResult


@singledispatch
def render(result: object) -> str:
    """Return what a task shows of its result on stdout, or of an error on stderr."""
    return str(result)


#: Hex digits of a digest in a table; JSON and SHA256SUMS have them all.
SHORT = 16


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of words in columns, as wide as they need to be."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = ["  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(printable(text.rstrip()) for text in texts)


@render.register
def _survey(survey: StatusReport) -> str:
    """What `status` and a dry run show."""
    state, plan = survey.state, survey.plan
    steps: dict[str, list[Action]] = {}
    for step in plan.actions:
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
    reads, writes, fetches = (
        _sum(plan.actions, f"bytes_{name}") for name in ("read", "written", "fetched")
    )
    over_network = f"to fetch {fetches:,} bytes, " if fetches else ""
    blocks.append(
        f"{over_network}to read {reads:,} bytes, to write {writes:,}, free {state.free_staging:,}"
    )
    if consuming := plan.having(Consume):
        paths = ", ".join(step.artifact.path for step in consuming)
        blocks.append(
            printable(
                f"consuming: the chunk files of {paths} go as it grows, and need at most"
                f" {room(consuming):,} bytes of disk besides; inv split brings them back"
            )
        )
    blocks += _finding_blocks(plan.findings, plan.notes)
    if survey.advice:
        blocks.append(survey.advice)
    return "\n\n".join(blocks)


def _next(steps: Sequence[Action]) -> str:
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
    }.get(origin.source, origin.where)


def _sum(steps: Iterable[Action], name: str) -> int:
    return sum(getattr(step, name) for step in steps)


@render.register
def _outcome(outcome: Outcome) -> str:
    """What a command did, and the short table of what is proven."""
    state = outcome.state
    blocks = [printable(f"{state.manifest.name} -> {state.paths.destination}")]
    if outcome.actions:
        acts = [(a.artifact.path, f"{a.verb} {a.detail}".strip()) for a in outcome.actions]
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
        ("speed", f"{report.frames_per_second:.3g} frames/s, {_real_time(report)}"),
        ("peak memory", f"host {_gigabytes(f.peak_host)}{device}"),
    ]
    return table(("figure", "measured"), rows)


def _real_time(report: SmokeReport) -> str:
    return f"real-time factor {report.real_time_factor:.3g}, below 1 is faster than real time"


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


@render.register
def _attesting(done: Attesting) -> str:
    """The subjects with their digests, and who vouches for them."""
    blocks = [printable(f"{done.model} -> {done.file}")]
    blocks.append(table(("subject", "sha256"), list(done.subjects.items())))
    if done.new_keys:
        private, public = done.new_keys
        blocks.append(printable(f"new key: {private} (keep it secret), {public} (hand it out)"))
    if done.signer:
        blocks.append(f"OK: attested, signed by {done.signer.scheme} key {done.signer.keyid[:16]}")
    else:
        blocks.append("OK: attested, but NOBODY SIGNED IT: --key or --new-key signs it")
    return "\n\n".join(blocks)


@render.register
def _comparison(comparison: Comparison) -> str:
    """Both sides, the first differences in the order of names, and one verdict."""
    sides = [("first", comparison.first), ("second", comparison.second)]
    rows = [(word, side.where, _kind(side), f"{side.tensors:,}") for word, side in sides]
    blocks = [table(("", "file", "format", "tensors"), rows)]
    blocks += [printable(_left_out(side)) for _, side in sides if side.left_out]
    if comparison.differences:
        blocks.append(_differences(comparison.differences))
    size = f"{comparison.equal:,} tensors of {comparison.nbytes:,} bytes are equal"
    if comparison.error:
        return "\n\n".join([*blocks, size, printable(f"NOT OK: {comparison.error.message}")])
    return "\n\n".join([*blocks, f"OK: {size}, name by name, in dtype, shape and every bit"])


def _kind(side: Summary) -> str:
    names = ", transformers' names" if side.layout is Layout.TRANSFORMERS else ""
    return f"{side.format}{names}"


def _left_out(side: Summary) -> str:
    size = f"{side.left_out:,} tensors of {side.left_out_bytes:,} bytes"
    return f"left out of {side.where}: the codec, {size}"


def _differences(differences: Sequence[Difference]) -> str:
    rows = [(d.where, str(d.what), d.first, d.second) for d in differences[:MAX_FINDINGS]]
    text = table(("tensor", "differs in", "first", "second"), rows)
    rest = len(differences) - len(rows)
    return f"{text}\nand {rest:,} more" if rest else text


@render.register
def _diagnosis(diagnosis: DoctorReport) -> str:
    """Each check with its verdict, what stands in the way, and one verdict."""
    rows = [(check.name, str(check.verdict), check.found) for check in diagnosis.checks]
    blocks = [printable(diagnosis.subject), table(("check", "verdict", "found"), rows)]
    error = diagnosis.error
    in_the_way = _findings(diagnosis.checks, is_ok=False)
    blocks += _lines("what stands in the way:", in_the_way)
    blocks += _lines("good to know:", _findings(diagnosis.checks, is_ok=True))
    if error and error.advice:
        blocks.append("\n".join(printable(line) for line in error.advice.splitlines()))
    verdict = f"NOT OK: {error.message}" if error else f"OK: {diagnosis.promise}"
    return "\n\n".join([*blocks, printable(verdict)])


def _findings(checks: Iterable[CheckResult], is_ok: bool) -> list[Finding]:
    """The findings of checks that are, or are not, NOT OK; each once."""
    some = [check for check in checks if (check.verdict is not Verdict.NOT_OK) is is_ok]
    return list(dict.fromkeys(finding for check in some for finding in check.findings))


def _lines(title: str, findings: Iterable[Finding]) -> list[str]:
    lines = [f"  {finding.line()}" for finding in findings]
    return ["\n".join([title, *lines])] if lines else []


@render.register
def _seeding(seeding: Seeding) -> str:
    """Where each file is in the Hub's cache and how it came there, and who finds it now."""
    repo = seeding.manifest.repo
    blocks = [printable(f"{repo} in {seeding.cache}")]
    if seeding.files:
        rows = [(file.path, str(file.how), file.blob.name) for file in seeding.files]
        blocks.append(table(("file", "how", "blob"), rows))
    if seeding.notes:
        blocks.append("\n".join(printable(note) for note in seeding.notes))
    if seeding.files:
        blocks.append(printable(f"OK: with HF_HUB_OFFLINE=1, {_call(seeding)} finds it"))
    return "\n\n".join(blocks)


def _call(seeding: Seeding) -> str:
    """How a program asks for what the cache has now."""
    repo, revision = seeding.manifest.repo, seeding.manifest.revision
    is_main = seeding.main == revision
    return f'from_pretrained("{repo}"{"" if is_main else f", revision={revision!r}"})'

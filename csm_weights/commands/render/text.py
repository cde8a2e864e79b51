"""Results as text for a person. Pure: prints nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from csm_weights.commands.render import blocks
from csm_weights.commands.render.blocks import SHORT, paragraph, table
from csm_weights.errors import printable
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action, Consume, costs
from csm_weights.pipeline.plan import room
from csm_weights.pipeline.session import Outcome, StatusReport
from csm_weights.progress import count, format_size
from csm_weights.store.inspect import ArtifactState, FileState, State
from csm_weights.transfer.policy import PieceOrigin, PieceSource
from csm_weights.verify.gates import Gate, GateResult

#: Tensors of one file that are named.
MOST = 5

if TYPE_CHECKING:  # what a task does not show need not be imported for it
    from csm_weights.commands.attest import Attesting
    from csm_weights.commands.identify import Identification
    from csm_weights.commands.seed_cache import Seeding
    from csm_weights.fleet.cluster import FleetOutcome
    from csm_weights.formats.compare import Comparison
    from csm_weights.pipeline.doctor import DoctorReport


def render(result: object) -> str:
    """Return what a task shows of its result; its error is told by itself, by `blocks.error`."""
    renderers: dict[str, Callable[[Any], str]] = {
        "StatusReport": _status,
        "Outcome": _outcome,
        "Attesting": _attesting,
        "Comparison": _comparison,
        "Identification": _identification,
        "DoctorReport": _doctor,
        "FleetOutcome": _fleet,
        "Seeding": _seeding,
    }
    return renderers.get(type(result).__name__, str)(result)


# ---- status, and dry runs


def _status(report: StatusReport) -> str:
    state, plan = report.state, report.plan
    rows, steps = [], steps_of(state, plan.actions)
    for item in state.artifacts:
        path, size = item.artifact.path, format_size(item.artifact.size)
        if path in report.refused:
            rows.append(("refused", path, size, "none: its digest is right, see the error"))
            continue
        rows.append((_state(item), path, size, steps.get(path, "no source has it")))
    shown = [
        printable(f"{state.manifest.name} -> {state.paths.destination}"),
        table(("state", "file", "size", "next"), rows),
    ]
    shown += [_pieces(path, some) for path, some in plan.origins.items() if len(some) > 1]
    shown.append(f"{costs(plan.actions)}; {format_size(state.free_staging)} free")
    if consuming := plan.having(Consume):
        paths = ", ".join(step.artifact.path for step in consuming)
        size = format_size(room(consuming))
        shown.append(
            paragraph(
                f"--consume removes the chunk files of {paths} while the file grows, which takes at"
                f" most {size} more of disk; inv split makes them again"
            )
        )
    shown += map(_status, report.also)
    if not report.error:
        shown += blocks.findings("problems:", plan.findings)
    shown += blocks.findings("to be repaired:", plan.notes)
    shown.append("\n".join(map(paragraph, report.advice.splitlines())))
    return "\n\n".join(filter(None, shown))


def steps_of(state: State, actions: Iterable[Action]) -> dict[str, str]:
    """Return in words what is done with each file, by its path."""
    words: dict[str, list[str]] = {item.artifact.path: [] for item in state.artifacts}
    for action in actions:
        words[action.artifact.path].append(f"{action.verb} {action.detail}".rstrip())
    return {path: ", then ".join(some) for path, some in words.items() if some}


def _state(item: ArtifactState) -> str:
    """Return in a word what is known of a file, and whether it is still staged."""
    if item.installed.state is FileState.ABSENT and item.staged.state is not FileState.ABSENT:
        return f"{item.staged.state}, staged"
    return str(item.installed.state)


def _pieces(path: str, origins: Sequence[PieceOrigin]) -> str:
    """Return a table of where pieces come from; a run of pieces from one place is one row."""
    rows, first = [], 1
    for where, group in groupby(origins, key=origin_words):
        sizes = [origin.piece.size for origin in group]
        last = first + len(sizes) - 1
        numbers = f"{first}" if last == first else f"{first} to {last}"
        rows.append((f"{numbers} of {len(origins)}", format_size(sum(sizes)), where))
        first = last + 1
    return f"pieces of {printable(path)}:\n{table(('piece', 'size', 'from'), rows)}"


def origin_words(origin: PieceOrigin) -> str:
    """Return where a piece comes from, in words."""
    return {
        PieceSource.KEPT: "the unfinished file, verified in an earlier run",
        PieceSource.SALVAGED: f"the damaged file {origin.where}",
        PieceSource.CACHED: f"the Hub's cache {origin.where}",
        PieceSource.CONSUMED: f"the unfinished file, and the rest of {origin.where}",
        PieceSource.NOWHERE: f"nowhere: {origin.where}",
    }.get(origin.source, origin.where)


# ---- what a command did


def _outcome(outcome: Outcome) -> str:
    state = outcome.state
    shown = [printable(f"{state.manifest.name} -> {state.paths.destination}")]
    if outcome.actions:
        shown.append(table(("file", "done"), steps_of(state, outcome.actions).items()))
    files = []
    for item in state.artifacts:
        file, receipt = item.file, item.file.valid_receipt
        sha256 = receipt.sha256[:SHORT] if receipt else "-"
        size = "-" if file.size is None else format_size(file.size)
        files.append((_state(item), size, sha256, item.artifact.path))
    shown.append(table(("state", "size", "sha256", "file"), files))
    if outcome.sealed:
        shown.append(table(("file", "sealed"), [(s.path, s.how) for s in outcome.sealed]))
    if outcome.results:
        shown.append(_gates(outcome.results))
    if outcome.attested:
        shown.append("\n".join(map(printable, outcome.attested.lines())))
    if outcome.smoke:
        shown.append(_smoke(outcome.smoke, outcome.smoke_is_known))
    shown += blocks.findings("repaired:", outcome.notes)
    shown += map(_outcome, outcome.also)
    if not outcome.error:
        shown.append("\n".join(_ending(outcome)))
    return "\n\n".join(shown)


def _gates(results: Sequence[GateResult]) -> str:
    unread = [f"{r.path}: {r.found}" for r in results if r.found.startswith("not read")]
    return "\n".join([table(("verdict", "gate", ""), gate_rows(results)), *map(paragraph, unread)])


def gate_rows(results: Sequence[GateResult]) -> Iterator[tuple[str, str, str]]:
    """Yield the verdict of each gate that was run, its name, and how many files passed it."""
    for gate in Gate:
        oks = [result.ok for result in results if result.gate is gate]
        if oks:
            verdict = "NOT OK" if False in oks else "not run" if None in oks else "OK"
            yield verdict, gate.value, f"{oks.count(True)} of {count(len(oks), 'file')}"


def verdict(outcome: Outcome) -> str:
    """Return in a few words what holds of the files of an outcome without an error."""
    states = {item.installed.state for item in outcome.state.artifacts}
    if outcome.smoke:
        return "OK: installed, verified, smoke test passed"
    is_installed = states == {FileState.VERIFIED} or outcome.results
    return "OK: installed and verified" if is_installed else "OK: verified"


def _ending(outcome: Outcome) -> list[str]:
    """Return the verdict, where the files are, and the command that is most likely wanted now."""
    state = outcome.state
    is_staged = FileState.ABSENT in [item.installed.state for item in state.artifacts]
    folder = state.paths.staging if is_staged else state.paths.destination
    rows = [("files", str(folder))]
    has_weights = any(item.artifact.is_weights for item in state.artifacts)
    if is_staged:
        rows.append(("next", state.paths.command("place")))
    elif outcome.also:
        text = "inv speak --text=Hello --out=hello.wav"
        rows.append(("next", " ".join([text, *state.paths.options])))
    elif outcome.smoke:
        below = os.path.relpath(folder, state.paths.root)
        rows.append(("next", f'in Python: csm_weights.Model.from_local("{below}")'))
    elif has_weights and any(item.artifact.format == "config" for item in state.artifacts):
        rows.append(("next", state.paths.command("smoke")))
    return [verdict(outcome), *(printable(f"  {word:7}{text}") for word, text in rows)]


def _smoke(report: SmokeReport, is_known: bool) -> str:
    """Return the checks with their verdicts, and what was measured; of an earlier run, when."""
    if is_known:
        when = f"passed in an earlier run, of {report.made_at}, on the same files"
        return paragraph(f"smoke test on {report.device}: {when}")
    checks = [
        ("OK" if c.ok else "NOT OK", f"{c.name}: {c.value}; limit {c.limit}") for c in report.checks
    ]
    checks += [
        ("OK" if p.ok else "note", f"path {p.name}: {p.found}; limit {p.limit}{_pace(p.ms)}")
        for p in report.paths
    ]
    head = ("verdict", f"smoke test on {report.device}")
    return f"{table(head, checks)}\n\n{table(('figure', 'measured'), smoke_figures(report))}"


def smoke_figures(report: SmokeReport) -> list[tuple[str, str]]:
    """Return what a smoke test measured beside its checks, each with its name."""
    f = report.figures
    driver = f", driver {f.driver}" if f.driver != "-" else ""
    seconds = f"{report.load_seconds:.2f} s"
    loaded = f"mapped in {seconds}, and read as it is used"
    if f.loaded_bytes:
        rate = f.loaded_bytes / report.load_seconds
        bus = f", {rate / f.bus_rate:.0%} of the bus's {_rate(f.bus_rate)}" if f.bus_rate else ""
        loaded = f"{format_size(f.loaded_bytes)} in {seconds}, {_rate(rate)}{bus}"
    frame = f"{_figure(1000 / report.frames_per_second)} ms for 80 ms of audio"
    if f.memory_rate:
        share = f.frame_bytes * report.frames_per_second / f.memory_rate
        frame += f", {share:.0%} of the memory's {_rate(f.memory_rate)}"
    device = f", device {format_size(f.peak_device)}" if f.peak_device else ""
    if report.paths:
        taken = next((p.name for p in report.paths if p.ok), "eager, as no fast path is right")
        frame += f"; path {taken}"
    return [
        ("machine", f"{f.machine}{driver}, torch {f.torch}, {f.dtype}"),
        ("loading", loaded),
        ("speed", f"real-time factor {_figure(report.real_time_factor)}, below 1 is faster"),
        ("a frame", frame),
        ("peak memory", f"host {format_size(f.peak_host)}{device}"),
    ]


def _pace(ms: float) -> str:
    return f"; {_figure(ms)} ms a frame" if ms else ""


def _figure(number: float) -> str:
    """Return a measured number in three digits, a large one without a fraction."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _rate(rate: float) -> str:
    return f"{format_size(rate)}/s"


# ---- attest, compare, doctor, seed-cache


def _attesting(done: Attesting) -> str:
    shown = [printable(f"{done.model} -> {done.file}")]
    shown.append(table(("sha256", "subject"), [(sha, name) for name, sha in done.subjects.items()]))
    if done.new_keys:
        private, public = done.new_keys
        shown.append(printable(f"new key: {private} (keep it secret), {public} (hand it out)"))
    if done.signer:
        shown.append(f"OK: attested, signed by {done.signer.scheme} key {done.signer.keyid[:16]}")
    else:
        shown.append("OK: attested, but NOT SIGNED: sign it with --key or --new-key")
    return "\n\n".join(shown)


def _comparison(comparison: Comparison) -> str:
    from csm_weights.formats.tensor_index import MAX_FINDINGS
    from csm_weights.formats.transformers_layout import Layout

    rows, left_out = [], []
    for word, side in (("first", comparison.first), ("second", comparison.second)):
        names = ", transformers' names" if side.layout is Layout.TRANSFORMERS else ""
        rows.append((word, f"{side.tensors:,}", f"{side.format}{names}", side.where))
        if side.left_out:
            size = f"{side.left_out:,} tensors, {format_size(side.left_out_bytes)}"
            left_out.append(paragraph(f"left out of {side.where}: the codec, {size}"))
    shown = [table(("", "tensors", "format", "file"), rows), *left_out]
    if differences := comparison.differences:
        lines = [(str(d.what), d.where, f"{d.first} against {d.second}") for d in differences]
        text = table(("differs in", "tensor", "first against second"), lines[:MAX_FINDINGS])
        rest = len(lines) - MAX_FINDINGS
        shown.append(f"{text}\nand {rest:,} more" if rest > 0 else text)
    equal = f"{comparison.equal:,} tensors, {format_size(comparison.nbytes)}, are equal"
    shown.append(equal if comparison.error else f"OK: {equal} in name, dtype, shape and every bit")
    return "\n\n".join(shown)


def _identification(found: Identification) -> str:
    shown = []
    for one in found.files:
        shown.append(printable(f"{one.path}: {one.identity}; {one.verdict}"))
        wrong = [f"{f.where}: expected {f.expected}, found {f.found}" for f in one.identity.wrong]
        lines = [*wrong, *(f"{name} differs" for name in one.differ or ())]
        shown += [printable(f"  {line}") for line in lines[:MOST]]
        shown += [f"  and {len(lines) - MOST:,} more"] if len(lines) > MOST else []
    return "\n".join(shown)


def _doctor(report: DoctorReport) -> str:
    from csm_weights.pipeline.doctor import Verdict

    rows = [(str(check.verdict), check.name, check.found) for check in report.checks]
    shown = [printable(report.subject), table(("verdict", "check", "found"), rows)]
    # What the command would end with is told as its error.
    told = report.error.findings if report.error else ()
    for title, is_ok in (("other problems:", False), ("notes:", True)):
        some = [check for check in report.checks if (check.verdict is not Verdict.NOT_OK) is is_ok]
        found = dict.fromkeys(finding for check in some for finding in check.findings)
        shown += blocks.findings(title, [finding for finding in found if finding not in told])
    return "\n\n".join(shown if report.error else [*shown, printable(f"OK: {report.promise}")])


def _seeding(seeding: Seeding) -> str:
    repo, revision = seeding.manifest.repo, seeding.manifest.revision
    shown = [printable(f"{repo} in {seeding.cache}")]
    if seeding.files:
        rows = [(str(file.how), file.path, file.blob.name[:SHORT]) for file in seeding.files]
        shown.append(table(("how", "file", "blob"), rows))
    shown += map(paragraph, seeding.notes)
    if seeding.files:
        asked = f'"{repo}"' if seeding.main == revision else f'"{repo}", revision={revision!r}'
        shown.append(printable(f"OK: with HF_HUB_OFFLINE=1, from_pretrained({asked}) finds it"))
    return "\n\n".join(shown)


# ---- fleet


def _fleet(outcome: FleetOutcome) -> str:
    rows, nodes = node_rows(outcome), count(len(outcome.nodes), "node")
    shown = [f"{outcome.model} on {nodes}", table(NODE_HEAD, rows)]
    if outcome.events:
        shown.append("\n".join(["on the way:", *(paragraph(f"  {e}") for e in outcome.events)]))
    if not outcome.error:
        shown.append(f"OK: verified on {nodes} in {outcome.seconds:.1f} s")
    return "\n\n".join(shown)


#: The names of the columns of `node_rows`.
NODE_HEAD = (
    *("node", "host", "state", "after", "own disk", "nodes", "origin", "refused", "gates"),
    "smoke",
)


def node_rows(outcome: FleetOutcome) -> list[tuple[str, ...]]:
    """Return what became of each node of a fleet, in words."""
    rows = []
    for report in outcome.nodes:
        sizes = map(format_size, (report.from_disk, report.from_nodes, report.from_origin))
        gates = {result.ok for result in report.gates}
        gate = "NOT OK" if False in gates else "OK" if gates else "-"
        words = (report.node, report.host, report.status, f"{report.seconds:.1f} s", *sizes)
        rows.append((*words, str(report.refused), gate, report.smoke or "-"))
    return rows

"""A result as one page for a browser: no scripts, nothing from elsewhere. Pure: writes nothing.

Names and messages are escaped by the template library; what a colour says, a mark and a
word say too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from csm_weights.commands.render.text import NODE_HEAD, node_rows, smoke_figures, verdict
from csm_weights.commands.render.text import render as render_text
from csm_weights.errors import Category, CsmWeightsError, Finding, printable
from csm_weights.manifest.types import Piece
from csm_weights.pipeline.actions import WriteText
from csm_weights.pipeline.plan import Plan
from csm_weights.pipeline.session import Outcome, StatusReport
from csm_weights.progress import Event, count, format_size
from csm_weights.store.inspect import ArtifactState, FileState
from csm_weights.transfer.policy import HUB, PieceSource
from csm_weights.verify.gates import Gate, GateResult

#: Boxes in the bar of a file at most; where it has more pieces, those alike share one.
MOST_BOXES = 128

#: Points of a curve at most, and the size of its picture.
MOST_POINTS = 120
WIDTH, HEIGHT = 600, 120

#: Kinds of sources: the letter in the box of a piece, and the word for it.
SOURCES = {
    "chunk": ("C", "chunk files"),
    "hub": ("H", "the Hub"),
    "mirror": ("M", "a mirror"),
    "cache": ("K", "the Hub's cache"),
    "folder": ("F", "another folder"),
    "text": ("T", "the manifest's own text"),
    "place": ("P", "found in place"),
    "unknown": ("", "source not recorded"),
    "nowhere": ("", "no source"),
}

#: States of a piece, the worst first: the sign after the letter, and the word for it.
STATES = {
    "wrong": ("✗", "wrong"),
    "missing": ("-", "missing"),
    "planned": ("…", "still to come"),
    "here": ("?", "here, not verified yet"),
    "kept": ("◐", "verified, in an unfinished file"),
    "verified": ("✓", "verified"),
}

_PLANNED = {
    PieceSource.CHUNK: "chunk",
    PieceSource.CONSUMED: "chunk",
    PieceSource.CACHED: "cache",
    PieceSource.SHELF: "folder",
    PieceSource.SALVAGED: "place",
}


@dataclass(frozen=True)
class Run:
    """One run of a task, for the page of its result: when it ended, and how it went.

    `host` is the machine's name, or empty; `manifest_sha256` the digest of the manifest's text.
    `as_typed` makes the commands in a text those that a person types.
    """

    command: str
    made_at: str
    seconds: float
    tool: str
    manifest_sha256: str = ""
    host: str = ""
    events: tuple[Event, ...] = ()
    as_typed: Callable[[str], str] = str


class Box(NamedTuple):
    """A piece in the bar of its file, or several alike: the `first` to the `last`, from 1 on."""

    source: str
    state: str
    size: int
    first: int
    last: int
    where: str

    @property
    def numbers(self) -> str:
        """The pieces that it stands for."""
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def mark(self) -> str:
        """The letter of its source and the sign of its state."""
        return SOURCES[self.source][0] + STATES[self.state][0]

    @property
    def words(self) -> str:
        """The same as a person reads it who sees no colours."""
        return f"{STATES[self.state][1]}, {self.origin}"

    @property
    def origin(self) -> str:
        """Its source in words."""
        return SOURCES[self.source][1]


def render(result: object, status: StatusReport | None, run: Run) -> str:
    """Return the page of a result or an error; `status` is what is on disk after the run."""
    error = result if isinstance(result, CsmWeightsError) else getattr(result, "error", None)
    outcome = result if isinstance(result, Outcome) else None
    fleet: Any = result if hasattr(result, "nodes") else None
    notes = (outcome.notes if outcome else ()) or (status.plan.notes if status else ())
    named = error.findings if error else ()
    parts = [("", status, outcome.results if outcome else ())] if status else []
    for one in getattr(result, "also", ()):
        is_plan = isinstance(one, StatusReport)
        report = one if is_plan else StatusReport(one.state, Plan(one.state, (), (), ()))
        parts.append((f"{one.state.manifest.name}: ", report, getattr(one, "results", ())))
    gates = [replace(r, path=prefix + r.path) for prefix, _, own in parts for r in own]
    for node in fleet.nodes if fleet else ():
        gates += [replace(r, path=f"{node.node}: {r.path}") for r in node.gates if not r.ok]
    shown: dict[Path, dict[str, Any]] = {}
    for prefix, report, own in parts:
        for item in report.state.artifacts:
            shown.setdefault(item.installed.path, _file(prefix, item, report, own, named))
    files = list(shown.values())
    boxes = [box for file in files for box in file["boxes"]]
    word, text = _verdict(result, error)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typed": run.as_typed, "size": format_size}
    return environment.get_template("page.html").render(
        word=word,
        verdict=text,
        error=error,
        advice=error.advice.splitlines() if error else (),
        facts=_facts(status, fleet, files, boxes, run),
        nodes=node_rows(fleet) if fleet else (),
        node_head=NODE_HEAD,
        happened=fleet.events if fleet else (),
        files=files,
        legend={(box.source, box.state): box for box in boxes}.values(),
        gates=sorted(gates, key=lambda r: list(Gate).index(r.gate)),
        curves=list(_curves(run.events)),
        width=WIDTH,
        height=HEIGHT,
        smoke=outcome.smoke if outcome else None,
        smoke_is_known=bool(outcome and outcome.smoke_is_known),
        figures=smoke_figures(outcome.smoke) if outcome and outcome.smoke else (),
        findings=named,
        notes=notes,
        provenance=_provenance(status, files, run),
        run=run,
    )


def _shown(value: Any) -> Any:
    """Return a value without control characters; text of the template itself stays."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _verdict(result: object, error: CsmWeightsError | None) -> tuple[str, str]:
    """Return the word at the top of the page, and the sentence behind it."""
    if error:
        return "NOT OK", f"{error.message} (exit code {error.exit_code})"
    if isinstance(result, StatusReport):
        return "DRY RUN", "nothing was done; this is what would be"
    words = verdict(result) if isinstance(result, Outcome) else render_text(result).splitlines()[-1]
    return "OK", words.removeprefix("OK: ")


def _facts(
    status: StatusReport | None,
    fleet: Any,
    files: Sequence[dict[str, Any]],
    boxes: Sequence[Box],
    run: Run,
) -> list[tuple[str, str]]:
    """Return what a person asks first: which model, how much of it, from where, how long."""
    if status is None:
        model = [("model", fleet.model)] if fleet else []
        return [*model, ("took", _seconds(run.seconds))]
    verified = [file for file in files if file["state"] == "verified"]
    sizes: Counter[str] = Counter()
    for box in boxes:
        if box.state in ("verified", "kept"):
            sizes[SOURCES[box.source][1]] += box.size
    origins = "; ".join(f"{format_size(n)} {word}" for word, n in sizes.most_common())
    total = format_size(sum(file["size"] for file in verified))
    return [
        ("model", status.state.manifest.name),
        ("verified", f"{len(verified)} of {count(len(files), 'file')}, {total}"),
        ("from", origins or "nowhere yet"),
        ("folder", str(status.state.paths.destination)),
        ("took", _seconds(run.seconds)),
    ]


# ---- files and their pieces


def _file(
    prefix: str,
    item: ArtifactState,
    status: StatusReport,
    results: Sequence[GateResult],
    error: Sequence[Finding],
) -> dict[str, Any]:
    """Return what the page shows of one file: its words, and the boxes of its bar."""
    own = [result for result in results if result.path == item.artifact.path]
    receipts = (item.installed.valid_receipt, item.staged.valid_receipt)
    digests = [d for d in (r.sha256 for r in own) if d] + [r.sha256 for r in receipts if r]
    is_verified = bool(digests) and all(result.ok is not False for result in own)
    findings = [*error, *(finding for result in own for finding in result.findings)]
    wrong = {finding.where for finding in findings if finding.kind.category is Category.CONTENT}
    boxes = list(_boxes(item, status, wrong, is_verified))
    worst = next(state for state in STATES if state in {box.state for box in boxes})
    state = "wrong" if any(result.ok is False for result in own) else worst
    joined = _joined(boxes)
    return {
        "path": prefix + item.artifact.path,
        "size": item.artifact.size,
        "count": len(boxes),
        "words": f"{format_size(item.artifact.size)}, {count(len(boxes), 'piece')}",
        "state": state,
        "said": " ".join(STATES[state]),
        "sha256": digests[0] if is_verified else "",
        "boxes": boxes if len(boxes) <= MOST_BOXES else joined,
        "rows": joined,
    }


def _boxes(
    item: ArtifactState, status: StatusReport, wrong: Set[str], is_verified: bool
) -> Iterator[Box]:
    """Yield a box for each piece of a file; `wrong` are the places of what is wrong."""
    artifact, files = item.artifact, (item.installed, item.staged)
    verified = [record for f in files if f.receipt for record in f.receipt.pieces]
    records = {r.offset: r for r in (*item.journal.pieces, *verified)}
    origins = {o.piece.offset: o for o in status.plan.origins.get(artifact.path, ())}
    paths = {str(file.path) for file in files}
    # The digest gate names pieces so; those that it does not name have been found right.
    named = {w.removeprefix(path) for w in wrong for path in paths if w.startswith(f"{path} bytes")}
    is_hashed, is_here = is_verified or named, any(f.state is FileState.UNVERIFIED for f in files)
    writes = {action.artifact.path for action in status.plan.having(WriteText)}
    for number, piece in enumerate(artifact.tiles, start=1):
        record, origin = records.get(piece.offset), origins.get(piece.offset)
        where = record.source if record and record.is_of(piece) else ""
        source = _source(where, piece, status.state.manifest.repo or "")
        planned = origin.source if origin else PieceSource.NOWHERE
        if f" bytes {piece.offset:,} to {piece.end - 1:,}" in named or wrong & paths:
            state, source, where = "wrong", "place", str(item.installed.path)
        elif is_hashed:
            state = "verified"
        elif piece.part in wrong:
            state, source, where = "wrong", "chunk", piece.part
        elif is_here:
            state, source, where = "here", "place", str(item.installed.path)
        elif artifact.path in writes:
            state, source, where = "planned", "text", ""
        elif origin is None or planned is PieceSource.NOWHERE:
            state, source, where = "missing", "nowhere", ""
        elif planned is PieceSource.KEPT:
            state = "kept"
        else:
            remote = "hub" if origin.where == HUB else "mirror"
            state, source, where = "planned", _PLANNED.get(planned, remote), origin.where
            where = "" if where == HUB else where
        yield Box(source, state, piece.size, number, number, where)


def _source(where: str, piece: Piece, repo: str) -> str:
    """Return the kind of a source, by the place that a record of a piece has."""
    if where in ("", piece.part):
        return "chunk" if where else "unknown"
    if "://" in where:
        return "hub" if repo and f"/{repo}/" in where else "mirror"
    if where == "in place":
        return "place"
    return "cache" if "/snapshots/" in where or "/blobs/" in where else "folder"


def _joined(boxes: Iterable[Box]) -> list[Box]:
    """Return one box for each run of pieces that have the same source and state."""
    joined = []
    for (source, state), run in groupby(boxes, key=lambda box: (box.source, box.state)):
        some = list(run)
        places = dict.fromkeys((some[0].where, some[-1].where))
        size, where = sum(box.size for box in some), " to ".join(places)
        joined.append(Box(source, state, size, some[0].first, some[-1].last, where))
    return joined


# ---- rates


def _curves(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """Yield, for each work, its mean rate in words and its rate over time as points of a curve."""
    works: dict[tuple[str, float], list[Event]] = {}
    for event in events:
        works.setdefault((event.label, event.started), []).append(event)
    for (label, started), seen in works.items():
        seconds, done = seen[-1].now - started, seen[-1].done
        if not done or not seconds:
            continue
        step = math.ceil(len(seen) / MOST_POINTS)
        some = [*seen[:-1:step], seen[-1]]
        rates = [
            (after.now - started, max(0, after.done - before.done) / (after.now - before.now))
            for before, after in pairwise(some)
            if after.now > before.now
        ]
        top = max((rate for _, rate in rates), default=0.0)
        corners, at = [(0.0, 0.0)], 0.0
        for end, rate in rates:
            corners += [(at, rate), (end, rate)]
            at = end
        corners.append((at, 0.0))
        points = " ".join(
            f"{x / seconds * WIDTH:.1f},{HEIGHT - y / top * HEIGHT:.1f}" for x, y in corners if top
        )
        yield {
            "label": label,
            "words": f"{format_size(done)} in {_seconds(seconds)}, {format_size(done / seconds)}/s",
            "points": points if len(rates) > 1 else "",
            "top": f"{format_size(top)}/s",
            "seconds": _seconds(seconds),
        }


# ---- provenance


def _provenance(
    status: StatusReport | None, files: Sequence[dict[str, Any]], run: Run
) -> list[tuple[str, str]]:
    rows = [("made", f"{run.made_at}, by {run.tool}, task {run.command}")]
    if run.host:
        rows.append(("host", run.host))
    if status is None:
        return rows
    manifest = status.state.manifest
    if manifest.repo:
        rows.append(("repository", f"{manifest.repo}, commit {manifest.revision or 'not pinned'}"))
    rows += [("manifest", manifest.where), ("manifest sha256", run.manifest_sha256)]
    return rows + [(f"{file['path']} sha256", file["sha256"]) for file in files if file["sha256"]]

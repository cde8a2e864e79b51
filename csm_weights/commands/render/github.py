"""Results for GitHub Actions: annotations of a run, and the summary of a job. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from csm_weights.commands.render import text, verdict
from csm_weights.commands.render.verdict import Ended
from csm_weights.errors import Finding, printable
from csm_weights.pipeline.session import Outcome

#: Annotations of a kind that GitHub shows of one step.
ANNOTATIONS = 10

#: Rows and bytes of a table: GitHub drops a summary of more than 1 MiB, which has four at most.
ROWS, TABLE = 200, 200_000

#: Characters that Markdown or HTML takes for more than themselves.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&$]")

#: What a finding says after the path of a file of which it means a part.
_RANGE = re.compile(r" bytes [\d,]+ to [\d,]+$")


def annotate(ended: Ended, workspace: Path | None) -> list[str]:
    """Return a workflow command for each finding: errors, and notes about what was repaired.

    A file below `workspace`, the folder of the checkout, is named relative to it.
    """
    lines: list[str] = []
    if error := ended.error:
        lines = [_annotation("error", finding, workspace) for finding in error.findings]
        lines = lines or [_command("error", {"title": ended.title}, error.message)]
    notes = ended.result.notes if isinstance(ended.result, Outcome) else ()
    repaired = [_annotation("notice", finding, workspace) for finding in notes]
    return [*lines[:ANNOTATIONS], *repaired[:ANNOTATIONS]]


def notice(title: str, words: str) -> str:
    """Return a workflow command that shows a note on the page of a run."""
    return _command("notice", {"title": title}, words)


def _annotation(kind: str, finding: Finding, workspace: Path | None) -> str:
    properties = {"title": f"{finding.kind}: {finding.where}"}
    if "://" not in finding.where:
        path = Path(_RANGE.sub("", finding.where))
        is_below = workspace and path.is_relative_to(workspace)
        properties["file"] = str(path.relative_to(workspace) if workspace and is_below else path)
    return _command(kind, properties, finding.line())


def _command(kind: str, properties: dict[str, str], message: str) -> str:
    """Return a workflow command in one line, whatever its words contain."""
    pairs = [f"{name}={_escaped(value, ':,')}" for name, value in properties.items()]
    return f"::{kind} {','.join(pairs)}::{_escaped(message)}"


def _escaped(words: str, more: str = "") -> str:
    """Return words with those characters as %XX that would end a value of a workflow command."""
    return "".join(f"%{ord(c):02X}" if c in f"%\r\n{more}" else c for c in printable(words))


def summary(ended: Ended) -> str:
    """Return Markdown for the page of a job: verdict, files, gates and findings, or ""."""
    if not ended.error and not isinstance(ended.result, Outcome):
        return ""
    blocks = [f"### {_markdown(verdict.headline(ended))}"]
    blocks.append(f"{_code(ended.title)} took {ended.seconds:,.1f} s.")
    if isinstance(ended.result, Outcome):
        head = ("file", "bytes", "state", "from", "sha256")
        blocks.append(_table(head, _files(ended.result)))
        if ended.result.results:
            rows = text.gate_rows(ended.result.results)
            blocks.append(_table(("verdict", "gate", "files"), rows))
    if ended.error and ended.error.findings:
        blocks.append(_findings(ended.error.findings))
    if isinstance(ended.result, Outcome) and ended.result.notes:
        blocks += ["Repaired:", _findings(ended.result.notes)]
    return "\n\n".join(blocks) + "\n\n"


def _files(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    taken = text.steps_of(outcome.state, outcome.actions)
    for item in outcome.state.artifacts:
        file, receipt = item.file, item.file.valid_receipt
        size = "" if file.size is None else f"{file.size:,}"
        steps = taken.get(item.artifact.path, "")
        sha256 = _code(receipt.sha256) if receipt else ""
        words = (item.artifact.path, size, str(file.state), steps)
        yield (*map(_markdown, words), sha256)


def _findings(findings: Iterable[Finding]) -> str:
    rows = [(f.kind, f.where, f.expected, f.found, f.help) for f in findings]
    head = ("what", "where", "expected", "found", "help")
    return _table(head, [tuple(map(_markdown, row)) for row in rows])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are Markdown already."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    ends = accumulate(len(line.encode()) + 1 for line in lines)
    kept = [line for line, end in zip(lines, ends, strict=True) if end <= TABLE][: ROWS + 2]
    more = len(lines) - len(kept)
    return "\n".join(kept) + (f"\n\nand {more:,} more" if more else "")


def _code(words: str) -> str:
    return f"`{printable(words).replace('`', '?')}`"


def _markdown(words: str) -> str:
    """Return words as Markdown that shows them as they are."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(words))

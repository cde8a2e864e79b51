"""The outcome, as text for a terminal and as the tables of docs/reliability.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tools.torture.peers import Row
from tools.torture.tally import Tally

#: The page with the tables.
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"

#: The words about a command that hung: what follows is where its threads were.
HUNG = "end with -99"

#: The columns of the tables: kinds of failure, and the words by which a check names them.
KINDS = {
    "wrong bytes": (
        "wrong bytes",
        "not what its name says",
        "is wrong about",
        "outside of the tree",
    ),
    "lost": ("lost", "is gone", "is missing", "does not count"),
    "asked again": ("read again", "were fetched", "were written"),
    "ended badly": ("ends with", "makes it end"),
    "left over": ("left over",),
}


def kinds(tally: Tally) -> dict[str, int]:
    """Count how many things of each kind went wrong."""
    texts = [wrong.split(": ", 2)[-1] for wrong in tally.wrong]
    return {
        kind: sum(any(word in text for word in words) for text in texts)
        for kind, words in KINDS.items()
    }


def table(tallies: Sequence[Tally]) -> str:
    """Return the rows of one group as Markdown."""
    head = ["what was done", "times", *KINDS, "how it ended"]
    rows = [head, ["---", "---:", *["---:"] * len(KINDS), "---"]]
    for tally in tallies:
        outcome = ", ".join(f"{text}: {count:,}" for text, count in tally.out.most_common())
        found = (str(count) if count else "0" for count in kinds(tally).values())
        rows.append([tally.what, f"{tally.tries:,}", *found, outcome])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def peer_table(rows: Sequence[Row]) -> str:
    """Return the rows about other programs as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row.outcome))
    lines = [["fault", *names], ["---"] * (len(names) + 1)]
    lines += [[row.fault, *(row.outcome.get(name, "-") for name in names)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(tables: dict[str, str], conditions: str) -> None:
    """Put the tables between their marks on the page; `conditions` describes the run."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in {**tables, "how": conditions}.items():
        mark = re.compile(rf"(<!-- torture: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")


def summary(tallies: Sequence[Tally]) -> str:
    """Return a line for each row, and one example of each kind of failure."""
    lines = [f"{t.group:7} {t.tries:5}  {len(t.wrong):4} wrong  {t.what}" for t in tallies]
    seen: set[str] = set()
    for tally in tallies:
        for wrong in tally.wrong:
            text = wrong.split(": ", 2)[-1]
            kind = re.sub(r"\S*[\d/.]\S*", "", f"{tally.group} {text}")
            if kind not in seen:
                seen.add(kind)
                lines.append(f"  - {wrong[:8000] if HUNG in wrong else wrong[:400]}")
    return "\n".join(lines)

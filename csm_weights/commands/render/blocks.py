"""What screens are made of: tables, findings and errors, at 80 columns and safe for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from csm_weights.errors import CsmWeightsError, Finding, columns, printable

#: Columns that a screen has at least.
WIDTH = 80

#: A command that messages tell a person to run.
COMMAND = re.compile(
    r"\binv [a-z][a-z-]*(?: --(?:(?:model|only|dest|source|url|revision|repo|file|key|size|with"
    r"|text|out)[= ][^\s,;`]+|[a-z-]+\b(?!=)))*"
)

#: Commands that stay in one piece when a text is wrapped.
_WHOLE = re.compile(
    rf"{COMMAND.pattern}|\bmake [a-z-]+( [A-Z_]+=\S+)*|(\.venv/bin/)?pip install (-\w \S+ )*\S+"
)

#: Stands for a space at which no line may end; no message has it, since it is not printable.
_GLUE = "\0"

#: Hex digits of a digest in a table; JSON and SHA256SUMS have them all.
SHORT = 16


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of words in columns as wide as they need to be; the last one is wrapped."""
    lines = [[printable(word) for word in line] for line in (head, *rows)]
    widths = [max(map(columns, column)) for column in list(zip(*lines, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    texts = []
    for *words, last in lines:
        spaces = [width - columns(word) + 2 for word, width in zip(words, widths, strict=True)]
        start = "".join(word + " " * space for word, space in zip(words, spaces, strict=True))
        texts.append(start + f"\n{' ' * indent}".join(wrapped(last, indent) or [""]))
    return "\n".join(text.rstrip() for text in texts)


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Return the lines of a text beside an indent.

    No word is cut, and no command that someone may copy: those may stick out.
    """
    text, width = printable(text), max(24, WIDTH - indent)
    if 0 < columns(text) <= width:
        return [text.rstrip()]
    whole = _WHOLE.sub(lambda command: command[0].replace(" ", _GLUE), text)
    lines: list[str] = []
    for word in re.findall(" *[^ ]+", whole):
        if lines and columns(lines[-1] + word) <= width:
            lines[-1] += word
        else:
            lines.append(word.lstrip())
    return [line.replace(_GLUE, " ") for line in lines]


def finding(found: Finding) -> str:
    """Return a finding as a block: what and where, what was expected and found, what helps."""
    lines = [printable(f"{found.kind}: {found.where}")]
    for word in ("expected", "found", "help"):
        for number, line in enumerate(wrapped(getattr(found, word), 14)):
            lines.append(f"  {'' if number else word:10}{line}")
    return textwrap.indent("\n".join(lines), "  ")


def findings(title: str, some: Iterable[Finding]) -> list[str]:
    """Return a block for each finding below a title, or nothing where there are none."""
    blocks = [finding(one) for one in some]
    return ["\n".join([title, *blocks])] if blocks else []


def error(failed: CsmWeightsError) -> str:
    """Return an error with its findings and its advice, what went wrong first."""
    blocks = [paragraph(f"error: {failed.message}"), *map(finding, failed.findings)]
    if failed.advice:
        blocks += ["", *map(paragraph, failed.advice.splitlines())]
    return "\n".join(blocks)


def paragraph(text: str) -> str:
    """Return a text in lines, the further ones a little to the right of where the first begins."""
    first = len(text) - len(text.lstrip())
    indent = first + 3 if first else 0
    return " " * first + f"\n{' ' * indent}".join(wrapped(text.lstrip(), indent))

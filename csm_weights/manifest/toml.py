"""Read TOML of unknown origin within limits of time and memory.

tomllib takes time and memory that grow with the square of the depth of a key,
and up to two hundred times the text for tables of a few letters: 40 kB take
4 s and 1.5 GB. So the marks that make tables, keys and items are counted first.
"""

import re
import tomllib
from collections import Counter
from typing import Any

from csm_weights.untrusted import Malformed, show

#: Most words of a dotted key.
MAX_DEPTH = 8

#: Most tables and arrays: `[`, `{`, and `.` between the words of a key. One for
#: each piece, four for each file.
MAX_TABLES = 40_000

#: Most keys and items: `=` and `,`. Eight for each piece.
MAX_ITEMS = 300_000

#: Strings and comments, in which marks mean nothing; a quote that begins no whole
#: string, at which any reader stops; and the marks.
_TOKEN = re.compile(
    rb'"""(?:[^"\\]|\\.|"(?!""))*+"{3,5}'
    rb"|'''(?:[^']|'(?!''))*+'{3,5}"
    rb'|(?!""")"(?:[^"\\\n]|\\[^\n])*+"'
    rb"|(?!''')'[^'\n]*+'"
    rb"|\#[^\n]*+"
    rb"|(?P<broken>[\"'])"
    rb"|(?P<mark>[\[\]{}=,.\n])",
    re.DOTALL,
)


def read_toml(text: bytes) -> dict[str, Any]:
    """Return the table in the text; raises Malformed for what is no TOML, or too much of it."""
    _check_marks(text)
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed("TOML", show(str(error) or type(error).__name__)) from None


def _check_marks(text: bytes) -> None:
    marks: Counter[bytes] = Counter()
    dots = 0
    for token in _TOKEN.finditer(text):
        mark = token["mark"]
        if token["broken"]:
            break
        if mark:
            marks[mark] += 1
            dots = dots + 1 if mark == b"." else 0
        if dots >= MAX_DEPTH:
            raise Malformed(f"keys of at most {MAX_DEPTH} words", "a key of more")
    for what, some, most in (("tables", b"[{.", MAX_TABLES), ("items", b"=,", MAX_ITEMS)):
        count = sum(marks[bytes([mark])] for mark in some)
        if count > most:
            raise Malformed(f"at most {most:,} {what}", f"{count:,}")

"""Read a large JSON object key by key, in memory that its size does not decide."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from csm_weights.untrusted import is_text, show

#: Characters that are looked at together: the ceiling of one key or value.
WINDOW = 1 << 20

_BLANKS = re.compile(r"[ \t\r\n]*+")
_TEXT = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in pairs:
        if not is_text(key) or key in items:
            raise ValueError(f"the name {show(key)} twice, or not UTF-8")
        items[key] = value
    return items


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


#: Of two equal keys two readers may take different values: each has to be there once.
STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


class JsonStream:
    """A JSON text that is read once, from its beginning, in UTF-8.

    `read` gives the bytes `[offset, offset + size)` of it, fewer at its end.
    Everything raises ValueError, with RecursionError for deep values, where the
    text is not JSON or a key or value is longer than `WINDOW`.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read, self._offset = read, 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at = "", 0
        self._is_whole = False

    def read_keys(self) -> Iterator[str]:
        """Read an object; yield each key, after which the caller has to read its value."""
        self._take("{")
        if self._next() == "}":
            self._at += 1
            return
        while True:
            key = self.read_value()
            if not is_text(key):
                raise ValueError(f"the name {show(key)} is no text, or not UTF-8")
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def read_value(self) -> Any:
        """Read a value, at most WINDOW characters long."""
        self._next()
        value, self._at = STRICT.raw_decode(self._text, self._at)
        return value

    def skip_texts(self) -> None:
        """Read null or an object of texts of any length, and drop it."""
        if self._next() != "{":
            if self.read_value() is not None:
                raise ValueError("neither null nor text to text")
            return
        for _ in self.read_keys():
            self._take('"')
            self._skip(_TEXT)
            self._take('"', blanks=False)

    def finish(self) -> None:
        """Check that nothing but blanks follows."""
        if self._next():
            raise ValueError("something after the end")

    def _fill(self) -> None:
        """Make WINDOW characters ready, or all that are left."""
        while not self._is_whole and len(self._text) - self._at < WINDOW:
            chunk = self._read(self._offset, WINDOW)
            self._offset += len(chunk)
            self._is_whole = len(chunk) < WINDOW
            self._text = self._text[self._at :] + self._decode(chunk, final=self._is_whole)
            self._at = 0

    def _skip(self, pattern: re.Pattern[str]) -> None:
        """Go on after all that the pattern matches, with WINDOW characters ready there."""
        while True:  # the window may have cut what it matches
            self._fill()
            start = self._at
            self._at = pattern.match(self._text, start).end()  # type: ignore[union-attr]
            if self._at == start:
                return

    def _next(self) -> str:
        """Skip blanks; return the next character, or "" at the end."""
        self._skip(_BLANKS)
        return self._text[self._at : self._at + 1]

    def _take(self, expected: str, blanks: bool = True) -> str:
        found = self._next() if blanks else self._text[self._at : self._at + 1]
        if not found or found not in expected:
            raise ValueError(f"expected one of {expected}, found {show(found)}")
        self._at += 1
        return found

"""What the readers of untrusted bytes share: one exception, and text that is safe to print."""

from __future__ import annotations


class Malformed(Exception):
    """Bytes break a rule of their format. `at` is the place inside the file, or empty."""

    def __init__(self, expected: str, found: str, at: str = "") -> None:
        super().__init__(f"{at}: expected {expected}, found {found}")
        self.expected, self.found, self.at = expected, found, at


def show(value: object) -> str:
    """A value from a file on one line of at most 80 ASCII characters; containers by type only."""
    if not isinstance(value, str | bytes | int | float | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    text = value if isinstance(value, str) else repr(value)
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."


def is_text(value: object) -> bool:
    """Whether it is a str that UTF-8 can write: JSON and pickles may hold lone surrogates."""
    if type(value) is not str:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def are_sizes(values: object) -> bool:
    """Whether it is a list or tuple of whole numbers a file can hold: from 0 to 2^63 - 1."""
    if not isinstance(values, list | tuple):
        return False
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)

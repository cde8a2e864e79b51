"""Text that anyone may have written: check it, show it, read records from it."""

import contextlib
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from csm_weights.errors import Kind

R = TypeVar("R")

#: The version that is written into every record.
SCHEMA = 1


class Malformed(Exception):
    """A rule of a format that bytes break. `at` is the position inside the file, or empty."""

    kind = Kind.MALFORMED

    def __init__(self, expected: str, found: str, at: str = "") -> None:
        super().__init__(f"{at}: expected {expected}, found {found}")
        self.expected, self.found, self.at = expected, found, at


class Unsupported(Malformed):
    """Bytes that a reader does not read, though their format allows them."""

    kind = Kind.UNSUPPORTED


def show(value: object) -> str:
    """Return a value of a file in at most 80 ASCII characters, of a container only its type."""
    if not isinstance(value, str | bytes | int | float | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    text = value if isinstance(value, str) else repr(value)
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."


def is_text(value: object) -> bool:
    """Check for a str that UTF-8 can write: JSON and pickles may hold lone surrogates."""
    if type(value) is not str:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def are_sizes(values: object) -> bool:
    """Check for a list or tuple of whole numbers that a file can hold: from 0 to 2^63 - 1."""
    return isinstance(values, list | tuple) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def dump_record(record: Any, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return a dataclass as JSON on one line; `names` are fields with another name there."""
    data = {names.get(name, name): value for name, value in asdict(record).items()}
    return json.dumps({"schema": SCHEMA, **data}, sort_keys=True)


def parse_record(
    text: str, *kinds: type[R], names: Mapping[str, str] = MappingProxyType({})
) -> R | None:
    """Return the record in `text`, of the first of these dataclasses that it fits, or None.

    It must have just the fields, each with the annotated type. `names` are
    fields with another name in the text.
    """
    try:
        data = json.loads(text)
        if data.pop("schema") != SCHEMA:
            return None
        data |= {name: data.pop(written) for name, written in names.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    for kind in kinds:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record: R = build(kind, data)
            return record
    return None


def build(kind: Any, value: Any) -> Any:
    """Return JSON data as a type, such as a dataclass; TypeError or KeyError where it is not."""
    if isinstance(kind, type) and is_dataclass(kind):
        fields = _field_types(kind)
        return kind(**{name: build(fields[name], field) for name, field in value.items()})
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if type(value) is not list:
            raise TypeError(f"expected a list, found {show(value)}")
        if inner[-1] is Ellipsis:
            return tuple(build(inner[0], item) for item in value)
        return tuple(build(*pair) for pair in zip(inner, value, strict=True))
    if isinstance(kind, types.UnionType):
        return None if value is None else build(typing.get_args(kind)[0], value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind}, found {show(value)}")
    return value


_field_types = functools.cache(typing.get_type_hints)

"""Text that anyone may have written: check it, show it, read records from it."""

import contextlib
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
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
    kind: Any
    for kind in kinds:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record: R = reader(kind)(data)
            return record
    return None


@functools.cache
def reader(kind: Any) -> Callable[[Any], Any]:
    """Return the reader of JSON data of a type; TypeError or KeyError is for data of another."""
    if isinstance(kind, type) and is_dataclass(kind):
        fields = {name: reader(hint) for name, hint in typing.get_type_hints(kind).items()}
        return lambda value: kind(**{name: fields[name](field) for name, field in value.items()})
    args = typing.get_args(kind)
    inner = [reader(one) for one in args if one is not Ellipsis]
    if isinstance(kind, types.UnionType):
        return lambda value: None if value is None else inner[0](value)

    written = list if typing.get_origin(kind) is tuple else kind

    def read(value: Any) -> Any:
        if type(value) is not written:
            raise TypeError(kind)
        if written is kind:
            return value
        readers = inner * len(value) if Ellipsis in args else inner
        return tuple(take(one) for take, one in zip(readers, value, strict=True))

    return read

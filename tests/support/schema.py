"""The documented schema of what tasks print with --json."""

from __future__ import annotations

import functools
import json
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tests.support.clone import REPOSITORY


def checked(text: str, schema: str = "v1") -> dict[str, Any]:
    """Return the object in `text`, once it is known to be ASCII, strict JSON and of a schema."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    data = json.loads(text.encode("ascii"), parse_constant=refuse)
    error = best_match(_validator(schema).iter_errors(data))
    assert error is None, f"{error.json_path}: {error.message[:300]}"
    assert isinstance(data, dict)
    return data


@functools.cache
def _validator(name: str) -> Any:
    schema = json.loads((REPOSITORY / "docs" / "json-schema" / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)

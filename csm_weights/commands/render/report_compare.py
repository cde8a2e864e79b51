"""How two files of weights compare, as text and JSON. Pure: prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from csm_weights.commands.render.report import dump, table
from csm_weights.errors import printable
from csm_weights.formats.compare import Comparison, Difference
from csm_weights.formats.tensor_index import MAX_FINDINGS
from csm_weights.formats.transformers_layout import Layout, Summary, Value


def comparison_text(comparison: Comparison) -> str:
    """Both sides, the first differences in the order of names, and one verdict."""
    sides = [("first", comparison.first), ("second", comparison.second)]
    rows = [(word, side.where, _kind(side), f"{side.tensors:,}") for word, side in sides]
    blocks = [table(("", "file", "format", "tensors"), rows)]
    blocks += [printable(_left_out(side)) for _, side in sides if side.left_out]
    if comparison.differences:
        blocks.append(_differences(comparison.differences))
    size = f"{comparison.equal:,} tensors of {comparison.nbytes:,} bytes are equal"
    if comparison.error:
        return "\n\n".join([*blocks, size, printable(f"NOT OK: {comparison.error.message}")])
    return "\n\n".join([*blocks, f"OK: {size}, name by name, in dtype, shape and every bit"])


def _kind(side: Summary) -> str:
    names = ", transformers' names" if side.layout is Layout.TRANSFORMERS else ""
    return f"{side.format}{names}"


def _left_out(side: Summary) -> str:
    size = f"{side.left_out:,} tensors of {side.left_out_bytes:,} bytes"
    return f"left out of {side.where}: the codec, {size}"


def _differences(differences: Sequence[Difference]) -> str:
    rows = [(d.where, str(d.what), d.first, d.second) for d in differences[:MAX_FINDINGS]]
    text = table(("tensor", "differs in", "first", "second"), rows)
    rest = len(differences) - len(rows)
    return f"{text}\nand {rest:,} more" if rest else text


def comparison_json(comparison: Comparison) -> str:
    """`compare --json`: both sides, and every difference with index, numbers and bits."""
    error = comparison.error
    return dump(
        ok=error is None,
        exit_code=error.exit_code if error else 0,
        message=error.message if error else "",
        first=asdict(comparison.first),
        second=asdict(comparison.second),
        equal=comparison.equal,
        bytes_equal=comparison.nbytes,
        differences=[_difference_data(d) for d in comparison.differences],
        findings=[asdict(finding) for finding in error.findings] if error else [],
    )


def _difference_data(difference: Difference) -> dict[str, Any]:
    values = difference.values
    return {
        "name": difference.name,
        "what": str(difference.what),
        "first": difference.first,
        "second": difference.second,
        "index": difference.index,
        "values": [_value_data(value) for value in values] if values else None,
    }


def _value_data(value: Value) -> dict[str, Any]:
    """A number that JSON does not have is text."""
    number = value.number
    is_json = not isinstance(number, complex) and math.isfinite(number)
    return {"number": number if is_json else repr(number), "bits": value.bits}

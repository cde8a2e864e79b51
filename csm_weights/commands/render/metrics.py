"""The figures of a run in OpenMetrics' text format, as node_exporter collects them. Pure.

Each metric is a gauge of the last run of a task on a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from csm_weights.commands.render.verdict import Ended
from csm_weights.pipeline.session import Outcome

#: The last success, in a file of an earlier run.
_SUCCESS = re.compile(r"^csm_weights_last_success_timestamp_seconds\{.*\} (\d+\.\d{3})$", re.M)


def render(ended: Ended, taken: Mapping[str, int], before: str, now: float) -> str:
    """Return the file's text.

    `taken` are the bytes from each source, `now` is in seconds since 1970, and `before`
    the text that an earlier run has written, whose success stays where this one has none.
    """
    success = f"{now:.3f}" if not ended.error else "".join(_SUCCESS.findall(before)[:1])
    sources = [(f',source="{_escaped(name)}"', count) for name, count in sorted(taken.items())]
    code = ended.error.exit_code if ended.error else 0
    metrics: list[tuple[str, str, list[tuple[str, object]]]] = [
        ("source_bytes", "Bytes that the run took from each source.", [*sources]),
        ("duration_seconds", "Seconds that the run took.", [("", f"{ended.seconds:.3f}")]),
        ("verified_files", "Files that the run left verified.", [("", _verified(ended))]),
        ("exit_code", "The exit code of the run.", [("", code)]),
        (
            "last_success_timestamp_seconds",
            "The time when a run last ended with exit code 0.",
            [("", success)] if success else [],
        ),
    ]
    labels = f'command="{_escaped(ended.command)}",model="{_escaped(ended.model)}"'
    lines = []
    for name, help_text, samples in metrics:
        full, unit = f"csm_weights_{name}", name.rpartition("_")[2]
        lines.append(f"# TYPE {full} gauge")
        lines += [f"# UNIT {full} {unit}"] if unit in ("bytes", "seconds") else []
        lines.append(f"# HELP {full} {help_text}")
        lines += [f"{full}{{{labels}{own}}} {value}" for own, value in samples]
    return "\n".join([*lines, "# EOF", ""])


def _verified(ended: Ended) -> int:
    if not isinstance(ended.result, Outcome):
        return 0
    return sum(item.verified is not None for item in ended.result.state.artifacts)


def _escaped(text: str) -> str:
    """Return a label's value with what would end it, or is no text, escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

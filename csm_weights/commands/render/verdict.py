"""A task that has ended, and its verdict in one line, for the status of a pod or a job. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from csm_weights.commands.render import text
from csm_weights.errors import CsmWeightsError, printable
from csm_weights.pipeline.session import Outcome
from csm_weights.progress import count, format_size

#: Most characters of a line: Kubernetes keeps 4,096 bytes of a termination message.
LONGEST = 1000


@dataclass(frozen=True)
class Ended:
    """A task that has ended: its name, its model, what it returned or raised, and its seconds."""

    command: str
    model: str
    result: object
    seconds: float

    @property
    def error(self) -> CsmWeightsError | None:
        """The error that it raised, or that its result carries."""
        is_error = isinstance(self.result, CsmWeightsError)
        error = self.result if is_error else getattr(self.result, "error", None)
        return error if isinstance(error, CsmWeightsError) else None

    @property
    def title(self) -> str:
        """The task and its model."""
        return f"{self.command} {self.model}".rstrip()


def headline(ended: Ended) -> str:
    """Return what is verified, or the exit code and the error's message."""
    if error := ended.error:
        return f"NOT OK: {ended.title}: exit code {error.exit_code}: {error.message}"
    if not isinstance(ended.result, Outcome):
        return f"OK: {ended.title}"
    artifacts = [item.artifact for item in ended.result.state.artifacts]
    size = format_size(sum(artifact.size for artifact in artifacts))
    files = f"{count(len(artifacts), 'file')}, {size}"
    return f"{text.verdict(ended.result)}: {ended.model}, {files}"


def render(ended: Ended) -> str:
    """Return the verdict in one line, with the first finding of an error."""
    words, findings = [headline(ended)], ended.error.findings if ended.error else ()
    words += [finding.line() for finding in findings[:1]]
    words += [f"and {count(len(findings) - 1, 'more finding')}"] if len(findings) > 1 else []
    line = printable("; ".join(words))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."

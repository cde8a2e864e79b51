"""Verify installed files: hash all of them again and run every gate."""

from collections.abc import Sequence
from pathlib import Path

from csm_weights.files import read_file
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, begin, gate_error
from csm_weights.store import atomic
from csm_weights.verify import gates
from csm_weights.verify.sums import MAX_SUMS, SUMS, parse_sums, render_sums


def verify(request: Request, sums: str | None = None, write_sums: bool = False) -> Outcome:
    """Hash everything that is installed and run every gate.

    `sums` is a SHA256SUMS file whose digests are compared with the files' as
    well. With `write_sums`, one is written beside files that passed; nothing
    else is ever written.
    """
    session = begin(request)
    state = session.inspect()
    results = list(session.gate(state, rehash=True))
    if sums:
        known = {r.path: r.sha256 for r in results if r.sha256}
        listed = _read_sums(Path(sums)).items()
        folder = state.paths.destination
        results += [gates.check_sum(folder, path, d, known.get(path)) for path, d in listed]
    outcome = Outcome(state, results=tuple(results), error=gate_error(results))
    if write_sums and not outcome.error:
        write_sums_of(outcome)
    return outcome


def write_sums_of(outcome: Outcome) -> None:
    """Write SHA256SUMS beside files that have just passed every gate.

    Lines that are there about other files stay.
    """
    path = outcome.state.paths.destination / SUMS
    others = _read_sums(path) if path.is_file() else {}
    atomic.write_whole(path, render_sums({**others, **digests_of(outcome.results)}))


def digests_of(results: Sequence[gates.GateResult]) -> dict[str, str]:
    """Return the sha256 of every file that has passed its digest gate, by path."""
    return {r.path: r.sha256 for r in results if r.gate is gates.Gate.DIGEST and r.sha256}


def _read_sums(path: Path) -> dict[str, str]:
    text = read_file(path, MAX_SUMS, "a SHA256SUMS file").decode(errors="replace")
    return parse_sums(text, str(path))

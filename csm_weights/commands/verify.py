"""Verify installed files: hash all of them again and run every gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from csm_weights.files import read_file
from csm_weights.pipeline.outcome import Outcome
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin, gate_error
from csm_weights.store import atomic
from csm_weights.verify import gates
from csm_weights.verify.sums import MAX_SUMS, SUMS, parse_sums, render_sums


def verify(request: Request, sums: str | None = None, write_sums: bool = False) -> Outcome:
    """Hash the installed files and run every gate.

    `sums` is a SHA256SUMS file whose digests are held against the files as
    well. With `write_sums`, one is written beside files that passed; nothing
    else is ever written.
    """
    session = begin(request)
    state = session.inspect()
    results = list(session.gate(state, rehash=True))
    folder = state.paths.destination
    if sums:
        results += _gate_sums(results, Path(sums), folder)
    outcome = Outcome(state, results=tuple(results), error=gate_error(results))
    if write_sums and not outcome.error:
        write_sums_of(outcome)
    return outcome


def write_sums_of(outcome: Outcome) -> None:
    """Write SHA256SUMS beside files that have just passed every gate."""
    _write_sums(outcome.state.paths.destination / SUMS, digests_of(outcome.results))


def digests_of(results: Sequence[gates.GateResult]) -> dict[str, str]:
    """Return the sha256 of every file that has passed its digest gate, by path."""
    return {r.path: r.sha256 for r in results if r.gate is gates.Gate.DIGEST and r.sha256}


def _write_sums(path: Path, digests: dict[str, str]) -> None:
    """Write SHA256SUMS; lines about other files stay."""
    others = {}
    if path.is_file():
        text = read_file(path, MAX_SUMS, "a SHA256SUMS file").decode(errors="replace")
        others = parse_sums(text, str(path))
    atomic.write_whole(path, render_sums({**others, **digests}))


def _gate_sums(
    results: Sequence[gates.GateResult], sums: Path, folder: Path
) -> list[gates.GateResult]:
    """Return a result for each line of a SHA256SUMS file, hashing only what is not hashed yet."""
    text = read_file(sums, MAX_SUMS, "a SHA256SUMS file").decode(errors="replace")
    listed = parse_sums(text, str(sums))
    known = {r.path: r.sha256 for r in results if r.sha256}
    return [gates.check_sum(folder, path, d, known.get(path)) for path, d in listed.items()]

"""Smoke-test an installed model: load it, generate some frames, and check them."""

from csm_weights.errors import UsageError
from csm_weights.pipeline import smoke_test
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, Session, Summary, begin, gate_error
from csm_weights.store.inspect import State


def smoke(
    request: Request,
    device: str = "",
    require_gpu: bool = False,
    frames: int = smoke_test.FRAMES,
    dtype: str = "",
    max_rtf: float = 0.0,
    require_fast: bool = False,
) -> Outcome:
    """Run the gates, load the installed model and check what it generates.

    Empty options leave the choice to torch's devices, and the speed unchecked.
    """
    session, state = _begin(request)
    results = session.gate(state, rehash=False)
    outcome = Outcome(state, results=results, error=gate_error(results))
    if outcome.error:
        return outcome
    return smoke_test.run(
        outcome, device or None, require_gpu, frames, dtype or None, max_rtf or None, require_fast
    )


def record_golden(request: Request, frames: int) -> Summary:
    """Record the golden frames of a model that passes its gates; return their file."""
    session, state = _begin(request)
    if error := gate_error(session.gate(state, rehash=True)):
        raise error
    from csm_weights.model.smoke import record_golden as write_golden

    path = request.root / "manifests" / f"{state.manifest.name}.golden.json"
    write_golden(state.paths.destination, path, frames)
    return Summary(state.manifest.name, [str(path)], {"golden": path})


def _begin(request: Request) -> tuple[Session, State]:
    """Return a session and what it finds; raises UsageError for a model without a smoke test."""
    session = begin(request)
    state, name = session.inspect(), session.manifest.name
    if not smoke_test.is_for(state.manifest):
        raise UsageError(f"there is no smoke test for {name}; inv verify verifies its files")
    return session, state

"""Get what a model needs to speak, with the model: for `inv weights --with speak`."""

from collections.abc import Sequence
from dataclasses import replace

from csm_weights.errors import UsageError, did_you_mean
from csm_weights.pipeline import apply, speech
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, gate_error
from csm_weights.progress import Progress

#: Words for --with.
WORDS = ("speak",)


def requests(request: Request, word: str) -> list[Request]:
    """Return the requests for what --with names besides the model; raises UsageError."""
    if word and word not in WORDS:
        hint = did_you_mean(word, WORDS)
        raise UsageError(f"--with {word!r}; there is {', '.join(WORDS)}{hint}")
    return speech.needs(request) if word else []


def bring(outcome: Outcome, more: Sequence[Request]) -> Outcome:
    """Fetch, install and gate what else was asked for; return the outcome with theirs.

    What the Hub has is linked into its cache, where other programs find it. Where
    the model itself failed verification, nothing else is fetched.
    """
    if gate_error(outcome.results):
        return outcome
    also = []
    for request in more:
        also.append(apply.weights(request, smoke=False))
        manifest = also[-1].state.manifest
        if also[-1].error is None and manifest.repo and manifest != outcome.state.manifest:
            from csm_weights.commands.seed_cache import seed_cache

            for note in seed_cache(request).notes:
                Progress(manifest.name).log(note)
    errors = [one.error for one in (outcome, *also) if one.error]
    return replace(outcome, also=tuple(also), error=errors[0] if errors else None)

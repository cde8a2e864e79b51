"""The results of the pipeline's commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from csm_weights.errors import CsmWeightsError, Finding
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action
from csm_weights.pipeline.plan import Plan
from csm_weights.store.inspect import State
from csm_weights.verify.gates import GateResult

if TYPE_CHECKING:  # few runs attest or seal
    from csm_weights.verify.envelope import Attested
    from csm_weights.verify.seal import Sealed


@dataclass(frozen=True)
class StatusReport:
    """The state of the disk, and the plan that follows from it.

    `advice` says how to get what is missing.
    """

    state: State
    plan: Plan
    advice: str = ""
    error: CsmWeightsError | None = None


@dataclass(frozen=True)
class Outcome:
    """What a command did, and what is verified now.

    `actions` are those taken, in order. `smoke` is the last smoke report of
    these very files; `smoke_is_known` says that it is an earlier run's. `sealed`
    are the files that were sealed, `attested` is what an attestation says of them.
    """

    state: State
    actions: tuple[Action, ...] = ()
    notes: tuple[Finding, ...] = ()
    results: tuple[GateResult, ...] = ()
    smoke: SmokeReport | None = None
    smoke_is_known: bool = False
    error: CsmWeightsError | None = None
    sealed: tuple[Sealed, ...] = ()
    attested: Attested | None = None

"""What to do, decided from what is there. Pure: no file is opened here.

`status` prints a plan and a dry run stops after it, so both show exactly
what acting would do.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from csm_weights.errors import Finding, Kind
from csm_weights.manifest import Artifact, Edition, Manifest
from csm_weights.state import ArtifactState, Condition, FileLook, State


class Goal(enum.Enum):
    """How far a command goes."""

    STAGED = "fetch"
    PLACED = "place"
    BOTH = "weights"


class Verb(enum.StrEnum):
    """What is done with one artifact; the value is the word `status` prints."""

    KEEP = "keep"
    PROVE = "prove in place"
    ASSEMBLE = "assemble"
    WRITE = "write"
    MOVE = "move into place"
    COPY = "copy into place"


@dataclass(frozen=True)
class Step:
    """One act. `reads` and `writes` are bytes; `look` is the file it is about.

    For PROVE and MOVE that is the file to prove or move, for ASSEMBLE and
    WRITE the staged file that results.
    """

    verb: Verb
    state: ArtifactState
    look: FileLook
    reads: int = 0
    writes: int = 0
    detail: str = ""

    @property
    def artifact(self) -> Artifact:
        """The artifact the step is about."""
        return self.state.artifact


@dataclass(frozen=True)
class Plan:
    """The steps, what stands in their way, and what was noticed on the way."""

    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    def having(self, *verbs: Verb) -> tuple[Step, ...]:
        """The steps with one of these verbs."""
        return tuple(step for step in self.steps if step.verb in verbs)

    @property
    def is_done(self) -> bool:
        """Whether everything asked for is in place and proven."""
        return not self.findings and all(step.verb is Verb.KEEP for step in self.steps)


def default_selection(state: State) -> tuple[Artifact, ...]:
    """What is meant when nothing is named.

    Each weight format of which anything is here, or the first one where there
    is none; config.json; and whatever else is here already. Everything, for a
    model without a weight format.
    """
    weights = [s for s in state.artifacts if s.artifact.is_weights]
    if not weights:
        return tuple(s.artifact for s in state.artifacts)
    wanted = [s for s in weights if s.is_here] or weights[:1]
    paths = {s.artifact.path for s in wanted}
    for other in state.artifacts:
        if not other.artifact.is_weights and (other.is_here or other.artifact.format == "config"):
            paths.add(other.artifact.path)
    return tuple(s.artifact for s in state.artifacts if s.artifact.path in paths)


def with_config(manifest: Manifest, chosen: Iterable[Artifact]) -> tuple[Artifact, ...]:
    """The chosen artifacts, and config.json if weights are among them: they need it."""
    chosen = list(chosen)
    needs_config = any(a.is_weights for a in chosen)
    paths = {a.path for a in chosen}
    return tuple(
        a for a in manifest.artifacts if a.path in paths or (needs_config and a.format == "config")
    )


def make_plan(state: State, goal: Goal) -> Plan:
    """Decides for each artifact how it gets where `goal` wants it."""
    steps: list[Step] = []
    findings: list[Finding] = []
    notes: list[Finding] = []
    for item in state.artifacts:
        found = _steps(item, state, goal)
        if isinstance(found, Step):
            taken = _then_placed(found, state, goal)
            steps += taken
            notes += _replaced(item, taken)
        else:
            findings += found
            findings += [look.finding for look in (item.placed, item.staged) if look.finding]
    findings += [] if findings else _space(steps, state)
    return Plan(tuple(steps), tuple(findings), tuple(notes))


def _replaced(item: ArtifactState, steps: Iterable[Step]) -> list[Finding]:
    """What is wrong with files that these steps put others in the place of."""
    verbs = {step.verb for step in steps}
    looks = []
    if verbs & {Verb.MOVE, Verb.COPY}:
        looks.append(item.placed)
    if verbs & {Verb.ASSEMBLE, Verb.WRITE}:
        looks.append(item.staged)
    return [look.finding for look in looks if look.finding]


def _steps(item: ArtifactState, state: State, goal: Goal) -> Step | list[Finding]:
    """The first step for one artifact, or why there is none, beyond what the looks say."""
    if any(f and f.kind is Kind.IN_THE_WAY for f in (item.placed.finding, item.staged.finding)):
        return []
    for look in (item.placed, item.staged):
        if look.condition is Condition.PROVEN:
            return Step(Verb.KEEP, item, look)
        if look.condition is Condition.UNPROVEN:
            return Step(Verb.PROVE, item, look, reads=look.size or 0)
    if goal is Goal.PLACED:
        return _absent(item, item.staged, f"inv fetch --model {state.manifest.name}")
    blocking = _blocking(item)
    if item.artifact.pieces and not blocking:
        return _assemble(item, state)
    if text := _text_edition(item.artifact):
        return Step(Verb.WRITE, item, item.staged, writes=text.size, detail="from its known text")
    if any(part.condition is not Condition.ABSENT for part in item.parts) or item.partial:
        return blocking
    return _absent(item, item.placed)


def _blocking(item: ArtifactState) -> list[Finding]:
    """What is wrong with the parts that are still needed, and the parts too many."""
    kept = {record.offset for record in item.partial}
    pairs = zip(item.artifact.pieces, item.parts, strict=True)
    wrong = [part.finding for piece, part in pairs if part.finding and piece.offset not in kept]
    return [*wrong, *item.extras]


def _assemble(item: ArtifactState, state: State) -> Step:
    size = item.artifact.size
    kept = sum(record.size for record in item.partial)
    copied = 0 if state.shares_blocks else size - kept
    detail = f"from {len(item.parts) - len(item.partial)} parts"
    if item.partial:
        detail += f", {len(item.partial)} pieces kept"
    return Step(Verb.ASSEMBLE, item, item.staged, reads=size, writes=copied, detail=detail)


def _text_edition(artifact: Artifact) -> Edition | None:
    return next((e for e in artifact.editions if e.text is not None), None)


def _absent(item: ArtifactState, look: FileLook, help_text: str = "") -> list[Finding]:
    """That a file is missing, unless something wrong has its name and is told anyway."""
    if look.condition is not Condition.ABSENT:
        return []
    size = f"{item.artifact.size:,} bytes"
    return [Finding(Kind.MISSING, str(look.path), size, "no such file", help_text)]


def _then_placed(step: Step, state: State, goal: Goal) -> list[Step]:
    """A step, and the move to the destination where one has to follow."""
    if goal is Goal.STAGED or step.look.path == step.state.placed.path:
        return [step]
    size = step.look.size or step.artifact.size
    if state.same_filesystem and not step.look.is_link:
        move = Step(Verb.MOVE, step.state, step.look)
    else:
        kept = sum(record.size for record in step.state.copied)
        move = Step(Verb.COPY, step.state, step.look, reads=size, writes=size - kept)
    return [move] if step.verb is Verb.KEEP else [step, move]


def _space(steps: Iterable[Step], state: State) -> list[Finding]:
    """Too little room for what will be written, before anything is."""
    findings = []
    for folder, free, verbs in (
        (state.places.staging, state.free_staging, (Verb.ASSEMBLE, Verb.WRITE)),
        (state.places.destination, state.free_destination, (Verb.COPY,)),
    ):
        needed = sum(step.writes for step in steps if step.verb in verbs)
        if needed > free:
            findings.append(
                Finding(
                    Kind.NO_SPACE,
                    str(folder),
                    f"{needed:,} bytes free",
                    f"{free:,}, {needed - free:,} too few",
                    "free some disk, ask for one format with --only, or choose another --dest",
                )
            )
    return findings

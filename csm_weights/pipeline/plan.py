"""Planning: what is to be done, decided from the manifest and the state of the disk.

Pure: no file is opened here. `status` prints a plan and a dry run stops after
it, so both show exactly what would be done.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact
from csm_weights.pipeline import actions as act
from csm_weights.pipeline.actions import Action, ActionT, Assemble, Consume, Keep
from csm_weights.store.consumed import CONSUMING_ROOM
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus, State
from csm_weights.transfer import consume
from csm_weights.transfer.policy import LOCAL, PieceOrigin, PieceSource, SourcePolicy
from csm_weights.transfer.source import NEXT_SOURCE


class Target(enum.Enum):
    """How far a command goes; the value is its name."""

    STAGED = "fetch"
    PLACED = "place"
    BOTH = "weights"


@dataclass(frozen=True)
class Plan:
    """The actions, what stands in their way, and what was noticed that they mend.

    `origins` tells, by path, where the pieces of unfinished files come from.
    """

    state: State
    actions: tuple[Action, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    origins: Mapping[str, tuple[PieceOrigin, ...]] = field(default_factory=dict)

    def having(self, *kinds: type[ActionT]) -> tuple[ActionT, ...]:
        """Return the actions of these kinds."""
        return tuple(action for action in self.actions if isinstance(action, kinds))

    @property
    def is_done(self) -> bool:
        """True where everything asked for is in its place and verified."""
        return not self.findings and all(isinstance(a, Keep) for a in self.actions)

    @property
    def is_verified(self) -> bool:
        """True where everything asked for is verified, and at most has to be moved."""
        done = (Keep, act.Move, act.Copy)
        return not self.findings and all(isinstance(a, done) for a in self.actions)

    @property
    def ready(self) -> tuple[Action, ...]:
        """The actions of the cheapest kind: what they find out may change the others."""
        for kind in act.ORDER:
            if found := tuple(action for action in self.actions if type(action) is kind):
                return found
        return ()

    @property
    def lacking(self) -> list[Finding]:
        """The pieces that no source has, of files whose other pieces are copied already."""
        return [
            Finding.missing(origin.piece.part, origin.piece.size, NEXT_SOURCE)
            for action in self.having(Assemble)
            for origin in action.origins
            if origin.source is PieceSource.NOWHERE
        ]

    def room(self, folder: str) -> int:
        """Return the bytes of disk that the actions take at their peak in a folder of `Paths`.

        Consuming gives back what it writes, but for the room that it begins with.
        """
        return room(action for action in self.actions if action.writes_to == folder)


def room(actions: Iterable[Action]) -> int:
    """Return the bytes of disk that actions take at their peak."""
    actions = tuple(actions)
    consuming = [action for action in actions if isinstance(action, Consume)]
    # The step that a killed run has left half done takes no room a second time.
    begun = min(consume.STEP, sum(action.item.held_twice for action in consuming))
    start = CONSUMING_ROOM - begun if consuming else 0
    return start + sum(action.cost.written - action.cost.freed for action in actions)


def default_selection(state: State) -> tuple[Artifact, ...]:
    """Return what is meant when nothing is named.

    Each weight format of which anything is here, or the first one where there
    is none; config.json; and whatever else is here already. Everything, for a
    model without a weight format.
    """
    weights = [s for s in state.artifacts if s.artifact.is_weights]
    if not weights:
        return tuple(s.artifact for s in state.artifacts)
    wanted = {s.artifact.path for s in weights if s.is_here} or {weights[0].artifact.path}
    for other in state.artifacts:
        if not other.artifact.is_weights and (other.is_here or other.artifact.format == "config"):
            wanted.add(other.artifact.path)
    return tuple(s.artifact for s in state.artifacts if s.artifact.path in wanted)


def make_plan(state: State, target: Target, policy: SourcePolicy = LOCAL) -> Plan:
    """Decide for each artifact how it gets where `target` wants it."""
    actions: list[Action] = []
    findings: list[Finding] = []
    origins: dict[str, tuple[PieceOrigin, ...]] = {}
    for item in state.artifacts:
        pieces: tuple[PieceOrigin, ...] = ()
        if item.verified is None:
            pieces = origins[item.artifact.path] = policy.origins(item, state.paths.root)
        found = _decide(item, pieces, state, target, policy)
        if isinstance(found, Action):
            is_moved = target is not Target.STAGED and found.file is not item.installed
            if not (is_moved and isinstance(found, Keep)):
                actions.append(found)
            if is_moved:
                can_rename = state.same_filesystem and not found.file.is_link
                actions.append((act.Move if can_rename else act.Copy)(item, found.file))
        else:
            findings += found
            findings += [file.finding for file in (item.installed, item.staged) if file.finding]
    notes = [file.finding for action in actions for file in action.replaced if file.finding]
    plan = Plan(state, tuple(actions), tuple(dict.fromkeys(findings)), tuple(notes), origins)
    return plan if findings else replace(plan, findings=tuple(_space(plan, target, policy)))


def _decide(
    item: ArtifactState,
    origins: tuple[PieceOrigin, ...],
    state: State,
    target: Target,
    policy: SourcePolicy,
) -> Action | list[Finding]:
    """Return the first action for one artifact, or why there is none.

    `origins` is where its pieces would come from, where no verified file has them.
    What is wrong with the installed and staged files need not be told again.
    """
    for file in (item.installed, item.staged):
        if file.finding and file.finding.kind is Kind.IN_THE_WAY:
            return []
    for file in (item.installed, item.staged):
        if file.state is FileState.VERIFIED:
            return Keep(item, file)
        if file.state is FileState.UNVERIFIED:
            return act.Verify(item, file)
    if target is Target.PLACED:
        return _absent(item, item.staged, state.paths.command("fetch"))
    if item.stranded:
        return [item.stranded]
    kinds = {origin.source for origin in origins}
    # What one disk of several has is copied before the next one is asked for.
    is_complete = PieceSource.NOWHERE not in kinds or PieceSource.SHELF in kinds
    is_whole = is_complete and not (PieceSource.CHUNK in kinds and item.extras)
    has_text = act.known_text(item.artifact) is not None
    if is_whole and not (has_text and PieceSource.REMOTE in kinds and not policy.remote_first):
        remark = _why_not_consumed(item, state, policy)
        shares_blocks = state.shares_blocks and PieceSource.SHELF not in kinds
        if PieceSource.CACHED in kinds:
            shares_blocks = state.cache_shares_blocks and PieceSource.CHUNK not in kinds
        if remark is not None:
            return Assemble(item, item.staged, origins, policy, shares_blocks, remark)
        return list(item.unfit) or Consume(item, item.staged, origins, policy, shares_blocks)
    if has_text and not item.journal.consumed:
        return act.WriteText(item, item.staged)
    return _blocking(item, origins, policy)


def _why_not_consumed(item: ArtifactState, state: State, policy: SourcePolicy) -> str | None:
    """Return None if chunk files go; else why they stay, or "" where nobody asks that they go."""
    if item.artifact.pieces and item.journal.consumed:
        return None
    if not policy.consume or not item.artifact.pieces:
        return ""
    if state.shares_blocks:
        return ", sharing their blocks: there is nothing to consume"
    return f", not consumed: {item.saves_nothing}" if item.saves_nothing else None


def _blocking(
    item: ArtifactState, origins: Iterable[PieceOrigin], policy: SourcePolicy
) -> list[Finding]:
    """Return why a file cannot be assembled: wrong or extra chunk files, or no source.

    Where folders were named, also which of them are not there.
    """
    help_text = NEXT_SOURCE if policy.shelves else ""
    if not policy.chunks:
        return list(policy.problems) or _absent(item, item.installed, help_text)
    gone = [problem for problem in policy.problems if problem.kind is Kind.MISSING]
    is_begun = any(part.state is not FileState.ABSENT for part in item.chunks)
    if not (is_begun or item.journal.pieces):
        return [*gone, *_absent(item, item.installed, help_text)]
    pairs = zip(origins, item.chunks, strict=False)
    wrong = [part.finding for origin, part in pairs if origin.source is PieceSource.NOWHERE]
    mends = {Kind.MISSING: help_text} if help_text else {}
    found = [replace(f, help=mends.get(f.kind, f.help)) for f in wrong if f]
    return [*gone, *found, *item.extras]


def _absent(item: ArtifactState, file: FileStatus, help_text: str = "") -> list[Finding]:
    """Return that a file is missing, unless something wrong has its name and is told anyway."""
    if file.state is not FileState.ABSENT:
        return []
    return [Finding.missing(file.path, item.artifact.size, help_text)]


def _space(plan: Plan, target: Target, policy: SourcePolicy) -> list[Finding]:
    """Return that there is too little room for what will be written, before anything is.

    With `--consume` in the help, where that would do; and where it was asked
    for and makes no room, why.
    """
    state, ways = plan.state, ["free some disk"]
    written = [a.artifact for a in plan.actions if a.artifact.is_weights and a.cost.written]
    formats = dict.fromkeys(artifact.group for artifact in written)
    if len(formats) > 1:
        ways.append(f"ask for one format with --only={next(iter(formats))}")
    short = []
    for name, option, free in (
        ("staging", "--staging", state.free_staging),
        ("destination", "--dest", state.free_destination),
    ):
        if (needed := plan.room(name)) > free:
            where = str(getattr(state.paths, name))
            found = f"{free:,}, {needed - free:,} too few"
            help_text = f"{', '.join(ways)}, or choose another {option}"
            short.append(Finding(Kind.NO_SPACE, where, f"{needed:,} bytes free", found, help_text))
    if not short:
        return []
    if policy.consume:
        expected = "chunk files whose removal frees disk space"
        mend = "free some disk, or choose another --staging"
        for item in state.artifacts:
            if item.saves_nothing and item.artifact.pieces:
                where = item.artifact.pieces[0].part.rpartition("/")[0]
                words = (expected, item.saves_nothing, mend)
                short.append(Finding(Kind.NOT_CONSUMABLE, where, *words))
        return list(dict.fromkeys(short))
    consuming = make_plan(state, target, replace(policy, consume=True))
    if consuming.findings or not consuming.having(Consume):
        return short
    needed = consuming.room("staging")
    way = f"--consume needs only {needed:,} bytes: it removes the chunk files as the file grows"
    return [replace(f, help=f"{way}; or {f.help}") for f in short]

"""What to do, decided from what is there. Pure: no file is opened here.

`status` prints a plan and a dry run stops after it, so both show exactly
what acting would do.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from csm_weights.byte_ranges import Ranges
from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.store.inspect import CONSUMING_ROOM, ArtifactState, FileState, FileStatus, State


class Target(enum.Enum):
    """How far a command goes."""

    STAGED = "fetch"
    PLACED = "place"
    BOTH = "weights"


class Verb(enum.StrEnum):
    """What is done with one artifact; the value is the word `status` prints."""

    KEEP = "keep"
    PROVE = "prove in place"
    ADOPT = "take from the Hub's cache"
    ASSEMBLE = "assemble"
    CONSUME = "assemble, consuming its parts,"
    WRITE = "write"
    MOVE = "move into place"
    COPY = "copy into place"


#: The Hub's name among the servers of a `SourcePolicy`.
HUB = "the Hub"


@dataclass(frozen=True)
class SourcePolicy:
    """Which sources there are besides files in place.

    `far` are servers in the order in which they are asked, after everything
    on this machine. `problems` say why others are not among them. `far_first`
    prefers a server's file to one whose text the manifest knows. `consume`
    says that parts may go as the file grows, where that makes room.
    """

    parts: bool = True
    cache: bool = True
    far: tuple[str, ...] = ()
    problems: tuple[Finding, ...] = ()
    far_first: bool = False
    consume: bool = False


#: What is on this machine, and nothing else.
NEAR = SourcePolicy()


class PieceSource(enum.StrEnum):
    """Where one piece of a file comes from."""

    KEPT = "kept"
    SALVAGED = "salvaged"
    PART = "part"
    CONSUMED = "consumed"
    CACHED = "cached"
    FAR = "far"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class PieceOrigin:
    """Where a piece comes from; `where` is a path, a server, or why there is none."""

    piece: Piece
    origin: PieceSource
    where: str


@dataclass(frozen=True)
class Step:
    """One act. `reads`, `writes`, `fetches` are bytes; `look` is the file it is about.

    For PROVE and MOVE that is the file to prove or move, for ADOPT the one in
    the cache, for ASSEMBLE, CONSUME and WRITE the staged file that results.
    `far` are the offsets of the pieces that come from a server, `consumes` of
    those whose parts go; `frees` are the bytes that they give back meanwhile.
    """

    verb: Verb
    state: ArtifactState
    look: FileStatus
    reads: int = 0
    writes: int = 0
    detail: str = ""
    fetches: int = 0
    far: frozenset[int] = frozenset()
    consumes: frozenset[int] = frozenset()
    frees: int = 0

    @property
    def artifact(self) -> Artifact:
        """The artifact the step is about."""
        return self.state.artifact


@dataclass(frozen=True)
class Plan:
    """The steps, what stands in their way, and what was noticed on the way.

    `origins` tells, by path, where the pieces of unfinished files come from.
    """

    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    origins: Mapping[str, tuple[PieceOrigin, ...]] = field(default_factory=dict)

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


def make_plan(state: State, goal: Target, sourcing: SourcePolicy = NEAR) -> Plan:
    """Decides for each artifact how it gets where `goal` wants it."""
    steps: list[Step] = []
    findings: list[Finding] = []
    notes: list[Finding] = []
    origins: dict[str, tuple[PieceOrigin, ...]] = {}
    for item in state.artifacts:
        found = _steps(item, state, goal, sourcing)
        if isinstance(found, Step):
            taken = _then_placed(found, state, goal)
            steps += taken
            notes += _replaced(item, taken)
        else:
            findings += found
            findings += [look.finding for look in (item.installed, item.staged) if look.finding]
        if FileState.VERIFIED not in (item.installed.state, item.staged.state):
            origins[item.artifact.path] = _origins(item, sourcing)
    findings = list(dict.fromkeys(findings)) or _space(steps, state)
    if any(f.kind is Kind.NO_SPACE for f in findings):
        findings = _with_consuming(findings, state, goal, sourcing)
    return Plan(tuple(steps), tuple(findings), tuple(notes), origins)


def _replaced(item: ArtifactState, steps: Iterable[Step]) -> list[Finding]:
    """What is wrong with files that these steps put others in the place of."""
    verbs = {step.verb for step in steps}
    looks = []
    if verbs & {Verb.MOVE, Verb.COPY}:
        looks.append(item.installed)
    if verbs & {Verb.ASSEMBLE, Verb.CONSUME, Verb.WRITE}:
        looks.append(item.staged)
    far = frozenset[int]().union(*(step.far for step in steps))
    parts = [part for piece, part in _parts(item) if piece.offset in far]
    looks += [part for part in parts if part.state is FileState.INVALID]
    return [look.finding for look in looks if look.finding]


def _steps(
    item: ArtifactState, state: State, goal: Target, sourcing: SourcePolicy
) -> Step | list[Finding]:
    """The first step for one artifact, or why there is none, beyond what the looks say."""
    if any(f and f.kind is Kind.IN_THE_WAY for f in (item.installed.finding, item.staged.finding)):
        return []
    for look in (item.installed, item.staged):
        if look.state is FileState.VERIFIED:
            return Step(Verb.KEEP, item, look)
        if look.state is FileState.UNVERIFIED:
            return Step(Verb.PROVE, item, look, reads=look.size or 0)
    if goal is Target.PLACED:
        return _absent(item, item.staged, f"inv fetch --model {state.manifest.name}")
    if item.stranded:
        return [item.stranded]
    from_cache = sourcing.cache and state.links_to_cache and not item.consumed
    if from_cache and (cached := _whole_in_cache(item)):
        return Step(Verb.ADOPT, item, cached, reads=item.artifact.size)
    origins = _origins(item, sourcing)
    kinds = {o.origin for o in origins}
    is_whole = PieceSource.NOWHERE not in kinds and not (PieceSource.PART in kinds and item.extras)
    text = _text_edition(item.artifact)
    if is_whole and not (text and PieceSource.FAR in kinds and not sourcing.far_first):
        is_consuming = _is_consuming(item, state, sourcing) and item.artifact.pieces
        if is_consuming and item.unfit:
            return list(item.unfit)
        step = _assemble(item, origins, state, sourcing)
        return _consume(step, origins) if is_consuming else step
    if text and not item.consumed:
        return Step(Verb.WRITE, item, item.staged, writes=text.size, detail="from its known text")
    return _blocking(item, origins, sourcing)


def _is_consuming(item: ArtifactState, state: State, sourcing: SourcePolicy) -> bool:
    """Whether parts are to go: where that was begun, or is asked for and makes room."""
    makes_room = not item.saves_nothing and not state.shares_blocks
    return bool(item.consumed) or (sourcing.consume and makes_room)


def _whole_in_cache(item: ArtifactState) -> FileStatus | None:
    """The file in the Hub's cache, unless hashing has refuted it."""
    is_good = item.cached and item.cached.state is FileState.UNVERIFIED
    return item.cached if is_good else None


def _parts(item: ArtifactState) -> list[tuple[Piece, FileStatus]]:
    return list(zip(item.artifact.pieces, item.parts, strict=True))


def _origins(item: ArtifactState, sourcing: SourcePolicy) -> tuple[PieceOrigin, ...]:
    """Where each piece comes from: what is here and good first, then parts, then servers."""
    kept = {record.offset for record in item.partial}
    parts = {piece.offset: part for piece, part in _parts(item)}

    def origin(piece: Piece) -> tuple[PieceSource, str]:
        part = parts.get(piece.offset)
        damaged = [look for look in (item.installed, item.staged) if piece.offset in look.good]
        cached = item.cached if sourcing.cache else None
        if piece.offset in kept:
            return PieceSource.KEPT, str(item.staged.path)
        if part and part.is_consumed:
            return PieceSource.CONSUMED, piece.part
        if sourcing.consume and sourcing.parts and part and not part.finding:
            return PieceSource.PART, piece.part
        if damaged:
            return PieceSource.SALVAGED, str(damaged[0].path)
        if sourcing.parts and part and not part.finding:
            return PieceSource.PART, piece.part
        if cached and (_whole_in_cache(item) or piece.offset in cached.good):
            return PieceSource.CACHED, str(cached.path)
        if sourcing.far:
            return PieceSource.FAR, sourcing.far[0]
        if sourcing.parts and part and part.finding:
            return PieceSource.NOWHERE, f"{piece.part} is {part.finding.kind}"
        return PieceSource.NOWHERE, "no source has it"

    return tuple(PieceOrigin(piece, *origin(piece)) for piece in item.artifact.tiles)


def _blocking(
    item: ArtifactState, origins: Iterable[PieceOrigin], sourcing: SourcePolicy
) -> list[Finding]:
    """Why a file cannot be assembled: parts that are wrong or too many, or no source."""
    if not sourcing.parts:
        return list(sourcing.problems) or _absent(item, item.installed)
    nowhere = {o.piece.offset for o in origins if o.origin is PieceSource.NOWHERE}
    wrong = [part.finding for piece, part in _parts(item) if piece.offset in nowhere]
    is_begun = any(part.state is not FileState.ABSENT for part in item.parts) or item.partial
    if is_begun:
        return [*(finding for finding in wrong if finding), *item.extras]
    return _absent(item, item.installed)


def _assemble(
    item: ArtifactState, origins: Sequence[PieceOrigin], state: State, sourcing: SourcePolicy
) -> Step:
    sizes: Counter[PieceSource] = Counter()
    for origin in origins:
        sizes[origin.origin] += origin.piece.size
    here = Ranges([(a.offset, a.offset + a.size) for a in item.arrived])
    far = [o.piece for o in origins if o.origin is PieceSource.FAR]
    gaps = [gap for piece in far for gap in here.missing(piece.offset, piece.end)]
    fetches = sum(end - start for start, end in gaps)
    near, arrived = item.artifact.size - sizes[PieceSource.FAR], sizes[PieceSource.FAR] - fetches
    copied = 0 if state.shares_blocks else near - sizes[PieceSource.KEPT]
    return Step(
        Verb.ASSEMBLE,
        item,
        item.staged,
        reads=near + arrived,
        writes=copied + fetches,
        detail=_detail(item, origins) + _not_consumed(item, state, sourcing),
        fetches=fetches,
        far=frozenset(piece.offset for piece in far),
    )


def _consume(step: Step, origins: Sequence[PieceOrigin]) -> Step:
    """The step with the parts going: those to be taken, and those of pieces that are kept."""
    item = step.state
    kept = {o.piece.offset for o in origins if o.origin is PieceSource.KEPT}
    moved = {c.offset: c.consumed for c in item.consumed}
    here = {piece.offset for piece, part in _parts(item) if part.is_usable}
    taken = [o.piece for o in origins if o.origin in (PieceSource.PART, PieceSource.CONSUMED)]
    gone = sum(moved.get(piece.offset, 0) for piece in taken)
    going = {piece.offset for piece in taken} | (kept & here)
    return replace(
        step,
        verb=Verb.CONSUME,
        # Every part is hashed before it goes, and read again as it is copied.
        reads=step.reads + sum(o.piece.size for o in origins if o.piece.offset in going),
        writes=max(0, step.writes - gone),
        consumes=frozenset(going),
        frees=sum(piece.size for piece in taken) - gone,
    )


def _not_consumed(item: ArtifactState, state: State, sourcing: SourcePolicy) -> str:
    """Why parts stay though consuming them was asked for, in words."""
    if not sourcing.consume or not item.artifact.pieces or _is_consuming(item, state, sourcing):
        return ""
    if state.shares_blocks:
        return ", sharing their blocks: there is nothing to consume"
    return f", not consumed: {item.saves_nothing}"


def _detail(item: ArtifactState, origins: Sequence[PieceOrigin]) -> str:
    """How many pieces come from where, in words."""
    counts = Counter(o.origin for o in origins)
    far = next((o.where for o in origins if o.origin is PieceSource.FAR), "")
    if len(origins) > counts[PieceSource.FAR] > 0:
        far += f" ({_count(counts[PieceSource.FAR], 'piece')})"
    salvaged, consumed = counts[PieceSource.SALVAGED], counts[PieceSource.CONSUMED]
    words = {
        PieceSource.SALVAGED: f"{_count(salvaged, 'piece')} of the damaged file",
        PieceSource.PART: _count(counts[PieceSource.PART], "part"),
        PieceSource.CONSUMED: f"{_count(consumed, 'part')} consumed in an earlier run",
        PieceSource.CACHED: "the Hub's cache",
        PieceSource.FAR: far,
    }
    texts = [word for origin, word in words.items() if counts[origin]]
    detail = f"from {' and '.join(texts)}" if texts else "from nothing new"
    return detail + (f", {_count(len(item.partial), 'piece')} kept" if item.partial else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _text_edition(artifact: Artifact) -> Edition | None:
    return next((e for e in artifact.editions if e.text is not None), None)


def _absent(item: ArtifactState, look: FileStatus, help_text: str = "") -> list[Finding]:
    """That a file is missing, unless something wrong has its name and is told anyway."""
    if look.state is not FileState.ABSENT:
        return []
    return [Finding.missing(look.path, item.artifact.size, help_text)]


def _then_placed(step: Step, state: State, goal: Target) -> list[Step]:
    """A step, and the move to the destination where one has to follow."""
    if goal is Target.STAGED or step.look.path == step.state.installed.path:
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
        (state.paths.staging, state.free_staging, (Verb.ASSEMBLE, Verb.CONSUME, Verb.WRITE)),
        (state.paths.destination, state.free_destination, (Verb.COPY,)),
    ):
        needed = extra([step for step in steps if step.verb in verbs])
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


def extra(steps: Iterable[Step]) -> int:
    """Bytes of disk that steps take at their peak: consuming gives back what it writes."""
    steps = tuple(steps)
    room = CONSUMING_ROOM if any(step.verb is Verb.CONSUME for step in steps) else 0
    return sum(step.writes - step.frees for step in steps) + room


def _with_consuming(
    findings: Iterable[Finding], state: State, goal: Target, sourcing: SourcePolicy
) -> list[Finding]:
    """The findings; where consuming the parts would do, with the option that does it.

    And where it was asked for and makes no room, why.
    """
    asked = replace(sourcing, consume=True)
    if sourcing.consume:
        stuck = [i for i in state.artifacts if i.saves_nothing and i.artifact.pieces]
        reasons = dict.fromkeys(_makes_no_room(item) for item in stuck)
        return [*findings, *reasons]
    plan = make_plan(state, goal, asked)
    if plan.findings or not plan.having(Verb.CONSUME):
        return list(findings)
    needed = extra(plan.having(Verb.ASSEMBLE, Verb.CONSUME, Verb.WRITE))
    way = f"--consume needs only {needed:,} bytes: it removes the parts as the file grows"
    return [
        replace(f, help=f"{way}; or {f.help}") if f.kind is Kind.NO_SPACE else f for f in findings
    ]


def _makes_no_room(item: ArtifactState) -> Finding:
    where = item.artifact.pieces[0].part.rpartition("/")[0]
    expected = "parts that make room when they go"
    help_text = "free some disk, or choose another --dest"
    return Finding(Kind.NOT_CONSUMABLE, where, expected, item.saves_nothing, help_text)

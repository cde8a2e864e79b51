"""Plans: what is decided from what is on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.pipeline.actions import Action, Assemble, Copy, Keep, Move, Verify, WriteText
from csm_weights.pipeline.plan import Plan, Target, default_selection, make_plan
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import begin
from csm_weights.store.inspect import (
    ArtifactState,
    FileState,
    FileStatus,
    Paths,
    State,
)
from csm_weights.store.journal import Journal, PieceRecord
from csm_weights.store.receipts import Receipt

PLACES = Paths(Path("/root"), Path("/root/staged"), Path("/root/placed"))
SHA = "5" * 64
VERIFIED, UNVERIFIED = FileState.VERIFIED, FileState.UNVERIFIED
ABSENT, INVALID = FileState.ABSENT, FileState.INVALID
HERE = (VERIFIED, UNVERIFIED)


# ---- generated states


def finding(where: object, kind: Kind = Kind.WRONG_SIZE) -> Finding:
    return Finding(kind, str(where), "one thing", "another")


def receipt_of(path: str, size: int) -> Receipt:
    return Receipt(path, "toy", size, SHA, (), Fingerprint(1, size, 2, 3), "now", "test")


def file_status(path: Path, condition: FileState, size: int) -> FileStatus:
    if condition is ABSENT:
        return FileStatus(path, condition)
    wrong = finding(path) if condition is INVALID else None
    receipt = receipt_of(path.name, size) if condition is VERIFIED else None
    return FileStatus(path, condition, size, wrong, receipt)


def chunk_status(piece: Piece, condition: FileState) -> FileStatus:
    kind = {ABSENT: Kind.MISSING, INVALID: Kind.WRONG_SIZE}.get(condition)
    path = PLACES.root / piece.part
    size = None if condition is ABSENT else piece.size
    return FileStatus(path, condition, size, finding(piece.part, kind) if kind else None)


@st.composite
def artifacts(draw: st.DrawFn, name: str) -> Artifact:
    sizes = draw(st.lists(st.integers(1, 1 << 40), max_size=4))
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = tuple(
        Piece(f"chunks/{name}-{i}", o, n, SHA)
        for i, (o, n) in enumerate(zip(offsets, sizes, strict=True))
    )
    size = sum(sizes) or draw(st.integers(0, 1 << 20))
    texts = (Edition(4, SHA, "text"),) if draw(st.booleans()) else ()
    kind = draw(st.sampled_from(["safetensors", "torch-zip", "config", "opaque"]))
    return Artifact(name, name, kind, size, SHA, pieces=pieces, alternatives=texts)


@st.composite
def artifact_states(draw: st.DrawFn, name: str) -> ArtifactState:
    artifact = draw(artifacts(name))
    conditions = st.sampled_from([ABSENT, VERIFIED, UNVERIFIED, INVALID])
    kept = [p for p in artifact.pieces if draw(st.booleans())] if draw(st.booleans()) else []
    parts = st.sampled_from([UNVERIFIED, UNVERIFIED, UNVERIFIED, ABSENT, INVALID])
    extras = draw(st.integers(0, 5)) == 0 and bool(artifact.pieces)
    return ArtifactState(
        artifact,
        installed=file_status(PLACES.destination / name, draw(conditions), artifact.size),
        staged=file_status(PLACES.staging / name, draw(conditions), artifact.size),
        journal=Journal(tuple(PieceRecord(p.offset, p.size, p.sha256, "x") for p in kept)),
        chunks=tuple(chunk_status(piece, draw(parts)) for piece in artifact.pieces),
        extras=(finding(f"{name}-zz", Kind.EXTRA_CHUNK_FILE),) if extras else (),
    )


@st.composite
def states(draw: st.DrawFn) -> State:
    items = tuple(draw(artifact_states(name)) for name in "abc"[: draw(st.integers(1, 3))])
    manifest = Manifest("toy", "staged", "placed", tuple(i.artifact for i in items))
    free = st.one_of(st.just(1 << 60), st.integers(0, 1 << 41))
    return State(
        manifest, PLACES, items, draw(free), draw(free), draw(st.booleans()), draw(st.booleans()),
        cache_shares_blocks=False,
    )  # fmt: skip


def a_state(*items: ArtifactState, **changes: Any) -> State:
    """A state with plenty of room on one file system, but for the changes."""
    manifest = Manifest("toy", "staged", "placed", tuple(i.artifact for i in items))
    state = State(manifest, PLACES, items, 1 << 60, 1 << 60, True, False, False)
    return replace(state, **changes)


def an_item(
    name: str = "a",
    placed: FileState = ABSENT,
    staged: FileState = ABSENT,
    kind: str = "opaque",
    pieces: int = 0,
    part: FileState = UNVERIFIED,
) -> ArtifactState:
    """An artifact of 10 bytes a piece, with both its files and all its chunk files as told."""
    tiles = tuple(Piece(f"chunks/{name}-{i}", 10 * i, 10, SHA) for i in range(pieces))
    artifact = Artifact(name, name, kind, 10 * pieces or 7, SHA, pieces=tiles)
    return ArtifactState(
        artifact,
        file_status(PLACES.destination / name, placed, artifact.size),
        file_status(PLACES.staging / name, staged, artifact.size),
        Journal(),
        tuple(chunk_status(tile, part) for tile in tiles),
        (),
    )


def verbs(plan: Plan) -> list[type[Action]]:
    return [type(step) for step in plan.actions]


def steps_of(plan: Plan, item: ArtifactState) -> list[Action]:
    return [step for step in plan.actions if step.artifact.path == item.artifact.path]


# ---- properties of every plan

any_target = st.sampled_from(Target)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def is_settled(item: ArtifactState, target: Target) -> bool:
    """Whether nothing is left to do for an artifact."""
    return item.installed.state is VERIFIED or (
        target is Target.STAGED and item.installed.state is not UNVERIFIED
        and item.staged.state is VERIFIED
    )  # fmt: skip


def is_reachable(item: ArtifactState, target: Target) -> bool:
    """Whether the artifact is here, or all that makes it is."""
    if item.installed.state in HERE or item.staged.state in HERE:
        return True
    if target is Target.PLACED:
        return False
    if any(edition.text is not None for edition in item.artifact.editions):
        return True
    kept = {record.offset for record in item.journal.pieces}
    pieces = zip(item.artifact.pieces, item.chunks, strict=True)
    needed = [part for piece, part in pieces if piece.offset not in kept]
    whole = all(part.finding is None for part in needed)
    return bool(item.artifact.pieces) and whole and not (needed and item.extras)


@many
@given(state=states(), target=any_target)
def test_bytes_to_read_and_write_are_plausible(state: State, target: Target) -> None:
    """No count is negative, and no step handles more than its whole file."""
    for step in make_plan(state, target).actions:
        most = max(edition.size for edition in step.artifact.editions)
        assert 0 <= step.cost.read <= most
        assert 0 <= step.cost.written <= most


@many
@given(state=states(), target=any_target)
def test_what_is_written_is_what_is_not_kept(state: State, target: Target) -> None:
    """Journaled pieces and shared blocks are not written again; all bytes are read."""
    for step in make_plan(state, target).having(Assemble):
        kept = sum(record.size for record in step.item.journal.pieces)
        expected = 0 if state.shares_blocks else step.artifact.size - kept
        assert (step.cost.read, step.cost.written) == (step.artifact.size, expected)


@many
@given(state=states(), target=any_target)
def test_done_means_everything_verified_in_its_place(state: State, target: Target) -> None:
    """A plan is done if, and only if, every file is verified where the target wants it."""
    assert make_plan(state, target).is_done == all(is_settled(i, target) for i in state.artifacts)


@many
@given(state=states(), target=any_target)
def test_each_artifact_has_steps_or_a_finding(state: State, target: Target) -> None:
    """What can be made has steps; what cannot has none, and the plan says why."""
    plan = make_plan(state, target)
    for item in state.artifacts:
        assert bool(steps_of(plan, item)) == is_reachable(item, target)
    unreachable = [i for i in state.artifacts if not is_reachable(i, target)]
    kinds = {f.kind for f in plan.findings}
    assert bool(unreachable) == bool(kinds - {Kind.NO_SPACE})


@many
@given(state=states(), target=any_target)
def test_each_file_ends_where_the_target_wants_it(state: State, target: Target) -> None:
    """The last step is about the installed file, or moves it there; fetching moves nothing."""
    plan = make_plan(state, target)
    door = Move if state.same_filesystem else Copy
    for item in state.artifacts:
        steps = steps_of(plan, item)
        moves = [type(step) for step in steps if type(step) in (Move, Copy)]
        in_place = bool(steps) and steps[0].file is item.installed
        expected = [door] if steps and not in_place and target is not Target.STAGED else []
        assert moves == expected
        assert not moves or type(steps[-1]) is door


@many
@given(state=states())
def test_placing_makes_nothing_new(state: State) -> None:
    """`place` verifies and moves what is staged; it neither assembles nor writes."""
    plan = make_plan(state, Target.PLACED)
    assert plan.having(Assemble, WriteText) == ()


@many
@given(state=states(), target=any_target)
def test_space_is_counted_before_anything_is_written(state: State, target: Target) -> None:
    """Too little room is a finding if, and only if, more is to be written than is free."""
    plan = make_plan(state, target)
    staged = sum(s.cost.written for s in plan.having(Assemble, WriteText))
    copied = sum(s.cost.written for s in plan.having(Copy))
    expected = [
        str(folder)
        for folder, needed, free in (
            (PLACES.staging, staged, state.free_staging),
            (PLACES.destination, copied, state.free_destination),
        )
        if needed > free
    ]
    short = [f.where for f in plan.findings if f.kind is Kind.NO_SPACE]
    assert short == ([] if len(plan.findings) > len(short) else expected)


@many
@given(state=states(), target=any_target)
def test_a_wrong_file_that_is_replaced_is_reported(state: State, target: Target) -> None:
    """Whatever a step replaces because it is wrong is in the plan's notes or findings."""
    plan = make_plan(state, target)
    for step in plan.having(Move, Copy):
        if step.item.installed.state is INVALID:
            assert step.item.installed.finding in plan.notes + plan.findings


# ---- plans by example


def test_a_verified_file_in_place_is_kept() -> None:
    """Nothing is to be done for what is done, whatever its chunk files look like."""
    plan = make_plan(a_state(an_item(placed=VERIFIED, pieces=2, part=INVALID)), Target.BOTH)
    assert (verbs(plan), plan.is_done) == ([Keep], True)


def test_chunk_files_are_assembled_and_moved() -> None:
    """From chunk files alone a file is assembled, then moved into place."""
    plan = make_plan(a_state(an_item(pieces=3)), Target.BOTH)
    assert [(type(s), s.cost.read, s.cost.written) for s in plan.actions] == [
        (Assemble, 30, 30),
        (Move, 0, 0),
    ]
    assert plan.actions[0].detail == "from 3 chunk files"


def test_a_file_is_verified_at_the_size_that_it_has() -> None:
    """Another edition has another size; what is read is the file that is here."""
    item = an_item(pieces=3, placed=UNVERIFIED)
    other = replace(item, installed=replace(item.installed, size=25))
    plan = make_plan(a_state(other), Target.BOTH)
    assert [(type(s), s.cost.read) for s in plan.actions] == [(Verify, 25)]


def test_fetching_stops_before_the_move() -> None:
    """`fetch` ends with the assembled file."""
    assert verbs(make_plan(a_state(an_item(pieces=3)), Target.STAGED)) == [Assemble]


def test_a_chunk_file_that_is_kept_in_the_partial_may_be_missing() -> None:
    """Pieces that an earlier run verified need no chunk file, and are not written again."""
    item = an_item(pieces=3)
    parts = (chunk_status(item.artifact.pieces[0], ABSENT), *item.chunks[1:])
    kept = (PieceRecord(0, 10, SHA, "x"),)
    plan = make_plan(a_state(replace(item, chunks=parts, journal=Journal(kept))), Target.STAGED)
    assert [(type(s), s.cost.read, s.cost.written) for s in plan.actions] == [(Assemble, 30, 20)]
    assert plan.actions[0].detail == "from 2 chunk files and 1 piece verified in an earlier run"


def test_every_bad_chunk_file_is_reported_at_once() -> None:
    """All chunk files that stand in the way are findings of one plan."""
    item = an_item(pieces=3, part=INVALID)
    plan = make_plan(a_state(item, an_item("b", pieces=2, part=INVALID)), Target.BOTH)
    expected = [f"chunks/a-{i}" for i in range(3)] + ["chunks/b-0", "chunks/b-1"]
    assert [f.where for f in plan.findings] == expected


def test_one_bad_artifact_does_not_hide_the_others() -> None:
    """What can be done is still planned beside what cannot."""
    state = a_state(an_item("a", pieces=2, part=INVALID), an_item("b", staged=VERIFIED))
    plan = make_plan(state, Target.BOTH)
    assert ([s.artifact.path for s in plan.actions], plan.is_done) == (["b"], False)


def test_a_known_text_stands_in_for_bad_chunk_files() -> None:
    """When no source has the file but its text is known, it is written."""
    item = an_item(pieces=2, part=ABSENT)
    text = replace(item.artifact, alternatives=(Edition(4, SHA, "text"),))
    plan = make_plan(a_state(replace(item, artifact=text)), Target.STAGED)
    assert [(type(s), s.cost.written) for s in plan.actions] == [(WriteText, 4)]


def test_nothing_here_is_one_finding_a_file() -> None:
    """With no chunk file at all, the file is missing, not each of its chunk files."""
    plan = make_plan(a_state(an_item(pieces=3, part=ABSENT)), Target.BOTH)
    assert [f.kind for f in plan.findings] == [Kind.MISSING]
    assert plan.findings[0].where == str(PLACES.destination / "a")


def test_a_wrong_file_in_place_is_not_called_absent() -> None:
    """`place` with a wrong file in place and none staged does not say "no such file"."""
    plan = make_plan(a_state(an_item(placed=INVALID)), Target.PLACED)
    about = [f for f in plan.findings if f.where == str(PLACES.destination / "a")]
    assert "no such file" not in [f.found for f in about]


def test_a_wrong_installed_file_is_noted_when_a_staged_one_replaces_it() -> None:
    """A verified staged file that takes the place of a wrong one does so with a note."""
    item = an_item(placed=INVALID, staged=VERIFIED)
    plan = make_plan(a_state(item), Target.PLACED)
    assert (verbs(plan), plan.notes) == ([Move], (item.installed.finding,))


def test_a_copy_is_counted_in_bytes() -> None:
    """Across file systems the staged file is read and written whole."""
    state = a_state(an_item(staged=VERIFIED, pieces=3), same_filesystem=False)
    plan = make_plan(state, Target.PLACED)
    assert [(type(s), s.cost.read, s.cost.written) for s in plan.actions] == [(Copy, 30, 30)]


def test_shared_blocks_need_no_room() -> None:
    """Where the file system shares blocks, assembling fits on a full disk."""
    state = a_state(an_item(pieces=3), shares_blocks=True, free_staging=0)
    assert make_plan(state, Target.STAGED).findings == ()


# ---- the default selection


def selected(*items: ArtifactState) -> list[str]:
    return [artifact.path for artifact in default_selection(a_state(*items))]


def weights_of(name: str, kind: str, part: FileState = ABSENT, **looks: FileState) -> ArtifactState:
    return an_item(name, kind=kind, pieces=2, part=part, **looks)


def test_with_nothing_here_the_first_format_is_meant() -> None:
    """Who has nothing gets one weight format, with config.json, and no extras."""
    items = (
        weights_of("m.safetensors", "safetensors"),
        weights_of("m.pt", "torch-zip"),
        an_item("config.json", kind="config"),
        an_item("prompt.wav"),
    )
    assert selected(*items) == ["m.safetensors", "config.json"]


def test_a_format_that_is_here_is_meant() -> None:
    """Who has chunk files of one format gets that one, not the first."""
    items = (
        weights_of("m.safetensors", "safetensors"),
        weights_of("m.pt", "torch-zip", UNVERIFIED),
        an_item("config.json", kind="config"),
    )
    assert selected(*items) == ["m.pt", "config.json"]


def test_both_formats_are_meant_when_both_are_here() -> None:
    """Each format of which anything is here is meant, wrong or not."""
    items = (
        weights_of("m.safetensors", "safetensors", placed=INVALID),
        weights_of("m.pt", "torch-zip", UNVERIFIED),
    )
    assert selected(*items) == ["m.safetensors", "m.pt"]


def test_what_else_is_here_is_meant_too() -> None:
    """A prompt that is in place is checked with the rest."""
    items = (
        weights_of("m.safetensors", "safetensors"),
        an_item("a.wav"),
        an_item("b.wav", placed=UNVERIFIED),
    )
    assert selected(*items) == ["m.safetensors", "b.wav"]


def test_a_file_that_was_here_is_still_meant() -> None:
    """A receipt without its file keeps the file in the selection, so its loss shows."""
    lost = weights_of("m.pt", "torch-zip")
    lost = replace(lost, installed=replace(lost.installed, receipt=receipt_of("m.pt", 20)))
    assert selected(weights_of("m.safetensors", "safetensors"), lost) == ["m.pt"]


def test_without_weights_everything_is_meant() -> None:
    """A model that is no network has no formats to choose from."""
    assert selected(an_item("a.wav"), an_item("b.wav")) == ["a.wav", "b.wav"]


def test_weights_bring_their_config(tmp_path: Path) -> None:
    """Chosen weights come with config.json, in manifest order; a prompt does not."""
    kinds = {"config.json": "config", "m.pt": "torch-zip", "a.wav": "opaque"}
    manifest = a_state(*(an_item(n, kind=k) for n, k in kinds.items())).manifest
    manifest = replace(manifest, staging="output/toy", destination="models/toy")
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / f"{manifest.name}.toml").write_text(render(manifest))
    chosen = {
        only: [a.path for a in begin(Request(tmp_path, manifest.name, (only,))).chosen]
        for only in ("m.pt", "a.wav")
    }
    assert chosen == {"m.pt": ["config.json", "m.pt"], "a.wav": ["a.wav"]}

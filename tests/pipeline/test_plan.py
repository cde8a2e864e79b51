"""Looking at a disk, and deciding from what was seen."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.model.smoke_report import load_report, report_path
from csm_weights.pipeline import apply
from csm_weights.pipeline.actions import Action, Assemble, Copy, Keep, Move, WriteText
from csm_weights.pipeline.plan import Plan, Target, default_selection, make_plan, with_config
from csm_weights.store.inspect import (
    ArtifactState,
    FileState,
    FileStatus,
    Paths,
    State,
    filesystem_type,
    inspect,
)
from csm_weights.store.journal import PieceRecord, journal_path, parse_line, partial_path
from csm_weights.store.receipts import Receipt, dump_receipt, load_receipt, receipt_path
from csm_weights.untrusted import dump_record
from tests.support.toy import PIECE_SIZE, Toy, flip

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


def file_look(path: Path, condition: FileState, size: int) -> FileStatus:
    if condition is ABSENT:
        return FileStatus(path, condition)
    wrong = finding(path) if condition is INVALID else None
    receipt = receipt_of(path.name, size) if condition is VERIFIED else None
    return FileStatus(path, condition, size, wrong, receipt)


def part_look(piece: Piece, condition: FileState) -> FileStatus:
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
        installed=file_look(PLACES.destination / name, draw(conditions), artifact.size),
        staged=file_look(PLACES.staging / name, draw(conditions), artifact.size),
        partial=tuple(PieceRecord(p.offset, p.size, p.sha256, "x") for p in kept),
        parts=tuple(part_look(piece, draw(parts)) for piece in artifact.pieces),
        extras=(finding(f"{name}-zz", Kind.EXTRA_PART),) if extras else (),
    )


@st.composite
def states(draw: st.DrawFn) -> State:
    items = tuple(draw(artifact_states(name)) for name in "abc"[: draw(st.integers(1, 3))])
    manifest = Manifest("toy", "staged", "placed", tuple(i.artifact for i in items))
    free = st.one_of(st.just(1 << 60), st.integers(0, 1 << 41))
    return State(
        manifest, PLACES, items, draw(free), draw(free), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


def a_state(*items: ArtifactState, **changes: Any) -> State:
    """A state with plenty of room on one file system, but for the changes."""
    manifest = Manifest("toy", "staged", "placed", tuple(i.artifact for i in items))
    state = State(manifest, PLACES, items, 1 << 60, 1 << 60, True, False)
    return replace(state, **changes)


def an_item(
    name: str = "a",
    placed: FileState = ABSENT,
    staged: FileState = ABSENT,
    kind: str = "opaque",
    pieces: int = 0,
    part: FileState = UNVERIFIED,
) -> ArtifactState:
    """An artifact of 10 bytes a piece, with both its files and all its parts as told."""
    tiles = tuple(Piece(f"chunks/{name}-{i}", 10 * i, 10, SHA) for i in range(pieces))
    artifact = Artifact(name, name, kind, 10 * pieces or 7, SHA, pieces=tiles)
    return ArtifactState(
        artifact,
        file_look(PLACES.destination / name, placed, artifact.size),
        file_look(PLACES.staging / name, staged, artifact.size),
        (),
        tuple(part_look(tile, part) for tile in tiles),
        (),
    )


def verbs(plan: Plan) -> list[type[Action]]:
    return [type(step) for step in plan.actions]


def steps_of(plan: Plan, item: ArtifactState) -> list[Action]:
    return [step for step in plan.actions if step.artifact.path == item.artifact.path]


# ---- properties of every plan

any_goal = st.sampled_from(Target)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def is_settled(item: ArtifactState, goal: Target) -> bool:
    """Whether nothing is left to do for an artifact."""
    return item.installed.state is VERIFIED or (
        goal is Target.STAGED and item.installed.state is not UNVERIFIED
        and item.staged.state is VERIFIED
    )  # fmt: skip


def is_reachable(item: ArtifactState, goal: Target) -> bool:
    """Whether the artifact is here, or all that makes it is."""
    if item.installed.state in HERE or item.staged.state in HERE:
        return True
    if goal is Target.PLACED:
        return False
    if any(edition.text is not None for edition in item.artifact.editions):
        return True
    kept = {record.offset for record in item.partial}
    pieces = zip(item.artifact.pieces, item.parts, strict=True)
    needed = [part for piece, part in pieces if piece.offset not in kept]
    whole = all(part.finding is None for part in needed)
    return bool(item.artifact.pieces) and whole and not (needed and item.extras)


@many
@given(state=states(), goal=any_goal)
def test_bytes_to_read_and_write_are_plausible(state: State, goal: Target) -> None:
    """No count is negative, and no step handles more than its whole file."""
    for step in make_plan(state, goal).actions:
        most = max(edition.size for edition in step.artifact.editions)
        assert 0 <= step.bytes_read <= most
        assert 0 <= step.bytes_written <= most


@many
@given(state=states(), goal=any_goal)
def test_what_is_written_is_what_is_not_kept(state: State, goal: Target) -> None:
    """Journaled pieces and shared blocks are not written again; all bytes are read."""
    for step in make_plan(state, goal).having(Assemble):
        kept = sum(record.size for record in step.item.partial)
        expected = 0 if state.shares_blocks else step.artifact.size - kept
        assert (step.bytes_read, step.bytes_written) == (step.artifact.size, expected)


@many
@given(state=states(), goal=any_goal)
def test_done_means_everything_proven_in_its_place(state: State, goal: Target) -> None:
    """A plan is done if, and only if, every file is proven where the goal wants it."""
    assert make_plan(state, goal).is_done == all(is_settled(i, goal) for i in state.artifacts)


@many
@given(state=states(), goal=any_goal)
def test_each_artifact_has_steps_or_a_finding(state: State, goal: Target) -> None:
    """What can be made has steps; what cannot has none, and the plan says why."""
    plan = make_plan(state, goal)
    for item in state.artifacts:
        assert bool(steps_of(plan, item)) == is_reachable(item, goal)
    unreachable = [i for i in state.artifacts if not is_reachable(i, goal)]
    kinds = {f.kind for f in plan.findings}
    assert bool(unreachable) == bool(kinds - {Kind.NO_SPACE})


@many
@given(state=states(), goal=any_goal)
def test_each_file_ends_where_the_goal_wants_it(state: State, goal: Target) -> None:
    """The last step is about the placed file, or moves it there; fetching moves nothing."""
    plan = make_plan(state, goal)
    door = Move if state.same_filesystem else Copy
    for item in state.artifacts:
        steps = steps_of(plan, item)
        moves = [type(step) for step in steps if type(step) in (Move, Copy)]
        in_place = bool(steps) and steps[0].file is item.installed
        expected = [door] if steps and not in_place and goal is not Target.STAGED else []
        assert moves == expected
        assert not moves or type(steps[-1]) is door


@many
@given(state=states())
def test_placing_makes_nothing_new(state: State) -> None:
    """`place` proves and moves what is staged; it neither assembles nor writes."""
    plan = make_plan(state, Target.PLACED)
    assert plan.having(Assemble, WriteText) == ()


@many
@given(state=states(), goal=any_goal)
def test_space_is_counted_before_anything_is_written(state: State, goal: Target) -> None:
    """Too little room is a finding if, and only if, more is to be written than is free."""
    plan = make_plan(state, goal)
    staged = sum(s.bytes_written for s in plan.having(Assemble, WriteText))
    copied = sum(s.bytes_written for s in plan.having(Copy))
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
@given(state=states(), goal=any_goal)
def test_a_wrong_file_that_is_replaced_is_told(state: State, goal: Target) -> None:
    """Whatever a step replaces because it is wrong is in the plan's notes or findings."""
    plan = make_plan(state, goal)
    for step in plan.having(Move, Copy):
        if step.item.installed.state is INVALID:
            assert step.item.installed.finding in plan.notes + plan.findings


# ---- plans by example


def test_a_proven_file_in_place_is_kept() -> None:
    """Nothing is to be done for what is done, whatever its parts look like."""
    plan = make_plan(a_state(an_item(placed=VERIFIED, pieces=2, part=INVALID)), Target.BOTH)
    assert (verbs(plan), plan.is_done) == ([Keep], True)


def test_parts_are_assembled_and_moved() -> None:
    """From parts alone a file is assembled, then moved into place."""
    plan = make_plan(a_state(an_item(pieces=3)), Target.BOTH)
    assert [(type(s), s.bytes_read, s.bytes_written) for s in plan.actions] == [
        (Assemble, 30, 30),
        (Move, 0, 0),
    ]


def test_fetching_stops_before_the_move() -> None:
    """`fetch` ends with the assembled file."""
    assert verbs(make_plan(a_state(an_item(pieces=3)), Target.STAGED)) == [Assemble]


def test_a_part_that_is_kept_in_the_partial_may_be_missing() -> None:
    """Pieces that an earlier run proved need no part, and are not written again."""
    item = an_item(pieces=3)
    parts = (part_look(item.artifact.pieces[0], ABSENT), *item.parts[1:])
    kept = (PieceRecord(0, 10, SHA, "x"),)
    plan = make_plan(a_state(replace(item, parts=parts, partial=kept)), Target.STAGED)
    assert [(type(s), s.bytes_read, s.bytes_written) for s in plan.actions] == [(Assemble, 30, 20)]


def test_every_bad_part_is_told_at_once() -> None:
    """All parts that stand in the way are findings of one plan."""
    item = an_item(pieces=3, part=INVALID)
    plan = make_plan(a_state(item, an_item("b", pieces=2, part=INVALID)), Target.BOTH)
    expected = [f"chunks/a-{i}" for i in range(3)] + ["chunks/b-0", "chunks/b-1"]
    assert [f.where for f in plan.findings] == expected


def test_one_bad_artifact_does_not_hide_the_others() -> None:
    """What can be done is still planned beside what cannot."""
    state = a_state(an_item("a", pieces=2, part=INVALID), an_item("b", staged=VERIFIED))
    plan = make_plan(state, Target.BOTH)
    assert ([s.artifact.path for s in plan.actions], plan.is_done) == (["b"], False)


def test_a_known_text_stands_in_for_bad_parts() -> None:
    """When no source has the file but its text is known, it is written."""
    item = an_item(pieces=2, part=ABSENT)
    text = replace(item.artifact, alternatives=(Edition(4, SHA, "text"),))
    plan = make_plan(a_state(replace(item, artifact=text)), Target.STAGED)
    assert [(type(s), s.bytes_written) for s in plan.actions] == [(WriteText, 4)]


def test_nothing_here_is_one_finding_a_file() -> None:
    """With no part at all, the file is missing, not each of its parts."""
    plan = make_plan(a_state(an_item(pieces=3, part=ABSENT)), Target.BOTH)
    assert [f.kind for f in plan.findings] == [Kind.MISSING]
    assert plan.findings[0].where == str(PLACES.destination / "a")


def test_a_wrong_file_in_place_is_not_called_absent() -> None:
    """`place` with a wrong file in place and none staged does not say "no such file"."""
    plan = make_plan(a_state(an_item(placed=INVALID)), Target.PLACED)
    about = [f for f in plan.findings if f.where == str(PLACES.destination / "a")]
    assert "no such file" not in [f.found for f in about]


def test_a_wrong_placed_file_is_noted_when_a_staged_one_replaces_it() -> None:
    """A proven staged file that takes the place of a wrong one does so with a note."""
    item = an_item(placed=INVALID, staged=VERIFIED)
    plan = make_plan(a_state(item), Target.PLACED)
    assert (verbs(plan), plan.notes) == ([Move], (item.installed.finding,))


def test_a_copy_is_counted_in_bytes() -> None:
    """Across file systems the staged file is read and written whole."""
    state = a_state(an_item(staged=VERIFIED, pieces=3), same_filesystem=False)
    plan = make_plan(state, Target.PLACED)
    assert [(type(s), s.bytes_read, s.bytes_written) for s in plan.actions] == [(Copy, 30, 30)]


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
    """Who has parts of one format gets that one, not the first."""
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


def test_weights_bring_their_config() -> None:
    """Chosen weights come with config.json, in manifest order; a prompt does not."""
    kinds = {"config.json": "config", "m.pt": "torch-zip", "a.wav": "opaque"}
    manifest = a_state(*(an_item(n, kind=k) for n, k in kinds.items())).manifest
    config, model, prompt = manifest.artifacts
    assert with_config(manifest, [model]) == (config, model)
    assert with_config(manifest, [prompt]) == (prompt,)


# ---- looking at a real disk


def look_at(toy: Toy, known_bad: dict[Path, Finding] | None = None) -> dict[str, ArtifactState]:
    paths = Paths.of(toy.manifest, toy.root)
    state = inspect(toy.manifest, toy.manifest.artifacts, paths, known_bad or {})
    return {item.artifact.path: item for item in state.artifacts}


@pytest.fixture
def placed(toy: Toy) -> Toy:
    """A toy repository whose files are all in place."""
    apply.weights(toy.request(), smoke=False)
    return toy


def test_a_fresh_repository_has_parts_only(toy: Toy) -> None:
    """Parts are seen with their sizes; files, partials and receipts are absent."""
    item = look_at(toy)["a.bin"]
    assert (item.installed.state, item.staged.state) == (ABSENT, ABSENT)
    assert [part.state for part in item.parts] == [UNVERIFIED] * 5
    assert [part.size for part in item.parts] == [p.size for p in toy.artifact("a.bin").pieces]
    assert (item.partial, item.extras) == ((), ())


def test_a_placed_file_is_proven_by_its_receipt(placed: Toy) -> None:
    """An untouched file with a receipt is proven without being read."""
    assert [i.installed.state for i in look_at(placed).values()] == [VERIFIED] * 3


def test_looking_again_finds_what_hashing_refuted(placed: Toy) -> None:
    """What was refuted in this run is wrong whatever its receipt says."""
    wrong = finding(placed.installed("a.bin"), Kind.WRONG_DIGEST)
    item = look_at(placed, {placed.installed("a.bin"): wrong})["a.bin"]
    assert (item.installed.state, item.installed.finding) == (INVALID, wrong)


def edit_receipt(toy: Toy, name: str, **changes: Any) -> None:
    path = receipt_path(toy.root / "models/toy", name)
    data = json.loads(path.read_text())
    for key, value in changes.items():
        field, _, inner = key.partition("__")
        if inner:
            data[field][inner] = value
        else:
            data[field] = value
    path.write_text(json.dumps(data))


FORGERIES: list[tuple[str, dict[str, Any]]] = [
    ("a.bin", {"model": "csm-1b"}),
    ("a.bin", {"size": 1}),
    ("a.bin", {"sha256": "0" * 64}),
    ("a.bin", {"schema": 2}),
    ("a.bin", {"fingerprint__inode": 1}),
    ("a.bin", {"fingerprint__size": 1}),
    ("a.bin", {"fingerprint__mtime_ns": 1}),
    ("a.bin", {"fingerprint__ctime_ns": 1}),
    ("a.bin", {"fingerprint": None}),
    ("a.bin", {"unknown": 1}),
    ("b.bin", {"sha256": "0" * 64}),
    ("b.bin", {"pieces": []}),
    ("b.bin", {"pieces": None}),
    ("b.bin", {"pieces": [{"offset": 0, "size": 1, "sha256": "0", "source": "x"}]}),
]


@pytest.mark.parametrize(("name", "changes"), FORGERIES)
def test_a_receipt_that_does_not_fit_proves_nothing(
    placed: Toy, name: str, changes: dict[str, Any]
) -> None:
    """Any figure of a receipt that is not the file's and the manifest's voids it."""
    edit_receipt(placed, name, **changes)
    assert look_at(placed)[name].installed.state is UNVERIFIED


@pytest.mark.parametrize("text", ["", "rubbish", "null", "[]", "[" * 9999, "\x00\xff", "9" * 9999])
def test_a_damaged_receipt_counts_as_absent(placed: Toy, text: str) -> None:
    """A receipt that cannot be understood leaves the file unproven."""
    receipt_path(placed.root / "models/toy", "a.bin").write_text(text)
    look = look_at(placed)["a.bin"].installed
    assert (look.state, look.receipt) == (UNVERIFIED, None)


def test_journal_lines_of_other_pieces_do_not_count(toy: Toy) -> None:
    """Only lines about pieces that the manifest pins today are kept, each once, in order."""
    a = toy.artifact("a.bin").pieces
    good = [PieceRecord(p.offset, p.size, p.sha256, "x") for p in (a[3], a[1], a[3])]
    stale = [
        replace(good[0], sha256="0" * 64),
        replace(good[0], size=1),
        replace(good[0], offset=1),
    ]
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.touch()
    lines = [dump_record(r) for r in (*stale, *good)] + [dump_record(good[0])[:-5]]
    journal_path(toy.staged("a.bin")).write_text("\n".join(lines))
    assert [r.offset for r in look_at(toy)["a.bin"].partial] == [a[1].offset, a[3].offset]


def test_a_journal_without_its_partial_does_not_count(toy: Toy) -> None:
    """Lines about a file that has gone are no claim on anything."""
    piece = toy.artifact("a.bin").pieces[0]
    journal = journal_path(toy.staged("a.bin"))
    journal.parent.mkdir(parents=True)
    journal.write_text(dump_record(PieceRecord(piece.offset, piece.size, piece.sha256, "x")) + "\n")
    assert look_at(toy)["a.bin"].partial == ()


def test_extra_parts_are_found_and_other_files_are_not(toy: Toy) -> None:
    """A file that is named like a part is told; SHA256SUMS beside the parts is not."""
    folder = toy.chunk_file("a.bin", 0).parent
    (folder / "a.bin.part-af").touch()
    (folder / "SHA256SUMS").touch()
    extras = look_at(toy)["a.bin"].extras
    assert [(f.kind, f.where) for f in extras] == [
        (Kind.EXTRA_PART, "chunks/toy/a.bin/a.bin.part-af")
    ]


def test_looking_changes_nothing(placed: Toy) -> None:
    """No file is made, removed or touched by a look."""

    def snapshot() -> list[tuple[str, int, int]]:
        paths = sorted(placed.root.rglob("*"))
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in paths]

    before = snapshot()
    look_at(placed)
    assert snapshot() == before


def test_a_wrong_size_says_what_the_file_is(toy: Toy) -> None:
    """A pointer, a refusal and an empty file are told apart by their first bytes."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    page = "Access to model sesame/csm-1b is restricted. You must have access to it"
    for index, text in enumerate((pointer, page, "", "x")):
        toy.chunk_file("a.bin", index).write_text(text)
    findings = [part.finding for part in look_at(toy)["a.bin"].parts[:4]]
    expected = [Kind.LFS_POINTER, Kind.ACCESS_PAGE, Kind.WRONG_SIZE, Kind.WRONG_SIZE]
    assert [f.kind for f in findings if f] == expected
    assert all(f.help for f in findings if f)


def test_the_destination_can_be_overridden(toy: Toy) -> None:
    """An own destination may be relative to the root, or absolute."""
    manifest = toy.manifest
    assert Paths.of(manifest, toy.root).destination == toy.root / "models/toy"
    assert Paths.of(manifest, toy.root, "here").destination == toy.root / "here"
    assert Paths.of(manifest, toy.root, "/else/where").destination == Path("/else/where")


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="no mountinfo here")
def test_the_type_of_a_file_system_is_known() -> None:
    """A folder on a mounted file system has that one's type."""
    assert filesystem_type(Path("/proc/self")) == "proc"


# ---- hostile records

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
PIECE = PieceRecord(0, 10, SHA, "chunks/a-0")
OID = "6" * 40
RECEIPT = replace(receipt_of("a", 10), pieces=(PIECE,), git_sha1=OID)


def has_types(record: Any, example: Any) -> bool:
    """Whether a record's fields have the types of those of a good one, all the way down."""
    if isinstance(example, tuple):
        return isinstance(record, tuple) and all(has_types(r, example[0]) for r in record)
    if hasattr(example, "__dataclass_fields__"):
        return type(record) is type(example) and all(
            has_types(value, getattr(example, key)) for key, value in vars(record).items()
        )
    return type(record) is type(example) or (record is None and example == OID)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(asdict(PIECE))), value=trees)
def test_a_journal_line_of_other_types_counts_as_absent(key: str, value: object) -> None:
    """A line is understood with the right types in it, or not at all."""
    record = parse_line(json.dumps({"schema": 1, **asdict(PIECE), key: value}))
    assert record is None or has_types(record, PIECE)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(asdict(RECEIPT))), value=trees)
def test_a_receipt_of_other_types_counts_as_absent(key: str, value: object) -> None:
    """A receipt is understood with the right types in it, or not at all."""
    record = load_receipt(json.dumps({"schema": 1, **asdict(RECEIPT), key: value}))
    assert record is None or has_types(record, RECEIPT)


@settings(max_examples=150, deadline=None)
@given(text=st.text() | trees.map(json.dumps))
def test_no_text_crashes_the_reader_of_records(text: str) -> None:
    """Whatever a record's file holds, reading it gives a record or nothing."""
    assert (load_receipt(text), parse_line(text), load_report(text)) == (None, None, None)


@pytest.mark.parametrize("value", [[], {}, None, "0", 0.5, True])
def test_a_journal_of_odd_values_only_costs_time(toy: Toy, value: object) -> None:
    """A journal line with a value of another type does not stop the look."""
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.touch()
    line = {"schema": 1, "offset": value, "size": value, "sha256": value, "source": value}
    journal_path(toy.staged("a.bin")).write_text(json.dumps(line) + "\n")
    assert look_at(toy)["a.bin"].partial == ()


@pytest.mark.parametrize("path", ["smoke", "smoke.json", "smoke-report"])
def test_no_receipt_is_kept_where_the_smoke_report_is(path: str) -> None:
    """A file may be called as it likes without its receipt meeting the smoke report."""
    folder = Path("/placed")
    assert receipt_path(folder, path) != report_path(folder)


def test_records_read_back_as_written() -> None:
    """Dumping and loading are inverse."""
    assert parse_line(dump_record(PIECE)) == PIECE
    assert load_receipt(dump_receipt(RECEIPT)) == RECEIPT


def test_a_fingerprint_survives_a_rename_but_not_an_edit(tmp_path: Path) -> None:
    """A rename keeps inode, size and mtime; a write does not, nor does another file."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * PIECE_SIZE)
    before = Fingerprint.of(path.stat())
    path = path.rename(tmp_path / "b")
    assert Fingerprint.of(path.stat()).same_bytes(before)
    os.utime(path, ns=(1, 1))
    assert not Fingerprint.of(path.stat()).same_bytes(before)


def test_a_copy_of_a_proven_file_is_not_proven(placed: Toy) -> None:
    """A receipt is for one file: another one of the same size and time has to be hashed."""
    file = placed.installed("a.bin")
    shutil.copy2(file, file.with_name("copy"))
    flip(file.with_name("copy"))
    os.utime(file.with_name("copy"), ns=(0, file.stat().st_mtime_ns))
    file.with_name("copy").replace(file)
    assert look_at(placed)["a.bin"].installed.state is UNVERIFIED

"""Where each piece is to come from, decided from values alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csm_weights.errors import Finding, Kind
from csm_weights.pipeline.actions import Assemble, WriteText
from csm_weights.pipeline.plan import Plan, Target, make_plan
from csm_weights.pipeline.request import Request
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus, Shelved, State
from csm_weights.store.journal import Arrival, Journal, PieceRecord
from csm_weights.transfer.policy import HUB, REMOTE, PieceSource, RemoteSources, SourcePolicy
from csm_weights.transfer.source import NEXT_SOURCE, NotAvailable, SourceError
from tests.pipeline.test_plan import (
    ABSENT,
    INVALID,
    PLACES,
    SHA,
    UNVERIFIED,
    a_state,
    an_item,
    any_target,
    chunk_status,
    finding,
    many,
    states,
    steps_of,
    verbs,
)

AUTO = SourcePolicy(remote=("https://mirror.example", HUB))
FROM_HUB = SourcePolicy(chunks=False, remote=(HUB,), remote_first=True)
CACHED = Path("/cache/blob")

policies = st.sampled_from(
    [SourcePolicy(), AUTO, FROM_HUB, SourcePolicy(chunks=False, cache=False)]
)


def origins(plan: Plan, path: str = "a") -> list[PieceSource]:
    return [o.source for o in plan.origins[path]]


def with_chunk_files(item: ArtifactState, *conditions: FileState) -> ArtifactState:
    pairs = zip(item.artifact.pieces, conditions, strict=True)
    return replace(item, chunks=tuple(chunk_status(piece, c) for piece, c in pairs))


def damaged(item: ArtifactState, *good: int) -> ArtifactState:
    """The item with a file in place of which only these pieces are right."""
    wrong = FileStatus(
        item.installed.path, INVALID, item.artifact.size, finding(item.installed.path)
    )
    return replace(item, installed=replace(wrong, good=frozenset(good)))


# ---- properties


@many
@given(state=states(), target=any_target)
def test_with_a_server_only_what_is_in_the_way_blocks(state: State, target: Target) -> None:
    """Where a server has everything, nothing but extra chunk files, or the target, stops a file."""
    plan = make_plan(state, target, AUTO)
    for item in state.artifacts:
        if target is not Target.PLACED and not item.extras:
            assert steps_of(plan, item)
        if item.artifact.path in plan.origins:
            assert PieceSource.NOWHERE not in origins(plan, item.artifact.path)


@many
@given(state=states(), target=any_target, policy=policies)
def test_what_is_fetched_is_what_nothing_here_has(
    state: State, target: Target, policy: SourcePolicy
) -> None:
    """The bytes to fetch are those of the remote pieces, and with the others they make the file."""
    for step in make_plan(state, target, policy).having(Assemble):
        far = [p for p in step.artifact.tiles if p.offset in step.remote]
        assert step.cost.fetched == sum(p.size for p in far)
        assert step.cost.read + step.cost.fetched == step.artifact.size
        assert 0 <= step.cost.written <= step.artifact.size


@many
@given(state=states(), target=any_target)
def test_without_chunk_files_no_chunk_file_is_used(state: State, target: Target) -> None:
    """From the Hub alone means that no chunk file is read, though they are all here."""
    for found in make_plan(state, target, FROM_HUB).origins.values():
        assert all(o.source is not PieceSource.CHUNK for o in found)


@many
@given(state=states(), target=any_target, policy=policies)
def test_every_open_file_has_an_origin_for_each_piece(
    state: State, target: Target, policy: SourcePolicy
) -> None:
    """What is not verified yet has a line for every piece, in file order."""
    plan = make_plan(state, target, policy)
    for item in state.artifacts:
        if FileState.VERIFIED not in (item.installed.state, item.staged.state):
            found = plan.origins[item.artifact.path]
            assert tuple(o.piece for o in found) == item.artifact.tiles


# ---- examples


def test_the_order_is_kept_salvaged_chunk_file_cached_remote() -> None:
    """Each piece comes from the nearest that has it."""
    item = damaged(
        with_chunk_files(an_item(pieces=5), UNVERIFIED, UNVERIFIED, UNVERIFIED, ABSENT, INVALID), 10
    )
    cached = FileStatus(CACHED, INVALID, 50, finding(CACHED), good=frozenset({0, 10, 20, 30}))
    kept = (PieceRecord(0, 10, SHA, "x"),)
    plan = make_plan(
        a_state(replace(item, cached=cached, journal=Journal(kept))), Target.STAGED, AUTO
    )
    expected = [
        PieceSource.KEPT,
        PieceSource.SALVAGED,
        PieceSource.CHUNK,
        PieceSource.CACHED,
        PieceSource.REMOTE,
    ]
    assert origins(plan) == expected
    (step,) = plan.having(Assemble)
    assert (step.cost.read, step.cost.fetched, step.remote) == (40, 10, frozenset({40}))
    for words in (
        "1 piece of the damaged file",
        "1 chunk file ",
        "the Hub's cache",
        "mirror.example",
    ):
        assert words in f"{step.detail} "


def test_a_wrong_chunk_file_that_is_fetched_instead_is_reported() -> None:
    """A chunk file of the wrong size is in the notes when its piece comes from elsewhere."""
    item = with_chunk_files(an_item(pieces=3), UNVERIFIED, INVALID, ABSENT)
    plan = make_plan(a_state(item), Target.STAGED, AUTO)
    assert [note.where for note in plan.notes] == ["chunks/a-1"]


def test_what_has_arrived_is_not_counted_again() -> None:
    """Ranges that an earlier run wrote are read back, not fetched."""
    item = replace(an_item(pieces=0), journal=Journal(arrived=(Arrival(0, 3, SHA),)))
    step = make_plan(a_state(item), Target.STAGED, AUTO).actions[0]
    assert (step.cost.read, step.cost.fetched, step.cost.written) == (3, 4, 4)


@pytest.mark.parametrize(("shares", "written"), [(True, 0), (False, 7)])
def test_a_file_of_the_cache_is_copied(shares: bool, written: int) -> None:
    """It gets an inode of its own: where the file system shares blocks, no byte is written."""
    item = replace(an_item(), cached=FileStatus(CACHED, UNVERIFIED, 7))
    state = a_state(item, cache_shares_blocks=shares)
    (copy,) = make_plan(state, Target.STAGED, AUTO).actions
    assert (type(copy), copy.cost.written, copy.cost.fetched) == (Assemble, written, 0)
    assert "from the Hub's cache" in copy.detail


def test_a_cache_that_is_not_asked_for_is_not_used() -> None:
    """From chunk files or a mirror alone, the Hub's cache does not count."""
    item = replace(an_item(), cached=FileStatus(CACHED, UNVERIFIED, 7))
    only_mirror = SourcePolicy(chunks=False, cache=False, remote=("https://mirror.example",))
    plan = make_plan(a_state(item), Target.STAGED, only_mirror)
    assert origins(plan) == [PieceSource.REMOTE]


def test_a_known_text_is_written_rather_than_fetched() -> None:
    """A config.json whose text is known needs no server, unless the Hub is asked for by name."""
    item = an_item(kind="config")
    edition = replace(item.artifact.editions[0], text="text", size=4)
    item = replace(item, artifact=replace(item.artifact, alternatives=(edition,)))
    assert verbs(make_plan(a_state(item), Target.STAGED, AUTO)) == [WriteText]
    assert verbs(make_plan(a_state(item), Target.STAGED, FROM_HUB)) == [Assemble]


def test_what_keeps_the_hub_from_being_asked_is_the_finding() -> None:
    """Without a token, and nothing else allowed, that is what stands in the way: once."""
    problem = Finding(Kind.NO_TOKEN, "the page", "a token", "none")
    policy = SourcePolicy(chunks=False, problems=(problem,))
    plan = make_plan(a_state(an_item("a"), an_item("b", pieces=2)), Target.STAGED, policy)
    assert plan.findings == (problem,)


def test_chunk_files_too_many_do_not_matter_where_no_chunk_file_is_used() -> None:
    """An extra chunk file blocks assembling from chunk files, and nothing else."""
    extra = (finding("chunks/a-zz", Kind.EXTRA_CHUNK_FILE),)
    item = replace(an_item(pieces=2), extras=extra)
    assert make_plan(a_state(item), Target.STAGED, AUTO).findings == extra
    assert make_plan(a_state(item), Target.STAGED, FROM_HUB).findings == ()


def test_room_for_a_download_is_counted_before_it_begins() -> None:
    """Bytes to fetch are bytes to write."""
    plan = make_plan(a_state(an_item(), free_staging=6), Target.STAGED, FROM_HUB)
    assert [f.kind for f in plan.findings] == [Kind.NO_SPACE]
    assert plan.findings[0].where == str(PLACES.staging)


def test_what_one_disk_of_several_has_is_copied_before_the_next_is_there() -> None:
    """The plan says how many pieces it goes without, and counts them neither read nor written."""
    shelved = {offset: Shelved(Path("/disk/a"), 50, offset) for offset in (0, 10)}
    item = replace(an_item(pieces=5), shelved=(shelved,))
    plan = make_plan(a_state(item), Target.STAGED, SourcePolicy(chunks=False, shelves=True))
    (step,) = plan.having(Assemble)
    assert step.detail == "from 2 pieces of other folders and 3 more that no source has yet"
    assert (step.cost.read, step.cost.written, step.cost.fetched) == (20, 20, 0)
    assert [lack.where for lack in plan.lacking] == ["chunks/a-2", "chunks/a-3", "chunks/a-4"]


@pytest.mark.parametrize("shelves", [False, True])
def test_the_next_disk_is_advised_where_folders_were_named(shelves: bool) -> None:
    """Elsewhere there is nothing more to say of what is missing."""
    policy = SourcePolicy(shelves=True) if shelves else SourcePolicy()
    item = with_chunk_files(an_item(pieces=2), ABSENT, ABSENT)
    plan = make_plan(a_state(item), Target.STAGED, policy)
    assert {f.help for f in plan.findings} == {NEXT_SOURCE if shelves else ""}


def test_the_source_that_is_planned_is_the_first_that_is_asked() -> None:
    """With --consume, shared blocks and a damaged file in place, both name the chunk files."""
    item = damaged(an_item(pieces=2), 0, 10)
    for policy in (SourcePolicy(consume=True), SourcePolicy()):
        plan = make_plan(a_state(item, shares_blocks=True), Target.STAGED, policy)
        first = policy.candidates(item, PLACES.root)
        asked = next(c for c in first if c.source and 0 in c.pieces)
        assert origins(plan) == [asked.kind] * 2
    assert origins(plan) == [PieceSource.SALVAGED] * 2


@pytest.mark.parametrize("chunks", [True, False])
def test_what_is_wrong_with_a_chunk_file_is_told_where_its_piece_is_nowhere(chunks: bool) -> None:
    """By the plan and by the source; unless chunk files are not asked for."""
    item = with_chunk_files(an_item(pieces=2), INVALID, ABSENT)
    policy, (wrong, absent) = SourcePolicy(chunks=chunks), item.artifact.pieces
    known = finding(wrong.part, Kind.WRONG_SIZE)
    told = [f"{wrong.part}: {known.kind}", f"{absent.part}: {Kind.MISSING}"]
    found = policy.origins(item, PLACES.root)
    assert [o.where for o in found] == (told if chunks else ["no source has it"] * 2)
    assert {o.source for o in found} == {PieceSource.NOWHERE}
    writer: Any = SimpleNamespace(is_empty=True, notes=[])
    source = policy.source(item, PLACES.root, [])
    with pytest.raises(SourceError if chunks else NotAvailable) as caught:
        source.deliver(item.artifact, wrong, writer)
    assert getattr(caught.value, "findings", (known,)) == (known,)
    with pytest.raises(NotAvailable):
        source.deliver(item.artifact, absent, writer)


def test_a_remote_source_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a further scheme takes: a module with `open_source`, and its name in `REMOTE`."""
    module = ModuleType("csm_weights.transfer.s3")
    opened: list[str] = []
    monkeypatch.setattr(module, "open_source", lambda url, *_: opened.append(url), raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(REMOTE, "s3", "s3")
    url = "s3://bucket/folder"
    request = Request(PLACES.root, urls=(url,), source="mirror")
    with RemoteSources(request.urls, a_state().manifest, Event(), print) as (source,):
        source.open()
    assert opened == [url]

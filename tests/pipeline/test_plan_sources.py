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
from csm_weights.manifest.types import Piece
from csm_weights.pipeline.actions import Assemble, Consume, Move, WriteText
from csm_weights.pipeline.plan import Plan, Target, make_plan
from csm_weights.pipeline.request import Request
from csm_weights.store.consumed import CONSUMING_ROOM
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus, Shelved, State
from csm_weights.store.journal import Arrival, Consumed, Journal, PieceRecord
from csm_weights.transfer.policy import HUB, REMOTE, PieceSource, RemoteSources, SourcePolicy
from csm_weights.transfer.source import NEXT_SOURCE, NotAvailable, SourceError
from tests.pipeline.test_plan import (
    ABSENT,
    INVALID,
    PLACES,
    SHA,
    UNVERIFIED,
    VERIFIED,
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
    item, here = (with_text(an_item(kind="config", pieces=n)) for n in (0, 2))
    assert verbs(make_plan(a_state(item), Target.STAGED, AUTO)) == [WriteText]
    assert verbs(make_plan(a_state(item), Target.STAGED, FROM_HUB)) == [Assemble]
    assert verbs(make_plan(a_state(here), Target.STAGED, AUTO)) == [Assemble]
    assert verbs(make_plan(a_state(here), Target.STAGED)) == [Assemble]


def with_text(item: ArtifactState) -> ArtifactState:
    """The item with an edition whose text is known."""
    edition = replace(item.artifact.editions[0], text="text", size=4)
    return replace(item, artifact=replace(item.artifact, alternatives=(edition,)))


def test_a_known_text_is_not_written_over_what_was_consumed() -> None:
    """The unfinished file has the only copy of bytes: what is missing of it is told."""
    item = with_text(an_item(pieces=2, part=ABSENT))
    begun = replace(item, journal=Journal(consumed=(Consumed(0, 4, SHA),)))
    begun = with_chunk_files(begun, FileState.CONSUMED, ABSENT)
    assert verbs(make_plan(a_state(item), Target.STAGED)) == [WriteText]
    plan = make_plan(a_state(begun), Target.STAGED)
    assert (plan.actions, plan.findings) == ((), (begun.chunks[1].finding,))


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


@pytest.mark.parametrize("free", [7, 6])
def test_room_for_a_download_is_counted_before_it_begins(free: int) -> None:
    """Bytes to fetch are bytes to write; just enough room is enough."""
    plan = make_plan(a_state(an_item(), free_staging=free), Target.STAGED, FROM_HUB)
    help_text = "free some disk, or choose another --staging"
    words = ("7 bytes free", "6, 1 too few", help_text)
    short = Finding(Kind.NO_SPACE, str(PLACES.staging), *words)
    assert plan.findings == (() if free == 7 else (short,))


def test_room_is_counted_in_both_folders() -> None:
    """One finding each, with the option that chooses another; of two formats one is offered."""
    kinds = {"a": "safetensors", "b": "torch-zip", "c": "safetensors"}
    a, b, c = (an_item(name, pieces=2, kind=kind) for name, kind in kinds.items())
    kept = replace(c, installed=replace(c.installed, state=VERIFIED))
    full = a_state(a, b, kept, same_filesystem=False, free_staging=39, free_destination=0)
    expected = [
        Finding(
            Kind.NO_SPACE, str(folder), "40 bytes free", found, f"{ways}, or choose another {o}"
        )
        for ways in ["free some disk, ask for one format with --only=a"]
        for folder, found, o in (
            (PLACES.staging, "39, 1 too few", "--staging"),
            (PLACES.destination, "0, 40 too few", "--dest"),
        )
    ]
    policy = SourcePolicy(chunks=False, remote=(HUB,))
    assert list(make_plan(full, Target.BOTH, policy).findings) == expected
    one = a_state(a, kept, same_filesystem=False, free_staging=0, free_destination=0)
    helps = [f.help for f in make_plan(one, Target.BOTH, policy).findings]
    assert helps == [f"free some disk, or choose another {o}" for o in ("--staging", "--dest")]


def test_the_room_that_consuming_needs_is_offered_where_it_would_do() -> None:
    """The help begins with it; not where a chunk file is unfit, or the room is too little."""
    item = an_item(pieces=3)
    large = replace(item.artifact, size=1 << 30, pieces=large_pieces(item))
    item = replace(item, artifact=large)
    for free, unfit, is_offered in (
        (CONSUMING_ROOM, (), True),
        (CONSUMING_ROOM - 1, (), False),
        (CONSUMING_ROOM, (finding("chunks/a-0", Kind.NOT_CONSUMABLE),), False),
    ):
        state = a_state(replace(item, unfit=unfit), free_staging=free)
        (short,) = make_plan(state, Target.STAGED).findings
        way = f"--consume needs only {CONSUMING_ROOM:,} bytes: it removes the chunk files as the "
        plain = "free some disk, or choose another --staging"
        assert short.help == (f"{way}file grows; or {plain}" if is_offered else plain)
        asked = make_plan(state, Target.STAGED, SourcePolicy(consume=True))
        assert (asked.findings == ()) == is_offered
        assert not unfit or asked.findings == unfit


def large_pieces(item: ArtifactState) -> tuple[Piece, ...]:
    """The pieces of an item as if they had a third of 1 GiB each."""
    sizes = (357_913_941, 357_913_941, 357_913_942)
    starts = (0, sizes[0], 2 * sizes[0])
    pairs = zip(item.artifact.pieces, starts, sizes, strict=True)
    return tuple(replace(piece, offset=start, size=size) for piece, start, size in pairs)


def test_why_consuming_makes_no_room_is_told_with_too_little_room() -> None:
    """Once for each folder of chunk files; nothing is told of files without any."""
    words = "they are on another disk"
    items = [replace(an_item(n, pieces=1 + (n == "a")), saves_nothing=words) for n in "ab"]
    none = replace(an_item("c"), saves_nothing=words)
    policy = SourcePolicy(consume=True, remote=(HUB,))
    plan = make_plan(a_state(*items, none, free_staging=36), Target.STAGED, policy)
    help_text = "free some disk, or choose another --staging"
    expected = "chunk files whose removal frees disk space"
    assert plan.findings == (
        Finding(Kind.NO_SPACE, str(PLACES.staging), "37 bytes free", "36, 1 too few", help_text),
        Finding(Kind.NOT_CONSUMABLE, "chunks", expected, words, help_text),
    )


CONSUMING = SourcePolicy(consume=True, remote=(HUB,))


@pytest.mark.parametrize(
    ("pieces", "policy", "changes", "kind", "remark"),
    [
        (2, CONSUMING, {}, Consume, ""),
        (2, replace(CONSUMING, consume=False), {}, Assemble, ""),
        (0, CONSUMING, {}, Assemble, ""),
        (
            2, CONSUMING, {"shares_blocks": True}, Assemble,
            ", sharing their blocks: there is nothing to consume",
        ),
    ],
)  # fmt: skip
def test_chunk_files_are_consumed_where_that_is_asked_for_and_makes_room(
    pieces: int, policy: SourcePolicy, changes: dict[str, bool], kind: type, remark: str
) -> None:
    """The action says why they stay."""
    plan = make_plan(a_state(an_item(pieces=pieces), **changes), Target.STAGED, policy)
    ((action,),) = (plan.having(Assemble),)
    assert (type(action), action.remark) == (kind, remark)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("shares_with_cache", [True, False])
@pytest.mark.parametrize("source", [PieceSource.CHUNK, PieceSource.CACHED, PieceSource.SHELF])
@pytest.mark.parametrize("has_chunk", [True, False])
def test_blocks_are_shared_where_all_that_is_copied_can_be(
    shares: bool, shares_with_cache: bool, source: PieceSource, has_chunk: bool
) -> None:
    """Chunk files or the cache, each with staging; not both, nor another folder of the user."""
    item = with_chunk_files(an_item(pieces=2), ABSENT, UNVERIFIED if has_chunk else ABSENT)
    if source is PieceSource.CACHED:
        item = replace(item, cached=FileStatus(CACHED, UNVERIFIED, 20))
    elif source is PieceSource.SHELF:
        item = replace(item, shelved=({n: Shelved(Path("/disk/a"), 20, n) for n in (0, 10)},))
    else:
        item = with_chunk_files(item, UNVERIFIED, UNVERIFIED)
    state = a_state(item, shares_blocks=shares, cache_shares_blocks=shares_with_cache)
    (action,) = make_plan(state, Target.STAGED).having(Assemble)
    expected = {
        PieceSource.CHUNK: shares,
        PieceSource.CACHED: shares_with_cache and not has_chunk,
        PieceSource.SHELF: False,
    }
    assert action.shares_blocks is expected[source]


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.IN_THE_WAY])
def test_a_wrong_file_is_replaced_whatever_is_wrong_with_it(kind: Kind) -> None:
    """Only what is in the way of a file, such as a folder, stops it, and is told once."""
    item = an_item(pieces=2)
    for name in ("installed", "staged"):
        file = replace(getattr(item, name), state=INVALID, finding=finding("a", kind))
        plan = make_plan(a_state(replace(item, **{name: file})), Target.BOTH)
        assert (verbs(plan), plan.notes) == ([Assemble, Move], (file.finding,))
        stuck = replace(file, finding=finding("a", Kind.IN_THE_WAY))
        plan = make_plan(a_state(replace(item, **{name: stuck})), Target.BOTH)
        assert (plan.actions, plan.findings) == ((), (stuck.finding,))


def test_what_cannot_be_continued_is_left_alone() -> None:
    """Its finding is the only one, though every piece is here."""
    stuck = finding("a.partial", Kind.STRANDED)
    plan = make_plan(a_state(replace(an_item(pieces=2), stranded=stuck)), Target.STAGED, AUTO)
    assert (plan.actions, plan.findings) == ((), (stuck,))


def test_what_a_partial_has_is_missed_piece_by_piece() -> None:
    """Where some are verified or can be salvaged, each piece that is nowhere is named."""
    item = damaged(an_item(pieces=4, part=ABSENT), 30)
    item = replace(item, journal=Journal((PieceRecord(10, 10, SHA, "x"),)))
    gone = finding("/disk", Kind.MISSING)
    others = [finding("the Hub", kind) for kind in Kind if kind is not Kind.MISSING]
    problems = (*others, gone)
    plan = make_plan(a_state(item), Target.STAGED, SourcePolicy(problems=problems))
    chunks = [item.chunks[0].finding, item.chunks[2].finding]
    assert list(plan.findings) == [gone, *chunks, item.installed.finding]
    shelves = SourcePolicy(problems=problems, shelves=True)
    helped = [replace(f, help=NEXT_SOURCE) for f in chunks if f]
    assert list(make_plan(a_state(item), Target.STAGED, shelves).findings)[:-1] == [gone, *helped]


def test_a_wrong_chunk_file_keeps_its_own_help() -> None:
    """Another disk is what helps for a chunk file that is missing, and for no other."""
    item = with_chunk_files(an_item(pieces=2), INVALID, ABSENT)
    plan = make_plan(a_state(item), Target.STAGED, SourcePolicy(shelves=True))
    assert [f.help for f in plan.findings] == ["", NEXT_SOURCE]


@pytest.mark.parametrize("shelves", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
def test_a_file_of_which_nothing_is_here_is_one_finding(shelves: bool, chunks: bool) -> None:
    """With its size, and the next disk as help where folders were named."""
    item = an_item(pieces=3, part=ABSENT)
    policy = SourcePolicy(chunks=chunks, shelves=shelves)
    plan = make_plan(a_state(item), Target.STAGED, policy)
    help_text = NEXT_SOURCE if shelves else ""
    assert plan.findings == (Finding.missing(PLACES.destination / "a", 30, help_text),)


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

"""What actions cost in bytes, and what they say of the origin of the bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.manifest.types import Edition
from csm_weights.pipeline.actions import (
    Assemble,
    Consume,
    Copy,
    Cost,
    Keep,
    Move,
    Verify,
    WriteText,
)
from csm_weights.pipeline.plan import Target, make_plan, room
from csm_weights.store.consumed import CONSUMING_ROOM
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus, Shelved
from csm_weights.store.journal import Arrival, Consumed, Journal, PieceRecord
from csm_weights.transfer import consume
from csm_weights.transfer.policy import HUB, LOCAL, SourcePolicy
from tests.pipeline.test_plan import (
    ABSENT,
    INVALID,
    SHA,
    UNVERIFIED,
    VERIFIED,
    a_state,
    an_item,
    finding,
)
from tests.pipeline.test_plan_sources import CACHED, damaged, with_chunk_files

CONSUMING = SourcePolicy(consume=True)
MIRROR = SourcePolicy(chunks=False, remote=("https://mirror.example",))
SHELVES = SourcePolicy(chunks=False, shelves=True)


def assembled(item: ArtifactState, policy: SourcePolicy = LOCAL, **changes: Any) -> Assemble:
    """The one action that stages an artifact."""
    (action,) = make_plan(a_state(item, **changes), Target.STAGED, policy).having(Assemble)
    return action


def journaled(item: ArtifactState, *records: PieceRecord | Arrival | Consumed) -> ArtifactState:
    """The item with an unfinished file of which a journal tells this."""
    kinds = (PieceRecord, Arrival, Consumed)
    pieces, arrived, consumed = (tuple(r for r in records if type(r) is kind) for kind in kinds)
    known = Journal(pieces, arrived, consumed, is_begun=True)  # type: ignore[arg-type]
    moved = {record.offset: record.consumed for record in consumed}  # type: ignore[union-attr]
    pairs = zip(item.artifact.pieces, item.chunks, strict=True)
    chunks = (replace(c, state=FileState.CONSUMED) if p.offset in moved else c for p, c in pairs)
    return replace(item, journal=known, chunks=tuple(chunks))


def kept(*offsets: int) -> list[PieceRecord]:
    return [PieceRecord(offset, 10, SHA, "x") for offset in offsets]


def moved(**sizes: int) -> list[Consumed]:
    """Bytes that have left the chunk file at `_OFFSET`."""
    return [Consumed(int(name[1:]), size, SHA) for name, size in sizes.items()]


# ---- bytes


def test_what_only_stays_or_is_renamed_costs_nothing() -> None:
    """Neither a kept file nor one that is moved on its file system is read or written."""
    item = an_item(pieces=3, staged=VERIFIED)
    assert Keep(item, item.staged).cost == Move(item, item.staged).cost == Cost(0, 0, 0, 0)


@pytest.mark.parametrize(("size", "read"), [(25, 25), (None, 30)])
def test_a_file_that_is_hashed_is_read_at_the_size_that_it_has(size: int | None, read: int) -> None:
    """One that is not there yet will have the artifact's."""
    item = an_item(pieces=3, placed=UNVERIFIED)
    action = Verify(item, replace(item.installed, size=size))
    assert action.cost == Cost(read, 0, 0, 0)


def test_a_text_is_written_and_read_nowhere() -> None:
    """Its bytes are counted, not its letters."""
    edition = Edition(5, SHA, "t\N{EM DASH}t")
    item = replace(an_item(), artifact=replace(an_item().artifact, alternatives=(edition,)))
    assert WriteText(item, item.staged).cost == Cost(0, 5, 0, 0)


def test_a_copy_goes_on_where_it_stopped() -> None:
    """What an earlier run has copied is read once more, and not written."""
    item = replace(an_item(pieces=3, staged=VERIFIED), copied=tuple(kept(0, 20)))
    assert Copy(item, item.staged).cost == Cost(30, 10, 0, 0)


ITEM = an_item(pieces=3)
GONE = an_item(pieces=3, part=ABSENT)
SHELVED = replace(
    an_item(pieces=5, part=ABSENT), shelved=({20: Shelved(Path("/disk/a-2"), 10, 0)},)
)

CACHE = replace(GONE, cached=FileStatus(CACHED, UNVERIFIED, 30))
SOME_CACHED = replace(
    GONE, cached=FileStatus(CACHED, INVALID, 30, finding(CACHED), good=frozenset({0, 10}))
)

COSTS: dict[str, tuple[ArtifactState, SourcePolicy, bool, Cost]] = {
    "chunk files": (ITEM, LOCAL, False, Cost(30, 30)),
    "shared blocks": (ITEM, LOCAL, True, Cost(30, 0)),
    "a piece is kept": (journaled(ITEM, *kept(10)), LOCAL, False, Cost(30, 20)),
    "remote": (GONE, MIRROR, False, Cost(0, 30, 30)),
    "remote, a piece is kept": (journaled(GONE, *kept(10)), MIRROR, False, Cost(10, 20, 20)),
    "remote, some has arrived": (
        journaled(GONE, Arrival(12, 5, SHA), Arrival(24, 6, SHA)), MIRROR, False, Cost(11, 19, 19)
    ),
    "chunk file, remote and kept": (
        journaled(with_chunk_files(ITEM, ABSENT, ABSENT, UNVERIFIED), *kept(0)),
        SourcePolicy(remote=(HUB,)), False, Cost(20, 20, 10)
    ),
    "one of five": (SHELVED, SHELVES, False, Cost(10, 10)),
    "one of five, another is kept": (
        replace(journaled(GONE, *kept(0)), shelved=SHELVED.shelved), SHELVES, False, Cost(20, 10)
    ),
    "consuming": (ITEM, CONSUMING, False, Cost(60, 30, 0, 30)),
    "consuming, a piece is kept": (
        journaled(ITEM, *kept(10)), CONSUMING, False, Cost(60, 20, 0, 20)
    ),
    "consuming, a kept piece has no chunk file": (
        journaled(with_chunk_files(ITEM, ABSENT, UNVERIFIED, INVALID), *kept(0, 20)),
        CONSUMING, False, Cost(40, 10, 0, 10)
    ),
    "consuming, a piece is salvaged": (
        damaged(with_chunk_files(ITEM, ABSENT, UNVERIFIED, UNVERIFIED), 0), CONSUMING, False,
        Cost(50, 30, 0, 20),
    ),
    "consuming, begun": (journaled(ITEM, *moved(_0=10, _10=4)), LOCAL, False, Cost(60, 16, 0, 16)),
    "consuming, all has moved": (
        journaled(ITEM, *moved(_0=10, _10=10, _20=10)), LOCAL, False, Cost(60, 0, 0, 0)
    ),
    "consuming, begun, shared blocks": (
        journaled(ITEM, *moved(_0=10, _10=4)), LOCAL, True, Cost(60, 0, 0, 16)
    ),
    "consuming, a begun piece is kept": (
        journaled(ITEM, *kept(0), *moved(_0=4, _10=4)), LOCAL, False, Cost(60, 16, 0, 16)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("item", "policy", "shares", "cost"), COSTS.values(), ids=COSTS)
def test_a_file_costs_what_it_takes_from_each_origin(
    item: ArtifactState, policy: SourcePolicy, shares: bool, cost: Cost
) -> None:
    """Each byte is read, or fetched; it is written unless it lies in the unfinished file."""
    assert assembled(item, policy, shares_blocks=shares).cost == cost


def test_only_chunk_files_with_nothing_wrong_are_consumed() -> None:
    """Those that are copied from go, and those of kept pieces that are whole or begun."""
    states = (ABSENT, UNVERIFIED, FileState.CONSUMED, INVALID, UNVERIFIED, INVALID)
    item = with_chunk_files(an_item(pieces=6), *states)
    action = assembled(replace(item, journal=Journal(tuple(kept(0, 10, 20, 30, 50)))), CONSUMING)
    assert isinstance(action, Consume)
    assert action.consumed == {10, 20, 40}


def test_chunk_files_whose_pieces_come_from_elsewhere_are_not_consumed() -> None:
    """A begun run that goes on without --consume, or without chunk files, leaves the others."""
    begun = journaled(with_chunk_files(ITEM, *[UNVERIFIED] * 3), *moved(_0=4))
    cached = replace(begun, cached=SOME_CACHED.cached)
    hub = SourcePolicy(chunks=False, remote=(HUB,))
    for item, policy in ((damaged(begun, 10), LOCAL), (cached, hub)):
        action = assembled(item, policy)
        assert isinstance(action, Consume)
        assert action.consumed == ({0, 20} if policy is LOCAL else {0})


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([], 0),
        ([0], CONSUMING_ROOM),
        ([5], CONSUMING_ROOM - 5),
        ([5, 7], CONSUMING_ROOM - 12),
        ([consume.STEP], CONSUMING_ROOM - consume.STEP),
        ([consume.STEP, 1], CONSUMING_ROOM - consume.STEP),
    ],
)
def test_consuming_takes_the_room_of_a_step_once(held: list[int], expected: int) -> None:
    """Less what a killed run has left twice; what other actions write comes on top."""
    files = [replace(an_item(str(n), pieces=3), held_twice=n) for n in held]
    actions = [assembled(item, CONSUMING) for item in files]
    assert room(actions) == expected
    assert room([*actions, assembled(ITEM), assembled(GONE, MIRROR)]) == expected + 60
    salvaged = damaged(with_chunk_files(ITEM, ABSENT, UNVERIFIED, UNVERIFIED), 0)
    assert room([assembled(salvaged, CONSUMING)]) == CONSUMING_ROOM + 10


def test_each_folder_takes_what_is_written_to_it() -> None:
    """Assembled files take room in staging, copies in the destination, and others none."""
    items = (an_item("a", pieces=3), an_item("b", staged=VERIFIED), an_item("c", placed=UNVERIFIED))
    plan = make_plan(a_state(*items, same_filesystem=False), Target.BOTH)
    assert {name: plan.room(name) for name in ("staging", "destination", "")} == {
        "staging": 30, "destination": 37, "": 0
    }  # fmt: skip


# ---- words

DETAILS: dict[str, tuple[ArtifactState, SourcePolicy, str]] = {
    "chunk files": (ITEM, LOCAL, "from 3 chunk files"),
    "one": (an_item(pieces=1), LOCAL, "from 1 chunk file"),
    "salvaged": (
        damaged(ITEM, 0, 20), LOCAL, "from 2 pieces of the damaged file and 1 chunk file"
    ),
    "a mirror": (GONE, MIRROR, "from https://mirror.example"),
    "the Hub": (an_item(), SourcePolicy(remote=(HUB,)), "from the Hub"),
    "some of a mirror": (
        with_chunk_files(ITEM, UNVERIFIED, ABSENT, ABSENT),
        SourcePolicy(remote=("https://a.example", "https://b.example")),
        "from 1 chunk file and https://a.example (2 pieces)",
    ),
    "kept": (
        journaled(GONE, *kept(0, 10)), MIRROR,
        "from https://mirror.example (1 piece) and 2 pieces verified in an earlier run",
    ),
    "the cache": (CACHE, LOCAL, "from the Hub's cache"),
    "some of the cache": (
        SOME_CACHED, SourcePolicy(remote=(HUB,)), "from the Hub's cache and the Hub (1 piece)"
    ),
    "a shelf": (
        SHELVED, SHELVES, "from 1 piece of other folders and 4 more that no source has yet"
    ),
    "begun": (
        journaled(ITEM, *moved(_0=10, _10=4)), LOCAL,
        "from 1 chunk file and 2 chunk files consumed in an earlier run",
    ),
    "not consumed": (
        replace(ITEM, saves_nothing="it is full"), CONSUMING,
        "from 3 chunk files, not consumed: it is full",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("item", "policy", "words"), DETAILS.values(), ids=DETAILS)
def test_the_words_tell_the_origins(item: ArtifactState, policy: SourcePolicy, words: str) -> None:
    """How many pieces come from where, and the name of the server that is asked first."""
    assert assembled(item, policy).detail == words


def test_what_is_replaced_is_told_once() -> None:
    """A wrong staged file, and wrong chunk files whose pieces come from elsewhere."""
    wrong = with_chunk_files(
        an_item(pieces=4, staged=INVALID), INVALID, ABSENT, UNVERIFIED, INVALID
    )
    item = replace(wrong, cached=replace(SOME_CACHED.cached, good=frozenset({0})))  # type: ignore[type-var]
    plan = make_plan(a_state(item), Target.BOTH, SourcePolicy(remote=(HUB,)))
    replaced = [wrong.staged, wrong.chunks[0], wrong.chunks[3]]
    assert plan.notes == tuple(file.finding for file in replaced)

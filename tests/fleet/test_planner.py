"""The planner of a fleet, driven by random fleets that die, lie and lag; a star must fail."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fleet_simulation import Fleet, simulate
from csm_weights.fleet.planner import ORIGIN, Planner, Pull, bits


@dataclass
class Rehearsal:
    """A fleet without a clock: each step asks, ends a pull in some way, or lets a node die.

    `liars` serve wrong bytes, a `blind` node finds some right bytes wrong. Node 0 is a first
    holder where `has_holder` says so, and neither dies nor lies.
    """

    seed: int
    has_holder: bool
    has_origin: bool
    faults: bool
    kind: type[Planner] = Planner
    pulls: list[Pull] = field(default_factory=list)
    given: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.nodes, self.blocks = self.random.randint(2, 9), self.random.randint(1, 40)
        self.planner = self.kind(self.blocks, self.nodes, self.has_origin, self.seed)
        self.liars: set[int] = set()
        self.blind: set[int] = set()
        self.gone: set[int] = set()
        if self.faults:
            others = range(1, self.nodes)
            self.liars = {n for n in others if self.random.random() < 0.15}
            self.blind = {n for n in [self.random.choice(others)] if self.random.random() < 0.3}
        if self.has_holder:
            self.planner.holds(0, self.planner.all)
            self.planner.offers(0, self.planner.all)

    def run(self) -> None:
        """Go on until nothing has happened for long."""
        now, quiet, deaths, recalls = 0.0, 0, 0, 0
        while quiet < 300 and not (self.planner.is_finished and not self.pulls):
            # Without faults the clock stands still, so that nothing is late.
            now, quiet = now + self.faults, quiet + 1
            chance = self.random.random()
            if chance < 0.55:
                quiet *= not self.ask(self.random.randrange(self.nodes), now)
            elif chance < 0.98 and self.pulls:
                self.end(self.pulls.pop(self.random.randrange(len(self.pulls))), now)
                quiet = 0
            elif chance < 0.985 and self.faults and deaths < self.nodes // 2:
                deaths += 1
                self.kill(self.random.randrange(1, self.nodes))
            elif chance > 0.995 and self.gone:
                node = self.random.choice(sorted(self.gone))
                self.gone.discard(node)
                self.planner.back(node)
            elif chance > 0.985 and self.faults and self.has_origin and recalls < 3:
                recalls += 1
                blocks = self.random.getrandbits(self.blocks)
                keep = self.random.getrandbits(self.nodes)
                self.planner.recall(blocks, keep)
                self.pulls = [
                    p for p in self.pulls if keep >> p.node & 1 or not blocks >> p.block & 1
                ]

    def ask(self, node: int, now: float) -> bool:
        """Let a node ask; check what it is told to do."""
        pull = self.planner.ask(node, self.random.random() < 0.5, now)
        if pull:
            assert pull.node == node
            assert pull.source != node
            assert all((p.node, p.block) != (node, pull.block) for p in self.pulls)
            if pull.source == ORIGIN:
                assert self.has_origin
            else:
                assert self.planner.serves[pull.source] >> pull.block & 1
            if pull.source == ORIGIN or (pull.source == 0 and self.has_holder):
                self.given[pull.source, pull.block] += 1
            self.pulls.append(pull)
        return pull is not None

    def end(self, pull: Pull, now: float) -> None:
        """End a pull: it breaks off where an end is gone, is wrong from a liar, or is done."""
        node, block, source = pull
        is_lost = self.faults and self.random.random() < 0.05
        if node in self.gone or source in self.gone or (is_lost and source != ORIGIN):
            self.planner.failed(node, block)
        elif source != ORIGIN and (
            source in self.liars or (node in self.blind and self.random.random() < 0.3)
        ):
            self.planner.wrong(node, block)
        else:
            self.planner.done(node, block, now)

    def kill(self, node: int) -> None:
        """Let a node vanish; its own pulls end with it."""
        self.gone.add(node)
        self.planner.dead(node)
        self.pulls = [pull for pull in self.pulls if pull.node != node]

    def assert_finished(self) -> None:
        """Check that every living node has everything."""
        lacking = {n: list(bits(self.planner.lacks[n])) for n in bits(self.planner.live)}
        assert not any(lacking.values()), (lacking, self.planner.events)


SEEDS = st.integers(0, 1 << 32)


@settings(max_examples=300, deadline=None)
@given(SEEDS, st.booleans())
def test_every_living_node_gets_everything(seed: int, has_holder: bool) -> None:
    """Whatever dies, lies or breaks off: while a first holder or the origin lives, all finish."""
    fleet = Rehearsal(seed, has_holder, not has_holder, faults=True)
    fleet.run()
    fleet.assert_finished()


def assert_given_once(seed: int, kind: type[Planner]) -> None:
    """Check that the first holder, or the origin, gives each block to one living receiver."""
    for has_holder in (True, False):
        fleet = Rehearsal(seed, has_holder, not has_holder, faults=False, kind=kind)
        fleet.run()
        fleet.assert_finished()
        assert max(fleet.given.values()) == 1


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_the_first_holder_and_the_origin_give_each_block_once(seed: int) -> None:
    """As long as no receiver dies, no block leaves a first holder or the origin twice."""
    assert_given_once(seed, Planner)


def assert_fast_and_even(kind: type[Planner]) -> None:
    """Check the time of eight equal nodes, and that none sends much more than its share."""
    result = simulate(Fleet(nodes=8, blocks=128), kind)
    assert result.last <= 1.15
    assert result.sent[0] <= 1.05
    uploads = [result.sent[node] for node in range(1, 9)]
    assert max(uploads) <= 1.5 * sum(uploads) / 8


def test_eight_nodes_take_hardly_longer_than_one_and_share_the_load() -> None:
    """In the simulator, eight nodes take 1.15 times one copy; no node sends half as much again."""
    assert_fast_and_even(Planner)


class Star(Planner):
    """A planner that sends every block of every node from where it was first."""

    def _ask_peer(self, *_: object) -> Pull | None:
        return None

    def ask(self, node: int, first: bool, now: float) -> Pull | None:
        self._first = self.all
        return super().ask(node, first or True, now)


@pytest.mark.parametrize("check", [lambda k: assert_given_once(1, k), assert_fast_and_even])
def test_a_star_fails_these_tests(check) -> None:  # type: ignore[no-untyped-def]
    """The same assertions refuse a planner that sends everything from the first holder."""
    with pytest.raises(AssertionError):
        check(Star)


def assert_slow_nodes_delay_only_themselves(kind: type[Planner]) -> None:
    """Check the others' times, the slow nodes' own, and what these were given and asked for."""
    for nodes, slow in ((4, {1: 0.25}), (8, {1: 0.25}), (8, {1: 0.1, 2: 0.1})):
        for seed in range(6):
            result = simulate(Fleet(nodes, blocks=256, slow=slow, seed=seed), kind)
            finished = result.finished
            assert max(finished[n] for n in finished if n not in slow) <= 1.25
            assert max(finished[n] * slow[n] for n in slow) <= 1.1
            for node in slow:
                assert result.firsts[node] <= 0.5 * sum(result.firsts.values()) / nodes
                assert result.sent[node] <= 0.1


def test_slow_nodes_delay_themselves_only() -> None:
    """One at a quarter, or two at a tenth of the rate: the others hardly wait."""
    assert_slow_nodes_delay_only_themselves(Planner)


class NoneSlow(Planner):
    """A planner that takes no node for slow."""

    def _learn(self, *pulled: Any) -> None:
        super()._learn(*pulled)
        self.slow = 0


class NoneAhead(Planner):
    """A planner that gives a first copy to whichever node asks next."""

    def _is_ahead(self, *_: int) -> bool:
        return False


@pytest.mark.parametrize("kind", [NoneSlow, NoneAhead, Star])
def test_planners_that_slow_nodes_hold_up_fail_this_test(kind: type[Planner]) -> None:
    """The same assertions refuse planners without one of the two rules, and a star."""
    with pytest.raises(AssertionError):
        assert_slow_nodes_delay_only_themselves(kind)


def test_a_node_that_dies_delays_the_others_little() -> None:
    """What a dead node held alone is given out again."""
    result = simulate(Fleet(nodes=8, blocks=128, dies={1: 0.5}))
    assert sorted(result.finished) == list(range(2, 9))
    assert result.last <= 1.25


def test_the_origin_gives_only_what_no_survivor_has() -> None:
    """After the first holder died at half time, the origin sends the other half and no more."""
    fleet = Fleet(nodes=8, blocks=128, dies={0: 0.5}, origin=0.25)
    result = simulate(fleet)
    assert sorted(result.finished) == list(range(1, 9))
    assert result.sent[0] + result.sent[ORIGIN] <= 1.05


def test_a_node_that_serves_garbage_is_shut_out() -> None:
    """It serves two wrong blocks, and the others hardly wait."""
    result = simulate(Fleet(nodes=8, blocks=128, garbage={1}))
    assert result.wrong <= 4
    assert result.last <= 1.25
    assert any("node 1 serves no more: served wrong bytes" in event for event in result.events)


def test_a_node_that_accuses_two_servers_is_given_up() -> None:
    """The servers that it alone accused serve again."""
    planner = Planner(4, 3, has_origin=False)
    for node, blocks in ((0, 0b0011), (1, 0b1100)):
        planner.holds(node, blocks)
        planner.offers(node, blocks)
    while planner.live == 0b111:
        pull = planner.ask(2, False, 0.0)
        assert pull
        planner.wrong(*pull[:2])
    assert planner.live == planner.servers == 0b011


def test_recalled_blocks_are_pulled_anew() -> None:
    """Blocks whose digests were wrong are lacked again by all but those who keep them."""
    planner = Planner(2, 3, has_origin=True)
    for block in (0, 1):
        pull = planner.ask(0, True, 0.0)
        assert pull == (0, block, ORIGIN)
        planner.done(0, block, 1.0)
    planner.recall(0b01)
    assert planner.lacks == [0b01, 0b11, 0b11]
    assert planner.ask(1, False, 2.0) == (1, 1, 0)
    assert planner.ask(2, True, 2.0) == (2, 0, ORIGIN)


def test_nobody_fetches_what_a_node_is_about_to_serve() -> None:
    """A promised block is not asked of the origin; once the promise ends it is."""
    planner = Planner(1, 2, has_origin=True)
    planner.promise(0, 0b1)
    assert planner.ask(1, True, 0.0) is None
    planner.promise(0, 0)
    assert planner.ask(1, True, 0.0) == (1, 0, ORIGIN)


def test_few_nodes_ask_the_origin() -> None:
    """Of 20 nodes eight fetch; where one is refused another takes its place."""
    planner = Planner(100, 20, has_origin=True)
    pulls = [planner.ask(node, True, 0.0) for node in range(20)]
    assert [pull is not None for pull in pulls] == [True] * 8 + [False] * 12
    planner.failed(0, 0)
    planner.cannot_fetch(0)
    assert planner.ask(0, True, 0.0) is None
    assert planner.ask(19, True, 0.0)

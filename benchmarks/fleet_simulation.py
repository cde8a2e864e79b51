"""Simulate a fleet with the planner's own class: `python -m benchmarks.fleet_simulation`.

Links are fluid and full duplex; the unit of time is one copy of everything over one link. A
transfer runs at the lesser of its shares of the sender's and the receiver's link, as TCP would
settle it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from csm_weights.fleet.planner import ORIGIN, Planner, Pull

#: Time between a death and the failure of what is pulled from the dead node; and between two
#: looks whether a node that waits can get something.
NOTICED = 0.05
LOOK = 0.02

#: A transfer's size varies by this share, as rates do.
JITTER = 0.2

#: Nodes that wait and are asked again after each event: as in the coordinator.
WOKEN = 6


@dataclass(frozen=True)
class Fleet:
    """What is simulated: receivers 1 to `nodes`, and node 0, which has everything.

    `slow` are rates of nodes, `dies` the share of everything that node 0 has sent, or for
    others the time, when they die. `origin` is the rate of the origin, 0 for none.
    """

    nodes: int
    blocks: int
    slow: Mapping[int, float] = field(default_factory=dict)
    dies: Mapping[int, float] = field(default_factory=dict)
    garbage: Set[int] = frozenset()
    origin: float = 0.0
    seed: int = 0


@dataclass
class Result:
    """Times at which nodes were complete, copies that each source sent, and what went wrong."""

    finished: dict[int, float] = field(default_factory=dict)
    sent: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    firsts: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    pulls: int = 0
    planning: float = 0.0
    events: list[str] = field(default_factory=list)

    @property
    def last(self) -> float:
        """The time at which the last node was complete."""
        return max(self.finished.values())


@dataclass(eq=False)
class Transfer:
    """A pull on its way: what is left of it at `since`, at a rate."""

    pull: Pull
    is_first_slot: bool
    left: float
    since: float
    rate: float = 0.0
    version: int = 0


class Simulation:
    """One run."""

    def __init__(self, fleet: Fleet, kind: type[Planner] = Planner) -> None:
        self.fleet, self.now, self.result = fleet, 0.0, Result()
        self.planner = kind(fleet.blocks, fleet.nodes + 1, fleet.origin > 0, fleet.seed)
        self.planner.holds(0, self.planner.all)
        self.planner.offers(0, self.planner.all)
        self.random = random.Random(fleet.seed + 1)
        self.rates = dict.fromkeys(range(fleet.nodes + 1), 1.0) | dict(fleet.slow)
        self.rates[ORIGIN] = fleet.origin
        self.sending: dict[int, dict[Transfer, None]] = defaultdict(dict)
        self.getting: dict[int, dict[Transfer, None]] = defaultdict(dict)
        self.waiting: dict[tuple[int, bool], None] = {}
        self.dead: set[int] = set()
        self.order = itertools.count()
        self.events: list[tuple[float, int, object]] = []

    def at(self, time: float, what: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), what))

    def run(self) -> Result:
        for node, time_of_death in self.fleet.dies.items():
            if node:
                self.at(time_of_death, ("die", node))
        self.at(0.0, "look")
        for node in range(1, self.fleet.nodes + 1):
            for slot in (True, False):
                self.give(node, slot)
        while self.events and not self.planner.is_finished and self.now < 60:
            self.now, _, what = heapq.heappop(self.events)
            if what == "look":
                self.wake(40)
                self.at(self.now + LOOK, "look")
            elif isinstance(what, tuple) and isinstance(what[0], Transfer):
                if what[0].version == what[1]:
                    self.arrive(what[0])
            elif isinstance(what, tuple):
                getattr(self, what[0])(what[1])
        self.result.events = self.planner.events
        return self.result

    def give(self, node: int, slot: bool) -> bool:
        """Ask for a node's slot; return whether it got something to do."""
        started = time.perf_counter()
        pull = self.planner.ask(node, slot, self.now)
        self.result.planning += time.perf_counter() - started
        if pull is None:
            self.waiting[node, slot] = None
            return False
        self.waiting.pop((node, slot), None)
        self.result.pulls += 1
        size = self.random.uniform(1 - JITTER, 1 + JITTER) / self.fleet.blocks
        transfer = Transfer(pull, slot, size, self.now)
        self.sending[pull.source][transfer] = self.getting[node][transfer] = None
        self.share(pull.source, node)
        return True

    def wake(self, misses: int = WOKEN) -> None:
        for node, slot in list(self.waiting):
            del self.waiting[node, slot]
            if node in self.dead or self.planner.is_complete(node):
                continue
            if not self.give(node, slot):
                misses -= 1
                if misses <= 0:
                    return

    def share(self, source: int, node: int) -> None:
        """Settle the rates anew of whatever shares a link with a transfer that began or ended."""
        for sender in {source, *(t.pull.source for t in self.getting[node])}:
            left, flows = 0.0 if sender in self.dead else self.rates[sender], []
            for transfer in self.sending[sender]:
                to = transfer.pull.node
                alive = 0.0 if to in self.dead else self.rates[to]
                flows.append((alive / len(self.getting[to]), id(transfer), transfer))
            for index, (most, _, transfer) in enumerate(sorted(flows)):
                rate = min(most, left / (len(flows) - index))
                left -= rate
                if rate == transfer.rate:
                    continue
                transfer.left -= transfer.rate * (self.now - transfer.since)
                transfer.since, transfer.rate = self.now, rate
                transfer.version += 1
                if rate:
                    end = self.now + max(0.0, transfer.left) / rate
                    self.at(end, (transfer, transfer.version))

    def drop(self, transfer: Transfer) -> Pull:
        transfer.version += 1
        del self.sending[transfer.pull.source][transfer]
        del self.getting[transfer.pull.node][transfer]
        self.share(transfer.pull.source, transfer.pull.node)
        return transfer.pull

    def arrive(self, transfer: Transfer) -> None:
        node, block, source = self.drop(transfer)
        self.result.sent[source] += 1 / self.fleet.blocks
        started = time.perf_counter()
        if source in self.fleet.garbage:
            self.planner.wrong(node, block)
            self.result.wrong += 1
        else:
            self.planner.done(node, block, self.now)
            self.result.firsts[node] += source in (0, ORIGIN)
        self.result.planning += time.perf_counter() - started
        if self.planner.is_complete(node):
            self.result.finished.setdefault(node, self.now)
        share = self.fleet.dies.get(0)
        if share and 0 not in self.dead and self.result.sent[0] >= share:
            self.die(0)
        self.give(node, transfer.is_first_slot)
        self.wake()

    def die(self, node: int) -> None:
        self.dead.add(node)
        for other in [*self.sending, *self.getting]:
            self.share(other, other)
        self.at(self.now + NOTICED, ("notice", node))

    def notice(self, node: int) -> None:
        for transfer in [*self.sending[node], *self.getting[node]]:
            pull = self.drop(transfer)
            self.planner.failed(pull.node, pull.block)
            self.waiting[pull.node, transfer.is_first_slot] = None
        self.planner.dead(node)
        self.wake(len(self.waiting) + 1)


def simulate(fleet: Fleet, kind: type[Planner] = Planner) -> Result:
    """Return what becomes of a fleet."""
    return Simulation(fleet, kind).run()


def main() -> None:
    """Print a table of fleets of these sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int, nargs="*", default=[4, 8, 64, 512, 1000])
    for nodes in parser.parse_args().nodes:
        blocks = max(256, nodes * 3 // 2)
        cases: dict[str, Fleet] = {
            "all well": Fleet(nodes, blocks),
            "one at a quarter": Fleet(nodes, blocks, slow={1: 0.25}),
            "two at a tenth": Fleet(nodes, blocks, slow={1: 0.1, 2: 0.1}),
            "one dies": Fleet(nodes, blocks, dies={1: 0.5}),
            "one serves garbage": Fleet(nodes, blocks, garbage={1}),
        }
        for name, fleet in cases.items() if nodes < 100 else list(cases.items())[:1]:
            started = time.perf_counter()
            result = simulate(fleet)
            others = max(t for n, t in result.finished.items() if n not in fleet.slow)
            print(
                f"{nodes:5} nodes, {blocks} blocks, {name:18}: {len(result.finished)} complete,"
                f" {others:.3f} (last {result.last:.3f}), first holder {result.sent[0]:.2f} copies,"
                f" {result.planning / result.pulls * 1e6:.0f} us a pull,"
                f" {time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

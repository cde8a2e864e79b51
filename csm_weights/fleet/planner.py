"""Decide which node gets which block from whom: coordinated dynamic scatter.

Pure: no clock, no network, no threads. The coordinator of a real fleet, the simulator and the
tests drive this one class.

- A node that came with everything (a first holder) and the origin (Hub, mirror) give each block
  to one node only, whichever asks next; a first holder not while another node that was given fewer
  has nothing to do. So slow nodes get few of these first copies, and keep no uploads from others.
- A node that verified a block serves it. The others pull the rarest block that they lack, from
  the least busy holder that is not slow.
- A block whose only holder died or serves wrong bytes is given out again; from the origin, only
  where no living node holds it.

Blocks and nodes are numbers. Sets of them are ints used as bit masks, so that a decision takes
microseconds.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

#: The source of a pull that is no node: what the ordinary single-machine code fetches from.
ORIGIN = -1

#: Blocks that a node sends at a time: with 1 or 3 a simulated fleet takes clearly longer.
UPLOADS = 2

#: Nodes that fetch from the origin, so that it sees few addresses and requests.
FETCHERS = 8

#: A server is slow below this share of the median rate; a first copy is late after so many
#: times the median time.
SLOW = 0.5
LATE = 2.0

#: Fewer servers than this are first asked together what they have.
FEW = 64

#: Wrong blocks after which a server serves no more.
ACCUSATIONS = 2

#: Failed pulls in a row, from two receivers or in all, after which a server counts as gone.
STRIKES = 8

#: Nodes whose fetching failed after which the origin is not asked any more.
REFUSALS = 3


class Pull(NamedTuple):
    """One block on its way to a node, from a node or from `ORIGIN`."""

    node: int
    block: int
    source: int


def bits(mask: int) -> Iterator[int]:
    """Yield the members of a set, in order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Planner:
    """The state of a fleet: who lacks, has, gets and serves which block.

    `has_origin` says that blocks which no node has can be fetched. `seed` decides what is drawn.
    `events` are lines for the report: which node was shut out, and why. No first copy is late
    before `least_late` seconds.
    """

    def __init__(
        self, blocks: int, nodes: int, has_origin: bool, seed: int = 0, least_late: float = 0.0
    ) -> None:
        self._least_late = least_late
        self.all = (1 << blocks) - 1
        self.blocks = blocks
        self.live = self.servers = self.free = self.idle = (1 << nodes) - 1
        self.lacks = [self.all] * nodes
        self.serves = [0] * nodes  # blocks that a node may be asked for, once it is a server
        self.seeds = self.slow = 0  # nodes that came with everything; clearly slower servers
        self.promises: dict[int, int] = {}  # node -> blocks that it is about to serve
        self.events: list[str] = []
        self.pulls: dict[tuple[int, int], tuple[int, float]] = {}  # -> source, start
        self.load = Counter[int]()  # pulls that a source serves now
        self.fetchers, self.may_fetch = 0, self.live if has_origin else 0
        self._refused = 0
        self._random = random.Random(seed)
        self._first = self.all  # blocks without a holder among the receivers, and not on their way
        self._firsts: dict[tuple[int, int], tuple[int, float]] = {}  # pulls of first copies
        self._first_seconds: dict[bool, deque[float]] = defaultdict(lambda: deque(maxlen=15))
        self._coming = [0] * nodes
        self._resting = 0  # nodes that asked in vain and get nothing
        self._given = [0] * nodes  # first copies that a node was given
        self._holders = [0] * blocks  # receivers that serve a block
        self._copies = [0] * blocks  # copies of a block that receivers have or get
        self._level: dict[int, int] = {0: self.all}  # number of copies -> blocks
        self._rates: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=6))
        self._accusers: dict[int, list[int]] = defaultdict(list)
        self._strikes: dict[int, list[int]] = defaultdict(list)

    # ---- questions

    def is_complete(self, node: int) -> bool:
        """Return whether a node lacks nothing."""
        return not self.lacks[node]

    @property
    def is_finished(self) -> bool:
        """True once no living node lacks anything."""
        return not any(self.lacks[node] for node in bits(self.live))

    @property
    def _offered(self) -> int:
        """The blocks that first holders serve, or that any node is about to."""
        found = self._served_by(self.seeds & self.servers)
        for promised in self.promises.values():
            found |= promised
        return found

    def ask(self, node: int, first: bool, now: float) -> Pull | None:
        """Return the next pull of a node, begun at second `now`, or None.

        With `first` it may be a first copy, else one from another receiver; a receiver that is
        alone takes first copies only.
        """
        lack = self.lacks[node] & ~self._coming[node]
        if not lack or not self.live >> node & 1:
            return None
        others = self.servers & ~self.seeds & ~(1 << node)
        pull = self._ask_first(node, lack, others, now) if first or not others else None
        pull = pull or self._ask_peer(node, lack, others, now)
        if not pull and not self._coming[node]:
            self._resting |= 1 << node
        return pull

    # ---- choosing

    def _ask_first(self, node: int, lack: int, others: int, now: float) -> Pull | None:
        # A late first copy, of a slow or stuck receiver, does not keep its source busy.
        active, late = Counter[int](), set[tuple[int, int]]()
        for key, (source, start) in self._firsts.items():
            usual = self._first_seconds[source == ORIGIN]
            is_late = len(usual) > 0 and now - start > max(LATE * median(usual), self._least_late)
            active[source] += not is_late
            late |= {key} if is_late else set()
        free = [
            source
            for source in bits(self.seeds & self.servers & ~(1 << node))
            if active[source] < UPLOADS and self.load[source] < 3 * UPLOADS
        ]
        # One that may not serve could not pass a first copy on, so others take it if they can.
        can_pass_on, can_fetch = self.servers >> node & 1, self._can_fetch(node)
        if not can_pass_on:
            free = [] if others else free
            can_fetch = can_fetch and not others & self.may_fetch
        todo = self._first & lack
        if free and todo and self._is_ahead(node, todo, others):
            free = []
        for source in sorted(free, key=active.__getitem__):
            if blocks := todo & self.serves[source]:
                return self._start(node, blocks, source, now)
        if can_fetch and (blocks := todo & ~self._offered):
            self.fetchers |= 1 << node
            return self._start(node, blocks, ORIGIN, now)
        if not self._first:
            # Nothing else is left: what is late goes to somebody else as well.
            for other, block in late:
                source = self._firsts[other, block][0]
                is_able = can_fetch if source == ORIGIN else source in free
                if is_able and lack >> block & 1 and self._copies[block] == 1:
                    return self._start(node, 1 << block, source, now)
        return None

    def _is_ahead(self, node: int, todo: int, others: int) -> bool:
        """Return whether another node that was given fewer first copies has nothing to do.

        Without this, as many slow nodes as a first holder has uploads would get all of them.
        """
        waiting = (n for n in bits(self._resting & others) if self._given[n] < self._given[node])
        return any(self.lacks[n] & todo for n in waiting)

    def _can_fetch(self, node: int) -> bool:
        is_member = self.fetchers >> node & 1 or self.fetchers.bit_count() < FETCHERS
        return bool(is_member and self.may_fetch >> node & 1)

    def _ask_peer(self, node: int, lack: int, others: int, now: float) -> Pull | None:
        if self.slow >> node & 1 and self._coming[node]:
            return None  # two pulls would keep all uploads of one server busy
        free = self.free & others
        found = self._rarest(lack, free & ~self.slow) if free else None
        if free & self.slow and not found:
            # One pull at a time from a slow node: of what nobody else has or gets; or, where there
            # is nothing else to do, of what only slow nodes have.
            slow = free & self.slow & self.idle
            found = self._rarest(lack & self._level.get(1, 0), slow)
            if not found and not self._coming[node]:
                found = self._rarest(lack & ~self._served_by(others & ~self.slow), slow)
        if not found:
            return None
        block, holders = found
        return self._start(node, 1 << block, self._draw(holders & self.idle or holders), now)

    def _rarest(self, blocks: int, nodes: int) -> tuple[int, int] | None:
        """Return the block of which there are the fewest copies, and who of `nodes` serve it."""
        if nodes.bit_count() < FEW:
            blocks &= self._served_by(nodes)
        for copies in sorted(self._level) if blocks else ():
            # From a random start, so that not all nodes want the same one.
            group, shift = self._level[copies] & blocks, self._random.randrange(self.blocks)
            for part in (group >> shift << shift, group & ((1 << shift) - 1)):
                for block in bits(part):
                    if holders := self._holders[block] & nodes:
                        return block, holders
        return None

    def _served_by(self, nodes: int) -> int:
        """Return the blocks that any of these nodes serves."""
        found = 0
        for node in bits(nodes):
            found |= self.serves[node]
        return found

    def _draw(self, nodes: int) -> int:
        chosen = self._random.randrange(nodes.bit_count())
        return next(node for i, node in enumerate(bits(nodes)) if i == chosen)

    # ---- bookkeeping

    def _start(self, node: int, blocks: int, source: int, now: float) -> Pull:
        block = (blocks & -blocks).bit_length() - 1
        self.pulls[node, block] = source, now
        self._coming[node] |= 1 << block
        self._resting &= ~(1 << node)
        self._count(block, +1)
        self._busy(source, +1)
        if source == ORIGIN or self.seeds >> source & 1:
            self._first &= ~(1 << block)
            self._firsts[node, block] = source, now
            self._given[node] += 1
        return Pull(node, block, source)

    def _end(self, node: int, block: int) -> tuple[int, float]:
        source, start = self.pulls.pop((node, block))
        self._firsts.pop((node, block), None)
        self._coming[node] &= ~(1 << block)
        self._count(block, -1)
        self._busy(source, -1)
        return source, start

    def _busy(self, source: int, by: int) -> None:
        self.load[source] += by
        if source != ORIGIN:
            one, load = 1 << source, self.load[source]
            self.free = self.free | one if load < UPLOADS else self.free & ~one
            self.idle = self.idle & ~one if load else self.idle | one

    def _count(self, block: int, by: int) -> None:
        one, copies = 1 << block, self._copies[block]
        self._level[copies] &= ~one
        if not self._level[copies]:
            del self._level[copies]
        self._copies[block] = copies + by
        self._level[copies + by] = self._level.get(copies + by, 0) | one

    def _give_again(self, block: int) -> None:
        """Let a block that no receiver serves, and none gets as a first copy, be given anew."""
        is_held = self._holders[block] & self.servers
        if not is_held and not any(b == block for _, b in self._firsts):
            self._first |= 1 << block

    # ---- what a node has

    def holds(self, node: int, blocks: int) -> None:
        """Count verified blocks that a node came with; with all at once it is a first holder."""
        blocks &= self.lacks[node] & ~self._coming[node]
        if blocks == self.all:
            self.seeds |= 1 << node
        else:
            for block in bits(blocks):
                self._count(block, +1)
        self.lacks[node] &= ~blocks

    def promise(self, node: int, blocks: int) -> None:
        """Note which blocks a node is about to serve: nobody fetches them meanwhile; 0 ends it."""
        self.promises[node] = blocks
        if not blocks or (node >= 0 and not self.servers >> node & 1):
            del self.promises[node]

    def offers(self, node: int, blocks: int) -> None:
        """Let a node that holds these blocks serve them."""
        self.serves[node] |= blocks & ~self.lacks[node]
        if self.servers >> node & 1:
            self._serve(node)

    def _serve(self, node: int) -> None:
        if not self.seeds >> node & 1:
            for block in bits(self.serves[node]):
                self._holders[block] |= 1 << node
            self._first &= ~self.serves[node]

    def recall(self, blocks: int, keep: int = 0) -> None:
        """Take back blocks whose digests were wrong, of all nodes but those in `keep`."""
        for node, block in list(self.pulls):
            if blocks >> block & 1 and not keep >> node & 1:
                self._end(node, block)
        for node in range(len(self.lacks)):
            if keep >> node & 1:
                continue
            had = blocks & ~self.lacks[node]
            is_seed = self.seeds >> node & 1
            for block in bits(had):
                self._holders[block] &= ~(1 << node)
                if not is_seed and self.live >> node & 1:
                    self._count(block, -1)
            self.serves[node] &= ~blocks
            if not is_seed:
                self.lacks[node] |= blocks
        for block in bits(blocks):
            self._give_again(block)

    # ---- what happened

    def done(self, node: int, block: int, now: float) -> None:
        """Note that a node has a block, with the right digest, and can serve it."""
        if (node, block) not in self.pulls:
            return  # late news of a node that was given up, or of a block that was recalled
        source, start = self._end(node, block)
        self._strikes.pop(source, None)
        self.lacks[node] &= ~(1 << block)
        self._count(block, +1)
        self.serves[node] |= 1 << block
        if self.servers >> node & 1:
            self._holders[block] |= 1 << node
        self._give_again(block)  # where this node may not serve it
        self._learn(node, source, now - start)

    def _learn(self, node: int, source: int, seconds: float) -> None:
        if source == ORIGIN or self.seeds >> source & 1:
            # Each kind has its own usual time, else all would soon be late, or nothing ever.
            self._first_seconds[source == ORIGIN].append(seconds)
            return
        # A slow receiver does not make its servers look slow: its pulls tell nothing, and a server
        # counts by its best.
        if self.slow >> node & 1:
            return
        self._rates[source].append(1 / max(seconds, 1e-9))
        known = {s: max(rates) for s, rates in self._rates.items() if len(rates) > 1}
        if source in known and len(known) > 2:
            is_slow = known[source] < SLOW * median(known.values())
            self.slow = self.slow | 1 << source if is_slow else self.slow & ~(1 << source)

    def failed(self, node: int, block: int) -> None:
        """Note that a pull broke off: the server could not be reached, or sent too little."""
        if (node, block) not in self.pulls:
            return
        source, _ = self._end(node, block)
        self._give_again(block)
        if source == ORIGIN:
            return
        self._strikes[source].append(node)
        strikes = self._strikes[source]
        is_gone = len(strikes) >= STRIKES or len(set(strikes)) > 1
        if is_gone and not self._is_last(source):
            self._shut_out(source, "cannot be reached by others")

    def _is_last(self, source: int) -> bool:
        """Return whether a source is the only first holder, and there is no origin."""
        return self.seeds & self.servers == 1 << source and not self.may_fetch

    def cannot_fetch(self, node: int) -> None:
        """Note that a node's fetching from the origin failed, after the retries that it has."""
        self.may_fetch &= ~(1 << node)
        self.fetchers &= ~(1 << node)
        self._refused += 1
        if self._refused >= REFUSALS:
            self.may_fetch = 0

    def wrong(self, node: int, block: int) -> None:
        """Note that a block arrived with a wrong digest.

        Its server is shut out after `ACCUSATIONS`. A node that alone accuses two servers, or
        again and again the only first holder, is the suspect: it is given up, and they serve.
        """
        if (node, block) not in self.pulls:
            return
        source, _ = self._end(node, block)
        self._give_again(block)
        accusers, is_last = self._accusers[source], self._is_last(source)
        accusers.append(node)
        mine = [s for s, nodes in self._accusers.items() if set(nodes) == {node}]
        if len(mine) > 1 or (mine and is_last and len(accusers) > ACCUSATIONS):
            names = " and ".join(map(str, mine))
            self.events.append(f"node {node} given up: it finds wrong bytes at nodes {names}")
            for server in mine:
                del self._accusers[server]
                self._serve_again(server)
            self.dead(node)
        elif len(set(accusers) if is_last else accusers) >= ACCUSATIONS:
            self._shut_out(source, "served wrong bytes")

    def blame(self, node: int, why: str) -> None:
        """Shut a node out as a server for good."""
        self._accusers[node] += [node] * ACCUSATIONS
        self.events.append(f"node {node} serves no more: {why}")
        self._stop_serving(node)

    def _shut_out(self, node: int, why: str) -> None:
        if self.servers >> node & 1:
            self.events.append(f"node {node} serves no more: {why}")
            self._stop_serving(node)

    def _stop_serving(self, node: int) -> None:
        self.servers &= ~(1 << node)
        self.promises.pop(node, None)
        for block in bits(self.serves[node]):
            self._holders[block] &= ~(1 << node)
            self._give_again(block)

    def _serve_again(self, node: int) -> None:
        if self.live >> node & 1 and not self.servers >> node & 1:
            self.servers |= 1 << node
            self._serve(node)

    def dead(self, node: int) -> None:
        """Note that a node is gone. Pulls from it end when those who pull report them failed."""
        if not self.live >> node & 1:
            return
        self.live &= ~(1 << node)
        self.fetchers &= ~(1 << node)
        self._stop_serving(node)
        for other, block in [key for key in self.pulls if key[0] == node]:
            self._end(other, block)
            self._give_again(block)
        if not self.seeds >> node & 1:
            for block in bits(self.all & ~self.lacks[node]):
                self._count(block, -1)

    def back(self, node: int) -> None:
        """Take a node in again that was only slow to answer, with all that it has."""
        if self.live >> node & 1:
            return
        self.live |= 1 << node
        if not self.seeds >> node & 1:
            for block in bits(self.all & ~self.lacks[node]):
                self._count(block, +1)
        if len(self._accusers.get(node, ())) < ACCUSATIONS:
            self._serve_again(node)

"""The coordinator: it knows every node's state, and tells each what to do next.

It is an actor of Ray, or just an object of one event loop: Ray is not imported here. A block has
a digest that the node which verified its piece has given, or, where nobody has the piece yet,
the node that fetched the block. Digests of the second kind are bound once a node has put the
piece together and found it right; where it is wrong, its blocks are recalled, and one node
fetches the whole piece as one machine does.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from csm_weights.errors import Finding, Kind
from csm_weights.fleet.job import Act, Answer, Hello, Job, Result, Task
from csm_weights.fleet.planner import ORIGIN, Planner, Pull, bits

#: Seconds: without a sign of life a node is lost; an unanswered question is asked again, also of
#: a node that is complete; nodes that come this late are not waited for; between two looks.
SILENCE = 10.0
ASK_AGAIN = 2.0
ASK_COMPLETE = 10.0
GRACE = 15.0
LOOK = 0.25

#: Seconds before which no first copy is late, however short the others took.
LATE = 3.0

#: Nodes that wait and are asked again after each answer.
WOKEN = 8

#: The planner's key for promises that nobody can keep.
NOBODY = -2

Slot = tuple[int, bool]


@dataclass(frozen=True)
class State:
    """What the driver shows: how many nodes are done, blocks they have, and what happened."""

    installed: int
    given_up: tuple[int, ...]
    have: tuple[int, ...]
    events: tuple[str, ...]
    is_over: bool


@dataclass
class Digests:
    """The digests of a piece's blocks by number, each with its giver.

    `lister` verified the whole piece; `is_bound` says that another node found it right by them.
    """

    of: dict[int, tuple[str, int]] = field(default_factory=dict)
    lister: int | None = None
    is_bound: bool = False


class Coordinator:
    """One job's coordinator; all its methods run in one event loop."""

    def __init__(self, job: Job) -> None:
        self.layout, count = job.layout, job.nodes
        has_origin, size = bool(job.remote) or job.is_shared, len(self.layout.blocks)
        self.planner = Planner(size, count, has_origin, least_late=LATE)
        self.events = self.planner.events
        self.credentials: dict[str, str] = {}
        self._hello: dict[int, Hello] = {}
        self._verified: list[set[int]] = [set() for _ in range(count)]
        self._digests = [Digests() for _ in self.layout.pieces]
        self._orders: dict[int, dict[int, Act]] = defaultdict(dict)  # node -> piece -> what to do
        self._busy: set[tuple[int, int]] = set()  # a node and the piece that it hashes or fetches
        self._doubted: dict[int, dict[int, tuple[str, int]]] = {}  # piece -> recalled digests
        self._rounds = [0 for _ in self.layout.pieces]  # how often its digests were recalled
        self._retried: set[tuple[int, int]] = set()  # a node and a piece that was wrong there once
        self._disproved: set[tuple[int, int]] = set()  # a node and a piece that it listed wrongly
        self._hopeless: set[int] = set()  # pieces of which no source has the right bytes
        self._trusted: set[int] = set()  # nodes that fetch
        self._waiting: dict[Slot, asyncio.Future[Task]] = {}
        self._seen: dict[int, float] = {}
        self._silent: set[int] = set()
        self._left: dict[int, tuple[Finding, ...]] = {}
        self._told: set[int] = set()
        self._installed: set[int] = set()
        self._origin_findings: dict[Finding, None] = {}
        self._opens_at = float("inf")
        self._is_open = self._is_over = False
        self._watcher: asyncio.Task[None] | None = None

    # ---- what nodes and the driver call

    async def trust(self, credentials: Mapping[str, str]) -> None:
        """Take the variables with secrets that nodes need to fetch."""
        self.credentials = dict(credentials)

    async def give_credentials(self, node: int) -> dict[str, str]:
        """Return the variables with secrets to a node that fetches; nothing to any other."""
        return self.credentials if node in self._trusted else {}

    async def join(self, node: int, hello: Hello) -> None:
        """Take in a node with what it has."""
        now = self._see(node)
        self._watcher = self._watcher or asyncio.ensure_future(self._watch())
        self._opens_at = min(self._opens_at, now + GRACE)
        self._hello[node], masks = hello, self.layout.masks
        self._is_open |= self._are_all_here
        self._verified[node] = {*hello.verified, *hello.spared}
        self.planner.holds(node, sum(masks[piece] for piece in self._verified[node]))
        for number, digest in hello.arrived:
            table = self._digests[self.layout.blocks[number].piece]
            if table.lister is None:
                table.of.setdefault(number, (digest, node))
        self._count_arrived(node)
        for piece in self._verified[node] - {*hello.spared}:
            if self._digests[piece].lister is not None:
                self.planner.offers(node, masks[piece])
        self._elect()
        self._wake(now)

    async def next(self, node: int, is_first: bool, answer: Answer | None = None) -> Task:
        """Take the answer to the last task, and return the next one as soon as there is one."""
        now = self._see(node)
        if answer:
            self._take(node, answer, now)
        task = self._task(node, is_first, now)
        if answer:
            self._wake(now)
        if task:
            return task
        future = self._waiting[node, is_first] = asyncio.get_running_loop().create_future()
        seconds = ASK_COMPLETE if node in self._told else ASK_AGAIN
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return Task(Act.WAIT)

    async def beat(self, node: int) -> None:
        """Note a sign of life."""
        self._see(node)

    async def installed(self, node: int) -> None:
        """Note that a node has the files under their names, and that they passed the gates."""
        self._see(node)
        self._installed.add(node)
        self._end_if_all_ended()

    async def leave(self, node: int, findings: tuple[Finding, ...]) -> None:
        """Give a node up: it failed, or its process is gone."""
        if node not in self._installed:
            self._give_up(node, findings)
        self.planner.dead(node)
        self._elect()
        self._wake(time.monotonic())

    async def state(self) -> State:
        """Return what there is to show."""
        lacks = self.planner.lacks
        return State(
            installed=len(self._installed),
            given_up=tuple(sorted({*self._left, *self._silent})),
            have=tuple((self.planner.all & ~lack).bit_count() for lack in lacks),
            events=tuple(self.events),
            is_over=self._is_over,
        )

    # ---- who is there

    def _see(self, node: int) -> float:
        now = self._seen[node] = time.monotonic()
        if node in self._silent:
            self._silent.discard(node)
            self.events.append(f"node {node} is back")
            self.planner.back(node)
        return now

    def _give_up(self, node: int, findings: Sequence[Finding]) -> None:
        self._left.setdefault(node, tuple(findings))
        self._silent.discard(node)
        self._withdraw(node)

    def _withdraw(self, node: int) -> None:
        """Forget what a node was to do."""
        self._orders.pop(node, None)
        self._busy = {(n, piece) for n, piece in self._busy if n != node}
        self.planner.dead(node)
        self._end_if_all_ended()

    def _end_if_all_ended(self) -> None:
        ended = {*self._installed, *self._left, *self._silent}
        if len(ended) == len(self.planner.lacks):
            self._is_over = True
            self._wake(time.monotonic(), len(self._waiting) + 1)

    @property
    def _are_all_here(self) -> bool:
        """True where every node has come, or is given up."""
        return len({*self._hello, *self._left, *self._silent}) == len(self.planner.lacks)

    def _is_complete(self, node: int) -> bool:
        return len(self._verified[node]) == len(self.layout.pieces)

    async def _watch(self) -> None:
        last = time.monotonic()
        while not self._is_over:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            if now - last > SILENCE / 4:  # held up itself: everybody gets the time back
                self._seen = {node: seen + now - last for node, seen in self._seen.items()}
            last = now
            for node, seen in self._seen.items():
                is_working = node not in self._left and node not in self._installed
                if is_working and node not in self._silent and now - seen > SILENCE:
                    self.events.append(f"node {node} gave no sign of life for {SILENCE:.0f} s")
                    self._silent.add(node)
                    self._withdraw(node)
            self._is_open |= self._are_all_here or now >= self._opens_at
            self._elect()
            self._wake(now, len(self._waiting) + 1)
            self._end_if_stuck()

    def _end_if_stuck(self) -> None:
        """Give up the nodes that lack what nobody can give any more."""
        planner = self.planner
        if planner.pulls or set(planner.promises) - {NOBODY} or not self._are_all_here:
            return
        working = {n for n in self._hello if planner.live >> n & 1 and not self._is_complete(n)}
        waiting = {slot for slot, future in self._waiting.items() if not future.done()}
        if not all((node, slot) in waiting for node in working for slot in (True, False)):
            return
        for node in working:
            self._give_up(node, self._why_lost(node))

    def _why_lost(self, node: int) -> list[Finding]:
        if self._origin_findings:
            return list(self._origin_findings)
        missing = self.planner.lacks[node]
        blocks = [self.layout.blocks[number] for number in bits(missing)]
        size, help_text = sum(b.end - b.start for b in blocks), "name a source: --source, --url"
        path = blocks[0].artifact.path
        found = "no node that is left has them, and there is no source"
        return [Finding(Kind.MISSING, path, f"{size:,} more bytes", found, help_text)]

    # ---- what to do next

    def _wake(self, now: float, misses: int = WOKEN) -> None:
        """Answer those who wait, the longest first, until some get nothing."""
        for slot in list(self._waiting):
            future = self._waiting.pop(slot)
            if future.done():
                continue
            if task := self._task(*slot, now):
                future.set_result(task)
                continue
            self._waiting[slot] = future
            misses -= 1
            if misses <= 0:
                return

    def _task(self, node: int, is_first: bool, now: float) -> Task | None:
        if node in self._left:
            return Task(Act.LEAVE, findings=self._left[node])
        if self._is_over:
            words = ("an answer before the others were done", "none", "run the same command again")
            late = Finding(Kind.NO_NETWORK, "", *words)
            return Task(Act.LEAVE, findings=() if node in self._installed else (late,))
        if node in self._silent or not self._is_open:
            return None
        if not self.planner.live >> node & 1:
            expected, found = "bytes that arrive as they were sent", "wrong ones from several nodes"
            help_text = "check this node's memory and network"
            self._give_up(node, [Finding(Kind.WRONG_DIGEST, "", expected, found, help_text)])
            return Task(Act.LEAVE, findings=self._left[node])
        for piece, act in self._orders[node].items():
            if (node, piece) not in self._busy:
                self._trusted |= {node} if act is Act.REFETCH else set()
                return self._begin(node, Task(act, piece, round=self._rounds[piece]))
        if task := self._unchecked(node):
            return self._begin(node, task)
        if self._is_complete(node):
            if node in self._told and is_first:
                return None
            self._told.add(node)
            return Task(Act.INSTALL)
        pull = self.planner.ask(node, is_first, now)
        return self._task_of(pull) if pull else None

    def _task_of(self, pull: Pull) -> Task:
        piece = self.layout.blocks[pull.block].piece
        table = self._digests[piece]
        digest, _ = table.of.get(pull.block, ("", ORIGIN))
        if pull.source == ORIGIN:
            self._trusted.add(pull.node)
            # Against digests that only one node vouches for, the origin may be right.
            digest = digest if table.is_bound else ""
            return Task(Act.FETCH, pull.block, "", digest, self._rounds[piece])
        address = self._hello[pull.source].address
        return Task(Act.PULL, pull.block, address, digest, self._rounds[piece])

    def _begin(self, node: int, task: Task) -> Task:
        self._busy.add((node, task.number))
        return task

    def _unchecked(self, node: int) -> Task | None:
        """Return the hashing of a piece of which a node has got all blocks."""
        lack = self.planner.lacks[node]
        for piece, mask in enumerate(self.layout.masks):
            is_new = piece not in self._verified[node] and (node, piece) not in self._busy
            if not lack & mask and is_new:
                return Task(Act.HASH, piece, round=self._rounds[piece])
        return None

    def _elect(self) -> None:
        """Let one holder of each piece without digests hash it, where a node lacks the piece.

        A piece whose digests were recalled, and which nobody holds, is fetched whole by one node.
        """
        wanted, ordered = 0, {piece for orders in self._orders.values() for piece in orders}
        for node in bits(self.planner.live):
            wanted |= self.planner.lacks[node]
        for piece, table in enumerate(self._digests):
            mask = self.layout.masks[piece]
            if table.lister is not None or not wanted & mask or piece in ordered:
                continue
            able = [n for n in bits(self.planner.servers) if self._has(n, piece)]
            act = Act.HASH
            if not able and piece in self._doubted:
                act = Act.REFETCH
                able = list(bits(self.planner.may_fetch & self.planner.servers))
                able = [n for n in able if n in self._hello and not self._is_complete(n)]
                if not able or piece in self._hopeless:
                    able = []
                    self.planner.promise(NOBODY, self.planner.promises.get(NOBODY, 0) | mask)
            if able and self._is_open:
                node = min(able, key=lambda n: len(self._orders[n]))
                self._orders[node][piece] = act
                self._promise(node)

    def _has(self, node: int, piece: int) -> bool:
        is_here = node in self._hello and piece in self._verified[node]
        is_false = (node, piece) in self._disproved
        return is_here and not is_false and piece not in self._hello[node].spared

    def _promise(self, node: int) -> None:
        """Let nobody fetch what a node is about to serve."""
        masks = [self.layout.masks[piece] for piece in self._orders[node]]
        self.planner.promise(node, sum(masks))

    # ---- what became of it

    def _take(self, node: int, answer: Answer, now: float) -> None:
        task, number = answer.task, answer.task.number
        if task.act in (Act.HASH, Act.REFETCH):
            self._busy.discard((node, number))
            if node not in self._left and task.round == self._rounds[number]:
                self._hashed(node, answer)
                self._elect()
            return
        table = self._digests[self.layout.blocks[number].piece]
        known, found = table.of.get(number), "".join(answer.digests)
        if task.round != self._rounds[self.layout.blocks[number].piece]:
            self.planner.failed(node, number)
        elif answer.result is Result.FAILED:
            self.planner.failed(node, number)
            if task.act is Act.FETCH:
                self._cannot_fetch(node, answer.findings)
        elif answer.result is Result.WRONG:
            self.planner.wrong(node, number)
        elif known and known[0] != found:
            self.planner.failed(node, number)
            if task.act is Act.FETCH:
                self._recall(self.layout.blocks[number].piece)
                self._elect()
        else:
            table.of.setdefault(number, (found, node))
            self.planner.done(node, number, now)

    def _cannot_fetch(self, node: int, findings: Sequence[Finding]) -> None:
        self._origin_findings |= dict.fromkeys(findings)
        self.events += [f"node {node} cannot fetch: {finding.line()}" for finding in findings[:1]]
        self.planner.cannot_fetch(node)

    def _hashed(self, node: int, answer: Answer) -> None:
        """Take in what a node has found of a piece that it came with, pulled, or fetched whole."""
        piece = answer.task.number
        table, mask = self._digests[piece], self.layout.masks[piece]
        act = self._orders[node].pop(piece, None)
        self._promise(node)
        (artifact, pinned), had = self.layout.pieces[piece], piece in self._verified[node]
        if answer.result is Result.DONE:
            numbers = [block.number for block in self.layout.of_piece[piece]]
            own = {n: (digest, node) for n, digest in zip(numbers, answer.digests, strict=True)}
            self._verified[node].add(piece)
            self.planner.holds(node, mask)
            if table.lister is None:
                self._list(piece, node, own)
            elif any(own[n][0] != digest for n, (digest, _) in table.of.items()):
                self.planner.blame(node, "gave other digests of a piece than its holder")
            else:
                table.is_bound |= node != table.lister
            self.planner.offers(node, mask)
        elif act is Act.REFETCH:
            self._cannot_fetch(node, answer.findings)
            if any(finding.kind is Kind.WRONG_DIGEST for finding in answer.findings):
                self._hopeless.add(piece)  # every source was asked for the piece, more than once
        elif had or (table.is_bound and (node, piece) in self._retried):
            # What it had when it came has changed, or others found these very bytes right.
            expected, found = f"sha256 {pinned.sha256}", "another one, though each block was right"
            found = "another one, in spite of its receipt" if had else found
            help_text = "check this node's disk and memory; inv verify hashes its files"
            words = (f"{artifact.path} from byte {pinned.offset:,}", expected, found, help_text)
            self._give_up(node, [Finding(Kind.WRONG_DIGEST, *words)])
        elif (node, piece) not in self._retried:
            # Once it may be this node's fault: a block may have been written over by a late one.
            self._retried.add((node, piece))
            self.planner.recall(mask, keep=~(1 << node))
        else:
            self._recall(piece)

    def _list(self, piece: int, node: int, own: dict[int, tuple[str, int]]) -> None:
        """Take the digests of a piece that a node has verified; recall others that differ."""
        table = self._digests[piece]
        before = self._doubted.pop(piece, {}) | table.of
        wrong = {n: giver for n, (digest, giver) in before.items() if digest != own[n][0]}
        if wrong:
            self.planner.recall(sum(1 << number for number in wrong), self._holders(piece))
            for giver in sorted(set(wrong.values())):
                self.planner.blame(giver, "gave a wrong digest")
        is_bound = not wrong and bool(before)
        self._digests[piece] = Digests(own, node, is_bound)
        for other, hello in self._hello.items():
            if self._has(other, piece):
                self.planner.offers(other, self.layout.masks[piece])
            if hello.arrived:
                self._count_arrived(other)

    def _holders(self, piece: int) -> int:
        """Return the set of nodes that have verified a piece."""
        return sum(1 << node for node, pieces in enumerate(self._verified) if piece in pieces)

    def _count_arrived(self, node: int) -> None:
        """Count the blocks that an earlier run has left, where their digest is known by now."""
        mask = 0
        for number, digest in self._hello[node].arrived:
            known = self._digests[self.layout.blocks[number].piece].of.get(number)
            mask |= (known is not None and known[0] == digest) << number
        mask &= self.planner.lacks[node]
        self.planner.holds(node, mask)
        self.planner.offers(node, mask)

    def _recall(self, piece: int) -> None:
        """Take back all blocks of a piece that is wrong though each block has its digest."""
        table = self._digests[piece]
        if table.lister is None:
            self._doubted[piece] = table.of
        else:
            self.planner.blame(table.lister, "gave digests that are not those of the piece")
            self._disproved.add((table.lister, piece))
            self._doubted[piece] = {}
        self.planner.recall(self.layout.masks[piece], self._holders(piece))
        self._digests[piece] = Digests()
        self._rounds[piece] += 1
        self._busy = {(n, p) for n, p in self._busy if p != piece}

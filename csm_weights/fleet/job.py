"""The values of a job: what all nodes are told, what is asked of one, and what it answers."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from csm_weights.errors import Finding
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.verify.gates import GateResult

#: Blocks of a job at least, and for each node: with fewer, nodes wait for each other at the end.
LEAST_BLOCKS = 128
BLOCKS_A_NODE = 1.5

#: Bytes of a block: a node holds two in memory.
LARGEST_BLOCK = 16 << 20
SMALLEST_BLOCK = 16 << 10


@dataclass(frozen=True)
class Job:
    """One run: the files of a manifest that every node shall have, and where they come from.

    `root`, where it exists on a node, is its checkout, with chunk files; `is_shared` says that all
    nodes have the same one, on a network. `directory` is where the files go; `~` and `$VARIABLES`
    in it are the node's. `remote` are the sources that are asked for what no node has. `secret` is
    shown with each request of a node to another one. `version` is that of this package.
    """

    manifest: Manifest
    paths: tuple[str, ...]
    root: str
    directory: str
    source: str = "auto"
    urls: tuple[str, ...] = ()
    remote: tuple[str, ...] = ()
    is_shared: bool = False
    patience: float | None = None
    nodes: int = 1
    secret: str = field(default="", repr=False)
    version: str = ""
    smoke: bool = False
    require_gpu: bool = False

    @cached_property
    def layout(self) -> Layout:
        """The blocks of the files, the same on every node."""
        chosen = [a for a in self.manifest.artifacts if a.path in self.paths]
        # Of a file whose text the manifest has, each node writes its own.
        artifacts = [a for a in chosen if all(e.text is None for e in a.editions)]
        total = sum(a.size for a in artifacts)
        count = max(LEAST_BLOCKS, int(BLOCKS_A_NODE * self.nodes))
        size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-total // count)))
        return Layout.of(artifacts, size)


@dataclass(frozen=True)
class Block:
    """The half-open range `[start, end)` of an artifact's bytes; `piece` is a number."""

    number: int
    artifact: Artifact
    piece: int
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The blocks that tile all pieces of the artifacts, in order."""

    artifacts: tuple[Artifact, ...]
    pieces: tuple[tuple[Artifact, Piece], ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, artifacts: Sequence[Artifact], size: int) -> Layout:
        """Return the layout with blocks of at most `size` bytes."""
        pieces = tuple((a, piece) for a in artifacts for piece in a.tiles if piece.size)
        blocks: list[Block] = []
        for number, (artifact, piece) in enumerate(pieces):
            for start in range(piece.offset, piece.end, size):
                end = min(start + size, piece.end)
                blocks.append(Block(len(blocks), artifact, number, start, end))
        return cls(tuple(artifacts), pieces, tuple(blocks))

    @cached_property
    def of_piece(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each piece."""
        found: list[list[Block]] = [[] for _ in self.pieces]
        for block in self.blocks:
            found[block.piece].append(block)
        return tuple(map(tuple, found))

    @cached_property
    def masks(self) -> tuple[int, ...]:
        """The blocks of each piece, as a set of the planner's."""
        return tuple(sum(1 << block.number for block in blocks) for blocks in self.of_piece)


class Act(enum.Enum):
    """What a node can be asked to do next."""

    WAIT = "ask again"
    PULL = "pull a block from another node"
    FETCH = "fetch a block from the sources of one machine"
    REFETCH = "fetch a piece from them, and hash it"
    HASH = "hash a piece and its blocks as they lie on the disk"
    INSTALL = "install the files: all pieces are here"
    LEAVE = "end: somebody else has given this node up, or all are done"


@dataclass(frozen=True)
class Task:
    """One thing for a node to do with a block or piece, by its number.

    `address` is the URL of the node to pull from, `digest` the hex sha256 that a block must
    have, or "" where nobody knows it yet. `round` counts how often the digests of its piece were
    recalled before. `findings` say why a node has to leave.
    """

    act: Act
    number: int = -1
    address: str = ""
    digest: str = ""
    round: int = 0
    findings: tuple[Finding, ...] = ()


class Result(enum.Enum):
    """How a task ended."""

    DONE = "done"
    FAILED = "failed"
    WRONG = "wrong digest"


@dataclass(frozen=True)
class Answer:
    """What became of a task. `digests` are of the block, or of each block of the piece."""

    task: Task
    result: Result
    digests: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Hello:
    """What a node comes with: its URL, verified pieces, and digests of unverified blocks.

    `spared` are pieces of files of which it has another edition: it neither needs nor serves them.
    """

    address: str
    verified: tuple[int, ...]
    spared: tuple[int, ...]
    arrived: tuple[tuple[int, str], ...]


class Status(enum.StrEnum):
    """The end of a node."""

    VERIFIED = "verified"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True)
class NodeReport:
    """What became of one expected node. Bytes by source: its own disk, other nodes, the origin.

    `refused` are blocks that arrived with a wrong digest. `smoke` is its verdict, or "".
    """

    node: str
    host: str
    status: Status
    seconds: float
    directory: str = ""
    from_disk: int = 0
    from_nodes: int = 0
    from_origin: int = 0
    refused: int = 0
    gates: tuple[GateResult, ...] = ()
    smoke: str = ""
    findings: tuple[Finding, ...] = ()

"""The servers of a plan, asked for the first byte of each file that would come from them.

They are asked as `inv weights` would ask them, by the same sources: what the
first byte meets, the whole file would meet too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.pipeline.actions import Assemble
from csm_weights.pipeline.plan import Plan
from csm_weights.pipeline.session import Session
from csm_weights.progress import Progress
from csm_weights.transfer.policy import HUB, LazySource, RemoteSources
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import NotAvailable, SourceError

if TYPE_CHECKING:
    from csm_weights.transfer.http.ranges import RemoteSource
    from csm_weights.transfer.hub import Hub

#: Limits of a client, by their names in `Timeouts`, in seconds: someone waits for the answers.
LIMITS = {"connect": 5.0, "read": 10.0, "patience": 3.0, "longest_wait": 10.0}


class _FirstByte:
    """A writer that takes the first byte of a piece, and verifies nothing."""

    is_empty = True

    def __init__(self, piece: Piece) -> None:
        self.notes: list[Finding] = []
        self._at = piece.offset

    def reset(self) -> None: ...

    def copy_from(self, fd: int, offset: int) -> None: ...

    def wanted(self) -> list[tuple[int, int]]:
        return [(self._at, self._at + 1)]

    def acquire_buffer(self) -> memoryview:
        return memoryview(bytearray(BLOCK))

    def write(self, buffer: memoryview, offset: int, size: int) -> None: ...

    def verify(self, where: str) -> None: ...


@dataclass
class Server:
    """A server with the paths that it was asked for and gives, and what was wrong."""

    url: str
    source: RemoteSource
    is_hub: bool
    asked: dict[str, None] = field(default_factory=dict)
    gives: dict[str, None] = field(default_factory=dict)
    findings: dict[Finding, None] = field(default_factory=dict)

    def probe(
        self, artifact: Artifact, pieces: Sequence[Piece]
    ) -> tuple[list[Piece], list[Finding]]:
        """Ask for pieces; return those that do not come from here, and why."""
        self.asked[artifact.path] = None
        for finding in self.findings:
            if finding.kind.category in (Category.ACCESS, Category.NETWORK):
                return list(pieces), [finding]
        # The Hub has whole files, a mirror may have some of their chunk files.
        trials = pieces[:1] if self.is_hub else pieces
        failed = {piece.offset: self._failure(artifact, piece) for piece in trials}
        findings = [finding for found in failed.values() for finding in found]
        self.findings |= dict.fromkeys(findings)
        if not findings:
            self.gives[artifact.path] = None
        return [piece for piece in pieces if failed.get(piece.offset)], findings

    def _failure(self, artifact: Artifact, piece: Piece) -> Sequence[Finding]:
        try:
            self.source.deliver(artifact, piece, _FirstByte(piece))
        except NotAvailable:
            where, expected = f"{self.url}/{artifact.path}", "the file, or its chunk files"
            help_text = "check that this is the folder, or name another --url"
            return [Finding(Kind.NOT_THERE, where, expected, "no such file", help_text)]
        except SourceError as error:
            return error.findings
        return ()


@dataclass
class ProbeResults:
    """The servers of a plan, by name; `blocking` is what no other server makes up for.

    `owner` says in words whose the token is, where the Hub reports it.
    """

    servers: dict[str, Server] = field(default_factory=dict)
    blocking: dict[Finding, None] = field(default_factory=dict)
    owner: str = ""

    @property
    def hub(self) -> Server | None:
        """The Hub, if it was asked."""
        return self.servers.get(HUB)

    @property
    def mirrors(self) -> list[Server]:
        """The mirrors that were asked."""
        return [server for server in self.servers.values() if not server.is_hub]

    @property
    def findings(self) -> list[Finding]:
        """The findings about all servers, each once."""
        return list(dict.fromkeys(f for server in self.servers.values() for f in server.findings))

    @property
    def hosts(self) -> dict[str, str]:
        """A URL of each host that would be contacted, by its name and port."""
        named = [server.url for server in self.servers.values()]
        reached = sorted(url for s in self.servers.values() for url in s.source.reached)
        hosts: dict[str, str] = {}
        for url in [*named, *reached]:
            hosts.setdefault(urlsplit(url).netloc or url, url)
        return hosts


def probe(session: Session, plan: Plan) -> ProbeResults:
    """Ask the servers of a plan, in its order, for what is planned to come from them."""
    results = ProbeResults()
    actions = [action for action in plan.having(Assemble) if action.remote]
    if not actions:
        return results
    cancel, names = threading.Event(), session.policy.remote
    with (
        Progress("asking", 0) as progress,
        RemoteSources(names, session.manifest, cancel, progress.log, limits=LIMITS) as sources,
    ):
        try:
            for action in actions:
                _probe_action(action, sources, results)
            _probe_owner(results)
        finally:
            cancel.set()
    return results


def _probe_action(action: Assemble, sources: Sequence[LazySource], results: ProbeResults) -> None:
    left = [piece for piece in action.artifact.tiles if piece.offset in action.remote]
    findings: list[Finding] = []
    for lazy in sources:
        if not left:
            return
        if lazy.name not in results.servers:
            source = cast("RemoteSource", lazy.open())
            results.servers[lazy.name] = Server(source.url, source, lazy.name == HUB)
        left, found = results.servers[lazy.name].probe(action.artifact, left)
        findings += found
    if left:
        results.blocking |= dict.fromkeys(findings)


def _probe_owner(results: ProbeResults) -> None:
    """Find out whose the token is; that the Hub does not know it is a finding."""
    if hub := results.hub:
        try:
            results.owner = cast("Hub", hub.source).owner()
        except SourceError as error:
            unknown = [f for f in error.findings if f.kind is Kind.UNKNOWN_TOKEN]
            hub.findings |= dict.fromkeys(unknown)

"""What the servers of a plan say when they are asked for the first byte of each file.

By the same sources, and over the same wire, as the files would come: what the
first byte meets, the whole file would meet too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from csm_weights.errors import Category, Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.pipeline.actions import Assemble
from csm_weights.pipeline.plan import Plan
from csm_weights.pipeline.session import Session
from csm_weights.progress import Progress
from csm_weights.transfer.policy import HUB
from csm_weights.transfer.reorder import Buffer
from csm_weights.transfer.source import NotAvailable, SourceError

if TYPE_CHECKING:
    from csm_weights.transfer.http.ranges import RangeDownloader
    from csm_weights.transfer.hub import Hub, HubCredentials
    from csm_weights.transfer.mirror import Mirror

#: Seconds that a server may take to answer, with someone waiting for it.
PATIENCE = 10.0


class _FirstByte:
    """A sink that takes the first byte of a piece, and proves nothing."""

    is_empty = True

    def __init__(self, piece: Piece) -> None:
        self._at = piece.offset

    def reset(self) -> None:
        """Nothing was taken."""

    def copy_from(self, fd: int, offset: int) -> None:
        """Nothing is wanted of a local file."""

    def wanted(self) -> list[tuple[int, int]]:
        """The one byte."""
        return [(self._at, self._at + 1)]

    def acquire_buffer(self) -> Buffer:
        """A block for it."""
        return Buffer()

    def write(self, block: Buffer, offset: int, size: int) -> None:
        """It came, which is all that was asked."""

    def verify(self, where: str) -> None:
        """One byte has no digest."""

    def add_notes(self, findings: Sequence[Finding]) -> None:
        """Nothing to remember."""


@dataclass
class Server:
    """A server while it is asked: what for, which files it gives, and what it is that it lacks."""

    url: str
    source: Hub | Mirror
    is_hub: bool
    asked: dict[str, None] = field(default_factory=dict)
    gives: dict[str, None] = field(default_factory=dict)
    findings: dict[Finding, None] = field(default_factory=dict)

    def probe(
        self, artifact: Artifact, pieces: Sequence[Piece]
    ) -> tuple[list[Piece], list[Finding]]:
        """Asks for pieces; those that do not come from here, and why."""
        self.asked[artifact.path] = None
        for finding in self.findings:
            if finding.kind.category in (Category.ACCESS, Category.NETWORK):
                return list(pieces), [finding]
        # The Hub has whole files, a mirror may have some of their parts.
        trials = pieces[:1] if self.is_hub else pieces
        met = {piece.offset: self._trouble(artifact, piece) for piece in trials}
        findings = [finding for found in met.values() for finding in found]
        self.findings |= dict.fromkeys(findings)
        if not findings:
            self.gives[artifact.path] = None
        return [piece for piece in pieces if met.get(piece.offset)], findings

    def _trouble(self, artifact: Artifact, piece: Piece) -> Sequence[Finding]:
        """What keeps the first byte of a piece from coming."""
        from csm_weights.transfer.hub import Hub

        try:
            if isinstance(self.source, Hub):
                # Once more than needed, but in this thread, where Ctrl-C is heard.
                self.source.resolve(artifact)
            self.source.deliver(artifact, piece, _FirstByte(piece))
        except NotAvailable:
            where, expected = f"{self.url}/{artifact.path}", "the file, or its parts"
            help_text = "look whether that is the folder, or name another --url"
            return [Finding(Kind.NOT_THERE, where, expected, "no such file", help_text)]
        except SourceError as broken:
            return broken.findings
        return ()


@dataclass
class ProbeResults:
    """What the servers of a plan said; `blocking` is what no other server makes up for.

    `owner` says in words whose the token is, where the Hub tells.
    """

    servers: dict[str, Server] = field(default_factory=dict)
    blocking: dict[Finding, None] = field(default_factory=dict)
    account: HubCredentials | None = None
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
        """What is wrong with any server, each thing once."""
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


def probe(run: Session, plan: Plan) -> ProbeResults:
    """Asks the servers of a plan, in its order, for what is planned to come from them."""
    answers = ProbeResults()
    steps = [step for step in plan.having(Assemble) if step.remote]
    if not steps:
        return answers
    with _wire() as wire:
        for step in steps:
            _ask_for(run, step, wire, answers)
    account, hub = answers.account, answers.hub
    kinds = {finding.kind for finding in hub.findings} if hub else set()
    is_known = Kind.UNKNOWN_TOKEN not in kinds
    is_reached = all(kind.category is not Category.NETWORK for kind in kinds)
    if account and account.token and hub and is_known and is_reached:
        answers.owner = _within(PATIENCE, lambda: _owner(account))
    return answers


@contextlib.contextmanager
def _wire() -> Iterator[RangeDownloader]:
    """A wire with little patience: someone waits for the answers."""
    from csm_weights.transfer.http.client import Timeouts
    from csm_weights.transfer.http.ranges import RangeDownloader

    cancel = threading.Event()
    limits = Timeouts(connect=5, read=PATIENCE, tries=2, connect_tries=1, longest_wait=PATIENCE)
    with Progress("asking", 0) as progress, RangeDownloader(cancel, progress.log, limits) as wire:
        try:
            yield wire
        finally:
            cancel.set()


def _ask_for(run: Session, step: Assemble, wire: RangeDownloader, answers: ProbeResults) -> None:
    left = [piece for piece in step.artifact.tiles if piece.offset in step.remote]
    met: list[Finding] = []
    for name in run.policy.remote:
        if not left:
            return
        if name not in answers.servers:
            answers.servers[name] = _server(run, name, wire, answers)
        left, findings = answers.servers[name].probe(step.artifact, left)
        met += findings
    if left:
        answers.blocking |= dict.fromkeys(met)


def _server(run: Session, name: str, wire: RangeDownloader, answers: ProbeResults) -> Server:
    from csm_weights.config import mirror_headers
    from csm_weights.transfer.hub import Hub, HubCredentials
    from csm_weights.transfer.mirror import Mirror

    manifest = run.manifest
    if name != HUB:
        return Server(name, Mirror(wire, name, mirror_headers()), is_hub=False)
    assert manifest.repo and manifest.revision, "the Hub is planned only where it is named"
    account = answers.account = HubCredentials.from_environment()
    hub = Hub(wire, account, manifest.repo, manifest.revision)
    return Server(account.endpoint, hub, is_hub=True)


def _within(seconds: float, probe: Callable[[], str]) -> str:
    """An answer that is only for information: none if it fails, or takes longer."""
    answers: list[str] = []

    def run() -> None:
        # What these libraries raise may quote what was sent.
        with contextlib.suppress(Exception):
            answers.append(probe())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else ""


def _owner(account: HubCredentials) -> str:
    """Whose the token is, and of which kind."""
    from csm_weights.transfer.hub import library

    told: dict[str, Any] = library().HfApi(account.endpoint, account.token).whoami()
    role = told.get("auth", {}).get("accessToken", {}).get("role", "")
    words = [f"of {told['name']}", str(role).replace("fineGrained", "fine-grained")]
    return ", ".join(filter(None, words)).replace(account.token or "", "***")[:100]

"""What stands in the way of `inv weights`, found out before anything is fetched or written.

The servers of the plan are asked as `inv weights` would ask them, by the same
sources, for the first byte of each file: what that meets, the whole file would
meet too.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from csm_weights.concurrency import run_all
from csm_weights.config import PUBLIC_ENDPOINT, HubEnvironment, pip_command
from csm_weights.errors import Category, CsmWeightsError, Finding, Kind, MissingInput, error_for
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.model import offline_assets
from csm_weights.pipeline import apply, speech
from csm_weights.pipeline.actions import Assemble, costs
from csm_weights.pipeline.locate import Weights
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Session, begin
from csm_weights.progress import Progress, format_size
from csm_weights.store import atomic
from csm_weights.transfer.policy import HUB, LazySource, RemoteSources
from csm_weights.transfer.reorder import BLOCK
from csm_weights.transfer.source import NotAvailable, SourceError

if TYPE_CHECKING:
    from csm_weights.transfer.http.ranges import RemoteSource
    from csm_weights.transfer.hub import Hub

#: Limits of a client, by their names in `Timeouts`, in seconds: someone waits for the answers.
LIMITS = {"connect": 5.0, "read": 10.0, "patience": 3.0, "longest_wait": 10.0}

_UNUSED = "not used"


class Verdict(enum.StrEnum):
    """The result of a check; the value is the word a person reads."""

    OK = "OK"
    NOT_OK = "NOT OK"
    NOTE = "note"
    NOT_ASKED = "not asked"


@dataclass(frozen=True)
class CheckResult:
    """One thing that was checked; its findings stand in the way where it is NOT OK."""

    name: str
    verdict: Verdict
    found: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class DoctorReport:
    """All checks, and the error that the command would end with.

    `promise` is what holds where there is none.
    """

    subject: str
    checks: tuple[CheckResult, ...]
    promise: str
    error: CsmWeightsError | None = None


def examine(request: Request, smoke: bool) -> DoctorReport:
    """Check whether `inv weights` could do what is asked, and what stands in its way.

    Nothing is hashed or written. Raises UsageError, ManifestInvalid.
    """
    session = begin(request)
    case = _Examination(session)
    case.ask_servers()
    disk, name = case.disk(), session.manifest.name
    checks = [case.files(), case.chunk_files()]
    if session.manifest.repo:
        checks += [case.cache(), case.token(), case.served("access", is_hub=True)]
    else:
        why = "the manifest names no repository of the Hub"
        checks += _not_asked(why, "Hub cache", "token", "access")
    checks += [case.served("mirrors", is_hub=False), *case.hosts_and_proxy(), disk]
    if smoke and any(item.artifact.is_weights for item in case.state.artifacts):
        checks += [_torch(), _gpu()]
    else:
        checks += _not_asked("no smoke test is to run", "torch", "GPU")
    # inv weights ends with the first of these that it meets.
    lacking = [*case.plan.findings, *case.plan.lacking]
    hurdles = (lacking, disk.findings, case.blocking, checks[-2].findings)
    findings = next(filter(None, hurdles), ())
    message, advice = f"{name}: inv weights would fail", case.status.advice
    options = f"{' --consume' * request.consume}{'' if smoke else ' --no-smoke'}"
    return DoctorReport(
        f"{name} -> {case.state.paths.destination}",
        tuple(checks),
        f"{session.paths.command('weights')}{options} could succeed",
        error_for(message, findings, advice) if findings else None,
    )


def _not_asked(why: str, *names: str) -> list[CheckResult]:
    return [CheckResult(name, Verdict.NOT_ASKED, why) for name in names]


def closure(request: Request) -> DoctorReport:
    """Check that a model can speak without a network: its files, its tokenizer, its codec.

    Nothing is hashed or loaded. What Sesame's own generator asks the Hub's cache for is
    noted.
    """
    environment, bring = HubEnvironment.read(), " ".join([offline_assets.BRING, *request.options])
    weights, home = next(Weights(request).candidates(), None), speech.codec_folder(request)
    beside = begin(request).paths.destination
    here = [
        ("weights", weights and weights.paths[0], bring),
        ("tokenizer", offline_assets.tokenizer_file(beside, home), bring),
        ("codec", offline_assets.codec_folder(home), bring),
        *(
            (name, importlib.util.find_spec(name) and "installed", pip_command("speak"))
            for name in ("torch", "transformers", "tokenizers")
        ),
    ]
    checks = []
    for name, found, command in here:
        findings = () if found else (Finding.missing(name, "on this machine", command),)
        verdict = Verdict.OK if found else Verdict.NOT_OK
        checks.append(CheckResult(name, verdict, str(found or "not here"), findings))
    for need in offline_assets.find_assets(environment.cache):
        found, command = f"here: {need.purpose}", need.command
        if need.gated and command.startswith("hf "):
            command = f"accept the terms at {environment.page(need.repo)}, then {command}"
        if need.missing:
            found = f"not here: {need.purpose}; {command}"
        checks.append(CheckResult(need.repo, Verdict.NOTE if need.missing else Verdict.OK, found))
    needed = [finding for check in checks for finding in check.findings]
    error = MissingInput(f"{request.model} cannot speak offline yet", needed) if needed else None
    subject = f"what {request.model} needs to speak offline, and Sesame's own code in the cache"
    promise = f"{request.model} can speak with HF_HUB_OFFLINE=1"
    return DoctorReport(subject, tuple(checks), promise, error)


# ---- asking servers


class _FirstByte:
    """A writer that takes the first byte of a piece, and verifies nothing."""

    is_empty = True

    def __init__(self, piece: Piece) -> None:
        self.notes: list[Finding] = []
        self._at = piece.offset

    def wanted(self) -> list[tuple[int, int]]:
        return [(self._at, self._at + 1)]

    def acquire_buffer(self) -> memoryview:
        return memoryview(bytearray(BLOCK))

    def _ignore(self, *_: object, **__: object) -> None: ...

    reset = copy_from = advance = write = verify = _ignore


@dataclass
class _Server:
    """A server with the paths that it was asked for and gives, and what was wrong.

    `place` names it in a sentence: "from URL".
    """

    source: RemoteSource
    place: str
    asked: set[str] = field(default_factory=set)
    gives: set[str] = field(default_factory=set)
    findings: dict[Finding, None] = field(default_factory=dict)

    def ask(self, artifact: Artifact, pieces: Iterable[Piece]) -> dict[int, Sequence[Finding]]:
        """Ask for pieces; return why it does not give some of them, by their offsets."""
        failed: dict[int, Sequence[Finding]] = {}
        for piece in pieces:
            try:
                self.source.deliver(artifact, piece, _FirstByte(piece))
            except NotAvailable:
                where = f"{self.source.url}/{artifact.path}"
                help_text = "check the URL of the folder, or give another one with --url"
                words = ("the file, or its chunk files", "no such file", help_text)
                failed[piece.offset] = [Finding(Kind.NOT_THERE, where, *words)]
            except SourceError as error:
                failed[piece.offset] = error.findings
        self.asked.add(artifact.path)
        if not failed:
            self.gives.add(artifact.path)
        self.findings |= dict.fromkeys(f for found in failed.values() for f in found)
        return failed

    def __str__(self) -> str:
        kinds = ", ".join(dict.fromkeys(str(finding.kind) for finding in self.findings))
        text = f"{len(self.gives)} of {len(self.asked)} files {self.place}"
        return f"{text}: {kinds}" if kinds else text


class _Examination:
    """A plan of `inv weights` with what its servers answer, and a check of each part of it.

    `blocking` are the findings of servers that no other server makes up for.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.status = apply.status_of(session)
        self.state, self.plan = self.status.state, self.status.plan
        self.environment = HubEnvironment.read()
        self.servers: dict[str, _Server] = {}
        self.blocking: dict[Finding, None] = {}
        self.problems = self.session.policy.problems if self.plan.findings else ()
        self.owner = ""

    def ask_servers(self) -> None:
        """Ask the servers of the plan, in its order, for what is planned to come from them."""
        actions = [action for action in self.plan.having(Assemble) if action.remote]
        if not actions:
            return
        cancel, manifest = threading.Event(), self.session.manifest
        names = self.session.policy.remote
        with (
            Progress("asking") as progress,
            RemoteSources(names, manifest, cancel, progress.log, limits=LIMITS) as sources,
        ):
            # In a thread of its own, so that an interrupt ends what it waits for.
            run_all([partial(self._ask, actions, sources)], cancel)

    def _ask(self, actions: Iterable[Assemble], sources: Iterable[LazySource]) -> None:
        for action in actions:
            left = [piece for piece in action.artifact.tiles if piece.offset in action.remote]
            findings: dict[Finding, None] = {}
            for lazy in sources:
                if not left:
                    break
                if lazy.name not in self.servers:
                    source, manifest = cast("RemoteSource", lazy.open()), self.session.manifest
                    of_hub = f"of {manifest.repo} at {(manifest.revision or '')[:12]}"
                    place = of_hub if lazy.name == HUB else f"from {source.url}"
                    self.servers[lazy.name] = _Server(source, place)
                # The Hub has whole files, a mirror may have some of their chunk files.
                trials = left[:1] if lazy.name == HUB else left
                failed = self.servers[lazy.name].ask(action.artifact, trials)
                findings |= dict.fromkeys(f for some in failed.values() for f in some)
                left = [piece for piece in left if piece.offset in failed]
            if left:
                self.blocking |= findings
        if hub := self.servers.get(HUB):
            try:
                self.owner = cast("Hub", hub.source).owner()
            except SourceError as error:
                # That the Hub does not know the token is a finding; else only its owner is unknown.
                unknown = [f for f in error.findings if f.kind is Kind.UNKNOWN_TOKEN]
                hub.findings |= dict.fromkeys(unknown)

    def check(self, name: str, found: str, findings: Iterable[Finding] = ()) -> CheckResult:
        """Return a check with these findings: NOT OK where one of them stands in the way."""
        some = tuple(findings)
        in_the_way = {*self.blocking, *self.plan.findings, *self.problems}
        verdict = Verdict.NOT_OK if in_the_way.intersection(some) else Verdict.NOTE
        return CheckResult(name, verdict if some else Verdict.OK, found, some)

    # ---- the checks

    def files(self) -> CheckResult:
        actions, count = self.plan.actions, len(self.state.artifacts)
        if self.plan.is_done:
            found = f"nothing to do: {count} files installed and verified"
            return CheckResult("plan", Verdict.OK, found)
        planned = len({action.artifact.path for action in actions})
        found = f"{planned} of {count} files are available: {costs(actions)}"
        # What the disk lacks is told by its own check.
        findings = [*self.plan.findings, *self.plan.lacking]
        lacking = [f for f in findings if f.kind.category is not Category.DISK]
        return self.check("plan", found, lacking)

    def chunk_files(self) -> CheckResult:
        name = "chunk files"
        items = [item for item in self.state.artifacts if item.artifact.pieces]
        if not self.session.policy.chunks:
            return CheckResult(name, Verdict.NOT_ASKED, "not used with this --source")
        if not items:
            found = "no file of this model is split into chunk files"
            return CheckResult(name, Verdict.NOT_ASKED, found)
        texts, bad = [], []
        for item in items:
            wrong = [*(part.finding for part in item.chunks if part.finding), *item.extras]
            kinds = dict.fromkeys(f.kind for f in wrong if f.kind is not Kind.MISSING)
            usable = sum(part.is_usable for part in item.chunks)
            text = f"{item.artifact.path} {usable} of {len(item.chunks)}"
            texts.append(f"{text} ({', '.join(kinds)})" if kinds else text)
            bad += wrong
        return CheckResult(name, self.check(name, "", bad).verdict, "; ".join(texts))

    def cache(self) -> CheckResult:
        name, cache = "Hub cache", self.environment.cache
        if not self.session.policy.cache:
            return CheckResult(name, Verdict.NOT_ASKED, "not used with this --source")
        held = [item.artifact.path for item in self.state.artifacts if item.cached]
        if not held:
            found = f"nothing of {self.session.manifest.repo} in {cache}"
            return CheckResult(name, Verdict.NOTE, found)
        return CheckResult(name, Verdict.OK, f"{', '.join(held)} in {cache}")

    def token(self) -> CheckResult:
        hub, holder = self.servers.get(HUB), self.environment.token_from
        of_the_token = (Kind.NO_TOKEN, Kind.UNKNOWN_TOKEN, Kind.SCOPE)
        blamed = [f for f in (hub.findings if hub else self.problems) if f.kind in of_the_token]
        if blamed:
            return self.check("token", f"{holder or 'none'}: {blamed[0].kind}", blamed)
        if not holder:
            found = "none, and none is needed" if hub else f"none; {_UNUSED}"
            return CheckResult("token", Verdict.NOTE, found)
        if not hub:
            return CheckResult("token", Verdict.NOT_ASKED, f"{holder}; {_UNUSED}")
        owner = self.owner or "owner unknown"
        return self.check("token", f"{holder}, {owner}")

    def served(self, name: str, is_hub: bool) -> CheckResult:
        """Tell how many files the Hub, or else the mirrors, give."""
        servers = [server for key, server in self.servers.items() if (key == HUB) is is_hub]
        if servers:
            findings = dict.fromkeys(f for server in servers for f in server.findings)
            return self.check(name, "; ".join(map(str, servers)), findings)
        page = self.environment.page(self.session.manifest.repo or "")
        offline = [f for f in self.problems if f.kind is Kind.OFFLINE]
        if problems := [f for f in offline if (f.where == page) is is_hub]:
            return self.check(name, str(Kind.OFFLINE), problems)
        return CheckResult(name, Verdict.NOT_ASKED, _UNUSED)

    def hosts_and_proxy(self) -> list[CheckResult]:
        """Tell which hosts are contacted, where the token goes, and by which proxy."""
        urls = [server.source.url for server in self.servers.values()]
        urls += sorted(url for server in self.servers.values() for url in server.source.reached)
        hosts: dict[str, str] = {}
        for url in urls:
            hosts.setdefault(urlsplit(url).netloc or url, url)
        if not hosts:
            return _not_asked("nothing is downloaded", "hosts", "proxy")
        # The import loads requests, and with it urllib3, which opens a socket to look for IPv6.
        from csm_weights.transfer.http.environment import proxy_for

        found = dict.fromkeys(f for server in self.servers.values() for f in server.findings)
        unreached = [f for f in found if f.kind in (Kind.NO_NETWORK, Kind.CERTIFICATE)]
        check = self.check("hosts", ", ".join(hosts), unreached)
        endpoint = self.environment.endpoint
        is_sent = HUB in self.servers and self.environment.token_from
        if is_sent and endpoint != PUBLIC_ENDPOINT:
            clear = " in the clear" if endpoint.startswith("http:") else ""
            host = urlsplit(endpoint).netloc
            told = f"{check.found}; HF_ENDPOINT: the token goes{clear} to {host}"
            verdict = check.verdict if unreached else Verdict.NOTE
            check = replace(check, found=told, verdict=verdict)
        ways = {host: proxy_for(url) for host, url in hosts.items()}
        # Without the credentials that a proxy's URL may have.
        shown = {host: re.sub(r"^([\w+.-]+://)?.*@", r"\1***@", way) for host, way in ways.items()}
        texts = [f"{host} {f'by {way}' if way else 'directly'}" for host, way in shown.items()]
        proxies = ", ".join(texts) if any(ways.values()) else "none"
        return [check, self.check("proxy", proxies, [f for f in found if f.kind is Kind.PROXY])]

    def disk(self) -> CheckResult:
        """Check the room, in bytes, and the permission for what the plan writes."""
        paths, texts = self.state.paths, []
        findings = [f for f in self.plan.findings if f.kind is Kind.NO_SPACE]
        for name, option, folder, free in (
            ("staging", "--staging", paths.staging, self.state.free_staging),
            ("destination", "--dest", paths.destination, self.state.free_destination),
        ):
            if needed := self.plan.room(name):
                texts.append(
                    f"{format_size(needed)} to write in {folder}, {format_size(free)} free"
                )
            if not self.plan.is_done and (why := atomic.why_read_only(folder)):
                help_text = f"make it writable, or choose another {option}"
                words = ("a writable folder", why, help_text)
                findings.append(Finding(Kind.NOT_WRITABLE, str(folder), *words))
        verdict = Verdict.NOT_OK if findings else Verdict.OK
        return CheckResult("disk", verdict, "; ".join(texts) or "nothing to write", tuple(findings))


def _torch() -> CheckResult:
    with contextlib.suppress(PackageNotFoundError):
        if importlib.util.find_spec("torch"):
            return CheckResult("torch", Verdict.OK, version("torch"))
    help_text = f"{pip_command('torch')}; or skip the smoke test with --no-smoke (make: SMOKE=no)"
    expected = "torch, which runs the model in the smoke test"
    finding = Finding(Kind.NOT_INSTALLED, "torch", expected, "none", help_text)
    return CheckResult("torch", Verdict.NOT_OK, "not installed", (finding,))


def _gpu() -> CheckResult:
    """Name the graphics cards without importing torch; having none is not an error."""
    on_cpu = "the smoke test runs on the CPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return CheckResult("GPU", Verdict.NOTE, f"hidden by CUDA_VISIBLE_DEVICES: {on_cpu}")
    program, listed = shutil.which("nvidia-smi"), ""
    if program:
        figures = "--query-gpu=name,memory.free,memory.total"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [program, figures, "--format=csv,noheader"]
            listed = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    cards = [line.split(", ") for line in listed.splitlines() if line.count(", ") == 2]
    if cards:
        found = "; ".join(f"{name}, {free} of {total} free" for name, free, total in cards)
        return CheckResult("GPU", Verdict.OK, found)
    has_driver = Path("/dev/nvidiactl").exists()
    unlisted = "a driver is installed, but nvidia-smi lists no GPU"
    return CheckResult("GPU", Verdict.NOTE, unlisted if has_driver else f"none: {on_cpu}")

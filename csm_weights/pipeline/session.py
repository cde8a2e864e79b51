"""One run of a command: what was asked, what it has found out so far, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_weights.config import HubEnvironment, folder_of, offline, user_path
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    UsageError,
    WrongContent,
    error_for,
    printable,
)
from csm_weights.manifest.paths import RECEIPTS, data_findings
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.pipeline.actions import Action
from csm_weights.pipeline.plan import Plan, Target, default_selection, make_plan
from csm_weights.pipeline.request import Request, find_manifest
from csm_weights.progress import Progress, label_for
from csm_weights.store import atomic, install, journal
from csm_weights.store.inspect import FileState, FileStatus, Paths, State, inspect
from csm_weights.store.leftovers import leftovers
from csm_weights.store.receipts import Receipt, VerifiedFile
from csm_weights.transfer.policy import HUB, SourcePolicy
from csm_weights.verify import gates

if TYPE_CHECKING:  # few runs attest or seal
    from csm_weights.verify.envelope import Attested
    from csm_weights.verify.seal import Sealed


@dataclass(frozen=True)
class StatusReport:
    """The state of the disk, and the plan that follows from it.

    `advice` says how to get what is missing. `refused` are the paths of artifacts that
    have the right digest and failed another gate. `also` is about what --with names.
    """

    state: State
    plan: Plan
    advice: str = ""
    error: CsmWeightsError | None = None
    refused: frozenset[str] = frozenset()
    also: tuple[StatusReport, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a command did, and what is verified now.

    `actions` are those taken, in order. `smoke` is the last smoke report of
    these very files; `smoke_is_known` says that it is an earlier run's. `sealed`
    are the files that were sealed, `attested` is what an attestation says of them.
    `also` are the outcomes for what --with names.
    """

    state: State
    actions: tuple[Action, ...] = ()
    notes: tuple[Finding, ...] = ()
    results: tuple[gates.GateResult, ...] = ()
    smoke: SmokeReport | None = None
    smoke_is_known: bool = False
    error: CsmWeightsError | None = None
    sealed: tuple[Sealed, ...] = ()
    attested: Attested | None = None
    also: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A result that is told in lines of text; a program gets `values`, by their keys in JSON."""

    model: str | None
    lines: Sequence[str]
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return "\n".join(map(printable, self.lines))


@dataclass
class Session:
    """One run of a command: what was asked, and what it has found out so far.

    `notes` are about what was wrong and has been mended.
    """

    manifest: Manifest
    paths: Paths
    chosen: tuple[Artifact, ...]
    policy: SourcePolicy
    request: Request
    known_bad: dict[Path, Finding] = field(default_factory=dict)
    good: dict[Path, frozenset[int]] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)

    def inspect(self) -> State:
        """Inspect what is on disk of the chosen artifacts; what was found wrong stays wrong."""
        known = self.known_bad, self.good, self.request.block_digests
        return inspect(self.manifest, self.chosen, self.paths, *known)

    def plan(self, target: Target) -> Plan:
        """Inspect the disk, and plan how the chosen artifacts get where `target` wants them.

        Raises WrongContent where a link would lead what is written out of the folders.
        """
        plan = make_plan(self.inspect(), target, self.policy)
        if not plan.is_done:
            folders = {artifact.path.rpartition("/")[0] for artifact in self.chosen}
            for base in (self.paths.staging, self.paths.destination):
                for folder in sorted({RECEIPTS, *folders}):
                    atomic.stay_inside(base / folder, base)
        return plan

    def receipt(self, artifact: Artifact, verified: VerifiedFile) -> Receipt:
        """Return the receipt of a file that has just been verified."""
        return receipt_of(verified, artifact.path, self.manifest.name)

    def install(self, verified: Path, directory: Path, receipt: Receipt) -> None:
        """Give a verified file its final name, and forget what was wrong under it."""
        install.install(verified, directory, receipt)
        final = directory / receipt.path
        self.known_bad.pop(final, None)
        journal.journal_path(final).unlink(missing_ok=True)

    def install_staged(self, artifact: Artifact, verified: VerifiedFile) -> None:
        """Give a verified partial its name in the staging folder."""
        self.install(verified.path, self.paths.staging, self.receipt(artifact, verified))

    def subject(self, artifact: Artifact, file: FileStatus) -> gates.Subject:
        """Return an inspected file as the gates take it."""
        return gates.Subject(artifact, file, self.paths.command("weights"))

    def gate(
        self, state: State, rehash: bool, staged: bool = False
    ) -> tuple[gates.GateResult, ...]:
        """Run every gate over the installed files; see `gates.check`.

        With `staged`, over the staged files in place of those that are not installed yet.
        """
        subjects = []
        for item in state.artifacts:
            is_installed = item.installed.state is FileState.VERIFIED
            file = item.staged if staged and not is_installed else item.installed
            subjects.append(self.subject(item.artifact, file))
        to_hash = gates.unhashed(subjects, rehash)
        label = label_for("verifying", [s.artifact.path for s in to_hash or subjects])
        with Progress(label, sum(s.edition.size for s in to_hash)) as progress:
            return tuple(gates.check(subjects, rehash, progress.advance))

    def verify(self, files: Sequence[tuple[Artifact, FileStatus]]) -> list[VerifiedFile | None]:
        """Hash files; a file that is wrong gives None, and counts as wrong from now on."""
        subjects = [self.subject(artifact, file) for artifact, file in files]
        label = label_for("verifying", [artifact.path for artifact, _ in files])
        with Progress(label, sum(s.edition.size for s in subjects)) as progress:
            found = gates.verify(subjects, progress.advance, self.request.block_digests)
        for file in found:
            if isinstance(file, gates.Rejected):
                self.known_bad[file.path], self.good[file.path] = file.finding(), file.good
        return [file if isinstance(file, VerifiedFile) else None for file in found]

    def remove_leftovers(self, state: State, is_staged: bool) -> bool:
        """Remove the leftovers of verified files, each durably; return whether there were any."""
        left = leftovers(state, is_staged)
        for path in left:
            with atomic.writing(path):
                path.unlink(missing_ok=True)
            atomic.sync(path.parent)
        return bool(left)


def begin(
    request: Request,
    choose: Callable[[Manifest], tuple[Artifact, ...]] | None = None,
    manifest: Manifest | None = None,
) -> Session:
    """Begin the run of a command: read the manifest, find the folders, choose the artifacts.

    `choose` takes the place of the request's own words, `manifest` of the one that it names.
    Raises UsageError for names that do not exist, ManifestInvalid, MissingInput.
    """
    manifest = manifest or find_manifest(request.root, request.model)
    if request.revision:
        manifest = replace(manifest, revision=request.revision)
    environment = HubEnvironment.read()
    cache = environment.cache if manifest.repo else None
    paths = Paths.of(manifest, request.root, request.dest, cache)
    destination = paths.destination.resolve()
    if request.dest and destination == destination.parent:
        own = f"a folder of its own is expected, such as --dest models/{manifest.name}"
        raise UsageError(f"--dest {request.dest} is the root of the file system; {own}")
    staging = request.root / user_path(request.staging or manifest.staging)
    shelves = _shelves(request)
    beside = paths.destination / RECEIPTS / "staging"
    if not request.staging and atomic.why_read_only(staging) and not atomic.why_read_only(beside):
        # A checkout that may only be read, as in a container: what is unfinished, and its
        # state, lies beside the installed files. What was staged before is copied.
        shelves, staging = [staging, *shelves], beside
    paths = replace(paths, staging=staging, shelves=tuple(shelves), options=request.options)
    if choose:
        chosen = choose(manifest)
    elif words := request.only or manifest.default:
        chosen = manifest.select(words)
    else:
        chosen = default_selection(inspect(manifest, manifest.artifacts, paths, {}))
    taken = {artifact.path for artifact in chosen}
    # Weights need the config.json that describes them.
    needed = {"config"} if any(a.is_weights for a in chosen) else set()
    chosen = tuple(a for a in manifest.artifacts if a.path in taken or a.format in needed)
    for folder in (paths.staging, paths.destination):
        if findings := data_findings(paths.root, folder, [a.path for a in chosen]):
            raise WrongContent("a model cannot be installed there", findings[:20])
    return Session(manifest, paths, chosen, _policy(request, manifest, environment), request)


def _shelves(request: Request) -> list[Path]:
    """Return the folders of this machine that a request names as sources."""
    return [*filter(None, map(folder_of, request.urls)), *map(user_path, request.caches)]


def _policy(request: Request, manifest: Manifest, environment: HubEnvironment) -> SourcePolicy:
    """Return which sources a request allows, and why others are not asked."""
    word, remote, problems = request.source, list[str](), list[Finding]()
    remote += [url for url in request.urls if not folder_of(url)]
    for shelf in _shelves(request):
        if not shelf.is_dir():
            mend = "insert the disk, or mount it"
            problems.append(Finding(Kind.MISSING, str(shelf), "a folder", "none", mend))
    if environment.offline and remote:
        problems.append(offline(remote[0], "a mirror"))
        remote = []
    if word in ("auto", "hf") and manifest.repo:
        problem = environment.problem(manifest.repo, manifest.gated)
        if problem:
            problems.append(problem)
        else:
            remote.append(HUB)
    elif word == "hf":
        raise UsageError(f"{manifest.where} names no repository of the Hub")
    return SourcePolicy(
        chunks=word in ("auto", "chunks"),
        cache=word in ("auto", "hf"),
        shelves=bool(_shelves(request)),
        remote=tuple(remote),
        problems=tuple(problems),
        remote_first=word == "hf",
        consume=request.consume,
    )


def gate_error(results: Iterable[gates.GateResult]) -> CsmWeightsError | None:
    """Return the one error for all that the gates found, each finding once."""
    findings = dict.fromkeys(f for r in results for f in r.findings)
    return error_for("verification failed", findings) if findings else None


def receipt_of(verified: VerifiedFile, path: str, model: str) -> Receipt:
    """Return the receipt of a file that has just been verified, by this tool."""
    found = (verified.size, verified.sha256, verified.pieces, verified.fingerprint)
    made = (now(), f"csm-weights {version('csm-weights')}")
    return Receipt(path, model, *found, *made, verified.git_sha1, verified.blocks)


def now() -> str:
    """Return the time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""What a command was asked for, and what it comes to: the values all commands share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from csm_weights.config import HubEnvironment, check_mirror
from csm_weights.errors import CsmWeightsError, Finding, Kind, UsageError
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.types import RECEIPTS, Artifact, Manifest
from csm_weights.pipeline.plan import (
    HUB,
    Plan,
    SourcePolicy,
    Step,
    Target,
    default_selection,
    make_plan,
    with_config,
)
from csm_weights.store import atomic, install, receipts
from csm_weights.store.inspect import Paths, State, inspect
from csm_weights.store.receipts import Receipt, SmokeReport
from csm_weights.transfer.assemble import VerifiedFile
from csm_weights.verify.gates import GateResult
from csm_weights.verify.seal import Sealed
from csm_weights.verify.statement import Attested

#: Words for where pieces may come from; auto is every source there is.
SOURCES = ("auto", "chunks", "hf", "mirror")

#: A commit, or the name of a branch or tag.
REVISION = re.compile(r"[\w][\w./-]{0,200}", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What is asked for: a model, by name or manifest path, below a repository root.

    `only` are words that `Manifest.select` knows; none means the default
    selection. `dest` overrides the manifest's destination, `revision` its
    commit of the Hub's repository. `source` is a word of `SOURCES`, `urls`
    are mirrors. `consume` lets parts go as their file grows.
    """

    root: Path
    model: str = "csm-1b"
    only: tuple[str, ...] = ()
    dest: str | None = None
    source: str = "auto"
    urls: tuple[str, ...] = ()
    revision: str | None = None
    consume: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UsageError(f"no source called {self.source!r}; there are {', '.join(SOURCES)}")
        for url in self.urls:
            check_mirror(url)
        if self.urls and self.source in ("chunks", "hf"):
            raise UsageError(f"--source={self.source} asks no mirror; leave --url out, or say auto")
        if self.source == "mirror" and not self.urls:
            raise UsageError("--source=mirror needs --url=https://...")
        if self.consume and self.source not in ("auto", "chunks"):
            raise UsageError(f"--consume is about parts; --source={self.source} takes none")
        if self.revision and not REVISION.fullmatch(self.revision):
            raise UsageError(f"--revision {self.revision!r} is not a commit, branch or tag")


@dataclass(frozen=True)
class StatusReport:
    """A look at the disk and the plan that follows from it.

    `advice` says how to get what is missing.
    """

    state: State
    plan: Plan
    advice: str = ""
    error: CsmWeightsError | None = None


@dataclass(frozen=True)
class Outcome:
    """What a command did and what is proven now.

    `acts` are the steps taken, in order. `smoke` is the last smoke report of
    these very files, perhaps an earlier run's. `sealed` are the files that were
    sealed, `attested` is what an attestation proved of them.
    """

    state: State
    acts: tuple[Step, ...] = ()
    notes: tuple[Finding, ...] = ()
    results: tuple[GateResult, ...] = ()
    smoke: SmokeReport | None = None
    error: CsmWeightsError | None = None
    sealed: tuple[Sealed, ...] = ()
    attested: Attested | None = None


@dataclass
class Session:
    """One run of a command: what was asked, and what it has learnt so far."""

    manifest: Manifest
    paths: Paths
    chosen: tuple[Artifact, ...]
    sourcing: SourcePolicy
    known_bad: dict[Path, Finding] = field(default_factory=dict)
    good: dict[Path, frozenset[int]] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)

    def inspect(self) -> State:
        """What is on disk of the chosen artifacts, with what this run has refuted."""
        return inspect(self.manifest, self.chosen, self.paths, self.known_bad, self.good)

    def plan(self, state: State, goal: Target) -> Plan:
        """How the chosen artifacts get where `goal` wants them, from the sources of this run.

        Raises WrongContent where a link would lead what is written out of the folders.
        """
        made = make_plan(state, goal, self.sourcing)
        if not made.is_done:
            for base in (self.paths.staging, self.paths.destination):
                for path in (f"{RECEIPTS}/receipt", *(a.path for a in self.chosen)):
                    atomic.stay_inside((base / path).parent, base)
        return made

    def note(self, findings: Iterable[Finding]) -> None:
        """Remembers what was wrong and has been mended; each thing once."""
        self.notes += [f for f in dict.fromkeys(findings) if f not in self.notes]

    def receipt(self, artifact: Artifact, proven: VerifiedFile) -> Receipt:
        """The receipt of a file that has just been proven; size in bytes."""
        return Receipt(
            path=artifact.path,
            model=self.manifest.name,
            size=proven.fingerprint.size,
            sha256=proven.sha256,
            git_sha1=proven.git_sha1,
            pieces=proven.records,
            fingerprint=proven.fingerprint,
            proven_at=now(),
            tool=f"csm-weights {version('csm-weights')}",
        )

    def install(self, proven: Path, directory: Path, receipt: Receipt) -> None:
        """Gives a proven file its final name; what was known of that name is over."""
        install.install(proven, directory, receipt)
        final = directory / receipt.path
        self.known_bad.pop(final, None)
        receipts.journal_path(final).unlink(missing_ok=True)


def find_manifest(root: Path, model: str) -> Manifest:
    """The manifest called `model` in manifests/, or at that path.

    Raises UsageError, naming those there are, when there is none.
    """
    by_path = model.endswith(".toml") or "/" in model
    path = Path(model) if by_path else root / "manifests" / f"{model}.toml"
    if not by_path and path_problem(model):
        raise UsageError(f"{model!r} is not a model's name")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (root / "manifests").glob("*.toml")))
        raise UsageError(
            f"no manifest for model {model!r}; there are {known}, or give a .toml path"
        )
    return load(path)


def begin(request: Request) -> Session:
    """The run of a command: its manifest, its folders, and what is chosen.

    Raises UsageError for names that do not exist, ManifestInvalid, MissingInput.
    """
    manifest = find_manifest(request.root, request.model)
    if request.revision:
        manifest = replace(manifest, revision=request.revision)
    environment = HubEnvironment.read()
    cache = environment.cache if manifest.repo else None
    paths = Paths.of(manifest, request.root, request.dest, cache)
    words = request.only or manifest.default
    chosen = manifest.select(words) if words else ()
    if not chosen:
        chosen = default_selection(inspect(manifest, manifest.artifacts, paths, {}))
    chosen = with_config(manifest, chosen)
    return Session(manifest, paths, chosen, _sourcing(request, manifest, environment))


def _sourcing(request: Request, manifest: Manifest, environment: HubEnvironment) -> SourcePolicy:
    """Which sources a request allows, and which of them are known to give nothing."""
    word, far, problems = request.source, list(request.urls), []
    if environment.offline and far:
        finding = Finding(Kind.OFFLINE, far[0], "a mirror that may be asked", "HF_HUB_OFFLINE")
        problems.append(finding)
        far = []
    if word in ("auto", "hf") and manifest.repo:
        problem = environment.problem(manifest.repo, manifest.gated)
        if problem:
            problems.append(problem)
        else:
            far.append(HUB)
    elif word == "hf":
        raise UsageError(f"{manifest.where} names no repository of the Hub")
    return SourcePolicy(
        parts=word in ("auto", "chunks"),
        cache=word in ("auto", "hf"),
        far=tuple(far) if word != "chunks" else (),
        problems=tuple(problems),
        far_first=word == "hf",
        consume=request.consume,
    )


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""What a command was asked for, and what it comes to: the values all commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from csm_weights import place, records
from csm_weights.assemble import Assembled
from csm_weights.errors import CsmWeightsError, Finding, UsageError
from csm_weights.gates import GateResult
from csm_weights.manifest import Artifact, Manifest, load, path_problem
from csm_weights.plan import Plan, Step, default_selection, with_config
from csm_weights.records import Receipt, SmokeReport
from csm_weights.state import Places, State, look


@dataclass(frozen=True)
class Request:
    """What is asked for: a model, by name or manifest path, below a repository root.

    `only` are words that `Manifest.select` knows; none means the default
    selection. `dest` overrides the manifest's destination.
    """

    root: Path
    model: str = "csm-1b"
    only: tuple[str, ...] = ()
    dest: str | None = None


@dataclass(frozen=True)
class Survey:
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
    these very files, perhaps an earlier run's.
    """

    state: State
    acts: tuple[Step, ...] = ()
    notes: tuple[Finding, ...] = ()
    results: tuple[GateResult, ...] = ()
    smoke: SmokeReport | None = None
    error: CsmWeightsError | None = None


@dataclass
class Run:
    """One run of a command: what was asked, and what it has learnt so far."""

    manifest: Manifest
    places: Places
    chosen: tuple[Artifact, ...]
    refuted: dict[Path, Finding] = field(default_factory=dict)

    def look(self) -> State:
        """What is on disk of the chosen artifacts, with what this run has refuted."""
        return look(self.manifest, self.chosen, self.places, self.refuted)

    def receipt(self, artifact: Artifact, proven: Assembled) -> Receipt:
        """The receipt of a file that has just been proven; size in bytes."""
        return Receipt(
            path=artifact.path,
            model=self.manifest.name,
            size=proven.fingerprint.size,
            sha256=proven.sha256,
            pieces=proven.records,
            fingerprint=proven.fingerprint,
            proven_at=now(),
            tool=f"csm-weights {version('csm-weights')}",
        )

    def install(self, proven: Path, directory: Path, receipt: Receipt) -> None:
        """Gives a proven file its final name; what was known of that name is over."""
        place.install(proven, directory, receipt)
        final = directory / receipt.path
        self.refuted.pop(final, None)
        records.journal_path(final).unlink(missing_ok=True)


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


def begin(request: Request) -> Run:
    """The run of a command: its manifest, its folders, and what is chosen.

    Raises UsageError for names that do not exist, ManifestInvalid, MissingInput.
    """
    manifest = find_manifest(request.root, request.model)
    places = Places.of(manifest, request.root, request.dest)
    chosen = manifest.select(request.only) if request.only else ()
    if not chosen:
        chosen = default_selection(look(manifest, manifest.artifacts, places, {}))
    return Run(manifest, places, with_config(manifest, chosen))


def now() -> str:
    """The time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

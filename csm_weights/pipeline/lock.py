"""Manifests from what is known: the Hub's own metadata, or files that are proven.

Like `pipeline`, this module knows an order and does nothing by itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from csm_weights.concurrency import OnProgress
from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, UsageError, WrongContent, error_for
from csm_weights.hashing import Digests, HashJob, measure
from csm_weights.manifest import pin
from csm_weights.manifest.digests import Whole, digest_findings
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline.checks import gate, gate_error, subject_of
from csm_weights.pipeline.request import REVISION, Request, begin
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import ArtifactState, State
from csm_weights.verify import gates

if TYPE_CHECKING:
    from csm_weights.transfer.hub_metadata import Listing

#: A repository of the Hub; what else it asks of a name, its client says.
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def lock(request: Request, dry: bool, size: str = "") -> str:
    """Fills in the digests that proven files in place show; returns the difference.

    A file without pieces that is larger than `size` gets some of that size,
    or of larger ones where there would be too many. Raises the gates' error
    unless every chosen file is proven.
    """
    wanted = pin.parse_size(size or pin.LOCKED_SIZE)
    state = begin(request).look()
    if error := gate_error(gate(state, rehash=False)):
        raise error
    manifest = state.manifest
    cuts = _cuts(state, wanted)
    with Progress("hashing", sum(item.placed.size or 0 for item in state.artifacts)) as progress:
        others = [item for item in state.artifacts if item.artifact.path not in cuts]
        for artifact in _shown(others, manifest.name, progress.advance):
            manifest = pin.with_artifact(manifest, artifact)
        items = [item for item in state.artifacts if item.artifact.path in cuts]
        for artifact in _in_pieces(items, cuts, manifest.name, progress.advance):
            manifest = pin.with_artifact(manifest, artifact)
    difference = _write(Path(manifest.where), manifest, dry)
    return difference or f"{manifest.where} says all that the files show"


def _cuts(state: State, piece_size: int) -> dict[str, list[tuple[int, int]]]:
    """The ranges, by path, that files without pieces are to be cut into."""
    artifacts = [
        item.artifact
        for item in state.artifacts
        if not item.artifact.pieces and item.placed.size == item.artifact.size
    ]
    piece_size = pin.lock_size([artifact.size for artifact in artifacts], piece_size)
    return {
        a.path: pin.tiling(a.size, piece_size)
        for a in artifacts
        # A part's name is longer than the file's, perhaps by too much.
        if a.size > piece_size and not path_problem(pin.part_of(a, state.manifest.name, 0))
    }


def _shown(items: Sequence[ArtifactState], model: str, on_progress: OnProgress) -> list[Artifact]:
    """The entries of files that keep their pieces, with what hashing them shows."""
    proofs = gates.prove([subject_of(i.artifact, i.placed, model) for i in items], on_progress)
    _require([finding for proof in proofs for finding in proof.findings])
    return [
        pin.locked(pin.recomputed(item.artifact), proof.sha256 or "")
        if item.placed.size == item.artifact.size
        else item.artifact
        for item, proof in zip(items, proofs, strict=True)
    ]


def _in_pieces(
    items: Sequence[ArtifactState],
    cuts: Mapping[str, list[tuple[int, int]]],
    model: str,
    on_progress: OnProgress,
) -> list[Artifact]:
    """The entries of files with pieces, taken in the read that proves the whole once more."""
    jobs = [
        HashJob(i.placed.path, i.artifact.size, tuple(cuts[i.artifact.path]), True, True)
        for i in items
    ]
    found = measure(jobs, on_progress)
    pairs = list(zip(items, found, strict=True))
    _require([finding for item, measured in pairs for finding in _wrong(item, measured)])
    return [
        pin.with_pieces(
            pin.locked(pin.recomputed(item.artifact), measured.whole or ""),
            model,
            cuts[item.artifact.path],
            measured.ranges,
        )
        for item, measured in pairs
    ]


def _wrong(item: ArtifactState, found: Digests) -> list[Finding]:
    artifact, whole = item.artifact, Whole(found.whole or "", found.git_sha1)
    return digest_findings(artifact, artifact.editions[0], whole, str(item.placed.path))


def _require(findings: Sequence[Finding]) -> None:
    if findings:
        raise error_for("nothing is locked to files that are not right", findings)


def lock_repo(root: Path, repo: str, revision: str, only: str, model: str, dry: bool) -> str:
    """Writes the manifest of any repository of the Hub, from the Hub's own metadata.

    `revision` is a commit, branch or tag, "" the main branch; `only` are
    globs, comma-separated. `model` is a name in manifests/ or the path of a
    manifest, "" the repository's name. One that is there already keeps what
    it knows of files that are still the same. Returns what is new. Raises
    UsageError, also for a manifest of another repository; AccessRefused,
    NetworkFailed, MissingInput or WrongContent for what the Hub answers.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"--repo {repo!r} is not ORG/NAME; datasets and spaces are not supported")
    if revision and not REVISION.fullmatch(revision):
        raise UsageError(f"--revision {revision!r} is not a commit, branch or tag")
    path = _manifest_path(root, repo, model)
    known = _known(path, repo)
    globs = [glob for word in only.split(",") if (glob := word.strip())]
    manifest = _manifest(known or _empty(path, repo), _listing(repo, revision, globs))
    difference = _write(path, manifest, dry)
    if known:
        return difference or f"{path} says all that the Hub tells"
    return render(manifest) if dry else _summary(manifest, model or path.stem)


def _manifest_path(root: Path, repo: str, model: str) -> Path:
    """Where the manifest of a repository is, or will be."""
    fitted = re.sub(r"[^a-z0-9._-]", "-", repo.partition("/")[2].lower())[:64].strip("._-")
    name = model or fitted
    path = Path(name) if "/" in name or name.endswith(".toml") else None
    if path is not None and path.suffix != ".toml":
        raise UsageError(f"--model {name!r}: the path of a manifest ends in .toml")
    path = path or root / "manifests" / f"{name}.toml"
    if problem := pin.name_problem(path.stem) or path_problem(path.stem):
        raise UsageError(f"--model {path.stem!r}: {problem}")
    return path


def _known(path: Path, repo: str) -> Manifest | None:
    """The manifest that is there already; raises UsageError for one of another repository."""
    if not path.exists():
        return None
    known = load(path)
    if known.repo != repo:
        of = f"of {known.repo}" if known.repo else "of no repository of the Hub"
        raise UsageError(f"{path} is {of}; choose another name with --model")
    return known


def _empty(path: Path, repo: str) -> Manifest:
    """A manifest of a repository's name, without files yet."""
    words = "Evidence marks: H the Hub's own metadata, A recomputed from a proven file."
    return Manifest(
        name=path.stem,
        description=f"{repo} as the Hub lists it. {words}",
        staging=f"output/{path.stem}",
        destination=f"models/{path.stem}",
        artifacts=(),
        repo=repo,
        default=("all",),
        where=str(path),
    )


def _listing(repo: str, revision: str, globs: Sequence[str]) -> Listing:
    """What the Hub tells; names that no manifest may have are told on stderr."""
    environment = HubEnvironment.read()
    if problem := environment.problem(repo, gated=False):
        raise error_for(f"{repo}: the Hub may not be asked", [problem])
    from csm_weights.transfer.hub import HubCredentials
    from csm_weights.transfer.hub_metadata import list_repo

    account = HubCredentials.from_environment(environment)
    with Progress("asking the Hub", 0) as progress:
        listing = list_repo(account, repo, revision or None, globs, progress.log)
    with Progress("left out", 0) as progress:
        for finding in listing.left_out:
            progress.log(finding.line())
    return listing


def _manifest(base: Manifest, listing: Listing) -> Manifest:
    """The manifest of what the Hub tells, with what `base` knows of the same files."""
    known = {artifact.path: artifact for artifact in base.artifacts}
    order = {path: number for number, path in enumerate(known)}
    artifacts, findings = [], []
    for told in sorted(listing.artifacts, key=lambda a: order.get(a.path, len(order))):
        before = known.get(told.path, told)
        same = pin.is_same(before, told)
        if base.revision != listing.commit:
            # At another commit only an id that both know tells that it is the same file.
            same = same is True
        elif same is False:
            findings.append(_contradiction(base.where, before, told))
        naming = replace(told, group=before.group, format=before.format)
        artifacts.append(naming if same is False else pin.with_told(before, told))
    if findings:
        raise WrongContent(f"commit {listing.commit} is not what it was", findings)
    words = {"all", *(word for a in artifacts for word in (a.group, a.path))}
    default = tuple(word for word in base.default if word in words)
    return replace(
        base,
        revision=listing.commit,
        gated=listing.gated,
        artifacts=tuple(artifacts),
        default=default or (("all",) if base.default else ()),
    )


def _contradiction(where: str, known: Artifact, told: Artifact) -> Finding:
    ids = [a.sha256 or a.blob_id or a.git_sha1 or "pieces" for a in (known, told)]
    expected, found = (f"{a.size:,} bytes, {i}" for a, i in zip((known, told), ids, strict=True))
    help_text = "one of the two is not true; move the manifest away to believe the Hub"
    return Finding(Kind.CHANGED, f"{where}: {known.path}", expected, found, help_text)


def _write(path: Path, manifest: Manifest, dry: bool) -> str:
    """Writes a manifest unless it is there already, and returns the difference."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = (before.splitlines(keepends=True), render(manifest).splitlines(keepends=True))
    difference = "".join(difflib.unified_diff(*lines, str(path), "locked"))
    if difference and not dry:
        atomic.write_manifest(path, manifest)
    return difference


def _summary(manifest: Manifest, model: str) -> str:
    count, total = len(manifest.artifacts), sum(a.size for a in manifest.artifacts)
    return (
        f"{manifest.where}: {count:,} files, {total:,} bytes, commit {manifest.revision}\n"
        f"what they must be is the Hub's word; now run inv weights --model {model}"
    )

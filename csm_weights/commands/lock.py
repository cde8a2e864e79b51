"""Manifests from the Hub's own metadata, or from verified files."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.concurrency import OnProgress
from csm_weights.errors import Finding, error_for
from csm_weights.files import read_file
from csm_weights.hashing import HashJob, measure
from csm_weights.manifest import pin
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.render import render
from csm_weights.manifest.types import MAX_TEXT, Artifact, Manifest
from csm_weights.pipeline import repo_manifest
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Summary, begin, gate_error
from csm_weights.progress import Progress
from csm_weights.store.inspect import ArtifactState, State
from csm_weights.store.manifest_file import write_manifest
from csm_weights.store.receipts import VerifiedFile
from csm_weights.verify import gates


def lock(request: Request, dry: bool, size: str = "") -> Summary:
    """Add the digests of the installed, verified files; return the difference.

    A file without pieces that is larger than `size` gets some of that size,
    or of larger ones where there would be too many. Raises the gates' error
    unless every chosen file is verified.
    """
    piece_size = pin.parse_size(size or pin.LOCKED_SIZE)
    session = begin(request)
    state = session.inspect()
    if error := gate_error(session.gate(state, rehash=False)):
        raise error
    manifest, cuts = state.manifest, _cuts(state, piece_size)
    to_cut = [item for item in state.artifacts if item.artifact.path in cuts]
    others = [item for item in state.artifacts if item.artifact.path not in cuts]
    with Progress("hashing", sum(item.installed.size or 0 for item in state.artifacts)) as progress:
        subjects = [session.subject(item.artifact, item.installed) for item in others]
        found = gates.verify(subjects, progress.advance)
        _require([f for file in found if isinstance(file, gates.Rejected) for f in file.findings])
        for item, file in zip(others, found, strict=True):
            if isinstance(file, VerifiedFile) and file.size == item.artifact.size:
                artifact = pin.recomputed(item.artifact, file.sha256)
                manifest = pin.with_artifact(manifest, artifact)
        for artifact in _in_pieces(to_cut, cuts, manifest.name, progress.advance):
            manifest = pin.with_artifact(manifest, artifact)
    known = f"{manifest.where}: nothing to add, it has every digest of these files"
    return _write(Path(manifest.where), manifest, dry, known)


def _cuts(state: State, piece_size: int) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges, by path, of the pieces that files without pieces get."""
    artifacts = [
        item.artifact
        for item in state.artifacts
        if not item.artifact.pieces and item.installed.size == item.artifact.size
    ]
    piece_size = pin.lock_size([artifact.size for artifact in artifacts], piece_size)
    return {
        a.path: pin.tiling(a.size, piece_size)
        for a in artifacts
        # A chunk file's name is longer than the file's, perhaps by too much.
        if a.size > piece_size and not path_problem(pin.chunk_file_of(a, state.manifest.name, 0))
    }


def _in_pieces(
    items: Sequence[ArtifactState],
    cuts: Mapping[str, list[tuple[int, int]]],
    model: str,
    on_progress: OnProgress,
) -> list[Artifact]:
    """Return the entries of files with pieces, hashed in one read with the whole."""
    jobs = [
        HashJob(i.installed.path, i.artifact.size, tuple(cuts[i.artifact.path]), True, True)
        for i in items
    ]
    artifacts, wrong = [], []
    for item, measured in zip(items, measure(jobs, on_progress), strict=True):
        artifact, whole = item.artifact, measured.whole or ""
        digests = (whole, measured.git_sha1)
        wrong += artifact.digest_findings(artifact.editions[0], *digests, item.installed.path)
        pinned = pin.recomputed(artifact, whole)
        artifacts.append(pin.with_pieces(pinned, model, cuts[artifact.path], measured.ranges))
    _require(wrong)
    return artifacts


def _require(findings: Sequence[Finding]) -> None:
    if findings:
        raise error_for("no digest was written: verification failed", findings)


def lock_repo(
    root: Path,
    repo: str,
    revision: str,
    only: str,
    model: str,
    dry: bool,
    patience: float | None = None,
) -> Summary:
    """Write the manifest of any repository of the Hub, from the Hub's own metadata.

    `revision` is a commit, branch or tag, "" the main branch; `only` are
    globs, comma-separated. `model` is a name in manifests/ or the path of a
    manifest, "" the repository's name. One that is there already keeps what
    it knows of files that are still the same. `patience` is how many seconds
    the Hub may give nothing. Returns what is new. Raises
    UsageError, also for a manifest of another repository; AccessRefused,
    NetworkFailed, MissingInput or WrongContent for what the Hub answers.
    """
    path = repo_manifest.path_of(root, repo, revision, model)
    is_known = path.exists()
    globs = [glob for word in only.split(",") if (glob := word.strip())]
    manifest = repo_manifest.from_hub(path, repo, revision, globs, patience)
    known = f"{path}: nothing to add, it has all that the Hub reports"
    done = _write(path, manifest, dry, known)
    if is_known or dry:
        return done if is_known else replace(done, lines=render(manifest).splitlines())
    count, total = len(manifest.artifacts), sum(a.size for a in manifest.artifacts)
    lines = [
        f"{manifest.where}: {count:,} files, {total:,} bytes, commit {manifest.revision}",
        "these are the sizes and digests that the Hub reported",
        f"next: inv weights --model {model or path.stem}",
    ]
    return replace(done, lines=lines)


def _write(path: Path, manifest: Manifest, dry: bool, known: str) -> Summary:
    """Write a manifest unless it is there already; return the difference, or what is `known`."""
    before = read_file(path, MAX_TEXT, "a manifest").decode() if path.exists() else ""
    lines = (before.splitlines(keepends=True), render(manifest).splitlines(keepends=True))
    difference = "".join(difflib.unified_diff(*lines, str(path), "locked"))
    if difference and not dry:
        write_manifest(path, manifest)
    values = {"dry": dry, "manifest": path, "difference": difference}
    return Summary(manifest.name, difference.splitlines() or [known], values)

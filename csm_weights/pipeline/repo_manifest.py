"""The manifest of any repository of the Hub, made from the Hub's own metadata."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, UsageError, WrongContent, error_for
from csm_weights.manifest import pin
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline.request import REVISION
from csm_weights.progress import Progress

if TYPE_CHECKING:
    from csm_weights.transfer.hub_metadata import Listing

#: The name of a repository of the Hub.
_REPO = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def path_of(root: Path, repo: str, revision: str = "", model: str = "") -> Path:
    """Return the path of a repository's manifest below `root`; it need not exist.

    `model` is a name in manifests/ or the path of a manifest, "" the
    repository's name. Raises UsageError for a name that cannot be one.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"--repo {repo!r} is not ORG/NAME; datasets and spaces are not supported")
    if revision and not REVISION.fullmatch(revision):
        raise UsageError(f"--revision {revision!r} is not a commit, branch or tag")
    fitted = re.sub(r"[^a-z0-9._-]", "-", repo.partition("/")[2].lower())[:64].strip("._-")
    name = model or fitted
    path = Path(name) if "/" in name or name.endswith(".toml") else None
    if path is not None and path.suffix != ".toml":
        raise UsageError(f"--model {name!r}: the path of a manifest ends in .toml")
    path = path or root / "manifests" / f"{name}.toml"
    if problem := pin.name_problem(path.stem) or path_problem(path.stem):
        raise UsageError(f"--model {path.stem!r}: {problem}")
    return path


def from_hub(
    path: Path, repo: str, revision: str, globs: Sequence[str], patience: float | None = None
) -> Manifest:
    """Return the manifest that the Hub's metadata give for the files that match `globs`.

    A manifest at `path` keeps what it knows of files that are still the same;
    nothing is written, and names that no manifest may have are logged. `revision`
    is a commit, branch or tag, "" the main branch; `patience` is how many seconds
    the Hub may give nothing. Raises UsageError where the manifest at `path` is of
    another repository; AccessRefused, NetworkFailed, MissingInput or WrongContent
    for what the Hub answers.
    """
    if path.exists():
        base = load(path)
    else:
        words = "Evidence marks: H the Hub's own metadata, A recomputed from a verified file."
        base = Manifest(
            name=path.stem,
            description=f"{repo} as the Hub lists it. {words}",
            staging=f"output/{path.stem}",
            destination=f"models/{path.stem}",
            artifacts=(),
            repo=repo,
            default=("all",),
            where=str(path),
        )
    if base.repo != repo:
        of = f"of {base.repo}" if base.repo else "of no repository of the Hub"
        raise UsageError(f"{path} is {of}; choose another name with --model")
    environment = HubEnvironment.read()
    if problem := environment.problem(repo, gated=False):
        raise error_for(f"{repo}: the Hub cannot be asked", [problem])
    from csm_weights.transfer.http.auth import HubCredentials
    from csm_weights.transfer.hub_metadata import list_repo

    credentials = HubCredentials.from_environment(environment)
    with Progress("asking the Hub") as progress:
        listing = list_repo(credentials, repo, revision or None, globs, progress.log, patience)
    for finding in listing.left_out:
        Progress("left out").log(finding.line())
    return _manifest(base, listing)


def _manifest(base: Manifest, listing: Listing) -> Manifest:
    """Return the manifest of what the Hub reports, with what `base` knows of the same files."""
    known = {artifact.path: artifact for artifact in base.artifacts}
    order = {path: number for number, path in enumerate(known)}
    artifacts, findings = [], []
    for reported in sorted(listing.artifacts, key=lambda a: order.get(a.path, len(order))):
        before = known.get(reported.path, reported)
        same = pin.is_same(before, reported)
        if base.revision != listing.commit:
            # At another commit only an id that both know tells that it is the same file.
            same = same is True
        elif same is False:
            where = f"{base.where}: {before.path}"
            mend = "if the Hub is right, move the manifest away and run the command again"
            findings.append(Finding(Kind.DIFFERENT, where, _ids(before), _ids(reported), mend))
        naming = replace(reported, group=before.group, format=before.format)
        artifacts.append(naming if same is False else pin.with_reported(before, reported))
    if findings:
        raise WrongContent(f"commit {listing.commit} is not as the manifest has it", findings)
    words = {"all", *(word for a in artifacts for word in (a.group, a.path))}
    default = tuple(word for word in base.default if word in words)
    return replace(
        base,
        revision=listing.commit,
        gated=listing.gated,
        artifacts=tuple(artifacts),
        default=default or (("all",) if base.default else ()),
    )


def _ids(artifact: Artifact) -> str:
    one = artifact.sha256 or artifact.blob_id or artifact.git_sha1 or "pieces"
    return f"{artifact.size:,} bytes, {one}"

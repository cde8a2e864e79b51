"""Compare the digests of a whole file with what a manifest pins."""

from __future__ import annotations

from dataclasses import dataclass

from csm_weights.errors import Finding, Kind
from csm_weights.hashing import blob_id
from csm_weights.manifest.types import Artifact, Edition


@dataclass(frozen=True)
class Whole:
    """The hex digests of a whole file; `git_sha1` only where it was asked for."""

    sha256: str
    git_sha1: str | None = None


def digest_findings(
    artifact: Artifact, edition: Edition, found: Whole, where: str
) -> list[Finding]:
    """What a whole file's digests break of what is pinned: the sha256, the Hub's ids.

    The ids are those of the pinned edition; alternatives have none.
    """
    findings, digest = [], found.sha256
    if edition.sha256 not in (None, digest):
        findings.append(_wrong_digest(where, f"sha256 {edition.sha256}", f"sha256 {digest}"))
    blob = blob_id(digest, edition.size)
    if edition.size == artifact.size and artifact.blob_id not in (None, blob):
        findings.append(_wrong_digest(where, f"Hub blob id {artifact.blob_id}", f"blob id {blob}"))
    if artifact.is_git_proven and edition.sha256 is None and not _is(artifact.git_sha1, found):
        ids = (f"git blob id {artifact.git_sha1}", f"git blob id {found.git_sha1}")
        findings.append(_wrong_digest(where, *ids))
    return findings


def _is(git_sha1: str | None, found: Whole) -> bool:
    return git_sha1 is not None and git_sha1 == found.git_sha1


def _wrong_digest(where: str, expected: str, found: str) -> Finding:
    help_text = "this is not the published file; if its parts are all right, the manifest is not"
    return Finding(Kind.WRONG_DIGEST, where, expected, found, help_text)

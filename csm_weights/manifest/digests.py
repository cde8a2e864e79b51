"""Compare the digests of a whole file with what a manifest pins."""

from csm_weights.errors import Finding, Kind
from csm_weights.hashing import blob_id
from csm_weights.manifest.types import Artifact, Edition


def digest_findings(
    artifact: Artifact, edition: Edition, sha256: str, git_sha1: str | None, where: object
) -> list[Finding]:
    """Return a finding for each pinned digest of an edition that a file does not have.

    `sha256` and `git_sha1` are the hex digests of the whole file; the second
    is None where it was not taken. The Hub's ids are those of the pinned
    edition; alternatives have none.
    """
    pairs = [("sha256", edition.sha256, sha256)]
    if edition.size == artifact.size:
        pairs.append(("Hub blob id", artifact.blob_id, blob_id(sha256, edition.size)))
    if artifact.is_pinned_by_git and edition.sha256 is None:
        pairs.append(("git blob id", artifact.git_sha1 or "one", git_sha1 or "none"))
    mend = "this is not the published file; if its chunk files are all right, the manifest is not"
    return [
        Finding(Kind.WRONG_DIGEST, str(where), f"{name} {pinned}", f"{name} {found}", mend)
        for name, pinned, found in pairs
        if pinned not in (None, found)
    ]

"""Make manifest entries: sizes and names of chunk files, digests found or reported."""

import re
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import UsageError
from csm_weights.hashing import blob_id, git_sha1
from csm_weights.manifest.paths import NAME
from csm_weights.manifest.types import WEIGHT_FORMATS, Artifact, Manifest, Piece

#: Default size of a chunk file in bytes: below the 2 GB that GitHub takes, and that of
#: `split -b 1G`.
PIECE_SIZE = 1 << 30

#: As many two-letter suffixes as split(1) gives out before it lengthens them.
MAX_CHUNK_FILES = 25 * 26

#: Default size in bytes of the pieces that `lock` adds: what one repair fetches.
LOCKED_SIZE = "64MiB"

#: Pieces of one manifest at most, so that its text stays below what `parse` takes.
MAX_PIECES = 10_000


def suffix(index: int) -> str:
    """Return the two letters that split(1) gives chunk file `index`: aa, ab, ..., yz."""
    letters = string.ascii_lowercase
    return letters[index // 26] + letters[index % 26]


def group_of(name: str) -> str:
    """Return a word for --only: that of the known ending, else the file's stem."""
    known = {ending: word for word, ending in WEIGHT_FORMATS.values()} | {".json": "config"}
    if word := known.get(Path(name).suffix):
        return word
    return re.sub(r"[^a-z0-9._-]", "-", Path(name).stem.lower()).lstrip("._-")[:64] or "file"


def parse_size(text: str) -> int:
    """Return bytes from "1GiB", "500MB", "1073741824"; raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,15}) ?(?:([KMGT])(i?))?B?", text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size; write 1GiB, 500MB or a number of bytes")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(int(number) * base ** " KMGT".index(unit or " "))


def name_problem(name: str) -> str:
    """Return why a model cannot be called `name`, or an empty string."""
    if re.fullmatch(NAME, name):
        return ""
    return "a model's name has lowercase letters, digits, '.', '_' and '-', at most 64"


def with_artifact(manifest: Manifest, artifact: Artifact) -> Manifest:
    """Return the manifest with `artifact` in place of the one with its path, or added last."""
    others = [a if a.path != artifact.path else artifact for a in manifest.artifacts]
    if artifact not in others:
        others.append(artifact)
    return replace(manifest, artifacts=tuple(others))


def is_same(known: Artifact, reported: Artifact) -> bool | None:
    """Return whether both are about the same bytes, by size and ids; None if they share no id."""
    edition = next((e for e in known.editions if e.size == reported.size), None)
    if edition is None:
        return False
    pairs = [(edition.sha256, reported.sha256)]
    if edition == known.editions[0]:
        pairs += [(known.blob_id, reported.blob_id), (known.git_sha1, reported.git_sha1)]
    if edition.text is not None:
        content = edition.text.encode()
        pairs.append((git_sha1(len(content), content).hexdigest(), reported.git_sha1))
    verdicts = [one == other for one, other in pairs if one and other]
    return all(verdicts) if verdicts else None


def with_reported(known: Artifact, reported: Artifact) -> Artifact:
    """Return `known` with what else the Hub reports of the same bytes, marked H."""
    if known.size != reported.size:
        return known
    names = ("sha256", "blob_id", "git_sha1")
    new = [name for name in names if getattr(reported, name) and not getattr(known, name)]
    return replace(
        known,
        sha256=known.sha256 or reported.sha256,
        blob_id=known.blob_id or reported.blob_id,
        git_sha1=known.git_sha1 or reported.git_sha1,
        evidence={**known.evidence, **dict.fromkeys(new, "H")},
    )


def recomputed(artifact: Artifact, digest: str) -> Artifact:
    """Return the artifact of a verified file with its sha256; what the Hub reported is now A.

    Except a git blob id beside a sha256: the file is not hashed for that.
    Weight files are LFS files on the Hub, unless it reports a git blob id of
    their content, so their blob id follows from the sha256.
    """
    taken = {"size", "sha256", "blob_id"}
    if artifact.is_pinned_by_git or artifact.size == 0:
        taken.add("git_sha1")
    marks = artifact.evidence.items()
    evidence = {f: "A" if m == "H" and f in taken else m for f, m in marks}
    if artifact.sha256 is not None or not digest:
        return replace(artifact, evidence=evidence)
    is_lfs = artifact.is_weights and artifact.git_sha1 is None
    blob = artifact.blob_id or (blob_id(digest, artifact.size) if is_lfs else None)
    evidence.pop("sha256", None)
    return replace(artifact, sha256=digest, blob_id=blob, evidence={**evidence, "sha256": "A"})


def lock_size(sizes: Sequence[int], piece_size: int) -> int:
    """Return `piece_size`, doubled until files of these sizes have few enough pieces (bytes)."""
    if piece_size < 1:
        raise UsageError("a piece has at least one byte")
    while True:
        counts = [-(-size // piece_size) for size in sizes if size > piece_size]
        if max(counts, default=0) <= MAX_CHUNK_FILES and sum(counts) <= MAX_PIECES:
            return piece_size
        piece_size *= 2


def with_pieces(
    artifact: Artifact, model: str, ranges: Sequence[tuple[int, int]], digests: Sequence[str]
) -> Artifact:
    """Return the artifact with these ranges and their sha256 as pieces, marked A.

    Their chunk files would be in chunks/MODEL/; they need not exist.
    """
    pieces = tuple(
        Piece(chunk_file_of(artifact, model, index), *range_, sha256=digest)
        for index, (range_, digest) in enumerate(zip(ranges, digests, strict=True))
    )
    return replace(artifact, pieces=pieces, evidence={**artifact.evidence, "pieces": "A"})


def chunk_file_of(artifact: Artifact, model: str, index: int) -> str:
    """Return the path of chunk file `index` of a file, below the repository root."""
    return f"chunks/{model}/{artifact.path}.part-{suffix(index)}"


def tiling(size: int, piece_size: int) -> list[tuple[int, int]]:
    """Return the half-open ranges, as `(offset, size)`, of pieces of `piece_size` bytes.

    Raises UsageError when there would be none or more than 650.
    """
    if piece_size < 1 or size < 1:
        raise UsageError(f"cannot cut {size:,} bytes into chunk files of {piece_size:,}")
    if -(-size // piece_size) > MAX_CHUNK_FILES:
        least = -(-size // MAX_CHUNK_FILES)
        raise UsageError(
            f"more than {MAX_CHUNK_FILES} chunk files; choose a --size of at least {least:,}"
        )
    return [(o, min(piece_size, size - o)) for o in range(0, size, piece_size)]

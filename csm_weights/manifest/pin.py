"""The other side: a file into parts, manifest entries, and SHA256SUMS."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csm_weights.errors import UsageError
from csm_weights.hashing import blob_id, git_sha1
from csm_weights.manifest.types import Artifact, Manifest, Piece

#: Default size in bytes of the pieces that `lock` adds: what one repair fetches.
LOCKED_SIZE = "64MiB"

#: Pieces of one manifest at most, so that its text stays below what `parse` takes.
MAX_PIECES = 10_000

#: File name endings that stand for a format and a group.
_KNOWN = {
    ".safetensors": ("safetensors", "safetensors"),
    ".pt": ("torch-zip", "ckpt"),
    ".json": ("opaque", "config"),
}


def suffix(index: int) -> str:
    """The two letters that split(1) gives part `index`: aa, ab, ..., yz."""
    letters = string.ascii_lowercase
    return letters[index // 26] + letters[index % 26]


def format_of(name: str) -> str:
    """Return the format of a file by its name: opaque unless the ending says more."""
    return _KNOWN.get(Path(name).suffix, ("opaque",))[0]


def group_of(name: str) -> str:
    """Return a word for --only: that of the known ending, else the file's stem."""
    if known := _KNOWN.get(Path(name).suffix):
        return known[1]
    return re.sub(r"[^a-z0-9._-]", "-", Path(name).stem.lower()).lstrip("._-")[:64] or "file"


def parse_size(text: str) -> int:
    """Bytes from "1GiB", "500MB", "1073741824"; raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,15}) ?(?:([KMGT])(i?))?B?", text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size; write 1GiB, 500MB or a number of bytes")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(int(number) * base ** " KMGT".index(unit or " "))


def name_problem(name: str) -> str:
    """Why a model cannot be called `name`, or an empty string."""
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        return ""
    return "a model's name has lowercase letters, digits, '.', '_' and '-', at most 64"


def with_artifact(manifest: Manifest, artifact: Artifact) -> Manifest:
    """The manifest with `artifact` in the place of the one with its path, or added last."""
    others = [a if a.path != artifact.path else artifact for a in manifest.artifacts]
    if artifact not in others:
        others.append(artifact)
    return replace(manifest, artifacts=tuple(others))


def locked(artifact: Artifact, digest: str) -> Artifact:
    """The artifact with the whole-file sha256 that its proven file was found to have.

    Weight files are LFS files on the Hub, unless it knows them by a git blob
    id of their own, so their blob id follows from it.
    """
    known = {name: mark for name, mark in artifact.evidence.items() if name != "sha256"}
    if artifact.sha256 is not None or not digest:
        return artifact
    is_lfs = artifact.is_weights and artifact.git_sha1 is None
    blob = artifact.blob_id or (blob_id(digest, artifact.size) if is_lfs else None)
    return replace(artifact, sha256=digest, blob_id=blob, evidence={**known, "sha256": "A"})


def is_same(known: Artifact, told: Artifact) -> bool | None:
    """Whether both are about the same bytes, by size and ids; None where they share no id."""
    edition = next((e for e in known.editions if e.size == told.size), None)
    if edition is None:
        return False
    pairs = [(edition.sha256, told.sha256)]
    if edition == known.editions[0]:
        pairs += [(known.blob_id, told.blob_id), (known.git_sha1, told.git_sha1)]
    if edition.text is not None:
        content = edition.text.encode()
        digest = git_sha1(len(content))
        digest.update(memoryview(content))
        pairs.append((digest.hexdigest(), told.git_sha1))
    verdicts = [one == other for one, other in pairs if one and other]
    return all(verdicts) if verdicts else None


def with_told(known: Artifact, told: Artifact) -> Artifact:
    """`known` with what else the Hub tells of the same bytes, marked as its word."""
    if known.size != told.size:
        return known
    names = ("sha256", "blob_id", "git_sha1")
    new = [name for name in names if getattr(told, name) and not getattr(known, name)]
    return replace(
        known,
        sha256=known.sha256 or told.sha256,
        blob_id=known.blob_id or told.blob_id,
        git_sha1=known.git_sha1 or told.git_sha1,
        evidence={**known.evidence, **dict.fromkeys(new, "H")},
    )


def recomputed(artifact: Artifact) -> Artifact:
    """The artifact of a proven file: what was the Hub's word has been found in it, so it is A.

    But for a git blob id beside a sha256, which is not taken of what is proven.
    """
    taken = {"size", "sha256", "blob_id"}
    if artifact.is_git_proven or artifact.size == 0:
        taken.add("git_sha1")
    marks = artifact.evidence.items()
    return replace(artifact, evidence={f: "A" if m == "H" and f in taken else m for f, m in marks})


def lock_size(sizes: Sequence[int], piece_size: int) -> int:
    """`piece_size`, doubled until files of these sizes have few enough pieces; all in bytes."""
    if piece_size < 1:
        raise UsageError("a piece has at least one byte")
    while True:
        counts = [-(-size // piece_size) for size in sizes if size > piece_size]
        if max(counts, default=0) <= MAX_PARTS and sum(counts) <= MAX_PIECES:
            return piece_size
        piece_size *= 2


def with_pieces(
    artifact: Artifact, model: str, ranges: Sequence[tuple[int, int]], digests: Sequence[str]
) -> Artifact:
    """The artifact with these ranges and their sha256 as pieces, marked A.

    Their parts would be in chunks/MODEL/; nobody has to make them.
    """
    pieces = tuple(
        Piece(part_of(artifact, model, index), *range_, sha256=digest)
        for index, (range_, digest) in enumerate(zip(ranges, digests, strict=True))
    )
    return replace(artifact, pieces=pieces, evidence={**artifact.evidence, "pieces": "A"})


def part_of(artifact: Artifact, model: str, index: int) -> str:
    """Where part `index` of a file would be, below the repository root."""
    return f"chunks/{model}/{artifact.path}.part-{suffix(index)}"


def tiling(size: int, piece_size: int) -> list[tuple[int, int]]:
    """The half-open ranges, as `(offset, size)`, that pieces of `piece_size` cut `[0, size)` into.

    Raises UsageError when there would be none or more than 650.
    """
    if piece_size < 1 or size < 1:
        raise UsageError(f"cannot cut {size:,} bytes into parts of {piece_size:,}")
    if -(-size // piece_size) > MAX_PARTS:
        least = -(-size // MAX_PARTS)
        raise UsageError(f"more than {MAX_PARTS} parts; choose a --size of at least {least:,}")
    return [(o, min(piece_size, size - o)) for o in range(0, size, piece_size)]


#: Default size of a part in bytes: below the 2 GB that GitHub takes, and what
#: `split -b 1G` makes.
PIECE_SIZE = 1 << 30


#: As many two-letter suffixes as split(1) gives out before it lengthens them.
MAX_PARTS = 25 * 26

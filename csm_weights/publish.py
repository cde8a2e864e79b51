"""The other side: a file into parts, manifest entries, and SHA256SUMS."""

from __future__ import annotations

import glob
import json
import os
import re
import string
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as bind
from pathlib import Path

from csm_weights.digest import (
    Chain,
    Hasher,
    Tick,
    blob_id,
    feed,
    git_sha1,
    run_all,
    sha256,
    sha256_of,
)
from csm_weights.errors import Finding, Kind, UsageError, WrongContent
from csm_weights.files import Extent, Target, copy_hashed, sync, write_whole, writing
from csm_weights.manifest import Artifact, Manifest, Piece, parse, path_problem, render

#: Default size of a part in bytes: below the 2 GB that GitHub takes, and what
#: `split -b 1G` makes.
PIECE_SIZE = 1 << 30

#: As many two-letter suffixes as split(1) gives out before it lengthens them.
MAX_PARTS = 25 * 26

#: Default size in bytes of the pieces that `lock` adds: what one repair fetches.
LOCKED_SIZE = "64MiB"

#: Pieces of one manifest at most, so that its text stays below what `parse` takes.
MAX_PIECES = 10_000

#: File name endings and the format they stand for; all else is opaque.
_FORMATS = {".safetensors": "safetensors", ".pt": "torch-zip"}

#: The two forms that `sha256sum -c` takes: its own, and that of `sha256sum --tag`.
_SUM_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<path>.+)")
_TAG_LINE = re.compile(r"SHA256 \((?P<path>.+)\) = (?P<digest>[0-9a-fA-F]{64})")

#: Bad lines that are told one by one.
MAX_BAD_LINES = 20


@dataclass(frozen=True)
class Recipe:
    """What a stand-in is made of: the text of its config.json and a seed.

    `piece_size` is in bytes.
    """

    description: str
    config: str
    seed: int
    piece_size: int
    golden: str | None = None


def _config(text_vocab: int, audio_vocab: int, backbone: str, decoder: str) -> str:
    """A config.json as the edition of March 2025 writes it."""
    data = {
        "audio_num_codebooks": 32,
        "audio_vocab_size": audio_vocab,
        "backbone_flavor": backbone,
        "decoder_flavor": decoder,
        "text_vocab_size": text_vocab,
    }
    return json.dumps(data, indent=2, sort_keys=True)


#: The stand-ins there are. csm-tiny is committed, parts and all.
RECIPES = {
    "csm-1b-standin": Recipe(
        description="Names, shapes and byte counts of CSM-1B, random values: for rehearsals.",
        config=_config(128256, 2051, "llama-1B", "llama-100M"),
        seed=1,
        piece_size=PIECE_SIZE,
    ),
    "csm-tiny": Recipe(
        description="A network like CSM-1B with 296,640 random parameters, for tests.",
        config=_config(512, 35, "tiny-backbone", "tiny-decoder"),
        seed=2,
        piece_size=200 << 10,
        golden="csm-tiny.golden.json",
    ),
}


def suffix(index: int) -> str:
    """The two letters that split(1) gives part `index`: aa, ab, ..., yz."""
    letters = string.ascii_lowercase
    return letters[index // 26] + letters[index % 26]


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


def split(file: Path, root: Path, folder: str, piece_size: int, tick: Tick) -> Artifact:
    """Writes the parts of `file` to `root/folder`, hashed as written, and returns its entry.

    The artifact's path is the file's name; its parts are `NAME.part-aa` and
    so on. A part appears under its name when it is whole. An existing part
    that differs is not overwritten: WrongContent. `tick` gets bytes.
    """
    size = file.stat().st_size
    ranges = tiling(size, piece_size)
    pieces = tuple(
        Piece(f"{folder}/{file.name}.part-{suffix(i)}", *r, sha256="") for i, r in enumerate(ranges)
    )
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        stop = threading.Event()
        chain = Chain(source, [*(offset for offset, _ in ranges), size], stop)
        tasks = [
            bind(_write_part, source, root, pieces, i, chain, tick) for i in range(len(pieces))
        ]
        digests = run_all(tasks, stop)
    except EOFError as error:
        finding = Finding(Kind.CHANGED, str(file), f"{size:,} bytes", str(error))
        raise WrongContent("the file was cut while it was split", [finding]) from None
    finally:
        os.close(source)
    # Before anything tells of the parts, their names have to be durable.
    sync(root / folder)
    whole = chain.hexdigest() or ""
    return Artifact(
        path=file.name,
        group=group_of(file.name),
        format=_FORMATS.get(file.suffix, "opaque"),
        size=size,
        sha256=whole,
        blob_id=blob_id(whole, size),
        pieces=tuple(replace(p, sha256=d) for p, d in zip(pieces, digests, strict=True)),
        evidence=dict.fromkeys(("size", "sha256", "blob_id", "pieces"), "A"),
    )


def _write_part(
    source: int, root: Path, pieces: Sequence[Piece], index: int, chain: Chain, tick: Tick
) -> str:
    """Copies one range of `source` to its part and returns the sha256 of what was written."""
    piece = pieces[index]
    part = root / piece.part
    digest, claimed = sha256(), chain.claim(index)
    sinks = [digest, claimed] if claimed else [digest]
    is_there = part.is_file() and part.stat().st_size == piece.size
    # Where locks do nothing another run may write the same part.
    unfinished = part.with_name(f"{part.name}.{os.getpid()}.partial")
    if is_there:
        feed(source, piece.offset, piece.size, sinks, tick, chain.stop)
    else:
        _copy_part(Extent(source, piece.offset, piece.size), unfinished, sinks, chain, tick)
    chain.finish(index, claimed, proven=True)
    _require_same(part, digest.hexdigest(), unfinished)
    if not is_there:
        with writing(part):
            unfinished.replace(part)
    return digest.hexdigest()


def _copy_part(
    extent: Extent, unfinished: Path, sinks: Sequence[Hasher], chain: Chain, tick: Tick
) -> None:
    target = Target(unfinished, os.O_TRUNC)
    try:
        copy_hashed(extent, target, 0, sinks, True, tick, chain.stop)
        with writing(unfinished):
            os.fsync(target.fd)
    finally:
        target.close()


def _require_same(part: Path, digest: str, unfinished: Path) -> None:
    """A part that is there already must be the one that belongs there."""
    if part.is_file() and (there := sha256_of(part)) != digest:
        unfinished.unlink(missing_ok=True)
        help_text = "move it away, or choose another --chunks folder"
        finding = Finding(
            Kind.WRONG_DIGEST, str(part), f"sha256 {digest}", f"sha256 {there}", help_text
        )
        raise WrongContent("a part of another file is in the way", [finding])


def remove_unfinished(folder: Path, name: str) -> None:
    """Removes what splits of the file called `name` have left that were killed."""
    if folder.is_dir():
        for left in folder.glob(f"{glob.escape(name)}.part-*.partial"):
            with writing(left):
                left.unlink(missing_ok=True)


def group_of(name: str) -> str:
    """A word for --only: the known format's, else the file's stem."""
    known = {".safetensors": "safetensors", ".pt": "ckpt", ".json": "config"}
    word = re.sub(r"[^a-z0-9._-]", "-", Path(name).stem.lower()).lstrip("._-")[:64]
    return known.get(Path(name).suffix) or word or "file"


def parse_size(text: str) -> int:
    """Bytes from "1GiB", "500MB", "1073741824"; raises UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,15}) ?(?:([KMGT])(i?))?B?", text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size; write 1GiB, 500MB or a number of bytes")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(int(number) * base ** " KMGT".index(unit or " "))


def standin_manifest(name: str, recipe: Recipe, artifacts: Sequence[Artifact]) -> Manifest:
    """The manifest of a stand-in, with its own places, apart from the real model's.

    As with CSM-1B, ckpt.pt is pinned by its pieces and Hub blob id alone.
    """
    config = recipe.config.encode()
    digest = sha256()
    digest.update(memoryview(config))
    weights = [a if a.format == "safetensors" else _without_sha256(a) for a in artifacts]
    return Manifest(
        name=name,
        description=recipe.description,
        staging=f"output/{name}",
        destination=f"models/{name}",
        golden=recipe.golden,
        artifacts=(
            *weights,
            Artifact(
                path="config.json",
                group="config",
                format="config",
                size=len(config),
                sha256=digest.hexdigest(),
                text=recipe.config,
                evidence={"size": "A", "sha256": "A"},
            ),
        ),
    )


def _without_sha256(artifact: Artifact) -> Artifact:
    marks = {name: mark for name, mark in artifact.evidence.items() if name != "sha256"}
    return replace(artifact, sha256=None, evidence=marks)


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


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest that has been read back and found valid."""
    text = render(manifest)
    parse(text.encode(), str(path))
    write_whole(path, text)


def render_sums(digests: Mapping[str, str]) -> str:
    """The text of a SHA256SUMS file, as `sha256sum -c` reads it: path and hex digest."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def parse_sums(text: str, where: str) -> dict[str, str]:
    """Path and digest of each line of a SHA256SUMS file.

    Raises WrongContent with every line that is neither, or whose path leaves
    the folder.
    """
    sums: dict[str, str] = {}
    findings = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        match = _SUM_LINE.fullmatch(line) or _TAG_LINE.fullmatch(line)
        path = match["path"].removeprefix("./") if match else ""
        digest = match["digest"].lower() if match else ""
        if path_problem(path) or sums.setdefault(path, digest) != digest:
            expected = "DIGEST  PATH, each path once"
            findings.append(
                Finding(Kind.MALFORMED, f"{where}:{number}", expected, repr(line[:100]))
            )
    if findings or not sums:
        raise WrongContent(f"{where} is not a SHA256SUMS file", findings[:MAX_BAD_LINES])
    return sums

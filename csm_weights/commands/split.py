"""Split a file into chunk files, with SHA256SUMS and a manifest entry."""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial as bind
from pathlib import Path

from csm_weights.commands.verify import SUMS
from csm_weights.concurrency import OnProgress, run_all
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent
from csm_weights.hashing import Hasher, blob_id, feed, sha256, sha256_of
from csm_weights.manifest import pin
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.pin import _FORMATS, group_of, suffix, tiling
from csm_weights.manifest.render import render_artifact
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.atomic import sync, writing
from csm_weights.store.block_io import Extent, OutputFile, copy_hashed
from csm_weights.store.lock import are_real, lock
from csm_weights.transfer.reorder import Chain
from csm_weights.verify.sums import render_sums


def split_file(
    file: Path, root: Path, folder: str, piece_size: int, on_progress: OnProgress
) -> Artifact:
    """Writes the parts of `file` to `root/folder`, hashed as written, and returns its entry.

    The artifact's path is the file's name; its parts are `NAME.part-aa` and
    so on. A part appears under its name when it is whole. An existing part
    that differs is not overwritten: WrongContent. `on_progress` gets bytes.
    """
    size = file.stat().st_size
    ranges = tiling(size, piece_size)
    pieces = tuple(
        Piece(f"{folder}/{file.name}.part-{suffix(i)}", *r, sha256="") for i, r in enumerate(ranges)
    )
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        cancel = threading.Event()
        chain = Chain(source, [*(offset for offset, _ in ranges), size], cancel)
        tasks = [
            bind(_write_part, source, root, pieces, i, chain, on_progress)
            for i in range(len(pieces))
        ]
        digests = run_all(tasks, cancel)
    except EOFError as error:
        finding = Finding.changed(file, str(error))
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
    source: int,
    root: Path,
    pieces: Sequence[Piece],
    index: int,
    chain: Chain,
    on_progress: OnProgress,
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
        feed(source, piece.offset, piece.size, sinks, on_progress, chain.cancel)
    else:
        _copy_part(Extent(source, piece.offset, piece.size), unfinished, sinks, chain, on_progress)
    chain.finish(index, claimed, proven=True)
    _require_same(part, digest.hexdigest(), unfinished)
    if not is_there:
        with writing(part):
            unfinished.replace(part)
    return digest.hexdigest()


def _copy_part(
    extent: Extent, unfinished: Path, sinks: Sequence[Hasher], chain: Chain, on_progress: OnProgress
) -> None:
    target = OutputFile(unfinished, os.O_TRUNC)
    try:
        copy_hashed(extent, target, 0, sinks, True, on_progress, chain.cancel)
        with writing(unfinished):
            os.fsync(target.fd)
    finally:
        target.close()


def _require_same(part: Path, digest: str, unfinished: Path) -> None:
    """A part that is there already must be the one that belongs there."""
    if part.is_file() and (there := sha256_of(part)) != digest:
        unfinished.unlink(missing_ok=True)
        help_text = "move it away, or choose another --chunks folder"
        finding = Finding.wrong_digest(part, digest, there, help_text)
        raise WrongContent("a part of another file is in the way", [finding])


def remove_unfinished(folder: Path, name: str) -> None:
    """Removes what splits of the file called `name` have left that were killed."""
    if folder.is_dir():
        for left in folder.glob(f"{glob.escape(name)}.part-*.partial"):
            with writing(left):
                left.unlink(missing_ok=True)


#: The name of the lock in output/ that one split holds at a time.
SPLIT_LOCK = ".split.lock"


def split(root: Path, file: Path, chunks: str, size: str, manifest: str, dry: bool) -> str:
    """Cuts `file` into parts below `root` and returns its manifest entry, or what was written.

    `size` is in bytes, or with a unit: MiB, GB, ... With `manifest`, a path,
    the entry is written there.
    """
    if not file.is_file():
        found = "not a plain file" if file.exists() else "no such file"
        finding = Finding(Kind.MISSING, str(file), "a file to split", found)
        raise MissingInput("there is nothing to split", [finding])
    folder = chunks or f"chunks/{file.stem}"
    if problem := path_problem(folder):
        raise UsageError(f"--chunks {folder!r}: {problem}")
    piece_size, total = pin.parse_size(size), file.stat().st_size
    ranges = pin.tiling(total, piece_size)
    if dry:
        return f"would write {len(ranges)} parts of at most {piece_size:,} bytes to {folder}/"
    path = Path(manifest)
    current = _manifest_to_extend(path) if manifest else None
    locks = root / "output"
    with lock(locks, SPLIT_LOCK), Progress("splitting", total) as progress:
        if are_real(locks / SPLIT_LOCK):
            remove_unfinished(root / folder, file.name)
        artifact = split_file(file, root, folder, piece_size, progress.advance)
        sums = {Path(p.part).name: p.sha256 for p in artifact.pieces}
        atomic.write_whole(root / folder / SUMS, render_sums(sums))
    if current is None:
        return "\n".join(["[[artifact]]", *render_artifact(artifact)])
    atomic.write_manifest(path, pin.with_artifact(current, artifact))
    return f"{len(ranges)} parts in {folder}/, entry in {path}"


def _manifest_to_extend(path: Path) -> Manifest:
    """The manifest at `path`, or an empty one of that name."""
    if path.exists():
        return load(path)
    if problem := pin.name_problem(path.stem):
        raise UsageError(f"--manifest {path}: {problem}")
    return Manifest(path.stem, f"output/{path.stem}", f"models/{path.stem}", (), where=str(path))

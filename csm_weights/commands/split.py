"""Split a file into chunk files, with SHA256SUMS and a manifest entry."""

import glob
import os
import threading
from dataclasses import replace
from functools import partial as bind
from pathlib import Path

from csm_weights.concurrency import OnProgress, deferred_interrupts, run_all
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent
from csm_weights.files import opened, read_file
from csm_weights.formats import sniff
from csm_weights.formats.tensor_index import HEAD
from csm_weights.hashing import blob_id, feed, sha256, sha256_of
from csm_weights.manifest import pin
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import CHUNKS, path_problem
from csm_weights.manifest.render import render_artifact
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.pipeline.session import Summary
from csm_weights.progress import Progress, count
from csm_weights.store.atomic import sync, write_whole, writing
from csm_weights.store.block_io import Extent, OutputFile, copy_hashed
from csm_weights.store.lock import are_real, lock
from csm_weights.store.manifest_file import write_manifest
from csm_weights.transfer.reorder import InOrderDigest
from csm_weights.verify.sums import MAX_SUMS, SUMS, render_chunk_list

#: Name of the lock in output/ that one split holds at a time.
SPLIT_LOCK = ".split.lock"


def split(root: Path, file: Path, chunks: str, size: str, manifest: str, dry: bool) -> Summary:
    """Cut `file` into chunk files below `root`; return its manifest entry, or what was written.

    `size` is that of a chunk file: bytes, or with a unit (MiB, GB, ...). With
    `manifest`, a path, the entry is written there.
    """
    if not file.is_file():
        found = "not a regular file" if file.exists() else "no such file"
        finding = Finding(Kind.MISSING, str(file), "a file to split", found, "check the path")
        raise MissingInput("there is nothing to split", [finding])
    folder = chunks or f"{CHUNKS}/{file.stem}"
    for option, path in (("--file", file.name), ("--chunks", folder)):
        if problem := path_problem(path):
            raise UsageError(f"{option} {path!r}: {problem}")
    if not folder.startswith(f"{CHUNKS}/"):
        raise UsageError(f"--chunks {folder!r}: choose a folder below {CHUNKS}/")
    piece_size, total = pin.parse_size(size), file.stat().st_size
    number = len(pin.tiling(total, piece_size))
    files = count(number, "chunk file")
    values = {"dry": dry, "folder": folder, "chunk_files": number, "size": total}
    values |= {"manifest": manifest or None, "sha256": None}
    if dry:
        would = f"would write {files} of at most {piece_size:,} bytes to {folder}/"
        return Summary(None, [would], values)
    locks, target, current = root / "output", Path(manifest), None
    if manifest and target.exists():
        current = load(target)
    elif manifest:
        if problem := pin.name_problem(target.stem):
            raise UsageError(f"--manifest {target}: {problem}")
        name = target.stem
        current = Manifest(name, f"output/{name}", f"models/{name}", (), where=manifest)
    with lock(locks, SPLIT_LOCK), Progress("splitting", total) as progress:
        if are_real(locks / SPLIT_LOCK):
            # What killed splits of this file have left.
            for left in (root / folder).glob(f"{glob.escape(file.name)}.part-*.partial"):
                with writing(left):
                    left.unlink(missing_ok=True)
        _known_list(root / folder / SUMS)
        artifact = split_file(file, root, folder, piece_size, progress.advance)
        write_chunk_list(root, artifact)
    values["sha256"] = artifact.sha256
    if current is None:
        return Summary(None, ["[[artifact]]", *render_artifact(artifact)], values)
    write_manifest(target, pin.with_artifact(current, artifact))
    return Summary(current.name, [f"{files} in {folder}/, entry in {manifest}"], values)


def write_chunk_list(root: Path, artifact: Artifact) -> None:
    """Write the chunk files of an artifact to the SHA256SUMS beside them.

    Lines about other files stay.
    """
    path = (root / artifact.pieces[0].part).with_name(SUMS)
    write_whole(path, render_chunk_list(artifact, _known_list(path)))


def _known_list(path: Path) -> str:
    """Return the text of a SHA256SUMS, or nothing; raises WrongContent for what is no text."""
    known = read_file(path, MAX_SUMS, "a SHA256SUMS file") if os.path.lexists(path) else b""
    try:
        return known.decode()
    except UnicodeDecodeError:
        finding = Finding(Kind.MALFORMED, str(path), "text in UTF-8", "other bytes", "move it away")
        raise WrongContent("SHA256SUMS cannot be extended", [finding]) from None


def split_file(
    file: Path, root: Path, folder: str, piece_size: int, on_progress: OnProgress
) -> Artifact:
    """Write the chunk files of `file` to `root/folder`, and return its manifest entry.

    The artifact's path is the file's name; its chunk files are `NAME.part-aa`
    and so on, each hashed as it is written; they are named when all are complete,
    and a split that fails leaves none. `on_progress` gets bytes. Raises WrongContent
    where another file has the name of a chunk file, which is not overwritten.
    """
    size = file.stat().st_size
    ranges = pin.tiling(size, piece_size)
    pieces = [
        Piece(f"{folder}/{file.name}.part-{pin.suffix(i)}", *r, sha256="")
        for i, r in enumerate(ranges)
    ]
    # Where locks do nothing another run may write the same chunk files.
    unfinished = [root / f"{piece.part}.{os.getpid()}.partial" for piece in pieces]
    made: list[Path] = []
    try:
        with opened(file) as source:
            starts = [*(offset for offset, _ in ranges), size]
            chain = InOrderDigest(source, starts, threading.Event())
            tasks = [
                bind(_write_chunk_file, source, root, piece, index, path, chain, on_progress)
                for index, (piece, path) in enumerate(zip(pieces, unfinished, strict=True))
            ]
            digests = run_all(tasks, chain.cancel)
            known = sniff(os.pread(source, HEAD, 0), file.name)
        with deferred_interrupts():
            for piece, path in zip(pieces, unfinished, strict=True):
                if path.exists():  # the others were there already
                    with writing(root / piece.part):
                        path.replace(root / piece.part)
                    made.append(root / piece.part)
    except EOFError as error:
        finding = Finding(Kind.CHANGED, str(file), f"{size:,} bytes", str(error))
        raise WrongContent("the file was truncated while it was split", [finding]) from None
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    # The names of the chunk files have to be durable before a list mentions them.
    sync(root / folder)
    whole = chain.hexdigest()
    return Artifact(
        path=file.name,
        group=pin.group_of(file.name),
        format=known.name if known else "opaque",
        size=size,
        sha256=whole,
        blob_id=blob_id(whole, size),
        pieces=tuple(replace(p, sha256=d) for p, d in zip(pieces, digests, strict=True)),
        evidence=dict.fromkeys(("size", "sha256", "blob_id", "pieces"), "A"),
    )


def _write_chunk_file(
    source: int,
    root: Path,
    piece: Piece,
    index: int,
    unfinished: Path,
    chain: InOrderDigest,
    on_progress: OnProgress,
) -> str:
    """Copy one piece of `source` to an unfinished file, unless it is there; return its sha256.

    Raises WrongContent where the chunk file is there with other content.
    """
    chunk_file = root / piece.part
    digest, claimed = sha256(), chain.claim(index)
    sinks = [digest, claimed] if claimed else [digest]
    if chunk_file.is_file() and chunk_file.stat().st_size == piece.size:
        feed(source, piece.offset, piece.size, sinks, on_progress, chain.cancel)
    else:
        target = OutputFile(unfinished, os.O_TRUNC)
        try:
            extent = Extent(source, piece.offset, piece.size)
            copy_hashed(extent, target, 0, sinks, True, on_progress, chain.cancel)
            with writing(unfinished):
                os.fsync(target.fd)
        finally:
            target.close()
    chain.finish(index, claimed, verified=True)
    if chunk_file.is_file() and (found := sha256_of(chunk_file)) != digest.hexdigest():
        help_text = "move it away, or choose another --chunks folder"
        finding = Finding.wrong_digest(chunk_file, digest.hexdigest(), found, help_text)
        raise WrongContent("a chunk file of this name has other content", [finding])
    return digest.hexdigest()

"""Write a file from a stream of blocks, hashed on the way, under an unfinished name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from csm_weights.concurrency import OnProgress, deferred_interrupts
from csm_weights.files import Fingerprint
from csm_weights.hashing import sha256
from csm_weights.store.atomic import unlink_shared, writing
from csm_weights.store.block_io import STEP, OutputFile
from csm_weights.store.journal import PieceRecord, partial_path
from csm_weights.store.receipts import VerifiedFile


def write_stream(
    path: Path, blocks: Iterable[bytes | bytearray], source: str, on_progress: OnProgress
) -> VerifiedFile:
    """Write blocks to the unfinished form of `path`; `source` says where they come from.

    What an earlier run has left there is compared with them, and written only
    where it differs. `on_progress` gets bytes. Raises NoSpace, and WrongContent
    where something is in the way.
    """
    unfinished, digest, offset = partial_path(path), sha256(), 0
    unlink_shared(unfinished)
    target = OutputFile(unfinished)
    try:
        left = os.fstat(target.fd).st_size
        with deferred_interrupts() as raise_pending, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for block in _gathered(blocks):
                raise_pending()
                if written:
                    written.result()
                is_left = offset + len(block) <= left
                if not (is_left and os.pread(target.fd, len(block), offset) == block):
                    # the disk takes this block while it is hashed and the next one is made
                    written = writer.submit(target.write, block, offset, True)
                digest.update(block)
                offset += len(block)
                on_progress(len(block))
        if written:
            written.result()
        with writing(unfinished):
            os.ftruncate(target.fd, offset)
            os.fsync(target.fd)
        fingerprint = Fingerprint.of(os.fstat(target.fd))
    finally:
        target.close()
    whole = digest.hexdigest()
    pieces = (PieceRecord(0, offset, whole, source),)
    return VerifiedFile(unfinished, whole, pieces, fingerprint)


def _gathered(blocks: Iterable[bytes | bytearray]) -> Iterator[memoryview]:
    """Yield the same bytes in blocks of `STEP`, in two buffers by turns that are page-aligned."""
    buffers = [memoryview(mmap.mmap(-1, STEP)) for _ in range(2)]
    filled = 0
    for block in blocks:
        rest = memoryview(block)
        while rest:
            room = min(len(rest), STEP - filled)
            buffers[0][filled : filled + room] = rest[:room]
            rest, filled = rest[room:], filled + room
            if filled == STEP:
                yield buffers[0]
                buffers.reverse()
                filled = 0
    if filled:
        yield buffers[0][:filled]

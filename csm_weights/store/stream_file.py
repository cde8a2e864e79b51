"""Write a file from a stream of blocks, hashed on the way, under an unfinished name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from csm_weights.concurrency import OnProgress, deferred_interrupts
from csm_weights.files import Fingerprint
from csm_weights.hashing import sha256
from csm_weights.store.atomic import unlink_shared, writing
from csm_weights.store.block_io import OutputFile
from csm_weights.store.journal import PieceRecord, partial_path
from csm_weights.store.receipts import VerifiedFile


def write_stream(
    path: Path, blocks: Iterable[bytes | bytearray], source: str, on_progress: OnProgress
) -> VerifiedFile:
    """Write blocks to the unfinished form of `path`; `source` says where they come from.

    What an earlier run has left there stays where it equals the blocks: each
    is compared with them, and written only where it differs. A block must not
    change before the one after the next is asked for. `on_progress` gets
    bytes. Raises NoSpace, and WrongContent where something is in the way.
    """
    unfinished, digest, offset = partial_path(path), sha256(), 0
    unlink_shared(unfinished)
    target = OutputFile(unfinished)
    try:
        fd, left = target.fd, os.fstat(target.fd).st_size
        hashed: Future[None] | None = None
        with deferred_interrupts() as raise_pending, ThreadPoolExecutor(1) as hasher:
            for block in blocks:
                raise_pending()
                is_left = offset + len(block) <= left
                if not (is_left and os.pread(fd, len(block), offset) == block):
                    with memoryview(block) as view:
                        target.write(view, offset, direct=False)
                # the next block is read while this one is hashed
                if hashed:
                    hashed.result()
                hashed = hasher.submit(digest.update, memoryview(block))
                offset += len(block)
                on_progress(len(block))
        with writing(unfinished):
            os.ftruncate(fd, offset)
            os.fsync(fd)
        fingerprint = Fingerprint.of(os.fstat(fd))
    finally:
        target.close()
    whole = digest.hexdigest()
    pieces = (PieceRecord(0, offset, whole, source),)
    return VerifiedFile(unfinished, whole, pieces, fingerprint)

"""Write the files of a stand-in, and tell their sizes beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import CsmConfig
from tools.standin.checkpoint import CheckpointWriter, checkpoint_layout
from tools.standin.safetensors import SafetensorsWriter, safetensors_layout
from tools.standin.values import HEAD, SPARE, Values

#: Blocks that may wait to be written.
QUEUE = 8


class Writer(Protocol):
    """A file under way that takes blocks of tensors."""

    def write(self, name: str, at: int, block: memoryview) -> int:
        """Write a block at byte `at` of a tensor; return the bytes written."""

    def finish(self) -> None:
        """Write what follows once all tensors are there."""


#: File and writer of each format.
FORMATS: dict[str, tuple[str, Callable[[BinaryIO, CsmConfig, int], Writer]]] = {
    "safetensors": ("model.safetensors", SafetensorsWriter),
    "ckpt": ("ckpt.pt", CheckpointWriter),
}


def sizes(config: CsmConfig) -> dict[str, int]:
    """Return the bytes of both stand-in files by file name, without writing them."""
    _, _, size = safetensors_layout(config)
    return {"model.safetensors": size, "ckpt.pt": checkpoint_layout(config, 0).size}


def write_standin(
    config: CsmConfig,
    seed: int,
    directory: Path,
    formats: Collection[str] = ("safetensors", "ckpt"),
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `model.safetensors` and `ckpt.pt`, which hold equal tensors, to the directory.

    `formats` chooses among "safetensors" and "ckpt". `progress` is called with
    the bytes written since its last call. A file gets its final name when it
    is complete. Takes some 20 MiB of memory, whatever the size. Raises
    UsageError for an unknown format, OSError when the disk refuses.
    """
    unknown = sorted(set(formats) - FORMATS.keys())
    if unknown:
        raise UsageError(f"no format {', '.join(unknown)}; known are {', '.join(FORMATS)}")
    with ExitStack() as stack:
        writers = []
        for name, make in (FORMATS[word] for word in formats):
            file = stack.enter_context(_named_when_complete(directory / name))
            writers.append(make(file, config, seed))
        _fill(writers, config, seed, progress)


@contextmanager
def _named_when_complete(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fill(
    writers: list[Writer], config: CsmConfig, seed: int, progress: Callable[[int], None]
) -> None:
    """Make blocks in this thread and write them in a second one: writing frees the GIL."""
    shapes = config.tensor_shapes()
    values, pending = Values(seed), deque[Future[int]]()

    def write(name: str, at: int, block: memoryview) -> int:
        return sum(writer.write(name, at, block) for writer in writers)

    with ThreadPoolExecutor(max_workers=1) as pool:
        for name, shape in {SPARE: shapes[HEAD][1:], **shapes}.items():
            for at, block in values.blocks(name, shape):
                pending.append(pool.submit(write, name, at, block))
                if len(pending) > QUEUE:
                    progress(pending.popleft().result())
        while pending:
            progress(pending.popleft().result())
    for writer in writers:
        writer.finish()

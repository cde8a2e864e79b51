"""Files that are written from a stream of blocks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_weights.store.block_io import STEP
from csm_weights.store.stream_file import write_stream


def test_an_interrupt_while_writing_is_raised_between_two_steps(tmp_path: Path) -> None:
    """The wait for the thread that writes is not left in its middle; nothing more is written."""
    seen: list[int] = []

    def blocks() -> Iterator[bytes]:
        yield bytes(STEP)
        yield bytes(STEP)
        signal.raise_signal(signal.SIGINT)
        seen.append(0)
        yield bytes(STEP)

    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path / "file", blocks(), "somewhere", seen.append)
    assert seen == [STEP, STEP, 0]

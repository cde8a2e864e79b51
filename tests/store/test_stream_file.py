"""Files that are written from a stream of blocks."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from csm_weights.files import Fingerprint
from csm_weights.store import stream_file
from csm_weights.store.block_io import STEP, OutputFile
from csm_weights.store.journal import PieceRecord, partial_path
from csm_weights.store.receipts import VerifiedFile
from csm_weights.store.stream_file import write_stream

#: Bytes of a step in these tests, and what is written in them: two steps and a bit.
SMALL = 8192
DATA = random.Random(1).randbytes(2 * SMALL + 5)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Small steps, and each write as its offset and size."""
    seen: list[tuple[int, int]] = []
    real = OutputFile.write

    def write(self: OutputFile, data: memoryview, offset: int, direct: bool) -> None:
        seen.append((offset, len(data)))
        assert direct  # past the page cache, which is for others
        real(self, data, offset, direct)

    monkeypatch.setattr(OutputFile, "write", write)
    monkeypatch.setattr(stream_file, "STEP", SMALL)
    return seen


ALL = [(0, SMALL), (SMALL, SMALL), (2 * SMALL, 5)]


@pytest.mark.parametrize("size", [1000, SMALL - 1, SMALL, SMALL + 1, len(DATA)])
def test_blocks_of_any_size_are_written_in_steps(
    tmp_path: Path, written: list[tuple[int, int]], size: int
) -> None:
    """With the digest of all bytes, and of the one piece that they are."""
    path, counts = tmp_path / "file", list[int]()
    blocks = [DATA[at : at + size] for at in range(0, len(DATA), size)]
    file = write_stream(path, [b"", *blocks], "somewhere", counts.append)
    digest = hashlib.sha256(DATA).hexdigest()
    partial = partial_path(path)
    assert (partial.read_bytes(), written) == (DATA, ALL)
    assert counts == [size for _, size in ALL]
    pieces = (PieceRecord(0, len(DATA), digest, "somewhere"),)
    assert file == VerifiedFile(partial, digest, pieces, Fingerprint.of(partial.stat()))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (DATA, []),
        (DATA + b"more", []),
        (DATA[:-1], ALL[2:]),
        (DATA[: 2 * SMALL], ALL[2:]),
        (DATA[: 2 * SMALL - 1], ALL[1:]),
        (bytes(SMALL) + DATA[SMALL:], ALL[:1]),
        (DATA[:-1] + b"\0", ALL[2:]),
    ],
)
def test_what_an_earlier_run_has_left_is_written_only_where_it_differs(
    tmp_path: Path, written: list[tuple[int, int]], left: bytes, expected: list[tuple[int, int]]
) -> None:
    """Up to its end, and in whole steps; what is beyond the last byte is cut off."""
    partial_path(tmp_path / "file").write_bytes(left)
    write_stream(tmp_path / "file", [DATA], "somewhere", lambda _: None)
    assert (partial_path(tmp_path / "file").read_bytes(), written) == (DATA, expected)


def test_a_second_name_of_the_unfinished_file_is_not_written_through(tmp_path: Path) -> None:
    """The other file keeps its bytes."""
    other, partial = tmp_path / "other", partial_path(tmp_path / "file")
    other.write_bytes(b"precious")
    os.link(other, partial)
    write_stream(tmp_path / "file", [b"new"], "somewhere", lambda _: None)
    assert (other.read_bytes(), partial.read_bytes()) == (b"precious", b"new")


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

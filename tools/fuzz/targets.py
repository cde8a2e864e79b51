"""One function for each reader: any bytes are read or refused, and nothing else happens.

The functions take bytes, so that tests can replay without a fuzzer what one has found.
Anything that they raise is a defect.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from csm_weights.errors import CsmWeightsError
from csm_weights.formats.tensor_index import TensorIndex
from csm_weights.manifest import parse, paths, render
from tests.support import hostile
from tests.support.readers import read_checkpoint, read_safetensors

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"

#: Exit codes of a refusal: an input is missing, or wrong.
REFUSALS = (3, 4)

#: In memory where there is such a place: a fuzzer writes thousands of files a second.
_MEMORY = Path("/dev/shm")
_FOLDER = tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None)


def _refuse(error: CsmWeightsError) -> None:
    """Check a refusal: its exit code, its findings, and that its text is printable."""
    assert error.exit_code in REFUSALS, repr(error)
    assert error.findings, repr(error)
    lines = str(error).split("\n")
    assert all(line.isprintable() for line in lines), repr(error)
    assert len(lines) < 500, f"a message of {len(lines)} lines"


def manifest(data: bytes) -> None:
    """Check any text: an accepted manifest renders to text that reads back equal."""
    try:
        read = parse.parse(data, "fuzz.toml")
    except CsmWeightsError as error:
        return _refuse(error)
    for artifact in read.artifacts:
        assert not paths.path_problem(artifact.path), artifact.path
        assert all(not paths.path_problem(piece.part) for piece in artifact.pieces)
    text = render.render(read)
    assert parse.parse(text.encode(), "fuzz.toml") == read
    return None


def safetensors(data: bytes) -> None:
    """Check any file: the tensors of an accepted one lie inside it."""
    _table(read_safetensors, data)


def checkpoint(data: bytes) -> None:
    """Check any file; after a byte that no zip begins with, any pickle in a sound zip."""
    is_pickle = data[:1] == b"\x80"
    _table(read_checkpoint, hostile.checkpoint(data) if is_pickle else data)


def _table(read: Callable[[Path], TensorIndex], data: bytes) -> None:
    path = Path(_FOLDER.name) / "weights"
    path.write_bytes(data)
    try:
        table = read(path)
    except CsmWeightsError as error:
        return _refuse(error)
    for info in table.tensors.values():
        last = sum((n - 1) * step for n, step in zip(info.shape, info.stride, strict=True))
        end = info.offset + (last + 1) * info.itemsize if info.nbytes else info.offset
        assert 0 <= info.offset <= end <= table.file_size == len(data)
        assert info.name.encode()
    return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "safetensors": safetensors,
    "checkpoint": checkpoint,
}


def seeds(name: str) -> Iterable[bytes]:
    """Yield the inputs that the fuzzer begins with: good ones, and every bad one that is known."""
    if name == "manifest":
        yield from (path.read_bytes() for path in sorted(MANIFESTS.glob("*.toml")))
        yield from (text for text, _ in hostile.BAD_MANIFESTS.values() if len(text) < 1 << 14)
    elif name == "safetensors":
        yield hostile.good_safetensors()
        yield from (content for content, _ in hostile.BAD_SAFETENSORS.values())
    else:
        yield hostile.GOOD_PICKLE
        yield hostile.good_checkpoint()
        yield from (content for content, _ in hostile.BAD_ZIPS.values())
        yield from (content for content, _ in hostile.BAD_PICKLES.values())
        yield from (content for content, _ in hostile.running_pickles("/nowhere").values())

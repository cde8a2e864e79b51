"""Loading the tensors of a file, or of its chunk files, to a device, verified on the way."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import MissingInput, WrongContent
from csm_weights.formats.multipart import MultipartFile, find_chunk_files
from csm_weights.formats.transformers_layout import NamedTensor, name_tensors
from csm_weights.formats.weights_file import WeightsFile, find, open_weights
from csm_weights.model import load
from csm_weights.model.load import StagingBuffers, load_tensors
from csm_weights.model.stream import blocks, stream
from tests.model.simulated_cuda import CURRENT, Event, Simulation

CPU = torch.device("cpu")
CHUNKS = Path(__file__).resolve().parents[2] / "chunks" / "csm-tiny" / "safetensors"

#: Buffers so small that every tensor is cut, and elements are.
SMALL = StagingBuffers(block=4099, count=1, threads=3)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Tensors of odd sizes; in a checkpoint two are views and one lies transposed."""
    torch.manual_seed(3)
    slots = torch.randn(4, 5, 7)
    return {
        "a": torch.randn(301, 11),
        "b": torch.randn(1),
        "empty": torch.zeros(0, 4),
        "head": slots[1:],
        "long": torch.randn(5003),
        "turned": torch.randn(37, 53).t(),
    }


@pytest.fixture(scope="module")
def files(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tensors in both formats."""
    folder = tmp_path_factory.mktemp("files")
    found = {"safetensors": folder / "model.safetensors", "torch-zip": folder / "ckpt.pt"}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, found["safetensors"])
    torch.save(state, found["torch-zip"])
    return found


def in_chunk_files(path: Path, folder: Path, size: int) -> list[Path]:
    """Cut a file into chunk files of `size` bytes each."""
    folder.mkdir()
    content = path.read_bytes()
    for number, start in enumerate(range(0, len(content), size)):
        suffix = "".join(chr(97 + n) for n in divmod(number, 26))
        (folder / f"{path.name}.part-{suffix}").write_bytes(content[start : start + size])
    return find_chunk_files(folder, path.name)


def pinned(content: bytes, size: int) -> list[ByteRange]:
    """Return ranges of `size` bytes with their digests."""
    return [
        ByteRange(
            s.offset, s.size, hashlib.sha256(content[s.offset : s.offset + s.size]).hexdigest()
        )
        for s in blocks(len(content), size)
    ]


def tensors_of(checkpoint: WeightsFile) -> Mapping[str, NamedTensor]:
    return name_tensors([checkpoint], ()).tensors


def loaded(paths: Sequence[Path], dtype: torch.dtype | None = None, **options: Any) -> Any:
    with open_weights(paths) as checkpoint:
        return load_tensors(tensors_of(checkpoint), CPU, dtype, **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("format_", ["safetensors", "torch-zip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "how", ["whole", "parts", "small blocks", "verified", "verified in odd pieces"]
)
def test_tensors_are_those_that_were_saved(
    files: dict[str, Path],
    state: dict[str, Tensor],
    tmp_path: Path,
    format_: str,
    dtype: torch.dtype,
    how: str,
) -> None:
    """Both formats give the saved tensors in any dtype, whole or in chunk files."""
    paths = [files[format_]]
    options: dict[str, Any] = {}
    if how == "parts":
        paths = in_chunk_files(paths[0], tmp_path / "parts", 3001)
    if how == "small blocks":
        options = {"buffers": SMALL}
    if how == "verified":
        options = {"digests": pinned(paths[0].read_bytes(), 8192)}
    if how == "verified in odd pieces":
        options = {"digests": pinned(paths[0].read_bytes(), 1237), "buffers": SMALL}

    assert_same(loaded(paths, dtype, **options), state, dtype)


@settings(max_examples=40, deadline=None)
@given(
    part=st.integers(500, 9000),
    block=st.integers(100, 9000),
    threads=st.integers(1, 4),
    piece=st.none() | st.integers(97, 9000),
)
def test_tensors_are_right_wherever_files_are_cut(
    files: dict[str, Path],
    state: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    part: int,
    block: int,
    threads: int,
    piece: int | None,
) -> None:
    """Files, blocks and pieces may be cut anywhere, within elements too."""
    source = files["torch-zip"]
    parts = in_chunk_files(source, tmp_path_factory.mktemp("cut") / "parts", part)
    digests = pinned(source.read_bytes(), piece) if piece else ()

    found = loaded(
        parts, torch.bfloat16, digests=digests, buffers=StagingBuffers(block, 1, threads)
    )
    assert_same(found, state, torch.bfloat16)


def test_without_conversion_the_file_is_mapped(files: dict[str, Path]) -> None:
    """A float32 file on the CPU takes no memory of its own, and writes to tensors stay private."""
    before = files["safetensors"].read_bytes()
    found = loaded([files["safetensors"]], torch.float32)
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}
    found["a"].zero_()

    assert len(storages) == 1
    assert files["safetensors"].read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_data_may_begin_at_any_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    """A header without padding lets the data begin where no element could be mapped."""
    state = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    content = save(state)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()
    for odd in range(4):
        padded = header + b" " * odd
        path = tmp_path / f"{odd}.safetensors"
        data = content[-sum(tensor.nbytes for tensor in state.values()) :]
        path.write_bytes(len(padded).to_bytes(8, "little") + padded + data)
        assert_same(loaded([path], dtype), state, dtype)


def test_tensors_may_share_bytes(tmp_path: Path) -> None:
    """Views of one storage, one within the other, are all whole."""
    storage = torch.arange(4000.0)
    state = {"all": storage, "few": storage[10:20], "odd": storage[1::2], "end": storage[-7:]}
    torch.save(state, tmp_path / "ckpt.pt")

    for buffers in (None, SMALL):
        assert_same(
            loaded([tmp_path / "ckpt.pt"], torch.float64, buffers=buffers), state, torch.float64
        )


def test_tensors_of_a_group_lie_side_by_side(files: dict[str, Path]) -> None:
    """Tensors that are used as one matrix are one in memory, in the order asked for."""
    found = loaded([files["safetensors"]], torch.bfloat16, together=[("long", "a")])
    long, a = found["long"], found["a"]

    assert long.data_ptr() + long.nbytes == a.data_ptr()
    assert long.storage_offset() * long.itemsize % load.ALIGNMENT == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_flipped_byte_is_refused_while_it_is_loaded(
    files: dict[str, Path], tmp_path: Path, position: int, dtype: torch.dtype
) -> None:
    """With pinned digests a wrong byte anywhere is refused, and its piece is named."""
    content = bytearray(files["safetensors"].read_bytes())
    digests = pinned(bytes(content), 4096)
    # the last byte of the header's padding, or one of the data: the structure stays right
    at = {0: int.from_bytes(content[:8], "little") + 7}.get(position, position)
    content[at] ^= 1 if position else ord(" ") ^ ord("\n")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    piece = digests[at % len(content) // 4096]

    with pytest.raises(WrongContent, match=rf"bytes {piece.offset:,} to .*{piece.sha256}"):
        loaded([path], dtype, digests=digests)


def test_digests_of_a_shorter_file_are_refused(files: dict[str, Path]) -> None:
    """Digests that leave bytes unverified are refused."""
    digests = pinned(files["safetensors"].read_bytes(), 4096)
    for wrong in (digests[:-1], digests[1:]):
        with pytest.raises(WrongContent, match="wrong size"):
            loaded([files["safetensors"]], torch.bfloat16, digests=wrong)


def test_a_file_that_changes_while_it_is_loaded_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """A write dubuffers the read is noticed at its end."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["safetensors"].read_bytes())
    with open_weights([path]) as checkpoint:
        path.write_bytes(files["safetensors"].read_bytes())
        with pytest.raises(WrongContent, match="changed while"):
            load_tensors(tensors_of(checkpoint), CPU, torch.bfloat16)


def test_a_file_that_is_cut_while_it_is_loaded_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """A file that becomes shorter gives an error, no zeros."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(files["safetensors"].read_bytes())
    with open_weights([path]) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(10_000)
        with pytest.raises(WrongContent, match="ended early"):
            load_tensors(tensors_of(checkpoint), CPU, torch.bfloat16)


def test_a_missing_chunk_file_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Chunk files that do not make up the file are refused by its structure."""
    for format_, path in files.items():
        parts = in_chunk_files(path, tmp_path / format_, 3001)
        for missing in (parts[-1], parts[1]):
            with pytest.raises(WrongContent):
                loaded([part for part in parts if part != missing])


def test_torchs_threads_are_as_before(files: dict[str, Path]) -> None:
    """Loading leaves the number of torch's threads alone, also when it fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded([files["safetensors"]], torch.bfloat16)
        with pytest.raises(WrongContent):
            wrong = [ByteRange(0, files["safetensors"].stat().st_size, "0" * 64)]
            loaded([files["safetensors"]], torch.bfloat16, digests=wrong)
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- finding weights


def test_weights_are_found_in_every_layout(files: dict[str, Path], tmp_path: Path) -> None:
    """A file, a folder with one, a folder of chunk files, and the root of a chunk repository."""
    parts = in_chunk_files(files["torch-zip"], tmp_path / "chunks", 3001)
    below = tmp_path / "repository" / "chunks" / "ckpt"
    below.parent.mkdir(parents=True)
    parts[0].parent.rename(below)

    assert find(files["torch-zip"]) == [[files["torch-zip"]]]
    assert find(files["torch-zip"].parent) == [[files["safetensors"]]]
    assert find(below) == find(tmp_path / "repository")
    assert [part.name for part in find(below)[0]] == [part.name for part in parts]


def test_chunk_files_come_in_the_order_of_split(tmp_path: Path) -> None:
    """After `zz` split goes on with three letters; other files are no chunk files."""
    names = ["w.part-aa", "w.part-zz", "w.part-aaa", "w.part-", "w.part-aa.partial", "v.part-aa"]
    for name in names:
        (tmp_path / name).touch()

    assert [path.name for path in find_chunk_files(tmp_path, "w")] == names[:3]


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    """No file, and a folder without weights, are missing inputs that name the place."""
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingInput, match=str(path)):
            find(path)
    with pytest.raises(MissingInput, match="gone"):
        open_weights([tmp_path / "gone.safetensors"])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder in the place of a chunk file is refused, and nothing waits for a pipe."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WrongContent, match="regular file"):
        open_weights([tmp_path / "pipe"])


# ---- streaming


class Recorder:
    """A consumer that keeps its blocks."""

    def __init__(self, size: int, taken: dict[int, bytes]) -> None:
        self._buffer = memoryview(bytearray(size))
        self._taken = taken

    def buffer(self) -> memoryview:
        return self._buffer

    def consume(self, offset: int, size: int) -> None:
        self._taken[offset] = bytes(self._buffer[:size])

    def finish(self) -> None:
        self._taken[-1] = self._taken.get(-1, b"") + b"."


def test_every_byte_passes_once(tmp_path: Path) -> None:
    """The blocks of all consumers tile the ranges, and each consumer is finished."""
    content = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(content)
    taken: dict[int, bytes] = {}
    with MultipartFile([tmp_path / "file"]) as source:
        stream(source, blocks(source.size, 1000), lambda: Recorder(300, taken), threads=3)

    assert taken.pop(-1) == b"..."
    assert b"".join(taken[offset] for offset in sorted(taken)) == content
    assert max(map(len, taken.values())) == 300


# ---- a GPU that is not there: copies are made as late as it may make them

GPU = torch.device("cuda", 0)

#: Buffers of odd sizes, of one element, one alone, and larger than the file.
LATE_BUFFERS = [
    StagingBuffers(4099, 2, 3),
    StagingBuffers(4099, 1, 2),
    StagingBuffers(2048, 3, 1),
    StagingBuffers(5, 4, 2),
    StagingBuffers(1 << 20, 2, 2),
]


def on_gpu(path: Path, device: torch.device = GPU, **options: Any) -> dict[str, Tensor]:
    with open_weights([path]) as checkpoint:
        return load_tensors(tensors_of(checkpoint), device, torch.bfloat16, **options)


@pytest.mark.parametrize("format_", ["safetensors", "torch-zip"])
@pytest.mark.parametrize("buffers", LATE_BUFFERS, ids=str)
@pytest.mark.usefixtures("simulated_cuda")
def test_tensors_are_right_however_late_copies_are(
    files: dict[str, Path], state: dict[str, Tensor], format_: str, buffers: StagingBuffers
) -> None:
    """No buffer is filled again before the copy from it, whatever its size."""
    content = files[format_].read_bytes()
    for digests in ((), pinned(content, 1237)):
        found = on_gpu(files[format_], digests=digests, buffers=buffers)
        assert_same(found, state, torch.bfloat16)


@pytest.mark.usefixtures("simulated_cuda")
def test_the_simulation_sees_a_buffer_that_is_filled_too_soon(
    files: dict[str, Path], state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for events tensors are wrong: the comparison is no matter of course."""
    monkeypatch.setattr(Event, "synchronize", lambda _: None)
    with pytest.raises(AssertionError):
        found = on_gpu(files["safetensors"], buffers=StagingBuffers(2048, 2, 1))
        assert_same(found, state, torch.bfloat16)


def test_nothing_is_copied_after_a_failure(
    files: dict[str, Path], simulated_cuda: Simulation
) -> None:
    """When the error arrives, no copy is under way into memory that will be another's."""
    content = files["safetensors"].read_bytes()
    good = pinned(content, 8192)
    digests = [*good[:-1], ByteRange(good[-1].offset, good[-1].size, "0" * 64)]
    with pytest.raises(WrongContent, match="pinned"):
        on_gpu(files["safetensors"], digests=digests, buffers=StagingBuffers(2048, 8, 2))

    assert simulated_cuda.streams
    assert [len(stream.waiting) for stream in simulated_cuda.streams if stream.waiting] == []


def test_everything_goes_to_the_callers_current_gpu(
    files: dict[str, Path], simulated_cuda: Simulation
) -> None:
    """A bare "cuda" is one GPU for all threads, each of which has a current one of its own."""
    on_gpu(files["safetensors"], torch.device("cuda"))

    assert {device.index for device in simulated_cuda.devices} == {CURRENT}
    assert {stream.device for stream in simulated_cuda.streams} == {torch.device("cuda", CURRENT)}


@pytest.mark.parametrize("most", [0, 1, 3])
def test_memory_that_cannot_be_pinned_is_a_clear_error(
    files: dict[str, Path], simulated_cuda: Simulation, most: int
) -> None:
    """At the first buffer or a later one: a MemoryError with bytes and cause, and nothing flows."""
    simulated_cuda.most_pinned = most
    words = r"2,048 bytes of a staging buffer cannot be pinned \(CUDA error: out of memory\)"
    with pytest.raises(MemoryError, match=f"{words}.*ulimit"):
        on_gpu(files["safetensors"], buffers=StagingBuffers(2048, 4, 2))

    assert [len(stream.waiting) for stream in simulated_cuda.streams if stream.waiting] == []


@pytest.mark.parametrize(("is_late", "pinned_"), [(False, 1), (True, 3)])
def test_buffers_are_pinned_when_they_are_needed(
    files: dict[str, Path],
    state: dict[str, Tensor],
    simulated_cuda: Simulation,
    monkeypatch: pytest.MonkeyPatch,
    is_late: bool,
    pinned_: int,
) -> None:
    """One a thread where copies are faster than reading, and more only while copies are late."""
    if not is_late:

        def copied(event: Event) -> bool:
            event.synchronize()
            return True

        monkeypatch.setattr(Event, "query", copied)
    found = on_gpu(files["safetensors"], buffers=StagingBuffers(2048, 3, 1))

    assert_same(found, state, torch.bfloat16)
    assert simulated_cuda.pinned == pinned_


@pytest.mark.parametrize("cores", [1, 16, 500])
def test_pinned_buffers_are_within_their_bound(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """Blocks of 4 MiB, two for each of as many threads as there are cores, 256 MiB at most."""
    monkeypatch.setattr(load, "workers", lambda: cores)
    buffers = load.staging_buffers(torch.device("cuda"))

    assert (buffers.block, buffers.count, buffers.threads) == (4 << 20, 2, min(cores, 32))
    assert buffers.block * buffers.count * buffers.threads <= 256 << 20


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_read(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the bytes needed and free, and is torch's own of this kind."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small one")
    with (
        open_weights([files["safetensors"]]) as checkpoint,
        pytest.raises(torch.OutOfMemoryError, match=r"a small one.*1,000 bytes are free"),
    ):
        load_tensors(tensors_of(checkpoint), torch.device("cuda:0"), torch.bfloat16)


def test_a_failing_consumer_ends_the_others(tmp_path: Path) -> None:
    """An error in one thread is the error of all, and no thread stays behind."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))

    class Failing(Recorder):
        def consume(self, offset: int, size: int) -> None:
            raise RuntimeError(f"no device for {size} bytes at {offset}")

    threads = threading.active_count()
    with (
        MultipartFile([tmp_path / "file"]) as source,
        pytest.raises(RuntimeError, match="no device"),
    ):
        stream(source, blocks(source.size, 1000), lambda: Failing(300, {}), threads=3)
    assert threading.active_count() == threads


def test_loading_imports_nothing_more_than_torch() -> None:
    """Making an empty network imports none of the hundreds of modules of torch's compiler."""
    code = f"""
import sys, torch, csm_weights.model.csm
from csm_weights.formats.architecture import FLAVORS, CsmConfig
before = len(sys.modules)
tiny = CsmConfig(FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], 512, 35, 32)
csm_weights.model.csm.Model.from_local({str(CHUNKS)!r}, config=tiny)
print(len(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert int(done.stdout) < 20

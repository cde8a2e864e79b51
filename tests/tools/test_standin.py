"""Stand-in weights: the published layout and size, numbers that never change."""

from __future__ import annotations

import hashlib
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import FLAVORS, CsmConfig
from csm_weights.formats.identify import check_network
from csm_weights.formats.transformers_layout import name_tensors
from csm_weights.formats.weights_file import open_weights
from tests.support.readers import read_checkpoint, read_safetensors
from tools.standin.write import sizes, write_standin

CSM_1B = CsmConfig(
    FLAVORS["llama-1B"],
    FLAVORS["llama-100M"],
    text_vocab=128_256,
    audio_vocab=2051,
    codebooks=32,
)
TINY = CsmConfig(
    FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], text_vocab=512, audio_vocab=35, codebooks=32
)
#: Its text embeddings take 20 MiB: many blocks.
WIDE = CsmConfig(
    FLAVORS["tiny-backbone"], FLAVORS["tiny-decoder"], text_vocab=81_920, audio_vocab=9, codebooks=2
)
SEED = 7
CKPT, SAFETENSORS = "ckpt.pt", "model.safetensors"
#: Frozen: a change of these changes every stand-in that anyone has pinned.
GOLDEN = {
    SAFETENSORS: "d7dac6e6a241ec3a0451976580e5849e8f6ce4b0d449aa2d91f34a244c37d9bb",
    CKPT: "e472cf91ab3dcf75773009e17c4cf0a7652a6daf466bb7ea5b0396bfbeddff0e",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both stand-in files of the tiny architecture."""
    directory = tmp_path_factory.mktemp("tiny")
    write_standin(TINY, SEED, directory)
    return directory


def _digests(directory: Path) -> dict[str, str]:
    paths = sorted(directory.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _tensors(path: Path) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def test_sizes_of_csm_1b() -> None:
    """The stand-ins of CSM-1B have the sizes of the published files."""
    assert sizes(CSM_1B) == {SAFETENSORS: 6_211_186_784, CKPT: 6_219_618_714}


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "wide"])
def test_sizes_come_true(config: CsmConfig, tmp_path: Path) -> None:
    """The predicted sizes are those of the files written, and nothing else is left behind."""
    write_standin(config, SEED, tmp_path)
    actual = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes(config) == actual


def test_same_for_ever(tiny: Path) -> None:
    """A seed gives the same bytes today as in every version before."""
    assert _digests(tiny) == GOLDEN


def test_another_seed(tiny: Path, tmp_path: Path) -> None:
    """Another seed gives other numbers in every tensor."""
    write_standin(TINY, SEED + 1, tmp_path, ["safetensors"])
    old, new = ((folder / SAFETENSORS).read_bytes() for folder in (tiny, tmp_path))
    for info in read_safetensors(tmp_path / SAFETENSORS).tensors.values():
        span = slice(info.offset, info.offset + info.nbytes)
        assert old[span] != new[span]


@pytest.mark.parametrize(("format_", "name"), [("safetensors", SAFETENSORS), ("ckpt", CKPT)])
def test_one_format(format_: str, name: str, tiny: Path, tmp_path: Path) -> None:
    """One format alone is the same file as when both are written, and the other is not."""
    write_standin(TINY, SEED, tmp_path, [format_])
    assert _digests(tmp_path) == {name: _digests(tiny)[name]}


def test_both_readers_accept(tiny: Path) -> None:
    """Both files hold exactly the architecture's tensors, contiguous, with the same bytes."""
    tables = [read_safetensors(tiny / SAFETENSORS), read_checkpoint(tiny / CKPT)]
    for name in (SAFETENSORS, CKPT):
        with open_weights([tiny / name]) as weights:
            assert check_network(name_tensors([weights], ()), TINY).listed() == []
    contents = [(tiny / SAFETENSORS).read_bytes(), (tiny / CKPT).read_bytes()]
    for name in TINY.tensor_shapes():
        infos = [table.tensors[name] for table in tables]
        assert all(info.contiguous for info in infos)
        first, second = (
            content[info.offset : info.offset + info.nbytes]
            for info, content in zip(infos, contents, strict=True)
        )
        assert first == second


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_checkpoint(mmap: bool, tiny: Path) -> None:
    """Torch's own strict loader reads what the safetensors library reads."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    expected = library.load_file(tiny / SAFETENSORS)
    actual = torch.load(tiny / CKPT, weights_only=True, mmap=mmap)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_pickle_is_torchs(tiny: Path, tmp_path: Path) -> None:
    """The pickle is the one that torch.save writes for the same tensors, byte for byte."""
    torch = pytest.importorskip("torch")
    again = tmp_path / "model.pt"
    torch.save(_tensors(tiny / CKPT), again)
    with zipfile.ZipFile(again) as theirs, zipfile.ZipFile(tiny / CKPT) as ours:
        assert theirs.read("model/data.pkl") == ours.read("model/data.pkl")


def test_safetensors_is_the_librarys(tiny: Path, tmp_path: Path) -> None:
    """The safetensors file is the one that the library writes for the same tensors."""
    library = pytest.importorskip("safetensors.torch")
    again = tmp_path / SAFETENSORS
    library.save_file(library.load_file(tiny / SAFETENSORS), again)
    assert again.read_bytes() == (tiny / SAFETENSORS).read_bytes()


def test_audio_head_is_a_view(tiny: Path) -> None:
    """The audio head is a view, not at the start, of a storage of one more codebook."""
    head = _tensors(tiny / CKPT)["audio_head"]
    assert head.storage_offset() == 32 * 35
    assert head.untyped_storage().nbytes() == 32 * 32 * 35 * 4


def test_checksums_are_right(tmp_path: Path) -> None:
    """Every record of the zip has the CRC its header says, also over many blocks."""
    write_standin(WIDE, SEED, tmp_path, ["ckpt"])
    with zipfile.ZipFile(tmp_path / CKPT) as archive:
        assert archive.testzip() is None


def test_records_are_aligned(tiny: Path) -> None:
    """Every storage begins at a multiple of 64 bytes, so that it can be mapped."""
    tensors = read_checkpoint(tiny / CKPT).tensors
    assert {info.offset % 64 for name, info in tensors.items() if name != "audio_head"} == {0}


def test_values_have_the_scale_of_weights(tmp_path: Path) -> None:
    """Matrices have about one over the root of their fan-in, embeddings one, norms are near one."""
    write_standin(replace(TINY, audio_vocab=300), SEED, tmp_path, ["ckpt"])
    for name, tensor in _tensors(tmp_path / CKPT).items():
        low, high = tensor.abs().min().item(), tensor.abs().max().item()
        rms = tensor.square().mean().sqrt().item()
        if tensor.dim() == 1:
            assert 1 <= tensor.min() < tensor.max() < 1.125
            continue
        fan_in = tensor.shape[1] if name == "audio_head" else tensor.shape[-1]
        expected = 1.0 if "embeddings" in name else fan_in**-0.5
        assert 0.7 < rms / expected < 1.42
        assert 0 < low < high <= 2 * low * 1.01
        assert abs(tensor.mean().item()) < 0.2 * rms


def test_no_two_blocks_are_equal(tmp_path: Path) -> None:
    """No stretch of 256 KiB occurs twice, so that swapped pieces cannot go unnoticed."""
    write_standin(WIDE, SEED, tmp_path, ["safetensors"])
    content = (tmp_path / SAFETENSORS).read_bytes()
    info = read_safetensors(tmp_path / SAFETENSORS).tensors["text_embeddings.weight"]
    starts = range(info.offset, info.offset + info.nbytes, 1 << 18)
    assert len({content[start : start + (1 << 18)] for start in starts}) == len(starts) == 80


def test_progress_and_memory(tmp_path: Path) -> None:
    """Progress adds up to the tensors' bytes, and memory does not grow with them."""
    seen: list[int] = []
    tracemalloc.start()
    write_standin(WIDE, SEED, tmp_path, progress=seen.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensors = sum(info.nbytes for info in read_safetensors(tmp_path / SAFETENSORS).tensors.values())
    spare = 32 * 9 * 4
    assert sum(seen) == 2 * tensors + spare
    assert peak < 24 << 20 < tensors + (4 << 20)


def test_interrupted(tiny: Path, tmp_path: Path) -> None:
    """A run that fails leaves no part of a file, and a file that was there before as it was."""

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / CKPT).write_bytes((tiny / CKPT).read_bytes())
    with pytest.raises(KeyboardInterrupt):
        write_standin(TINY, SEED + 1, tmp_path, progress=fail)
    assert _digests(tmp_path) == {CKPT: _digests(tiny)[CKPT]}


def test_disk_refuses(tmp_path: Path) -> None:
    """A directory that is not there is an OSError, not a half-written file."""
    with pytest.raises(OSError, match="none"):
        write_standin(TINY, SEED, tmp_path / "none")


def test_unknown_format(tmp_path: Path) -> None:
    """A format that does not exist is refused before anything is written."""
    with pytest.raises(UsageError, match="onnx"):
        write_standin(TINY, SEED, tmp_path, ["safetensors", "onnx"])
    assert list(tmp_path.iterdir()) == []

"""Tests that need a GPU; `make test-gpu` runs them, elsewhere they are skipped with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csm_weights.byte_ranges import ByteRange
from csm_weights.formats.weights_file import find, open_weights
from csm_weights.model import smoke
from csm_weights.model.csm import Model
from csm_weights.model.decoders import FrameDecoder, open_decoder
from csm_weights.model.load import StagingBuffers, load_tensors
from csm_weights.model.path_checks import FAST_PATHS
from tests.model.test_fast_decoder import prompt, reference
from tests.model.test_load import tensors_of
from tests.model.test_smoke import saved, tiny_state
from tests.support.networks import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

CHUNKS = Path(__file__).resolve().parents[2] / "chunks" / "csm-tiny"


BUFFERS = [None, StagingBuffers(4096, 2, 3), StagingBuffers(1 << 20, 1, 1)]


@pytest.mark.parametrize("format_", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffers", BUFFERS)
def test_a_gpu_gets_the_same_tensors(
    format_: str, dtype: torch.dtype, buffers: StagingBuffers | None
) -> None:
    """Chunk files of either format, through buffers of any size, give the CPU's tensors."""
    found = []
    for device in ("cpu", "cuda"):
        with open_weights(find(CHUNKS / format_)[0]) as checkpoint:
            options: Any = {"buffers": buffers} if device == "cuda" else {}
            found.append(
                load_tensors(tensors_of(checkpoint), torch.device(device), dtype, **options)
            )

    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name].cpu()), name


def test_a_flipped_byte_is_refused_on_the_way_to_a_gpu(tmp_path: Path) -> None:
    """Digests are checked against the bytes that are copied to the device."""
    (tmp_path / "w").write_bytes(b"".join(p.read_bytes() for p in find(CHUNKS / "ckpt")[0]))
    digests = [ByteRange(0, (tmp_path / "w").stat().st_size, "0" * 64)]
    with (
        open_weights([tmp_path / "w"]) as checkpoint,
        pytest.raises(Exception, match="not those that are pinned"),
    ):
        load_tensors(
            tensors_of(checkpoint),
            torch.device("cuda"),
            torch.bfloat16,
            digests=digests,
        )


def on_gpu(dtype: torch.dtype) -> Model:
    return Model.from_local(CHUNKS / "safetensors", "cuda", dtype, config=TINY)


def generated(decoder: FrameDecoder, count: int, **how: Any) -> list[Tensor]:
    tokens, mask = prompt()
    first = decoder.start(tokens.cuda(), mask.cuda(), **how)
    return [first, *(decoder.step() for _ in range(count - 1))]


@pytest.mark.parametrize("path", [*FAST_PATHS, "eager"])
def test_every_path_gives_the_frames_of_the_reference(path: str) -> None:
    """In float32 40 greedy frames on the GPU are those of the CPU's reference."""
    torch.set_float32_matmul_precision("highest")
    model = Model.from_local(CHUNKS / "safetensors", config=TINY)
    expected = [codes for codes, _ in reference(model, 40, *prompt(), temperature=0)]
    found = generated(open_decoder(on_gpu(torch.float32), path), 40, temperature=0)

    assert [codes.tolist() for codes in expected] == [codes.tolist() for codes in found]


@pytest.mark.parametrize("path", FAST_PATHS)
def test_a_seed_gives_the_same_frames_again(path: str) -> None:
    """Codes drawn follow the seed, in the first sequence (which captures) as in later ones."""
    decoder = open_decoder(on_gpu(torch.bfloat16), path)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([codes.tolist() for codes in generated(decoder, 10)])

    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("path", FAST_PATHS)
def test_draws_of_one_sequence_differ(path: str) -> None:
    """A replayed graph draws anew each time, not the same again."""
    frames = generated(open_decoder(on_gpu(torch.bfloat16), path), 30, temperature=2.0)

    assert len({str(codes.tolist()) for codes in frames}) > 20


@pytest.mark.parametrize("dtype", list(smoke.CACHE_LIMITS))
def test_smoke_is_ok_on_a_gpu_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    """Every check is OK, every fast path is right, and bus, memory and driver are measured."""
    folder = saved(tmp_path, tiny_state(seed=1))
    report = smoke.run(folder, device="cuda", require_gpu=True, dtype=dtype)

    assert [check.name for check in report.checks if not check.ok] == []
    assert [(check.name, check.found) for check in report.paths if not check.ok] == []
    assert [check.name for check in report.paths] == list(FAST_PATHS)
    figures = report.figures
    assert min(figures.bus_rate, figures.memory_rate, figures.peak_device) > 0
    assert figures.driver != "-"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_gpu_is_as_good_as_the_first(tmp_path: Path) -> None:
    """With `cuda:1` the model loads and runs there, and nothing goes to the first GPU."""
    folder = saved(tmp_path, tiny_state(seed=1))
    torch.cuda.reset_peak_memory_stats(0)
    report = smoke.run(folder, device="cuda:1", require_gpu=True)

    assert report.ok
    assert torch.cuda.max_memory_allocated(0) == 0

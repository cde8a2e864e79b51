"""The smoke test: OK on a sound model, NOT OK on each fault, never silent."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from csm_weights.errors import MissingInput, SmokeUnavailable, UsageError, WrongContent
from csm_weights.model import fast_decoder, smoke
from csm_weights.model.csm import Model
from csm_weights.model.fast_decoder import Decoder
from csm_weights.model.smoke import record_golden
from csm_weights.model.smoke_report import SmokeReport
from tests.support.networks import TINY, TINY_CONFIG

NAMES = "tensors of the right name and shape"
FINITE = "weights that are not finite"
CACHE = "cached against parallel logits, largest difference"
CODES = "codes of 5 frames"
SPEED = "real-time factor, below 1 is faster"
GOLDEN = "golden frames"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound tiny model."""
    return saved(tmp_path / "model", tiny_state(seed=1))


@pytest.fixture
def golden(directory: Path, tmp_path: Path) -> Path:
    """Five golden frames of the sound model."""
    path = tmp_path / "golden.json"
    record_golden(directory, path, 5)
    return path


def tiny_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Model(TINY).state_dict()


def saved(directory: Path, state: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    save_file(state, directory / "model.safetensors")
    return directory


def run(directory: Path, frames: int = 3, **options: Any) -> SmokeReport:
    return smoke.run(directory, device="cpu", frames=frames, **options)


def not_ok(report: SmokeReport) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def value(report: SmokeReport, name: str) -> str:
    return next(check.value for check in report.checks if check.name == name)


def test_sound_model_is_ok(directory: Path, golden: Path) -> None:
    """Every check of a sound model is OK, and each is there."""
    report = run(directory, golden=golden)

    assert not_ok(report) == []
    assert report.ok
    expected = [NAMES, FINITE, CACHE, CODES, GOLDEN]
    assert expected == [check.name for check in report.checks]


def test_report_gives_figures(directory: Path) -> None:
    """The report names the device, the number of tensors, and figures of speed that agree."""
    report = run(directory)

    assert report.device == "cpu"
    assert f"{len(TINY.tensor_shapes())}" == value(report, NAMES)
    assert pytest.approx(report.real_time_factor * report.frames_per_second * 0.08) == 1.0
    assert report.load_seconds > 0


def test_either_format_can_be_asked_for(directory: Path) -> None:
    """The path may be a file's: here a checkpoint of another model gives other frames."""
    torch.save(tiny_state(seed=2), directory / "ckpt.pt")
    golden = directory / "golden.json"
    record_golden(directory, golden, 3)

    assert not_ok(run(directory / "model.safetensors", golden=golden)) == []
    assert not_ok(run(directory / "ckpt.pt", golden=golden)) == [GOLDEN]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_not_ok(tmp_path: Path, bad: float) -> None:
    """A single NaN or infinity among the weights is counted, and its tensor named."""
    state = tiny_state(seed=1)
    # A token that the prompt does not use: only the scan of the weights can see it.
    state["text_embeddings.weight"][500, 3] = bad
    report = run(saved(tmp_path, state))

    assert not_ok(report) == [FINITE]
    assert value(report, FINITE) == "1, in text_embeddings.weight"
    assert not report.ok


def test_every_part_of_a_large_tensor_is_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Non-finite weights in the last element and across chunk borders are all counted."""
    monkeypatch.setattr(smoke, "_CHUNK", 1000)
    state = tiny_state(seed=1)
    state["text_embeddings.weight"].view(-1)[[999, 1000, 2000, -1]] = float("nan")

    assert value(run(saved(tmp_path, state)), FINITE) == "4, in text_embeddings.weight"


def test_logits_that_are_not_numbers_are_not_ok(tmp_path: Path) -> None:
    """A model whose logits are all NaN does not pass as cached equal to parallel."""
    state = tiny_state(seed=1)
    state["backbone.norm.scale"][0] = float("nan")

    assert not_ok(run(saved(tmp_path, state))) == [FINITE, CACHE]


def with_faulty_layers(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """After each layer of a step, `fault` may change positions, keys and values."""
    read = fast_decoder._FusedLayer.__call__

    def faulty(layer: Any, x: Tensor, freqs_cis: Tensor, positions: Tensor, *caches: Any) -> Tensor:
        after = read(layer, x, freqs_cis, positions, *caches)
        fault(positions, *caches[:2])
        return after

    monkeypatch.setattr(fast_decoder._FusedLayer, "__call__", faulty)


def test_cache_that_loses_a_value_is_not_ok(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache whose first value is another's is found."""

    def lose(positions: Tensor, _: Tensor, values: Tensor) -> None:
        values[:, :, 0] = values[:, :, int(positions[-1])]

    with_faulty_layers(monkeypatch, lose)
    assert not_ok(run(directory)) == [CACHE]


def test_rounded_cache_is_not_ok(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that keeps only bfloat16 in a float32 model is found."""

    def rounded(_: Tensor, keys: Tensor, values: Tensor) -> None:
        for cache in (keys, values):
            cache.copy_(cache.bfloat16())

    with_faulty_layers(monkeypatch, rounded)
    assert not_ok(run(directory)) == [CACHE]


def test_cached_positions_that_slip_are_not_ok(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step-by-step decoding that rotates keys and queries twice as far is found."""
    rotate = fast_decoder._apply_rope

    def slipped(x: Tensor, freqs_cis: Tensor) -> Tensor:
        return rotate(x, freqs_cis * freqs_cis)

    monkeypatch.setattr(fast_decoder, "_apply_rope", slipped)
    assert not_ok(run(directory)) == [CACHE]


def test_code_outside_its_codebook_is_not_ok(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code that reaches into the next codebook's embeddings is found."""
    step = Decoder.step

    def overflowing(decoder: Decoder) -> Tensor:
        codes = step(decoder)
        codes[:, 0] = TINY.audio_vocab
        return codes

    monkeypatch.setattr(Decoder, "step", overflowing)
    report = run(directory, frames=5)

    assert CODES in not_ok(report)
    assert value(report, CODES).endswith("to 35")


def test_tensor_that_the_architecture_does_not_know_is_not_ok(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module with one tensor more than the architecture's table is found, and it is named."""
    load = Model.from_local

    def with_another(*arguments: Any) -> Model:
        model = load(*arguments)
        model.register_buffer("stray", torch.zeros(1))
        return model

    monkeypatch.setattr(Model, "from_local", with_another)
    report = run(directory)

    assert not_ok(report) == [NAMES]
    assert value(report, NAMES).endswith("wrong: stray")


def test_speed_is_checked_only_where_a_limit_is_asked_for(directory: Path) -> None:
    """A slow model passes; with `max_rtf` the real-time factor must be at most that."""
    report = run(directory)
    assert report.ok and SPEED not in [check.name for check in report.checks]
    assert not_ok(run(directory, max_rtf=1e-9)) == [SPEED]
    allowed = run(directory, max_rtf=1e9)
    assert allowed.ok and value(allowed, SPEED) == f"{allowed.real_time_factor:.3g}"


def test_other_golden_frame_is_not_ok(directory: Path, golden: Path) -> None:
    """A single code that differs from the golden frames is found, and its frame named."""
    recorded = json.loads(golden.read_text())
    recorded["frames"][3][31] = (recorded["frames"][3][31] + 1) % 35
    golden.write_text(json.dumps(recorded))
    report = run(directory, golden=golden)

    assert not_ok(report) == [GOLDEN]
    assert value(report, GOLDEN) == "4 of 5 the same, frame 3 is the first that differs"


def test_other_weights_do_not_give_the_golden_frames(tmp_path: Path, golden: Path) -> None:
    """Golden frames of one model are not those of a model with other weights."""
    other = saved(tmp_path / "other", tiny_state(seed=2))

    assert not_ok(run(other, golden=golden)) == [GOLDEN]


def test_one_changed_matrix_changes_the_golden_frames(tmp_path: Path, golden: Path) -> None:
    """The golden frames notice that one matrix has changed its sign."""
    state = tiny_state(seed=1)
    state["backbone.layers.1.mlp.w2.weight"] *= -1

    assert not_ok(run(saved(tmp_path / "other", state), golden=golden)) == [GOLDEN]


def test_golden_frames_of_another_torch_have_a_tolerance(directory: Path, golden: Path) -> None:
    """The file says which torch made it; with another one a code may be second by a hair, no more.

    Both a code that is second by more, and the model with one matrix changed, are found.
    """
    recorded = json.loads(golden.read_text())
    assert recorded["torch"] == torch.__version__.partition("+")[0]
    model = Model.from_local(directory, "cpu", torch.float32)
    with torch.no_grad():
        # a copy of the best code's head: it wins or loses by rounding alone
        best = recorded["frames"][4][0]
        other = next(code for code in range(35) if code not in [r[0] for r in recorded["frames"]])
        model.codebook0_head.weight[other] = model.codebook0_head.weight[best] * (1 - 1e-7)
        model.codebook0_head.weight[best] *= 1 - 1e-6
    near = saved(directory.parent / "near", model.state_dict())
    said = run(near, golden=golden)
    assert not_ok(said) == [GOLDEN]
    golden.write_text(json.dumps(recorded | {"torch": "2.0.0"}))
    report = run(near, golden=golden)
    assert not_ok(report) == []
    assert "made with torch 2.0.0" in value(report, GOLDEN)
    assert value(run(directory, golden=golden), GOLDEN) == "5 of 5 the same"
    for code in (1, 35):
        recorded["frames"][3][31] = (recorded["frames"][3][31] + code) % (35 + code)
        golden.write_text(json.dumps(recorded | {"torch": "2.0.0"}))
        assert not_ok(run(directory, golden=golden)) == [GOLDEN]


def test_golden_frames_after_another_prompt_are_not_ok(directory: Path, golden: Path) -> None:
    """Golden frames that were recorded after another prompt fail the check."""
    recorded = json.loads(golden.read_text())
    recorded["prompt"][0] += 1
    golden.write_text(json.dumps(recorded))

    assert not_ok(run(directory, golden=golden)) == [GOLDEN]


def test_golden_file_without_frames_is_not_ok(directory: Path, golden: Path) -> None:
    """A golden file without frames fails the check."""
    golden.write_text(json.dumps(json.loads(golden.read_text()) | {"frames": []}))

    assert not_ok(run(directory, golden=golden)) == [GOLDEN]


def test_all_golden_frames_are_compared(directory: Path, tmp_path: Path) -> None:
    """With more golden frames than were asked for, as many are generated."""
    path = tmp_path / "golden.json"
    record_golden(directory, path, 12)

    assert value(run(directory, frames=2, golden=path), GOLDEN) == "12 of 12 the same"


def test_golden_recording_repeats(directory: Path, golden: Path, tmp_path: Path) -> None:
    """Recording twice gives the same bytes, with rows of 32 codes."""
    again = tmp_path / "again.json"
    record_golden(directory, again, 5)

    assert golden.read_bytes() == again.read_bytes()
    assert [len(row) for row in json.loads(golden.read_text())["frames"]] == [32] * 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"prompt": [1]}',
        '{"prompt": [1], "frames": 3}',
        '{"prompt": [1.5], "frames": []}',
    ],
)
def test_malformed_golden_file_is_wrong_content(directory: Path, golden: Path, text: str) -> None:
    """A golden file that is not one is refused before the model is loaded."""
    golden.write_text(text)
    with pytest.raises(WrongContent, match=r"golden\.json"):
        run(directory, golden=golden)


def test_missing_golden_file_is_missing_input(directory: Path) -> None:
    """A golden file that is not there is a missing input, not a check left out."""
    with pytest.raises(MissingInput, match="nowhere"):
        run(directory, golden=directory / "nowhere.json")


def test_missing_model_is_missing_input(tmp_path: Path) -> None:
    """An empty directory is a missing input."""
    with pytest.raises(MissingInput):
        run(tmp_path)


def test_single_frame_is_refused(directory: Path) -> None:
    """One frame would leave the cache untested, and is a usage error."""
    with pytest.raises(UsageError, match="at least 2"):
        run(directory, frames=1)


def test_required_gpu_that_is_missing_is_unavailable(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a CUDA device a required GPU ends with exit code 77, never with a pass."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SmokeUnavailable, match="GPU") as refusal:
        smoke.run(directory, require_gpu=True)
    assert refusal.value.exit_code == 77


def test_required_gpu_does_not_go_with_the_cpu(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for the CPU while requiring a GPU is a usage error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="cpu"):
        run(directory, require_gpu=True)


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_device_that_cannot_compute_is_unavailable(directory: Path, device: str) -> None:
    """A device that is asked for and cannot be used ends with exit code 77."""
    with pytest.raises(SmokeUnavailable, match=device) as refusal:
        smoke.run(directory, device=device)
    assert refusal.value.exit_code == 77


def test_unknown_device_is_a_usage_error(directory: Path) -> None:
    """A word that is no device is a usage error."""
    with pytest.raises(UsageError, match="abacus"):
        smoke.run(directory, device="abacus")


def test_without_gpu_the_cpu_is_taken(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device asked for, and no CUDA device there: the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert smoke.run(directory).device == "cpu"


def test_too_little_memory_is_unavailable(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory on the device is exit code 77 and leaves torch's settings alone."""

    def out_of_memory(*_: Any) -> Model:
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr(Model, "from_local", out_of_memory)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(SmokeUnavailable, match="4 GiB"):
            run(directory)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_without_torch_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch the smoke test ends with exit code 77 and the command that installs it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, smoke.__name__)
    with pytest.raises(SmokeUnavailable, match=r"\[torch\].*SMOKE=no") as refusal:
        importlib.import_module(smoke.__name__)
    assert refusal.value.exit_code == 77


# ---- measures of the device

#: Seconds that the device of these tests works at a run, and those to wait for it.
WORK, WAIT = 160e-6, 25e-6


def test_starting_and_waiting_are_no_part_of_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose work goes on while the host does, a run's time is the device's to 2 %."""
    clock, queued = [0.0], [0.0]

    def run() -> None:
        queued[0] += WORK

    def synchronize(_: torch.device) -> None:
        clock[0] += queued[0] + WAIT
        queued[0] = 0.0

    monkeypatch.setattr(smoke, "synchronize", synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    assert smoke._fastest(run, torch.device("cuda")) == pytest.approx(WORK, rel=0.02)

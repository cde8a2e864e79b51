"""The reference as a decoder, and which path a generator takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from csm_weights.errors import UsageError
from csm_weights.model import decoders
from csm_weights.model.csm import Model
from csm_weights.model.decoders import EagerDecoder, choose_path, open_decoder
from csm_weights.model.fast_decoder import Decoder
from csm_weights.model.generator import Generator
from csm_weights.model.path_checks import FAST_PATHS, PathCheck
from csm_weights.model.smoke_report import path_report_path
from csm_weights.untrusted import dump_record
from tests.commands.test_render import SMOKE
from tests.model.test_fast_decoder import assert_same_frames, generated, prompt

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_the_reference_decodes_as_the_fast_path(model: Model) -> None:
    """Frame by frame the same codes and logits, in a second sequence too, greedy and drawn."""
    eager, fast = EagerDecoder(model), Decoder(model)
    hows: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.7, "topk": 5}]
    for length, how in zip((3, 9), hows, strict=True):
        torch.manual_seed(4)
        expected = generated(fast, 4, *prompt(length), **how)
        torch.manual_seed(4)
        assert_same_frames(generated(eager, 4, *prompt(length), **how), expected)


def test_a_step_of_the_reference_needs_a_start(model: Model) -> None:
    """Without a prompt there is nothing to go on with."""
    with pytest.raises(UsageError, match="start"):
        EagerDecoder(model).step()


def test_the_cpu_takes_its_steps_and_can_be_told_otherwise(model: Model) -> None:
    """Nothing is checked before the CPU's fast path is taken; `fast` takes the reference."""
    generator, told = Generator(model), Generator(model, fast="eager")

    assert str(generator.path) == "steps: the fast path of the CPU"
    assert isinstance(generator._decoder, Decoder)
    assert str(told.path) == "eager: as asked for"
    assert isinstance(told._decoder, EagerDecoder)


def test_a_path_that_the_device_has_not_is_misuse(model: Model) -> None:
    """A GPU's path on the CPU, or a name that is none, is told with those there are."""
    with pytest.raises(UsageError, match=r"no path 'graphs' on cpu; there are steps, eager"):
        _ = Generator(model, fast="graphs").path
    with pytest.raises(UsageError, match="abacus"):
        open_decoder(model, "abacus")


# ---- a GPU that is not there


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `choose_path` asks of a model in bfloat16 on a GPU, in a folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card 9000")
    monkeypatch.setattr(decoders, "_first", lambda *_: "575.1")
    (tmp_path / ".csm-weights").mkdir()
    weight = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    return SimpleNamespace(folder=tmp_path, projection=SimpleNamespace(weight=weight))


def remember(gpu: Any, *checks: PathCheck, **other: str) -> None:
    """Write the report of a smoke test, of this machine but for `other`."""
    of = {"machine": "Card 9000", "driver": "575.1", "torch": torch.__version__}
    path = path_report_path(gpu.folder, **{**of, "dtype": "bfloat16", **other})
    path.write_text(dump_record(replace(SMOKE, paths=checks)))


def right(name: str) -> PathCheck:
    return PathCheck(name, True, "1e-2", ms=5.0)


def wrong(name: str) -> PathCheck:
    return PathCheck(name, False, "its process ended by SIGSEGV: no message")


def test_the_fastest_path_that_passed_is_taken(gpu: Any) -> None:
    """Of those that the smoke test has checked the first right one; what is wrong is told."""
    remember(gpu, right("first"), right("second"))
    assert choose_path(gpu, None).name == "first"
    remember(gpu, wrong("first"), right("second"))
    found = choose_path(gpu, None)
    assert found.name == "second"
    assert f"checked at {SMOKE.made_at}; first: its process ended by SIGSEGV" in found.why


def test_where_no_path_passed_the_reference_speaks(gpu: Any) -> None:
    """No check, or none that passed: the reference, and why."""
    assert choose_path(gpu, None).name == "eager"
    assert "inv smoke checks them" in choose_path(gpu, None).why
    remember(gpu, *map(wrong, FAST_PATHS))
    assert choose_path(gpu, None).name == "eager"
    gpu.folder = None
    assert "no fast path was checked" in choose_path(gpu, None).why


@pytest.mark.parametrize(
    "other",
    [{"machine": "Card 1"}, {"driver": "1"}, {"torch": "1.0"}, {"dtype": "float16"}],
    ids=lambda other: next(iter(other)),
)
def test_a_check_holds_for_its_card_driver_torch_and_dtype(gpu: Any, other: dict[str, str]) -> None:
    """A check on another card, or with another driver, torch or dtype is none."""
    remember(gpu, *map(right, FAST_PATHS), **other)
    assert choose_path(gpu, None).name == "eager"
    remember(gpu, *map(right, FAST_PATHS))
    assert choose_path(gpu, None).name == FAST_PATHS[0]


def test_without_triton_the_fused_path_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smoke test then notes it, and the graphs are taken."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("kernels", "fused_decoder"):
        monkeypatch.delitem(sys.modules, f"csm_weights.model.{name}", raising=False)
    monkeypatch.setattr(decoders, "names_of", lambda _: FAST_PATHS)
    with pytest.raises(UsageError, match=r"the fused path needs Triton .*torch for CUDA brings it"):
        open_decoder(model, "fused")


def test_a_path_can_be_forced_on_a_gpu(gpu: Any) -> None:
    """`fast` takes a path that was never checked."""
    assert str(choose_path(gpu, FAST_PATHS[0])) == f"{FAST_PATHS[0]}: as asked for"

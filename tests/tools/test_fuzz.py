"""The fuzzer's targets, run without a fuzzer on all seeds and on mixtures of them."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from csm_weights.errors import CsmWeightsError, MissingInput, UsageError
from csm_weights.formats import tensor_index
from csm_weights.manifest import parse as manifests
from tests.support import hostile
from tools.fuzz import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_are_read_or_refused(name: str) -> None:
    """Every seed keeps to the rules that the targets check."""
    seeds = list(targets.seeds(name))
    assert len(seeds) > 20
    for seed in seeds:
        targets.TARGETS[name](seed)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_crossed_seeds_are_read_or_refused(name: str) -> None:
    """A thousand joints of the halves of two seeds keep to the rules as well."""
    chance = random.Random(name)
    seeds = [seed for seed in targets.seeds(name) if len(seed) < 4_000]
    for _ in range(1_000):
        first, second = chance.sample(seeds, 2)
        cut = chance.randrange(len(first) + 1)
        targets.TARGETS[name](first[:cut] + second[min(cut, len(second)) :])


def _raises(error: Exception) -> Callable[..., object]:
    def act(*_: object) -> object:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        MissingInput("no finding"),
        UsageError("another branch"),
        RecursionError("deep"),
    ],
)
def test_a_reader_that_breaks_the_rules_is_noticed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other exception, exit code or empty refusal of a reader fails the target."""
    monkeypatch.setattr(manifests, "parse", _raises(error))
    monkeypatch.setattr(targets, "read_safetensors", _raises(error))
    monkeypatch.setattr(targets, "read_checkpoint", _raises(error))
    for name, act in targets.TARGETS.items():
        with pytest.raises((type(error), AssertionError)):
            act(next(iter(targets.seeds(name))))


def test_a_table_that_leaves_its_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accepted file whose tensors lie outside it fails the target."""
    info = tensor_index.TensorInfo("w", "F32", (2, 3), 1 << 20, (3, 1))
    table = tensor_index.TensorIndex({"w": info}, 8)
    monkeypatch.setattr(targets, "read_safetensors", lambda _: table)
    with pytest.raises(AssertionError):
        targets.safetensors(bytes(8))


def test_a_good_seed_is_accepted() -> None:
    """The targets do not pass by refusing everything."""
    assert manifests.parse(hostile.manifest(), "x")
    with pytest.raises(CsmWeightsError):
        manifests.parse(b"", "x")
    for content in (hostile.GOOD_PICKLE, hostile.good_checkpoint()):
        targets.checkpoint(content)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is here")
def test_without_the_fuzzer_the_command_says_how_to_get_it() -> None:
    """`python -m tools.fuzz` without atheris ends with 1 and names the command to install it."""
    command = [sys.executable, "-m", "tools.fuzz", "manifest", "corpus"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "make fuzz" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr

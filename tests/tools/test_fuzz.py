"""What the fuzzer does, without the fuzzer: all seeds, and what changes of them come to."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from csm_weights.errors import CsmWeightsError, MissingInput, UsageError
from csm_weights.formats import tensor_index
from csm_weights.manifest import parse as manifests
from tests.support import hostile
from tools.fuzz import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_are_read_or_refused(name: str) -> None:
    """Everything that the fuzzer begins with keeps to the rules that it holds readers to."""
    seeds = list(targets.seeds(name))
    assert len(seeds) > 20
    for seed in seeds:
        targets.TARGETS[name](seed)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_crossed_seeds_are_read_or_refused(name: str) -> None:
    """Halves of two seeds joined, a thousand times the same way, keep to the rules as well."""
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
    """Any other exception, code or empty refusal of a reader ends the fuzzer's run."""
    monkeypatch.setattr(manifests, "parse", _raises(error))
    monkeypatch.setattr(targets, "read_safetensors", _raises(error))
    monkeypatch.setattr(targets, "read_checkpoint", _raises(error))
    for name, act in targets.TARGETS.items():
        with pytest.raises((type(error), AssertionError)):
            act(next(iter(targets.seeds(name))))


def test_a_table_that_leaves_its_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accepted file whose tensors lie outside it ends the fuzzer's run."""
    info = tensor_index.TensorInfo("w", "F32", (2, 3), 1 << 20, (3, 1))
    table = tensor_index.TensorIndex({"w": info}, 8)
    monkeypatch.setattr(targets, "read_safetensors", lambda _: table)
    with pytest.raises(AssertionError):
        targets.safetensors(bytes(8))


def test_a_good_seed_is_accepted() -> None:
    """The targets do not keep to the rules by refusing everything."""
    assert manifests.parse(hostile.manifest(), "x")
    with pytest.raises(CsmWeightsError):
        manifests.parse(b"", "x")
    for content in (hostile.GOOD_PICKLE, hostile.good_checkpoint()):
        targets.checkpoint(content)

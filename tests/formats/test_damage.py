"""Weights saved anew with one thing wrong: with the release at hand the tensor is named.

DAMAGES=300 in the environment tries so many, as `make damage` does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csm_weights.commands.identify import Identified, identify_paths
from csm_weights.errors import WrongContent
from csm_weights.formats.transformers_layout import own_name
from tests.commands.test_identify import TIED, in_transformers, released, root, saved
from tests.formats.test_compare import sharded

__all__ = ["root"]

COUNT = int(os.environ.get("DAMAGES", "40"))

#: The names of tensors that are exchanged or changed, drawn by the seed.
State = dict[str, Tensor]

AUDIO = "backbone_model.embed_tokens.embed_audio_tokens.weight"
TIED_NAMES = {AUDIO, TIED}


def _alone(state: State) -> list[str]:
    """The tensors that nothing is tied to."""
    return sorted(state.keys() - TIED_NAMES)


def not_permuted(state: State, draw: random.Random) -> set[str]:
    """The rows of q or k stay in our order."""
    name = draw.choice([n for n in _alone(state) if ".q_proj" in n or ".k_proj" in n])
    state[name] = released()[own_name(name) or ""]
    return {name}


def exchanged(state: State, draw: random.Random) -> set[str]:
    """Two tensors of one shape have changed places."""
    alike = [
        (a, b) for a in _alone(state) for b in _alone(state)
        if a < b and state[a].shape == state[b].shape and not torch.equal(state[a], state[b])
    ]  # fmt: skip
    first, second = draw.choice(alike)
    state[first], state[second] = state[second], state[first]
    return {first, second}


def rotated(state: State, draw: random.Random) -> set[str]:
    """Every row is one further down."""
    name = draw.choice([n for n in _alone(state) if state[n].ndim > 1])
    state[name] = state[name].roll(1, 0)
    return {name}


def tied_copy(state: State, draw: random.Random) -> set[str]:
    """The copy of the audio embeddings has another element."""
    rows, columns = state[TIED].shape
    state[TIED] = state[TIED].clone()
    state[TIED][draw.randrange(rows), draw.randrange(columns)] += 1
    return {TIED}


def of_another(state: State, draw: random.Random) -> set[str]:
    """One tensor is that of a fine-tune."""
    name = draw.choice(_alone(state))
    state[name] = state[name] + torch.full_like(state[name], draw.choice([1e-3, 0.5]))
    return {name}


def missing(state: State, draw: random.Random) -> set[str]:
    name = draw.choice(_alone(state))
    del state[name]
    return {name}


def one_too_many(state: State, draw: random.Random) -> set[str]:
    name = draw.choice(_alone(state)).replace("weight", "bias")
    state[name] = torch.zeros(4)
    return {name}


def wrong_dtype(state: State, draw: random.Random) -> set[str]:
    name = draw.choice(_alone(state))
    state[name] = state[name].to(draw.choice([torch.float16, torch.bfloat16]))
    return {name}


#: Damages, and whether headers and the file itself tell them without the release.
DAMAGES: list[tuple[Callable[[State, random.Random], set[str]], bool]] = [
    (not_permuted, False),
    (exchanged, False),
    (rotated, False),
    (tied_copy, True),
    (of_another, False),
    (missing, True),
    (one_too_many, True),
    (wrong_dtype, True),
]


def named(found: Identified) -> set[str]:
    """The tensors that a person is told, by their names in the file and by ours."""
    wrong = {finding.where.rpartition(": ")[2] for finding in found.identity.wrong}
    return wrong | set(found.differ or ())


@pytest.mark.parametrize("seed", range(COUNT))
def test_every_damage_is_named_by_its_tensor(seed: int, root: Path, tmp_path: Path) -> None:
    """With the release here each damaged tensor is named; without, the rest is not called good."""
    draw = random.Random(seed)
    damage, is_seen_alone = DAMAGES[seed % len(DAMAGES)]
    state = in_transformers(released(), codec=False)
    expected = damage(state, draw)
    path = tmp_path / "theirs"
    if draw.random() < 0.5:
        sharded(path, state, draw.randint(2, 4))
    else:
        saved(path, state)

    (found,) = identify_paths(root, [path]).files
    assert {own_name(name) or name for name in named(found)} == {own_name(n) or n for n in expected}
    assert "equal" not in found.verdict

    shutil.rmtree(root / "chunks")
    (alone,) = identify_paths(root, [path]).files
    assert named(alone) == (expected if is_seen_alone else set())
    assert alone.verdict.startswith("not compared with a release")


@pytest.mark.parametrize("seed", range(max(4, COUNT // 10)))
def test_a_truncated_shard_is_refused_by_its_file(seed: int, root: Path, tmp_path: Path) -> None:
    """A shard that was cut, or lies there without its index's others, is refused and named."""
    draw = random.Random(seed)
    shards = sharded(tmp_path, in_transformers(released(), codec=False), 3)
    victim = draw.choice(shards)
    victim.write_bytes(victim.read_bytes()[: -draw.randint(1, 10_000)])
    with pytest.raises(WrongContent) as caught:
        identify_paths(root, [tmp_path])
    assert str(victim) in str(caught.value)
    index = json.loads((tmp_path / "transformers.safetensors.index.json").read_text())
    assert victim.name in index["weight_map"].values()

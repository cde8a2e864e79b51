"""Weights as people have them: of transformers, in shards, in another dtype, wrapped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm_weights import api
from csm_weights.errors import CsmWeightsError, MissingInput, WrongContent
from csm_weights.formats.transformers_layout import TIED, name_tensors
from csm_weights.formats.weights_file import open_weights
from csm_weights.model import smoke
from csm_weights.model.csm import Model
from csm_weights.model.load import StagingBuffers, load_tensors
from tests.model.test_csm import (
    assert_close,
    generate,
    greedy,
    transformers_depth_logits,
    transformers_hidden,
)
from tests.model.test_load import assert_same, pinned
from tests.support.networks import TINY, TINY_CONFIG, random_model
from tests.support.oracles import transformers_config, transformers_model

pytestmark = pytest.mark.usefixtures("no_gradients")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Names of one tensor in both layouts.
OURS, THEIRS = "backbone.layers.1.mlp.w3.weight", "backbone_model.layers.1.mlp.up_proj.weight"

#: What training loops put before the names of tensors.
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod."]

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """The model as transformers saves it, with a codec."""
    folder = tmp_path_factory.mktemp("theirs")
    transformers_model(TINY, model.state_dict()).save_pretrained(folder)
    return folder


def in_dtype(folder: Path, model: Model, dtype: torch.dtype, **options: Any) -> Path:
    """The model as transformers saves it in a dtype."""
    saved = transformers_model(TINY, model.state_dict()).to(dtype)
    saved.save_pretrained(folder, **options)
    return folder


def original(folder: Path, state: Any, name: str = "ckpt.pt") -> Path:
    """A checkpoint of our layout with the 155-byte edition of config.json beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    torch.save(state, folder / name)
    return folder


def assert_is(loaded: Model, model: Model, dtype: torch.dtype) -> None:
    assert_same(loaded.state_dict(), model.state_dict(), dtype)


# ---- transformers' layout


def test_weights_that_transformers_made_give_its_logits_and_frames(tmp_path: Path) -> None:
    """A model that transformers drew and saved gives here what it gives there."""
    from transformers import CsmForConditionalGeneration

    torch.manual_seed(3)
    drawn = CsmForConditionalGeneration(transformers_config(TINY, initializer_range=0.2)).eval()
    drawn.save_pretrained(tmp_path)
    ours = Model.from_local(tmp_path)

    text, codes = torch.randint(1, 512, (1, 30)), torch.randint(35, (30, 32))
    tokens = torch.zeros(1, 30, 33, dtype=torch.long)
    tokens[..., 32], mask = text, torch.arange(33).expand(1, 30, 33) == 32
    hidden = ours.backbone_hidden(tokens, mask, torch.arange(30)[None])
    assert_close(hidden, transformers_hidden(drawn, tokens, mask))
    logits = ours.codebook_logits(hidden[0], codes)
    assert_close(logits[:, 0], drawn.lm_head(hidden[0]))
    assert_close(logits[:, 1:], transformers_depth_logits(drawn, hidden[0], codes))
    said = drawn.generate(
        input_ids=text, max_new_tokens=6, do_sample=False, depth_decoder_do_sample=False
    )
    assert said.tolist() == torch.stack(generate(ours, text, 6, greedy(ours)), 1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_whatever_transformers_saves_is_loaded(
    tmp_path: Path, model: Model, dtype: torch.dtype, size: str
) -> None:
    """In each dtype, whole or in shards, the tensors are ours to the bit, with q and k in order."""
    folder = in_dtype(tmp_path, model, dtype, max_shard_size=size)

    assert (len(list(folder.glob("model-*.safetensors"))) > 3) == (size == "60KB")
    assert_is(Model.from_local(folder, dtype=None), model, dtype)


def test_a_config_that_is_given_tells_the_heads(tmp_path: Path) -> None:
    """Rows of q and k go by the given network's heads, not by a published one of equal shapes."""
    wide = replace(TINY, backbone=replace(TINY.backbone, heads=2, kv_heads=1))
    model = random_model(wide)
    transformers_model(wide, model.state_dict()).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()

    assert_is(Model.from_local(tmp_path, config=wide), model, torch.float32)


@pytest.mark.parametrize("buffers", [(4099, 2, 3), (1237, 1, 2), (310, 1, 1), (1 << 20, 1, 2)])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.usefixtures("simulated_cuda")
def test_rows_are_put_in_order_as_they_stream(
    theirs: Path, model: Model, buffers: tuple[int, int, int], device: str
) -> None:
    """Blocks may end anywhere in a row, a half of a head or an element; digests are checked."""
    content = (theirs / "model.safetensors").read_bytes()
    for digests in ((), pinned(content, 4096)):
        with open_weights([theirs / "model.safetensors"]) as file:
            tensors = name_tensors([file], [theirs]).tensors
            found = load_tensors(
                tensors,
                torch.device(device),
                torch.bfloat16,
                together=TINY.fused_tensors(),
                digests=digests,
                buffers=StagingBuffers(*buffers),
            )
        assert_same(found, model.state_dict(), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_out_of_order_is_copied(
    tmp_path: Path, model: Model, dtype: torch.dtype
) -> None:
    """In its own dtype a file of transformers is mapped, but for q and k."""
    folder = in_dtype(tmp_path, model, dtype)
    loaded = Model.from_local(folder, dtype=dtype).state_dict()
    size = (folder / "model.safetensors").stat().st_size
    copied = {name for name, t in loaded.items() if t.untyped_storage().nbytes() != size}

    assert copied == {n for n in loaded if n.endswith(("q_proj.weight", "k_proj.weight"))}


def test_shards_are_found_by_folder_index_shard_or_list(tmp_path: Path, model: Model) -> None:
    """All ways to name a model in shards mean all of them."""
    folder = in_dtype(tmp_path, model, torch.float32, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))

    for path in (folder, folder / "model.safetensors.index.json", shards[1], shards):
        assert_is(Model.from_local(path), model, torch.float32)
    (folder / "model.safetensors.index.json").unlink()
    assert_is(Model.from_local(folder), model, torch.float32)
    shards[1].unlink()
    with pytest.raises(MissingInput, match=shards[1].name):
        Model.from_local(folder)


# ---- other dtypes, wrappers, prefixes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_a_training_loop_saves_is_loaded(
    tmp_path: Path, model: Model, dtype: torch.dtype, wrapper: str, prefix: str
) -> None:
    """In any float dtype, in a dict with other things or not, with prefixes or not."""
    state: Any = {prefix + name: t.to(dtype) for name, t in model.state_dict().items()}
    if wrapper:
        state = {wrapper: state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(3)}}}

    loaded = Model.from_local(original(tmp_path / "model", state), dtype=None)
    assert_is(loaded, model, dtype)


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_transformers_names_may_be_prefixed(
    tmp_path: Path, theirs: Path, model: Model, prefix: str
) -> None:
    """Both at once: the names of transformers, and a prefix of a training loop."""
    shutil.copy(theirs / "config.json", tmp_path)
    state = load_file(theirs / "model.safetensors")
    save_file({prefix + name: t for name, t in state.items()}, tmp_path / "model.safetensors")

    assert_is(Model.from_local(tmp_path), model, torch.float32)


# ---- strict


def without(state: State, name: str) -> None:
    del state[name]


def with_another(state: State, name: str) -> None:
    state[name.replace("layers.1", "layers.9")] = state[name].clone()


def with_a_wrong_shape(state: State, name: str) -> None:
    state[name] = state[name][:-1].clone()


def with_a_wrong_dtype(state: State, name: str) -> None:
    state[name] = state[name].to(torch.float16)


SPOILED = [without, with_another, with_a_wrong_shape, with_a_wrong_dtype]


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_a_finding_has_the_name_in_the_file(
    tmp_path: Path,
    theirs: Path,
    model: Model,
    spoil: Callable[[State, str], None],
    prefix: str,
    name: str,
) -> None:
    """A tensor missing, extra, misshapen or of another dtype is called what its file calls it."""
    shutil.copy(theirs / "config.json", tmp_path)
    state = model.state_dict() if name == OURS else load_file(theirs / "model.safetensors")
    state = {prefix + key: tensor for key, tensor in state.items()}
    spoil(state, prefix + name)
    save_file(state, tmp_path / "model.safetensors")

    with pytest.raises(WrongContent, match="is not the network of its") as refusal:
        Model.from_local(tmp_path)
    called = prefix + name.replace("layers.1", "layers.9" if spoil is with_another else "layers.1")
    assert [f.where.rpartition(": ")[2] for f in refusal.value.findings] == [called]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(tmp_path: Path, model: Model, dtype: torch.dtype) -> None:
    """Float64 and whole numbers are named tensor by tensor, and not loaded."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    with pytest.raises(WrongContent, match="F32 or BF16 or F16"):
        Model.from_local(original(tmp_path / "model", state))


def test_the_refusal_says_what_the_file_is(tmp_path: Path, theirs: Path) -> None:
    """Where the network is another than that of config.json, the error says which it is."""
    shutil.copy(theirs / "model.safetensors", tmp_path)
    config = TINY_CONFIG | {"backbone_flavor": "llama-100M"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongContent, match="These weights are another CSM in transformers'"):
        Model.from_local(tmp_path)


def test_a_second_copy_of_the_embeddings_must_be_the_same(tmp_path: Path, theirs: Path) -> None:
    """transformers may save the tied embeddings twice: equal is good, different is refused."""
    shutil.copy(theirs / "config.json", tmp_path)
    state = load_file(theirs / "model.safetensors")
    other = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    state[other] = state[TIED].clone()
    save_file(state, tmp_path / "model.safetensors")
    Model.from_local(tmp_path)

    torch.save(state | {other: state[TIED]}, tmp_path / "shared.pt")
    Model.from_local(tmp_path / "shared.pt")
    state[TIED][7, 3] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WrongContent, match=rf"{TIED}\[7, 3\]"):
        Model.from_local(tmp_path)


# ---- for programs, and smoke


@pytest.mark.filterwarnings("ignore:.*is loaded unverified")
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_programs_load_what_transformers_saved(tmp_path: Path, model: Model, size: str) -> None:
    """The public Model takes the same files, and says that nothing is pinned for them."""
    folder = in_dtype(tmp_path, model, torch.bfloat16, max_shard_size=size)
    loaded = api.Model.from_local(folder, dtype=None)

    assert_is(loaded, model, torch.bfloat16)
    assert not loaded.verified


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_smoke_is_ok_on_what_transformers_saved(
    tmp_path: Path, model: Model, dtype: torch.dtype, size: str
) -> None:
    """Every check is OK, in the dtype of the file as in others."""
    folder = in_dtype(tmp_path, model, dtype, max_shard_size=size)
    for word in ("float32", str(dtype).removeprefix("torch.")):
        report = smoke.run(folder, device="cpu", frames=2, dtype=word)

        assert [check.name for check in report.checks if not check.ok] == []
        is_mapped = word == str(dtype).removeprefix("torch.")
        assert (report.figures.loaded_bytes == 0) == is_mapped


def test_a_file_that_is_not_csm_is_refused(tmp_path: Path) -> None:
    """Tensors of another model are no network of CSM, whatever their names begin with."""
    with pytest.raises(CsmWeightsError, match="not CSM"):
        Model.from_local(original(tmp_path / "model", {"model.embed.weight": torch.ones(3)}))

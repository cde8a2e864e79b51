"""What weights are: network, layout, dtype, and the release that they equal or come from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from csm_weights.commands.identify import Identified, identify_paths
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.commands.verify import verify
from csm_weights.errors import MissingInput, WrongContent
from csm_weights.formats.architecture import CSM_1B, FLAVORS, CsmConfig
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from tests.formats.test_compare import joined, sharded
from tests.support import hostile
from tests.support.clone import REPOSITORY, copy_tiny
from tests.support.networks import TINY
from tests.support.oracles import transformers_model
from tests.support.schema import checked

TIED = "depth_decoder.model.embed_tokens.weight"
Q_PROJ = "backbone.layers.1.attn.q_proj.weight"


def released() -> dict[str, Tensor]:
    """The tensors of the committed tiny release."""
    parts = sorted((REPOSITORY / "chunks/csm-tiny/safetensors").glob("model.safetensors.part-*"))
    state: dict[str, Tensor] = load(b"".join(part.read_bytes() for part in parts))
    return state


def in_transformers(state: dict[str, Tensor], codec: bool = True) -> dict[str, Tensor]:
    """A state dict as transformers' own model has it, the tied copy included."""
    theirs = transformers_model(TINY, state).state_dict()
    return {n: t.clone() for n, t in theirs.items() if codec or not n.startswith("codec_model.")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with csm-tiny's manifest and chunk files."""
    return copy_tiny(tmp_path / "repository")


def identified(root: Path, path: Path) -> Identified:
    (found,) = identify_paths(root, [path]).files
    return found


def saved(folder: Path, state: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / name)
    return folder / name


def test_a_manifest_that_cannot_be_read_is_passed_over(root: Path) -> None:
    """A pipe, a folder and a broken file in manifests/ do not stand in the way of the others."""
    os.mkfifo(root / "manifests" / "a.toml")
    (root / "manifests" / "b.toml").mkdir()
    (root / "manifests" / "c.toml").write_text("[")
    assert identified(root, root / "chunks/csm-tiny/safetensors").release == "csm-tiny"


# ---- the release itself, and in other layouts


def _cached(root: Path) -> Path:
    home = root / "hub" / "models--some--csm"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c" * 40)
    blob = home / "blobs" / "x"
    blob.parent.mkdir()
    joined(root, "model.safetensors", "other").rename(blob)
    for commit in ("b" * 40, "c" * 40):
        (home / "snapshots" / commit).mkdir(parents=True)
    (home / "snapshots" / ("c" * 40) / "model.safetensors").symlink_to(blob)
    return home


PLACES: dict[str, Callable[[Path], Path]] = {
    "a file": lambda root: joined(root, "model.safetensors", "other"),
    "a checkpoint": lambda root: joined(root, "ckpt.pt", "other"),
    "a wrong name": lambda root: joined(root, "ckpt.pt", "other").rename(root / "a.safetensors"),
    "a folder": lambda root: joined(root, "model.safetensors", "other").parent,
    "chunk files": lambda root: root / "chunks/csm-tiny/ckpt",
    "one chunk file": lambda root: root / "chunks/csm-tiny/safetensors/model.safetensors.part-ab",
    "the Hub's cache": _cached,
    "a snapshot": lambda root: _cached(root) / "snapshots" / ("c" * 40),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_release_is_known_by_its_digest(place: str, root: Path) -> None:
    """Wherever its file or chunk files are, and whatever they are called."""
    found = identified(root, PLACES[place](root))
    assert (found.release, found.differ) == ("csm-tiny", None)
    assert found.verdict.endswith("of csm-tiny, by its digest")
    assert (found.identity.layout, found.identity.network) == ("original", TINY)
    assert (found.identity.dtypes, found.identity.parameters) == (("F32",), 296_640)


@pytest.mark.parametrize("codec", [True, False])
@pytest.mark.parametrize("place", ["a file", "shards", "a shard", "their index", "a checkpoint"])
def test_the_release_in_transformers_layout_is_known_by_its_tensors(
    place: str, codec: bool, root: Path, tmp_path: Path
) -> None:
    """Each tensor is held against the release here, whatever form it comes in."""
    state = in_transformers(released(), codec)
    path = tmp_path / "theirs"
    if place == "a file":
        path = saved(path, state)
    elif place == "a checkpoint":
        path.mkdir()
        path /= "pytorch_model.bin"
        torch.save(state, path)
    else:
        shard = sharded(path, state, 3)[2]
        index = path / "transformers.safetensors.index.json"
        path = {"shards": path, "a shard": shard, "their index": index}[place]
    found = identified(root, path)

    assert (found.release, found.differ, found.file) == ("csm-tiny", (), "")
    assert found.verdict == "the tensors of csm-tiny, every one equal"
    assert found.identity.layout == "transformers"
    assert found.identity.codec_tensors == sum(n.startswith("codec_model.") for n in state)
    assert found.identity.parameters == 296_640


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_release_is_known(dtype: torch.dtype, root: Path, tmp_path: Path) -> None:
    """A narrower dtype is compared with the release rounded to it."""
    state = {name: tensor.to(dtype) for name, tensor in released().items()}
    assert identified(root, saved(tmp_path / "a", state)).differ == ()
    state[Q_PROJ][3, 4] += 1
    found = identified(root, saved(tmp_path / "b", state))
    assert found.differ == (Q_PROJ,)
    assert found.identity.dtypes == ({"bfloat16": "BF16", "float16": "F16"}[str(dtype)[6:]],)


def test_a_wrapped_checkpoint_says_in_what(root: Path, tmp_path: Path) -> None:
    """The prefix is named, and tensors beside the model are counted."""
    state = {f"module.{name}": tensor for name, tensor in released().items()}
    torch.save({"model": state, "optimizer": {"exp_avg": torch.ones(2)}}, tmp_path / "run.pt")
    found = identified(root, tmp_path / "run.pt")
    assert (found.differ, found.identity.wrapper, found.identity.beside) == ((), "model.module.", 1)
    assert "inside model.module, with 1 other tensors beside it" in str(found.identity)


# ---- fine-tunes, and what is not right


def test_a_fine_tune_is_counted_against_the_release(root: Path, tmp_path: Path) -> None:
    """The tensors that differ are named, in the text the first of them."""
    state = released()
    trained = [name for name in state if name.startswith("backbone.layers.1.")]
    for name in trained:
        state[name] = state[name] + 0.5
    result = identify_paths(root, [saved(tmp_path / "tuned", in_transformers(state))])
    (found,) = result.files

    assert found.differ == tuple(sorted(trained))
    assert found.verdict == f"a fine-tune of csm-tiny: {len(trained)} of 52 tensors differ"
    text = as_text.render(result)
    assert "backbone.layers.1.attn.k_proj.weight differs" in text
    assert text.splitlines()[-1] == "  and 4 more"
    data = checked(as_json.render(result, "identify"))
    assert data["files"][0]["differ"] == sorted(trained)


def test_weights_that_share_nothing_are_not_called_a_fine_tune(root: Path, tmp_path: Path) -> None:
    """Where every tensor differs it may be another model."""
    state = {name: tensor + 1 for name, tensor in released().items()}
    found = identified(root, saved(tmp_path, state))
    assert found.verdict.startswith("another model of the dimensions of csm-tiny, or all of it")


def test_damage_that_shapes_tell_is_named_by_the_names_in_the_file(
    root: Path, tmp_path: Path
) -> None:
    """Missing, one too many, misshapen: without the release too, and never called good."""
    shutil.rmtree(root / "chunks")
    state = in_transformers(released(), codec=False)
    del state["lm_head.weight"]
    state["depth_decoder.extra"] = torch.ones(3)
    state["embed_text_tokens.weight"] = state["embed_text_tokens.weight"][:, :-1]
    found = identified(root, saved(tmp_path / "damaged", state))

    wrong = {finding.where.rpartition(": ")[2]: finding for finding in found.identity.wrong}
    assert set(wrong) == {"lm_head.weight", "depth_decoder.extra", "embed_text_tokens.weight"}
    assert wrong["embed_text_tokens.weight"].expected == "[512, 64]"
    assert "3 of its tensors not as they should be" in str(found.identity)
    assert found.verdict == (
        "not compared with a release; to tell which release it is, get one: "
        "inv fetch --model csm-tiny"
    )


def test_other_models_are_not_csm(root: Path, tmp_path: Path) -> None:
    """Another model is told from CSM, even with a config.json of its own beside it."""
    state = {
        "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
        "lm_head.weight": torch.ones(4),
    }
    path = saved(tmp_path / "llama", state)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    found = identified(root, path)
    assert (found.identity.model, found.identity.network) == ("not CSM", None)


def test_a_csm_of_other_dimensions_needs_its_config(root: Path, tmp_path: Path) -> None:
    """Dimensions that no flavor has are told by the config.json beside the file."""
    shapes = CsmConfig(FLAVORS["tiny-decoder"], FLAVORS["tiny-decoder"], 40, 9, 3).tensor_shapes()
    state = {name: torch.ones(*(size + 2 for size in shape)) for name, shape in shapes.items()}
    path = saved(tmp_path / "odd", state)
    assert identified(root, path).identity.model == "a CSM of unknown dimensions"


def test_csm_1b_is_known_by_its_shapes(root: Path, tmp_path: Path) -> None:
    """The published network has its name, from the header alone."""
    header, end = {}, 0
    for name, shape in CSM_1B.tensor_shapes().items():
        size = 2 * torch.Size(shape).numel()
        header[name] = hostile.entry(end, end + size, list(shape), "BF16")
        end += size
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(hostile.safetensors(header, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
    found = identified(root, path)
    assert str(found.identity) == (
        "CSM-1B in the original layout, safetensors, BF16, 1,552,791,552 parameters"
    )


def test_a_file_with_a_wrong_name_is_told_where_it_is_refused(root: Path) -> None:
    """The layout that some mirrors ship under the same name is named by status and verify."""
    path = saved(root / "models" / "csm-tiny", in_transformers(released()))
    size = path.stat().st_size
    said = f"{size:,} bytes: another CSM in transformers' layout, with Mimi's 92 tensors"
    request = Request(root, "csm-tiny", only=("safetensors",))
    assert any(said in finding.found for finding in apply.status(request).plan.notes)
    error = verify(request, None, False).error
    assert error
    assert any(said in finding.found for finding in error.findings)
    path.write_bytes(b"not weights at all")
    error = verify(request, None, False).error
    assert error
    assert "18 bytes" in [finding.found for finding in error.findings]


@pytest.mark.parametrize("name", sorted(hostile.BAD_SAFETENSORS)[:8])
def test_hostile_files_are_refused(name: str, root: Path, tmp_path: Path) -> None:
    """As everywhere: with WrongContent, and nothing is said of them."""
    with pytest.raises(WrongContent):
        identify_paths(root, [hostile.written(tmp_path, hostile.BAD_SAFETENSORS[name][0], "a.pt")])


def test_nothing_is_missing_input(root: Path, tmp_path: Path) -> None:
    """A path without weights is a missing input."""
    with pytest.raises(MissingInput):
        identify_paths(root, [tmp_path / "none"])

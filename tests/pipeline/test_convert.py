"""Weights converted between layouts, formats and dtypes, and read back by their own loaders."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm_weights.commands.verify import verify
from csm_weights.errors import Kind, NoSpace, UsageError, WrongContent
from csm_weights.formats import strided, write
from csm_weights.formats.architecture import CSM_1B, CsmConfig, TransformerConfig, parse_config
from csm_weights.formats.model_files import generation_config, original_config, transformers_config
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.model.csm import Model
from csm_weights.pipeline import convert
from csm_weights.pipeline.convert import Conversion
from csm_weights.pipeline.request import Request
from csm_weights.store import stream_file
from csm_weights.store.block_io import OutputFile
from tests.commands.test_identify import TIED, in_transformers, released, saved
from tests.model.test_csm import generate, greedy
from tests.support import hostile
from tests.support.clone import REPOSITORY
from tests.support.networks import TINY
from tests.support.oracles import transformers_model

Q_PROJ = "backbone.layers.1.attn.q_proj.weight"
PARTS = REPOSITORY / "chunks" / "csm-tiny" / "safetensors"


def converted(source: Path, to: str, out: Path, root: Path | None = None, **options: Any) -> Path:
    """Convert to a folder, and return it."""
    convert.convert(root or out.parent, Conversion(source, to, out, **options))
    return out


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check names, dtypes, shapes and all bits."""
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        found = state[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


# ---- there and back


@pytest.mark.parametrize("format_", ["safetensors", "ckpt"])
@pytest.mark.parametrize("shard_size", [0, 400_000])
def test_there_and_back_is_the_same_file(format_: str, shard_size: int, tmp_path: Path) -> None:
    """The published file comes back byte for byte, and so does what was made of it."""
    there = {"shard_size": shard_size} if format_ == "safetensors" else {"format": format_}
    theirs = converted(PARTS, "transformers", tmp_path / "theirs", **there)
    ours = converted(theirs, "original", tmp_path / "ours")
    again = converted(ours, "transformers", tmp_path / "again", **there)

    assert digest(ours / "model.safetensors") == digest_of_parts()
    names = sorted(path.name for path in theirs.iterdir() if path.is_file())
    assert len(names) == (8 if shard_size and format_ == "safetensors" else 3)
    assert {n: digest(theirs / n) for n in names} == {n: digest(again / n) for n in names}


@pytest.mark.parametrize(("options", "model"), [({}, "out"), ({"manifest": "mine"}, "mine")])
def test_the_receipt_has_the_name_of_the_manifest_or_of_the_folder(
    options: dict[str, str], model: str, tmp_path: Path
) -> None:
    """A path through another folder is resolved first."""
    (tmp_path / "manifests").mkdir()
    out = converted(PARTS, "original", tmp_path / "b" / ".." / "out", tmp_path, **options)
    receipt = out / RECEIPTS / "model.safetensors.json"
    assert json.loads(receipt.read_text())["model"] == model


def digest_of_parts() -> str:
    parts = sorted(PARTS.glob("model.safetensors.part-*"))
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def flags_in(archive: Path) -> set[tuple[bool, int]]:
    """Return the flags of records with bytes and without."""
    with zipfile.ZipFile(archive) as records:
        return {(record.file_size > 0, record.flag_bits) for record in records.infolist()}


def test_torch_reads_what_is_written_as_a_checkpoint(tmp_path: Path) -> None:
    """torch.load gives the same tensors, and checks the archive's own CRCs."""
    out = converted(PARTS, "original", tmp_path / "out", format="ckpt")
    assert_equal(torch.load(out / "ckpt.pt", weights_only=True), released())
    torch.save({"w": torch.ones(1), "none": torch.ones(0)}, tmp_path / "theirs.pt")
    assert flags_in(out / "ckpt.pt") <= flags_in(tmp_path / "theirs.pt")
    back = converted(out / "ckpt.pt", "original", tmp_path / "back")
    assert digest(back / "model.safetensors") == digest_of_parts()


@pytest.mark.parametrize("word", ["bfloat16", "float16"])
@pytest.mark.parametrize("to", ["original", "transformers"])
def test_a_dtype_that_is_asked_for_is_torchs(word: str, to: str, tmp_path: Path) -> None:
    """Values are rounded as torch rounds them; back in float32 they are the rounded ones."""
    out = converted(PARTS, to, tmp_path / "out", dtype=word)
    dtype = getattr(torch, word)
    narrow = {name: tensor.to(dtype) for name, tensor in released().items()}
    expected = narrow if to == "original" else in_transformers_of(narrow)
    assert_equal(load_file(out / "model.safetensors"), expected)
    wide = converted(out, "original", tmp_path / "wide", dtype="float32")
    assert_equal(load_file(wide / "model.safetensors"), {n: t.float() for n, t in narrow.items()})


def in_transformers_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and permute by transformers' own model, which holds float32, exactly."""
    theirs = in_transformers({n: t.float() for n, t in state.items()}, codec=False)
    return {name: tensor.to(next(iter(state.values())).dtype) for name, tensor in theirs.items()}


SOURCES: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "safetensors": lambda folder, state: saved(folder, state),
    "wrapped": lambda folder, state: torched(folder, {"model": state, "epoch": 1}),
    "module": lambda folder, state: torched(folder, {f"module.{n}": t for n, t in state.items()}),
    "views": lambda folder, state: torched(
        folder, {n: torch.stack((t, t))[1] for n, t in state.items()}
    ),
}


def torched(folder: Path, state: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "run.pt")
    return folder / "run.pt"


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("source", SOURCES)
def test_what_people_have_becomes_the_original_file(
    source: str, layout: str, tmp_path: Path
) -> None:
    """Wrappers, views and either layout: the result is the published file."""
    state = released() if layout == "original" else in_transformers(released(), codec=True)
    path = SOURCES[source](tmp_path / "theirs", state)
    out = converted(path, "original", tmp_path / "out")
    assert digest(out / "model.safetensors") == digest_of_parts()
    assert parse_config((out / "config.json").read_bytes(), "") == TINY


# ---- transformers' own loader, and its own files


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mimi, as transformers saves it."""
    from transformers import MimiConfig, MimiModel

    from tests.support.oracles import _TINY_CODEC

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("mimi")
    MimiModel(
        MimiConfig(**{k: v for k, v in _TINY_CODEC.items() if k != "model_type"})
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard_size", [0, 400_000])
def test_transformers_loads_what_is_written(shard_size: int, mimi: Path, tmp_path: Path) -> None:
    """Nothing is missing or unexpected, and its greedy frames are those of our reference."""
    from transformers import CsmForConditionalGeneration

    out = converted(PARTS, "transformers", tmp_path / "t", codec=mimi, shard_size=shard_size)
    theirs, info = CsmForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert [len(v) for v in info.values() if v] == []
    theirs.codec_model.save_pretrained(tmp_path / "mimi")
    codec = load_file(tmp_path / "mimi" / "model.safetensors")
    assert_equal(codec, load_file(mimi / "model.safetensors"))
    assert theirs.eval().config.rope_parameters["rope_type"] == "llama3"

    text = torch.randint(1, 512, (1, 11))
    with torch.no_grad():
        model = Model.from_local(converted(PARTS, "original", tmp_path / "ours"))
        expected = torch.stack(generate(model, text, 12, greedy(model)), 1)
        found = theirs.generate(
            input_ids=text, max_new_tokens=12, do_sample=False, depth_decoder_do_sample=False
        )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_what_transformers_saves_becomes_the_original_file(shard_size: str, tmp_path: Path) -> None:
    """save_pretrained keeps one of the two tied names, and may write shards."""
    model = transformers_model(TINY, released())
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    out = converted(tmp_path / "saved", "original", tmp_path / "out")
    assert digest(out / "model.safetensors") == digest_of_parts()


def test_a_fine_tune_goes_back_and_speaks_the_same(tmp_path: Path) -> None:
    """After some steps of training in transformers both layouts give the same codes."""
    theirs = transformers_model(TINY, released()).train()
    theirs.codec_model.requires_grad_(False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = theirs.backbone_model(input_ids=torch.randint(1, 35, (2, 6, 32))).last_hidden_state
        depth = theirs.depth_decoder(
            input_ids=torch.randint(1, 35, (12, 32)),
            backbone_last_hidden_state=hidden.flatten(0, 1),
        ).logits
        (theirs.lm_head(hidden).square().mean() + depth.square().mean()).backward()
        optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "tuned")
    out = converted(tmp_path / "tuned", "original", tmp_path / "out")

    text = torch.randint(1, 512, (1, 7))
    with torch.no_grad():
        model = Model.from_local(out)
        found = torch.stack(generate(model, text, 8, greedy(model)), 1)
        expected = theirs.generate(
            input_ids=text, max_new_tokens=8, do_sample=False, depth_decoder_do_sample=False
        )
    assert found.tolist() == expected.tolist()
    assert not torch.equal(load_file(out / "model.safetensors")[Q_PROJ], released()[Q_PROJ])


def test_mimis_tensors_stay_where_the_layout_stays(tmp_path: Path) -> None:
    """From transformers to transformers the codec and the rest of config.json stay."""
    model = transformers_model(TINY, released())
    model.save_pretrained(tmp_path / "saved")
    out = converted(tmp_path / "saved", "transformers", tmp_path / "out", dtype="bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", out))
    codec = {n: t.bfloat16() for n, t in before.items() if n.startswith("codec_model.")}
    assert len(codec) > 50
    assert_equal({name: after[name] for name in codec}, codec)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", out)
    )
    assert after == before | {"dtype": "bfloat16"}


def test_mimis_tensors_and_config_can_be_added_later(mimi: Path, tmp_path: Path) -> None:
    """A fine-tune that was saved without the codec gets it, and a word in its config.json."""
    from transformers import CsmForConditionalGeneration

    bare = converted(PARTS, "transformers", tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text()) | {"torch_dtype": "float32", "mine": 1}
    (bare / "config.json").write_text(json.dumps(config))
    out = converted(bare, "transformers", tmp_path / "whole", codec=mimi)
    _, info = CsmForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert [len(v) for v in info.values() if v] == []
    after = json.loads((out / "config.json").read_text())
    assert (after["mine"], after["dtype"], "torch_dtype" in after) == (1, "float32", False)


def test_the_published_small_files_are_written() -> None:
    """For CSM-1B they have the digests of the public ones, or the figures."""
    manifest = load(REPOSITORY / "manifests" / "csm-1b.toml")
    known = {artifact.path: artifact for artifact in manifest.artifacts}
    text = generation_config(CSM_1B).encode()
    pinned = known["generation_config.json"]
    assert (len(text), hashlib.sha256(text).hexdigest()) == (pinned.size, pinned.sha256)
    assert original_config(CSM_1B) in [edition.text for edition in known["config.json"].editions]
    config = transformers_config(CSM_1B, "F32", {}, {})
    assert parse_config(config.encode(), "") == CSM_1B
    assert json.loads(config)["codebook_pad_token_id"] == 2050


@pytest.mark.parametrize("stack", ["backbone", "decoder"])
def test_a_network_with_one_stack_of_no_published_flavor_is_described(stack: str) -> None:
    """Its config is read back as the same network."""
    other = replace(getattr(CSM_1B, stack), layers=3)
    network = replace(CSM_1B, **{stack: other})
    assert parse_config(original_config(network).encode(), "") == network


def test_sizes_and_tokens_for_csm_1b_are_transformers_defaults() -> None:
    """Read by transformers, the config.json of CSM-1B differs from its default in RoPE alone."""
    from transformers import CsmConfig as Theirs

    found = Theirs(**json.loads(transformers_config(CSM_1B, "F32", {}, {}))).to_dict()
    default = Theirs().to_dict()
    aside = {"architectures", "dtype", "rope_parameters"}
    parts = found.pop("depth_decoder_config"), default.pop("depth_decoder_config")
    for ours, theirs in ((found, default), parts):
        assert {key for key in theirs if ours[key] != theirs[key]} <= aside


# ---- what is refused


def broken(change: Callable[[dict[str, Tensor]], object], theirs: bool = True) -> dict[str, Tensor]:
    state = in_transformers(released(), codec=False) if theirs else released()
    change(state)
    return state


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop("lm_head.weight"), "lm_head.weight"),
    "one too many": (lambda state: state.update(x=torch.ones(2)), ": x: "),
    "misshapen": (
        lambda state: state.update({"backbone_model.layers.0.mlp.up_proj.weight": torch.ones(5)}),
        "backbone_model.layers.0.mlp.up_proj.weight",
    ),
    "tied copy": (lambda state: state[TIED].add_(1), TIED),
    "dtype": (
        lambda state: state.update({"lm_head.weight": state["lm_head.weight"].int()}),
        "lm_head.weight: malformed",
    ),
    "not CSM": (
        lambda state: [state.pop(name) for name in list(state)[5:]],
        "the tensors of a CSM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_model_is_refused_by_its_tensor(name: str, tmp_path: Path) -> None:
    """Nothing is written, and the tensor has the name of the file."""
    change, said = REFUSED[name]
    path = saved(tmp_path / "theirs", broken(change))
    with pytest.raises(WrongContent) as caught:
        converted(path, "original", tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(hostile.BAD_SAFETENSORS)[::6])
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    path = hostile.written(tmp_path, hostile.BAD_SAFETENSORS[name][0], "model.safetensors")
    with pytest.raises(WrongContent):
        converted(path, "original", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "originel"}, "did you mean original?"),
        ({"format": "gguf"}, "there are safetensors, ckpt"),
        ({"dtype": "float8"}, "did you mean float"),
        ({"codec": Path("mimi")}, "--codec goes with"),
        ({"format": "ckpt", "shard_size": 5}, "--shard-size"),
        ({"manifest": "My Model"}, "lowercase letters"),
    ],
)
def test_options_that_make_no_sense_are_misuse(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        Conversion(**{"path": PARTS, "to": "original", "out": Path("out"), **options})


# ---- what is there already


def test_another_file_of_the_name_stays(tmp_path: Path) -> None:
    """A file that is not of this conversion is not overwritten, nor is a config.json."""
    for name in ("model.safetensors", "config.json"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(WrongContent) as caught:
            converted(PARTS, "original", out)
        assert caught.value.findings[0].kind is Kind.IN_THE_WAY
        assert (out / name).read_text() == "mine"
        assert len([path for path in out.iterdir() if path.is_file()]) == 1


@pytest.mark.parametrize("name", ["csm-1b", "theirs", "mine"])
def test_the_manifest_of_another_model_stays(name: str, tmp_path: Path) -> None:
    """Neither one that comes with the package, nor one with another folder, is replaced."""
    root = tmp_path / "root"
    (root / "manifests").mkdir(parents=True)
    converted(PARTS, "original", root / "models" / "mine", root, manifest="mine")
    text = (root / "manifests" / "mine.toml").read_text()
    (root / "manifests" / "theirs.toml").write_text(text.replace("CSM weights in", "Theirs:"))
    before = {path: path.read_bytes() for path in (root / "manifests").iterdir()}
    with pytest.raises(UsageError, match="there is one already"):
        converted(PARTS, "transformers", root / "models" / "other", root, manifest=name)
    assert {path: path.read_bytes() for path in (root / "manifests").iterdir()} == before


@pytest.mark.parametrize("folder", ["csm_weights", ".git", "lib/site-packages"])
def test_nothing_is_written_where_programs_import_from(folder: str, tmp_path: Path) -> None:
    """The rule for the destination of a model holds for --out as well."""
    out = tmp_path / folder
    out.mkdir(parents=True)
    (out / "__init__.py").touch()
    with pytest.raises(WrongContent, match="cannot be written there"):
        converted(PARTS, "original", out)
    assert [path.name for path in out.iterdir()] == ["__init__.py"]


def test_a_second_run_writes_and_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receipts say that all is done; another dtype is another conversion."""
    out = converted(PARTS, "original", tmp_path / "out")
    before = (out / "model.safetensors").stat()
    monkeypatch.setattr(convert, "write_stream", lambda *_: pytest.fail("written again"))
    converted(PARTS, "original", out)
    assert (out / "model.safetensors").stat() == before
    with pytest.raises(WrongContent, match="in the way"):
        converted(PARTS, "original", out, dtype="bfloat16")
    os.utime(out / "model.safetensors")
    with pytest.raises(WrongContent, match="in the way"):
        converted(PARTS, "original", out)


@pytest.mark.parametrize("after", [1, 7, 18])
@pytest.mark.parametrize("spoilt", [False, True])
def test_an_interrupted_run_goes_on(
    after: int, spoilt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is compared and kept, what is wrong is written again; no half file is named."""
    out, begun, written = tmp_path / "out", [0], [0]
    real = OutputFile.write

    def failing(file: Any, block: memoryview, offset: int, direct: bool) -> None:
        begun[0] += 1
        if begun[0] > after:
            raise KeyboardInterrupt
        real(file, block, offset, direct)

    def counting(file: Any, block: memoryview, offset: int, direct: bool) -> None:
        written[0] += 1
        real(file, block, offset, direct)

    monkeypatch.setattr(stream_file, "STEP", 64 << 10)
    monkeypatch.setattr(OutputFile, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        converted(PARTS, "original", out)
    assert not (out / "model.safetensors").exists()
    partial = out / "model.safetensors.partial"
    if spoilt:
        with partial.open("r+b") as file:
            file.write(b"\xff" * 20)
    monkeypatch.setattr(OutputFile, "write", counting)
    converted(PARTS, "original", out)
    assert digest(out / "model.safetensors") == digest_of_parts()
    assert written[0] == 19 - after + spoilt
    assert not partial.exists()


def test_sources_that_change_meanwhile_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of a file that is written to gets no name."""
    source = saved(tmp_path / "a", released())
    real = OutputFile.write

    def disturbing(*arguments: Any) -> None:
        os.utime(source, ns=(1, 1))
        real(*arguments)

    monkeypatch.setattr(OutputFile, "write", disturbing)
    with pytest.raises(WrongContent, match="changed while they were converted"):
        converted(source, "original", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_source_that_is_cut_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends early while it is converted is named, and gives no file."""
    source = saved(tmp_path / "a", released())
    real = strided.read_elements

    def cutting(*arguments: Any) -> None:
        os.truncate(source, 10_000)
        real(*arguments)

    monkeypatch.setattr(write, "read_elements", cutting)
    with pytest.raises(WrongContent, match="ended early") as caught:
        converted(source, "original", tmp_path / "out")
    assert [finding.where for finding in caught.value.findings] == [str(source)]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_too_little_disk_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoSpace, match="too little disk"):
        converted(PARTS, "original", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.partial").exists()


# ---- a manifest of the result


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("to", "options", "count"),
    [
        ("original", {"format": "ckpt"}, 2),
        ("original", {"dtype": "bfloat16"}, 2),
        ("transformers", {"shard_size": 400_000}, 8),
    ],
)
def test_a_manifest_makes_the_result_a_model_like_others(
    to: str, options: dict[str, Any], count: int, inside: bool, tmp_path: Path
) -> None:
    """It pins every file, all are verified, and a changed byte is found."""
    root = tmp_path / "root"
    (root / "manifests").mkdir(parents=True)
    out = root / "models" / "mine" if inside else tmp_path / "elsewhere"
    converted(PARTS, to, out, root, manifest="mine", **options)
    request = Request(root, "mine", dest=None if inside else str(out))
    done = verify(request, None, False)
    assert done.error is None
    assert len(done.state.artifacts) == count

    victim = max(out.iterdir(), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(100_000)
        file.write(b"\xff")
    assert verify(request, None, False).error


def test_a_network_of_no_flavor_is_converted_by_its_config(tmp_path: Path) -> None:
    """Its heads are known by the config.json beside it, which is written for it too."""
    stack = TransformerConfig(layers=1, dim=24, heads=3, kv_heads=1, ffn=32)
    network = CsmConfig(stack, replace(stack, dim=12, heads=2), 50, 9, 4)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in network.tensor_shapes().items()
    }
    path = saved(tmp_path / "odd", state)
    (path.parent / "config.json").write_text(original_config(network))
    theirs = converted(path, "transformers", tmp_path / "theirs")
    ours = converted(theirs, "original", tmp_path / "ours")
    save_file(state, tmp_path / "plain.safetensors")
    assert digest(ours / "model.safetensors") == digest(tmp_path / "plain.safetensors")
    assert parse_config((ours / "config.json").read_bytes(), "") == network


def test_a_fine_tune_is_not_taken_for_the_release_of_its_name_and_size(tmp_path: Path) -> None:
    """Where its receipt, or a manifest of its folder, says what it is, that counts."""
    import csm_weights

    root = tmp_path / "root"
    (root / "manifests").mkdir(parents=True)
    (root / "tasks.py").touch()
    shutil.copy(REPOSITORY / "manifests" / "csm-tiny.toml", root / "manifests")
    state = released()
    state["projection.weight"] += 1
    tuned = saved(root / "tuned", in_transformers(state))
    plain = converted(tuned, "original", root / "models" / "plain", root)
    named = converted(tuned, "original", root / "models" / "named", root, manifest="zz-named")

    assert csm_weights.Model.from_local(plain).verified
    assert csm_weights.Model.from_local(named, verify=True).verified
    shutil.rmtree(plain / ".csm-weights")
    with pytest.raises(WrongContent, match="not those that are pinned"):
        csm_weights.Model.from_local(plain)


def test_a_conversion_may_be_repeated_with_its_manifest(tmp_path: Path) -> None:
    """The manifest of an earlier conversion to that folder is written anew, and no other."""
    root = tmp_path / "root"
    (root / "manifests").mkdir(parents=True)
    out, manifest = root / "models" / "mine", root / "manifests" / "mine.toml"
    converted(PARTS, "original", out, root, manifest="mine")
    text = manifest.read_text()
    manifest.write_text(text.replace('evidence = "A"', 'evidence = "H"'))
    converted(PARTS, "original", out, root, manifest="mine")
    assert manifest.read_text() == text


@pytest.mark.parametrize("text", ["[]", "7", "{", "\xff", "[" * 100_000])
def test_a_config_of_mimi_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    """The finding names the file and the command that gets it again; nothing is written."""
    path = saved(tmp_path / "mimi", {"encoder.weight": torch.ones(1)})
    config = path.with_name("config.json")
    config.write_text(text, encoding="latin-1")
    with pytest.raises(WrongContent, match=r"config\.json cannot be used") as caught:
        converted(PARTS, "transformers", tmp_path / "out", codec=path.parent)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.MALFORMED, str(config))
    assert (finding.expected, finding.found) == ("a JSON object", "something else")
    assert not (tmp_path / "out").exists()


def test_weights_in_transformers_layout_need_no_config_beside_them(tmp_path: Path) -> None:
    """A network that its tensors tell gets the config.json that is written for it anyway."""
    theirs = converted(PARTS, "transformers", tmp_path / "theirs")
    expected = (theirs / "config.json").read_bytes()
    (theirs / "config.json").unlink()
    again = converted(theirs, "transformers", tmp_path / "again")
    assert (again / "config.json").read_bytes() == expected


def test_a_network_may_have_two_codebooks() -> None:
    """The decoder predicts all but the first: one is the least that there is to predict."""
    config = original_config(replace(CSM_1B, codebooks=2)).encode()
    assert parse_config(config, "").codebooks == 2


def test_the_largest_dimension_is_16_million() -> None:
    """CSM-1B's is 128,256; one more than the most is refused."""
    config = original_config(replace(CSM_1B, text_vocab=1 << 24))
    assert parse_config(config.encode(), "").text_vocab == 1 << 24
    with pytest.raises(WrongContent, match="not an integer from 1 to 16777216"):
        parse_config(original_config(replace(CSM_1B, text_vocab=(1 << 24) + 1)).encode(), "")


# ---- figures, to the last one


def test_what_was_written_is_told(tmp_path: Path) -> None:
    """For a person in lines, for a program by its keys; the model only with a manifest."""
    (tmp_path / "manifests").mkdir()
    out = tmp_path / "out"
    plain = convert.convert(tmp_path, Conversion(PARTS, "original", out))
    size, sha256 = (out / "model.safetensors").stat().st_size, digest_of_parts()
    file = {"path": "model.safetensors", "size": size, "sha256": sha256}
    assert plain.values == {"folder": out, "files": [file], "remarks": []}
    ok = f"OK: converted to the original layout in {out}"
    assert plain.lines == [f"model.safetensors: {size:,} bytes, sha256 {sha256}", ok]
    named = convert.convert(tmp_path, Conversion(PARTS, "original", out, manifest="mine"))
    assert (plain.model, named.model) == (None, "mine")
    written = f"manifest: {tmp_path}/manifests/mine.toml; next: inv verify --model mine"
    assert named.values["remarks"] == [written]
    assert load(tmp_path / "manifests" / "mine.toml").destination == "out"


def test_what_is_said_of_mimi(mimi: Path, tmp_path: Path) -> None:
    """Only one layout has its tensors: that they are missing, or left out, is told."""

    def remarks(source: Path, to: str, out: str, codec: Path | None = None) -> list[str]:
        asked = Conversion(source, to, tmp_path / out, codec=codec)
        return list(convert.convert(tmp_path, asked).values["remarks"])

    count = len(load_file(mimi / "model.safetensors"))
    without = "without Mimi's tensors, which transformers then draws: see --codec"
    left_out = f"left out: Mimi's {count:,} tensors, for this layout has none"
    assert remarks(PARTS, "transformers", "bare") == [without]
    assert remarks(PARTS, "transformers", "whole", mimi) == []
    assert remarks(tmp_path / "whole", "transformers", "again") == []
    assert remarks(tmp_path / "whole", "original", "ours") == [left_out]


def test_shards_hold_as_much_as_they_may(tmp_path: Path) -> None:
    """Tensors in the order of their names, up to the size; a larger one has its own shard."""
    state = released()
    sizes = {name: state[name].nbytes for name in sorted(state)}
    most = sum(sizes.values()) - next(reversed(sizes.values()))
    for room, expected in ((most, 2), (most - 1, 2), (sum(sizes.values()), 1)):
        out = converted(PARTS, "original", tmp_path / f"{room}", shard_size=room)
        if expected == 1:
            assert not list(out.glob("*.index.json"))
            assert digest(out / "model.safetensors") == digest_of_parts()
            continue
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes.values())
        cut = len(sizes) - (1 if room == most else 2)
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert [index["weight_map"][name] for name in sizes] == (
            [names[0]] * cut + [names[1]] * (len(sizes) - cut)
        )
    for room in (147_071, 147_072):  # two tensors of one of the later shards, and a byte less
        out = converted(PARTS, "original", tmp_path / f"{room}", shard_size=room)
        shards = [list(load_file(path).values()) for path in sorted(out.glob("*.safetensors"))]
        for one, other in itertools.pairwise(shards):
            held = sum(tensor.nbytes for tensor in one)
            assert held <= room or len(one) == 1
            assert held + other[0].nbytes > room
    smallest = converted(PARTS, "original", tmp_path / "each", shard_size=1)
    assert len(list(smallest.glob("model-*-of-*.safetensors"))) == len(sizes)


def test_weights_of_mixed_dtypes_are_converted(tmp_path: Path) -> None:
    """Each tensor keeps its own, or all get the one that is asked for."""
    state = released()
    state["projection.weight"] = state["projection.weight"].bfloat16()
    path = saved(tmp_path / "mixed", state)
    out = converted(path, "original", tmp_path / "out")
    assert_equal(load_file(out / "model.safetensors"), state)
    whole = converted(path, "original", tmp_path / "whole", dtype="float16")
    assert_equal(load_file(whole / "model.safetensors"), {n: t.half() for n, t in state.items()})


@pytest.mark.parametrize("change", ["longer", "shorter", "folder"])
def test_another_config_json_is_in_the_way(change: str, tmp_path: Path) -> None:
    """One that begins or ends like the one to write is another file all the same."""
    text = (converted(PARTS, "original", tmp_path / "first") / "config.json").read_text()
    out = tmp_path / "out"
    out.mkdir()
    if change == "folder":
        (out / "config.json").mkdir()
    else:
        (out / "config.json").write_text(f"{text} " if change == "longer" else text[:-1])
    with pytest.raises(WrongContent, match="is in the way") as caught:
        converted(PARTS, "original", out)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.IN_THE_WAY, str(out / "config.json"))


def test_room_is_needed_for_what_is_not_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just enough is enough; what an earlier run has left of a file is there already."""
    whole = (converted(PARTS, "original", tmp_path / "first") / "model.safetensors").stat().st_size
    usage, free = shutil.disk_usage(tmp_path), [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    for there in (0, 5000):
        out = tmp_path / f"{there}"
        (out / RECEIPTS).mkdir(parents=True)
        if there:
            (out / "model.safetensors.partial").write_bytes(bytes(there))
        free[0] = whole - there - 1
        with pytest.raises(NoSpace) as caught:
            converted(PARTS, "original", out)
        (finding,) = caught.value.findings
        assert (finding.kind, finding.where) == (Kind.NO_SPACE, str(out))
        assert finding.expected == f"{whole - there:,} bytes free"
        assert finding.found == f"{whole - there - 1:,}"
        free[0] += 1
        converted(PARTS, "original", out)
        free[0] = 0
        converted(PARTS, "original", out)


def test_the_receipt_names_the_conversion(tmp_path: Path) -> None:
    """By 32 digits, which a later version has to find again."""
    out = converted(PARTS, "original", tmp_path / "out")
    receipt = json.loads((out / RECEIPTS / "model.safetensors.json").read_text())
    (piece,) = receipt["pieces"]
    assert re.fullmatch(r"converted [0-9a-f]{32}", piece["source"])

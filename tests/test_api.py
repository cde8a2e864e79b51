"""Models as a program gets them: strict, verified, from this machine first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import csm_weights
from csm_weights import Generator, Model, Segment, hashing, load_csm_1b
from csm_weights.errors import CsmWeightsError, Kind, MissingInput, UsageError, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.hashing import sha256
from csm_weights.manifest.parse import load
from csm_weights.model import csm as plain
from csm_weights.model import stream
from csm_weights.pipeline import apply, locate, session
from csm_weights.pipeline import request as requests
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request
from csm_weights.store.inspect import inspect
from csm_weights.store.receipts import Receipt, dump_receipt, read_receipt, receipt_path
from tests.support.clone import REPOSITORY
from tests.support.hub import HubServer
from tests.support.privileges import unprivileged
from tests.support.toy import flip

CHUNKS = "chunks/csm-tiny"
REPO = "sesame/csm-1b"
TOKEN = "hf_goodToken"

#: A repository of the Hub that no manifest names.
OTHER = "acme/CSM-tuned"


def joined(name: str) -> bytes:
    """A weight file of csm-tiny, from the embedded chunk files."""
    return b"".join(part.read_bytes() for part in sorted((REPOSITORY / CHUNKS).rglob(f"{name}.*")))


SAFETENSORS, CKPT = joined("model.safetensors"), joined("ckpt.pt")
CONFIG = (
    b'{\n  "audio_num_codebooks": 32,\n  "audio_vocab_size": 35,\n'
    b'  "backbone_flavor": "tiny-backbone",\n  "decoder_flavor": "tiny-decoder",\n'
    b'  "text_vocab_size": 512\n}'
)
HUB_FILES = {"model.safetensors": SAFETENSORS, "ckpt.pt": CKPT, "config.json": CONFIG}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_token(TOKEN)
        yield server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which csm-1b is a model as small as csm-tiny; nothing else, no network."""
    for name in ("HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "root"
    write_manifest(root)
    monkeypatch.setattr(locate, "checkout", lambda: root)
    return root


@pytest.fixture
def online(root: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The same with a Hub that may be asked, and has the model behind its terms."""
    commit = hub.add_repo(REPO, HUB_FILES, gated=True)
    write_manifest(root, commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def write_manifest(root: Path, commit: str = "c" * 40) -> None:
    """The manifest of csm-tiny as that of csm-1b."""
    text = (REPOSITORY / "manifests" / "csm-tiny.toml").read_text()
    text = text.replace("csm-tiny", "csm-1b").replace("chunks/csm-1b/", "chunks/")
    repo = f'[hub]\nrepo = "{REPO}"\nrevision = "{commit}"\ngated = true\n'
    golden = '[smoke]\ngolden = "csm-1b.golden.json"\n'
    path = root / "manifests" / "csm-1b.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace(golden, repo))


def give_chunk_files(root: Path, name: str) -> list[Path]:
    """Copies the chunk files of a weight file to where they belong; returns them."""
    word = "ckpt" if name == "ckpt.pt" else "safetensors"
    shutil.copytree(REPOSITORY / CHUNKS / word, root / "chunks" / word)
    return sorted((root / "chunks" / word).glob("*.part-*"))


def give_cache(root: Path, name: str, content: bytes) -> Path:
    """Puts a file into the Hub's cache, as the standard client does."""
    home = root.parent / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    blob = home / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = home / "snapshots" / ("c" * 40) / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"../../blobs/{blob.name}")
    return blob


def other_weights() -> bytes:
    """csm-tiny with one value changed: of the right size and structure, and not the model."""
    content = bytearray(SAFETENSORS)
    content[-1] ^= 1
    return bytes(content)


def expected(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = safetensors.torch.load(SAFETENSORS)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def assert_is_model(model: plain.Model, dtype: torch.dtype = torch.float32) -> None:
    state, wanted = model.state_dict(), expected(dtype)
    assert sorted(state) == sorted(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def loaded(**options: Any) -> Model:
    """The model of load_csm_1b on the CPU."""
    model = load_csm_1b(device="cpu", **options)._model
    assert isinstance(model, Model)
    return model


def sources(root: Path) -> list[list[str]]:
    """Where the weights would be taken from, in order, below the parent of the root."""
    return [
        [path.relative_to(root.parent).parts[0] for path in found.paths[:1]]
        + [path.parent.name for path in found.paths[:1]]
        for found in locate.Weights(Request(root, "csm-1b")).candidates()
    ]


def counted(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, real: Callable[..., Any]
) -> list[str]:
    """Let a module's function go on as it is; return a list that grows with each call."""
    calls: list[str] = []

    def counting(*arguments: Any) -> Any:
        calls.append(name)
        return real(*arguments)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json and model.safetensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(SAFETENSORS)
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- the names


def test_names_come_from_the_package_itself() -> None:
    """`from csm_weights import load_csm_1b, Model, Generator` is all there is to know."""
    assert {"Generator", "Model", "Segment", "load_csm_1b"} <= set(dir(csm_weights))
    assert issubclass(Model, plain.Model)
    assert Segment.__module__ == Generator.__module__ == "csm_weights.model.generator"
    with pytest.raises(AttributeError, match="load_csm_2b"):
        _ = csm_weights.load_csm_2b


def test_the_package_alone_loads_no_torch() -> None:
    """Importing the package, or what finds the weights, takes no torch."""
    code = (
        "import csm_weights, csm_weights.pipeline.locate, sys;"
        "print('torch' in sys.modules, 'requests' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]


# ---- from_local


def test_from_local_is_float32_on_the_cpu(root: Path, folder: Path) -> None:
    """The default on the CPU is float32, which is faster there; None keeps the file's dtype."""
    assert_is_model(Model.from_local(folder))
    assert_is_model(Model.from_local(folder, dtype=torch.bfloat16), torch.bfloat16)
    assert_is_model(Model.from_local(folder, dtype=None), torch.float32)
    assert_is_model(Model.from_local(str(folder), "cpu", torch.float16), torch.float16)
    assert root.is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt"])
def test_from_local_takes_a_chunk_repository(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`Model.from_local("./")` in a repository of chunk files loads them, without config.json."""
    give_chunk_files(root, name)
    monkeypatch.chdir(root)

    assert_is_model(Model.from_local("./"))
    assert_is_model(Model.from_local("./", verify=True))


def test_the_hubs_refusal_in_place_of_config_is_looked_through(root: Path) -> None:
    """What the public chunk repository has as config.json is said, and does not stop it."""
    give_chunk_files(root, "model.safetensors")
    (root / "config.json").write_text("Access to model sesame/csm-1b is restricted.")
    with pytest.warns(UserWarning, match=r"config\.json"):
        assert_is_model(Model.from_local(root))


def test_without_config_of_unknown_weights_is_an_error(root: Path, folder: Path) -> None:
    """Weights that nothing is known of need their config.json, and one that can be read."""
    rewrite(folder, lambda tensors: tensors.pop("projection.weight"))
    (folder / "config.json").write_text("Access to model")
    with warnings.catch_warnings(), pytest.raises(WrongContent, match=r"config\.json"):
        warnings.simplefilter("error")
        Model.from_local(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingInput, match=r"config\.json"):
        Model.from_local(folder)
    assert root.is_dir()


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors["projection.weight"]


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.layers.3.sa_norm.scale"] = torch.ones(64)


def _misshapen(tensors: dict[str, Tensor]) -> None:
    tensors["projection.weight"] = tensors["projection.weight"].t().contiguous()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_missing, "projection.weight"),
        (_extra, "backbone.layers.3.sa_norm.scale"),
        (_misshapen, "projection.weight"),
    ],
)
def test_from_local_is_strict(root: Path, folder: Path, change: Any, name: str) -> None:
    """A tensor that is missing, one too many, or of another shape is named."""
    rewrite(folder, change)
    with pytest.raises(WrongContent) as caught:
        Model.from_local(folder)

    assert [name] == [finding.where.rpartition(": ")[2] for finding in caught.value.findings]
    assert root.is_dir()


def test_a_wrong_byte_is_refused_while_it_is_loaded(root: Path, folder: Path) -> None:
    """Of the right name, size and structure, a wrong value is only seen by its digest."""
    assert Model.from_local(folder).verified
    (folder / "model.safetensors").write_bytes(other_weights())
    for verify in (None, True):
        with pytest.raises(WrongContent) as caught:
            Model.from_local(folder, verify=verify)
        assert [finding.kind for finding in caught.value.findings] == [Kind.WRONG_DIGEST]
        assert "a fine-tune" in str(caught.value)
        assert "verify=False" in str(caught.value)
    assert not Model.from_local(folder, verify=False).verified
    assert root.is_dir()


def test_a_wrong_byte_in_a_chunk_file_is_refused(root: Path) -> None:
    """A chunk repository is held to what its manifest pins, too."""
    chunks = give_chunk_files(root, "model.safetensors")
    assert Model.from_local(root).verified
    flip(chunks[2])
    with pytest.raises(WrongContent, match=r"bytes 409,600 to"):
        Model.from_local(root)


def test_weights_of_ones_own_load_and_are_called_unverified(root: Path, folder: Path) -> None:
    """Where no manifest pins a file of that name and size, it loads with a warning."""
    rewrite(folder, lambda tensors: tensors["projection.weight"].add_(1))
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    with pytest.warns(UserWarning, match="loaded unverified"):
        assert not Model.from_local(folder / "mine.safetensors").verified
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Model.from_local(folder / "mine.safetensors", verify=False).verified
    assert root.is_dir()


def test_only_a_checkout_above_the_file_says_what_it_must_be(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifests above a file count where there is a checkout, and not in any other folder."""
    monkeypatch.setattr(requests, "SHIPPED", root / "shipped")
    shutil.copytree(root / "manifests", folder.parent / "manifests")
    for manifest in (root / "manifests").iterdir():
        manifest.unlink()
    with pytest.warns(UserWarning, match="loaded unverified"):
        assert not Model.from_local(folder).verified
    (folder.parent / "tasks.py").touch()
    assert Model.from_local(folder).verified


def test_a_receipt_is_trusted_by_its_stat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed file that nobody has touched since is not hashed again; a touched one is."""
    give_chunk_files(root, "model.safetensors")
    apply.apply(Request(root, "csm-1b", ("safetensors",)), Target.BOTH)
    installed = root / "models" / "csm-1b"
    hashed = counted(monkeypatch, stream, "sha256", sha256)
    assert Model.from_local(installed).verified
    assert hashed == []
    os.utime(installed / "model.safetensors")
    assert Model.from_local(installed).verified
    assert hashed
    assert Model.from_local(installed, verify=True).verified


def test_blocks_of_a_receipt_are_what_verify_holds_bytes_against(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With verify=True each block is hashed by itself; a touched file is held to the manifest."""
    monkeypatch.setattr(hashing, "DIGEST_BLOCK", 50_000)
    give_chunk_files(root, "model.safetensors")
    apply.apply(Request(root, "csm-1b", ("safetensors",), block_digests=True), Target.BOTH)
    installed = root / "models" / "csm-1b"
    file = installed / "model.safetensors"
    blocks = -(-file.stat().st_size // 50_000)
    pieces = len(load(root / "manifests" / "csm-1b.toml").select(["model.safetensors"])[0].pieces)
    chains = counted(monkeypatch, stream, "sha256", sha256)
    assert Model.from_local(installed, verify=True).verified
    assert len(chains) >= blocks > pieces
    chains.clear()
    os.utime(file)
    assert Model.from_local(installed, verify=True).verified
    assert len(chains) == pieces

    receipt = read_receipt(installed, file.name)
    assert receipt is not None
    wrong = (replace(receipt.blocks[0], sha256="0" * 64), *receipt.blocks[1:])
    now = Fingerprint.of(file.stat())
    changed = replace(receipt, blocks=wrong, fingerprint=now)
    receipt_path(installed, file.name).write_text(dump_receipt(changed))
    with pytest.raises(WrongContent, match="bytes 0 to "):
        Model.from_local(installed, verify=True)


def test_a_receipt_of_other_bytes_is_not_trusted(root: Path, folder: Path) -> None:
    """A receipt whose digest is not the one that is pinned does not stand for the file."""
    file = folder / "model.safetensors"
    file.write_bytes(other_weights())
    digest = hashlib.sha256(other_weights()).hexdigest()
    seen = Fingerprint.of(file.stat())
    receipt = Receipt(file.name, "csm-1b", seen.size, digest, (), seen, "now", "test")
    path = receipt_path(folder, file.name)
    path.parent.mkdir()
    path.write_text(dump_receipt(receipt))
    with pytest.raises(WrongContent):
        Model.from_local(folder)
    assert root.is_dir()


@pytest.mark.parametrize("option", [{"verify": "no"}, {"dtype": "float33"}, {"dtype": torch.int8}])
def test_an_option_that_makes_no_sense_is_misuse(option: dict[str, Any], folder: Path) -> None:
    """No other value counts as true, and no name is taken for a dtype."""
    with pytest.raises(UsageError, match=next(iter(option))):
        Model.from_local(folder, **option)


def test_verify_needs_something_pinned(root: Path, folder: Path) -> None:
    """Where no manifest pins weights of that size, verify says so."""
    rewrite(folder, _missing)
    with pytest.raises(UsageError, match=r"nothing is pinned for .*model\.safetensors"):
        Model.from_local(folder, verify=True)
    assert root.is_dir()


def test_from_pretrained_inspects_the_disk_once_a_round(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session finds weights and gets them.

    It inspects for candidates, before the lock, for each of three kinds of action, and at the end.
    """
    give_chunk_files(root, "model.safetensors")[0].unlink()
    give_cache(root, "model.safetensors", other_weights())
    inspections = counted(monkeypatch, session, "inspect", inspect)
    begun = counted(monkeypatch, locate, "begin", session.begin)
    assert_is_model(Model.from_pretrained(REPO))
    assert len(begun) == 1
    assert len(inspections) == 1 + 1 + 3 + 1


def test_a_gpu_that_is_not_here_is_said_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is fetched or read, a device that is not there is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (
        load_csm_1b,
        lambda: Model.from_local(root, "cuda"),
        lambda: Model.from_pretrained(REPO, device="cuda:1"),
    ):
        with pytest.raises(UsageError, match="no CUDA device"):
            call()
    with pytest.raises(UsageError, match="warp drive"):
        load_csm_1b("warp drive")


# ---- load_csm_1b: what is nearest


def test_order_of_preference(root: Path) -> None:
    """Verified files come first, then the cache, chunk files, and unverified files."""
    give_chunk_files(root, "model.safetensors")
    give_chunk_files(root, "ckpt.pt")
    parts = [["root", "safetensors"], ["root", "ckpt"]]
    assert parts == sources(root)

    give_cache(root, "model.safetensors", SAFETENSORS)
    assert [["hf", "blobs"], *parts] == sources(root)

    staged = root / "output" / "csm-1b"
    staged.mkdir(parents=True)
    (staged / "ckpt.pt").write_bytes(CKPT)
    unproven = [["hf", "blobs"], *parts, ["root", "csm-1b"]]
    assert unproven == sources(root)

    apply.apply(Request(root, "csm-1b", ("safetensors",)), Target.BOTH)
    assert [["root", "csm-1b"], *unproven] == sources(root)
    assert next(locate.Weights(Request(root, "csm-1b")).candidates()).digests == ()


@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt"])
def test_chunk_files_are_loaded_where_they_lie(root: Path, name: str) -> None:
    """All chunk files of either format are enough: nothing is asked, joined or written."""
    give_chunk_files(root, name)
    before = sorted(root.rglob("*"))

    assert_is_model(loaded())
    assert before == sorted(root.rglob("*"))


def test_the_cache_is_loaded_where_it_lies(root: Path) -> None:
    """A file in the Hub's cache is verified while it is loaded, in the dtype that was asked for."""
    give_cache(root, "ckpt.pt", CKPT)

    assert_is_model(loaded(dtype=torch.float32), torch.float32)
    assert not (root / "models").exists()


def test_the_generator_knows_where_the_models_files_are(root: Path) -> None:
    """The tokenizer is looked for where the model's files belong."""
    give_chunk_files(root, "model.safetensors")

    assert root / "models" / "csm-1b" == loaded().folder


def test_a_flipped_byte_in_a_chunk_file_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong chunk files are not loaded; what is wrong is named, and nothing is left."""
    flip(give_chunk_files(root, "model.safetensors")[3])
    with pytest.raises(CsmWeightsError, match="part-ad"):
        loaded()

    assert "the weights are not those that are pinned" in capsys.readouterr().err
    assert not (root / "models" / "csm-1b" / "model.safetensors").exists()


def test_what_is_wrong_is_passed_over(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage in the cache and in a chunk file does not matter where the other format is right."""
    blob = give_cache(root, "model.safetensors", SAFETENSORS)
    blob.write_bytes(other_weights())
    flip(give_chunk_files(root, "model.safetensors")[0])
    give_chunk_files(root, "ckpt.pt")

    assert_is_model(loaded())
    assert capsys.readouterr().err.count("is not loaded") == 2


def test_stray_chunk_files_do_not_decide_what_is_loaded(root: Path) -> None:
    """One chunk file too many in the folder: those of the manifest are loaded, and only those."""
    parts = give_chunk_files(root, "model.safetensors")
    shutil.copy(parts[0], parts[0].with_name("model.safetensors.part-ag"))

    assert sources(root) == [["root", "safetensors"]]
    assert_is_model(loaded())


def test_offline_with_nothing_here_the_error_helps(root: Path) -> None:
    """Without files and without the Hub it is a missing input that says what to do."""
    with pytest.raises(MissingInput) as caught:
        loaded()

    text = str(caught.value)
    assert "HF_HUB_OFFLINE" in text
    assert "model.safetensors" in text
    assert root.is_dir()


def test_nothing_here_is_fetched_from_the_hub(root: Path, online: HubServer) -> None:
    """One format comes from the Hub, verified and in place; the second time nobody is asked."""
    assert_is_model(loaded())
    assert (root / "models" / "csm-1b" / "model.safetensors").is_file()
    assert online.requests(contains="ckpt.pt") == []
    count = len(online.log)

    assert_is_model(loaded())
    assert count == len(online.log)


def test_a_bad_chunk_file_is_mended_from_the_hub(root: Path, online: HubServer) -> None:
    """With the Hub at hand one flipped byte costs one piece."""
    flip(give_chunk_files(root, "model.safetensors")[1])

    assert_is_model(loaded())
    assert online.bytes_sent() == 204_800


@pytest.mark.usefixtures("online")
def test_without_a_manifest_csm_1b_is_the_packages(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of a checkout the package's own manifest says what CSM-1B is."""
    monkeypatch.setattr(requests, "SHIPPED", (root / "manifests").rename(root.parent / "shipped"))
    assert_is_model(loaded())
    assert (root / "models" / "csm-1b" / "model.safetensors").is_file()
    assert not (root / "manifests").exists()


# ---- from_pretrained


@pytest.mark.usefixtures("online")
def test_a_known_repository_is_held_to_the_pinned_digests(root: Path, hub: HubServer) -> None:
    """Whatever the Hub has at another revision, the manifest's digests decide."""
    commit = hub.push(REPO, {"model.safetensors": other_weights()}, branch="next")
    with pytest.raises(WrongContent):
        Model.from_pretrained(REPO, revision=commit)
    assert_is_model(Model.from_pretrained(REPO))
    assert root.is_dir()


@pytest.mark.usefixtures("online")
def test_another_repository_by_the_hubs_word(root: Path, hub: HubServer) -> None:
    """Any repository with CSM's files: locked, fetched, verified, kept out of the checkout."""
    tree = sorted(root.rglob("*"))
    hub.add_repo(OTHER, {**HUB_FILES, "README.md": b"tuned\n"})

    model = Model.from_pretrained(OTHER, dtype=torch.float32)
    assert_is_model(model, torch.float32)
    assert tree == sorted(root.rglob("*"))
    assert model.folder is not None
    assert model.folder.is_relative_to(root.parent / "hf" / "csm-weights" / "acme--CSM-tuned")
    assert hub.requests(contains="ckpt.pt") == []
    manifest = next((root.parent / "hf" / "csm-weights").rglob("*.toml"))
    assert {a.path for a in load(manifest).artifacts} == set(HUB_FILES)
    count = len(hub.log)

    assert_is_model(Model.from_pretrained(OTHER))
    assert count == len(hub.log)


@pytest.mark.usefixtures("online", "root")
def test_revisions_are_kept_apart(hub: HubServer) -> None:
    """A branch gives its own weights, beside those of main."""
    hub.add_repo(OTHER, HUB_FILES)
    files = {**HUB_FILES, "model.safetensors": other_weights()}
    hub.push(OTHER, files, branch="tuned/v2")
    main = Model.from_pretrained(OTHER, dtype=None).state_dict()
    tuned = Model.from_pretrained(OTHER, "tuned/v2", dtype=None).state_dict()

    assert sum(not torch.equal(main[name], tuned[name]) for name in main) == 1


@pytest.mark.usefixtures("online")
def test_a_config_json_counts_if_the_manifest_has_its_bytes(hub: HubServer, root: Path) -> None:
    """One that was edited, or may not be read, describes no network, though its size is right."""
    hub.add_repo(OTHER, HUB_FILES)
    Model.from_pretrained(OTHER)
    request = locate.of_repo(root, OTHER, None)
    (found, *_) = locate.Weights(request).candidates()
    assert found.config is not None
    config = found.folder / "config.json"
    config.write_bytes(CONFIG.replace(b'"text_vocab_size": 512', b'"text_vocab_size": 513'))
    (found, *_) = locate.Weights(request).candidates()
    assert found.config is None
    config.write_bytes(CONFIG)
    config.chmod(0)
    with unprivileged():
        (unread, *_) = locate.Weights(request).candidates()
        staged = request.root / "output" / found.folder.name / "config.json"
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(CONFIG)
        (beside, *_) = locate.Weights(request).candidates()
    assert unread.config is None and beside.config is not None


@pytest.mark.usefixtures("online", "root")
def test_a_ckpt_alone_will_do(hub: HubServer) -> None:
    """A repository may have only ckpt.pt."""
    hub.add_repo(OTHER, {"ckpt.pt": CKPT, "config.json": CONFIG})

    assert_is_model(Model.from_pretrained(OTHER))


@pytest.mark.usefixtures("online", "root")
def test_a_repository_of_something_else_is_refused(hub: HubServer, tmp_path: Path) -> None:
    """Tensors of another layout under the same file name are named; without weights it is said."""
    path = tmp_path / "other.safetensors"
    save_file({"lm_head.weight": torch.ones(3)}, path)
    hub.add_repo(OTHER, {"model.safetensors": path.read_bytes(), "config.json": CONFIG})
    with pytest.raises(WrongContent, match=r"audio_head: malformed"):
        Model.from_pretrained(OTHER)
    hub.add_repo("acme/empty", {"config.json": CONFIG})
    with pytest.raises(MissingInput, match=r"model\.safetensors or ckpt\.pt"):
        Model.from_pretrained("acme/empty")


@pytest.mark.usefixtures("root")
def test_an_unknown_repository_offline_is_missing() -> None:
    """Offline, a repository that was never here is a missing input."""
    with pytest.raises(MissingInput, match="HF_HUB_OFFLINE"):
        Model.from_pretrained(OTHER)


@pytest.mark.parametrize("repo", ["csm", "a/b/c", "../../etc", ""])
def test_a_name_that_is_none_is_refused(root: Path, repo: str) -> None:
    """What is not org/name makes no folder anywhere."""
    with pytest.raises(UsageError, match="ORG/NAME"):
        Model.from_pretrained(repo)
    assert not (root.parent / "hf").exists()


def test_csm_tiny_itself_speaks() -> None:
    """The embedded model, from its chunk files in this checkout, gives the recorded frames."""
    golden = json.loads((REPOSITORY / "manifests" / "csm-tiny.golden.json").read_text())
    found = next(locate.Weights(Request(REPOSITORY, "csm-tiny")).candidates())
    path = found.paths[0] if len(found.paths) == 1 else found.paths[0].parent
    model = Model.from_local(path, dtype=None, config=found.config, digests=found.digests)
    frames = Generator(model).generate_frames(
        golden["prompt"], 0, [], 80 * len(golden["frames"]), temperature=0
    )

    assert golden["frames"] == frames.tolist()


def test_without_torch_the_import_names_the_command() -> None:
    """A program that imports the model without torch is told in one sentence what installs it."""
    code = "import sys; sys.modules['torch'] = None; from csm_weights import load_csm_1b"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "ModuleNotFoundError: csm_weights.load_csm_1b needs torch: .venv/bin/pip install "
    assert done.stderr.splitlines()[-1].startswith(said)


def test_torch_without_numpy_does_not_warn() -> None:
    """An environment without NumPy, which nothing here needs, imports without a warning."""
    code = "import sys; sys.modules['numpy'] = None; from csm_weights import Model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""

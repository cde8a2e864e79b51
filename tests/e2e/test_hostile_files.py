"""Hostile weights, as a user meets them: refused with exit 4, soon, in little memory, not run."""

from __future__ import annotations

import copyreg
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.errors import CsmWeightsError, MissingInput, WrongContent
from csm_weights.formats import weights_file
from csm_weights.formats.architecture import CsmConfig, parse_config
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.model.smoke_report import SmokeReport
from csm_weights.store.journal import parse_line
from csm_weights.store.receipts import dump_receipt, load_receipt
from csm_weights.untrusted import dump_record, parse_record
from tests.support import hostile
from tests.support.clone import Clone
from tests.support.readers import read_checkpoint
from tools.fuzz import probe

ROOT = Path(__file__).resolve().parents[2]

#: Names of the canaries that a payload makes, were it run.
CANARY = "was-run"


def _plant(root: Path, name: str, content: bytes, format_: str) -> None:
    """Write a model whose manifest pins just these hostile bytes, and install the file."""
    digest = hashlib.sha256(content).hexdigest()
    artifact = Artifact("weights", "g", format_, len(content), digest)
    manifest = Manifest(name, f"output/{name}", f"models/{name}", (artifact,))
    (root / "manifests").mkdir(exist_ok=True)
    (root / "manifests" / f"{name}.toml").write_text(render(manifest))
    (root / "models" / name).mkdir(parents=True)
    hostile.written(root / "models" / name, content)


def _probed(root: Path, files: Mapping[str, tuple[bytes, str]], format_: str) -> dict[str, Any]:
    """The outcome of all files in one watched process; names are written as a manifest can."""
    names = {f"n{index}": name for index, name in enumerate(files)}
    for key, name in names.items():
        _plant(root, key, files[name][0], format_)
    (root / "jobs.json").write_text(json.dumps(list(names)))
    found = watched(root, "verify", "compare")
    for result in found["results"]:
        result["name"] = names[result["name"]]
    return found


def watched(root: Path, *acts: str) -> dict[str, Any]:
    """The probe's report on the jobs in a folder."""
    command = [sys.executable, "-m", "tools.fuzz.probe", str(root), *acts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _running(root: Path) -> dict[str, tuple[bytes, str]]:
    """Every file that would make the canary, in a zip where it has none of its own."""
    target = str(root / CANARY)
    pickles = hostile.running_pickles(target).items()
    inside = {name: (hostile.checkpoint(code), why) for name, (code, why) in pickles}
    return inside | hostile.running_files(target)


def _inside_zips(_: Path) -> dict[str, tuple[bytes, str]]:
    pickles = hostile.BAD_PICKLES.items()
    return {name: (hostile.checkpoint(code), why) for name, (code, why) in pickles}


SETS: dict[str, tuple[Callable[[Path], Mapping[str, tuple[bytes, str]]], str]] = {
    "safetensors": (lambda _: hostile.BAD_SAFETENSORS, "safetensors"),
    "zips": (lambda _: hostile.BAD_ZIPS, "torch-zip"),
    "pickles": (_inside_zips, "torch-zip"),
    "running": (_running, "torch-zip"),
    "heavy safetensors": (lambda _: hostile.heavy_safetensors(), "safetensors"),
    "heavy zips": (lambda _: hostile.heavy_zips(), "torch-zip"),
}


@pytest.mark.parametrize("name", SETS)
def test_hostile_weights_are_refused_in_bounds(name: str, tmp_path: Path) -> None:
    """Every file of a set is refused, though its digest is the pinned one.

    Only what breaks no rule of its format and is not read is verified by that
    digest, with a note; compare refuses it too.
    """
    make, format_ = SETS[name]
    files = make(tmp_path)
    found = _probed(tmp_path, files, format_)
    results = found["results"]
    assert len(results) == 2 * len(files)
    verified = [r for r in results if r["command"] == "verify"]
    codes = {r["name"]: r["code"] for r in verified}
    assert codes == {name: 0 if name in hostile.UNREAD else 4 for name in files}
    assert [r["name"] for r in results if r["command"] == "compare" and r["code"] != 4] == []
    shown = {r["name"]: " ".join(r["text"].split()) for r in verified}
    assert [name for name, text in shown.items() if files[name][1] not in text] == []
    assert [r["name"] for r in results if r["seconds"] > probe.SECONDS] == []
    assert found["grown"] < probe.MEMORY
    assert not (tmp_path / CANARY).exists()


def test_a_good_file_passes_the_same_way(tmp_path: Path) -> None:
    """A sound file is accepted by the same commands."""
    for format_, content in (
        ("safetensors", hostile.good_safetensors()),
        ("torch-zip", hostile.good_checkpoint()),
    ):
        root = tmp_path / format_
        root.mkdir()
        found = _probed(root, {"good": (content, "")}, format_)
        assert [result["code"] for result in found["results"]] == [0, 0], found


def _load_all(files: Mapping[str, bytes], folder: Path) -> None:
    """Let torch load each file as before weights_only, and write down which ones ran."""
    import torch

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    copyreg.add_extension("builtins", "open", hostile.EXTENSION)
    ran = []
    for name, content in files.items():
        try:
            torch.load(hostile.written(folder, content), weights_only=False)
        except BaseException:  # a payload may raise what it likes, SystemExit too
            null = os.open(os.devnull, os.O_WRONLY)
        if (folder / CANARY).exists():
            (folder / CANARY).unlink()
            ran.append(name)
    (folder / "ran").write_text(json.dumps(ran))


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Each payload but the decoys runs under torch.load(weights_only=False)."""
    pytest.importorskip("torch")
    files = {name: content for name, (content, _) in _running(tmp_path).items()}
    process = multiprocessing.get_context("fork").Process(target=_load_all, args=(files, tmp_path))
    process.start()
    process.join(120)
    ran = set(json.loads((tmp_path / "ran").read_text()))
    assert files.keys() - ran == hostile.DECOYS


@pytest.mark.parametrize("name", ["storage_record_is_smaller"])
def test_mapped_loading_accepts_what_is_refused_here(name: str, tmp_path: Path) -> None:
    """torch maps a forged record, and reads what follows it in the file as its elements."""
    torch = pytest.importorskip("torch")
    path = hostile.written(tmp_path, hostile.checkpoint(hostile.BAD_PICKLES[name][0]))
    torch.load(path, mmap=True, weights_only=True)
    with pytest.raises(WrongContent):
        read_checkpoint(path)


# ---- through the commands and the interface for programs


#: Of each kind of attack one, for these tests start a process for each.
SAMPLES = ["header_of_100_mb", "tensors_overlap", "gadget_of_torch_jit", "protocol_4", "tar"]


def _sample(name: str, root: Path) -> bytes:
    sets = (hostile.heavy_safetensors(), hostile.BAD_SAFETENSORS, _running(root))
    return next(some[name][0] for some in sets if name in some)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A checkout that these tests may write to."""
    return Clone.make(tmp_path_factory.mktemp("clone") / "root")


@pytest.mark.parametrize("name", SAMPLES)
def test_inv_refuses_with_exit_4(name: str, clone: Clone, tmp_path: Path) -> None:
    """`inv compare` of a hostile file ends with 4 and says why, whatever the file is called."""
    path = hostile.written(tmp_path, _sample(name, tmp_path), f"{name}.safetensors")
    done = clone.inv("compare", "--file", str(path), "--file", str(path))
    assert done.returncode == 4, done.stderr
    assert "  malformed: " in done.stderr
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("called", ["model.safetensors", "ckpt.pt"])
@pytest.mark.parametrize("name", SAMPLES)
def test_programs_get_wrong_content(name: str, called: str, tmp_path: Path) -> None:
    """`Model.from_local` raises the error with code 4, whatever the file is called."""
    pytest.importorskip("torch")
    from csm_weights import Model

    (tmp_path / "config.json").write_bytes(hostile.config())
    path = hostile.written(tmp_path, _sample(name, tmp_path), called)
    with pytest.raises(CsmWeightsError) as caught:
        Model.from_local(path, device="cpu", verify=False)
    assert caught.value.exit_code == 4
    assert not (tmp_path / CANARY).exists()


# ---- config.json, the index of shards, and what is written beside the files


@pytest.mark.parametrize("name", hostile.BAD_CONFIGS)
def test_hostile_config_is_refused(name: str) -> None:
    """A config.json that describes no network is wrong content, and asks for no memory."""
    content, reason = hostile.BAD_CONFIGS[name]
    with pytest.raises(WrongContent) as caught:
        parse_config(content, "config.json")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", hostile.BAD_INDEXES)
def test_hostile_index_is_refused(name: str, tmp_path: Path) -> None:
    """An index that names no shards beside it is wrong content, and nothing else is opened."""
    content, reason = hostile.BAD_INDEXES[name]
    path = hostile.written(tmp_path, content, "model.safetensors.index.json")
    with pytest.raises(WrongContent) as caught:
        weights_file.find(path)
    assert reason in str(caught.value)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


def _json(*keys: str) -> st.SearchStrategy[Any]:
    """Any JSON, with the reader's own keys more often than by chance."""
    names = st.sampled_from(keys) | st.text(max_size=4)
    return st.recursive(
        _SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=8),
        max_leaves=24,
    )


def _mutated(good: Mapping[str, Any], *keys: str) -> st.SearchStrategy[bytes]:
    """A good object with a few values replaced by anything, or any JSON, or any bytes."""
    changes = st.dictionaries(st.sampled_from(sorted(good)), _json(*keys), max_size=3)
    objects = changes.map(lambda changed: {**good, **changed}) | _json(*keys)
    return objects.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


_FLAVORED = json.loads(hostile.config())
_LAYERED = json.loads(hostile.config_of_layers())


@settings(deadline=None, max_examples=300)
@given(_mutated(_FLAVORED, *_FLAVORED) | _mutated(_LAYERED, *_LAYERED))
def test_any_config_is_read_or_refused(content: bytes) -> None:
    """Any config.json gives a network of sane sizes or wrong content."""
    try:
        config = parse_config(content, "config.json")
    except WrongContent as error:
        assert error.findings
    else:
        assert isinstance(config, CsmConfig)
        assert len(config.tensor_shapes()) < 20_000


_INDEX = {"weight_map": {"a": "m-00001-of-00001.safetensors"}, "metadata": {"total_size": 8}}


@settings(deadline=None, max_examples=200)
@given(content=_mutated(_INDEX, *_INDEX))
def test_any_index_names_shards_beside_it(content: bytes, tmp_path_factory: Any) -> None:
    """Any index is refused, or leads to files in its own folder."""
    folder = tmp_path_factory.getbasetemp()
    path = hostile.written(folder, content, "m.safetensors.index.json")
    hostile.written(folder, b"", "m-00001-of-00001.safetensors")
    try:
        found = weights_file.find(path)
    except (WrongContent, MissingInput) as error:
        assert error.findings
    else:
        assert {part.parent for parts in found for part in parts} == {folder}


_PIECE = {"schema": 1, "offset": 0, "size": 8, "sha256": "1" * 64, "source": "here"}
_PRINT = {"inode": 1, "size": 8, "mtime_ns": 1, "ctime_ns": 1}
_RECEIPT = {
    "schema": 1,
    "path": "a",
    "model": "m",
    "size": 8,
    "sha256": "1" * 64,
    "pieces": [{k: v for k, v in _PIECE.items() if k != "schema"}],
    "fingerprint": _PRINT,
    "proven_at": "2026-01-01T00:00:00+00:00",
    "tool": "t",
}
_ARRIVAL = {"schema": 1, "offset": 0, "size": 8, "piece": "1" * 64}
_CHECK = {"name": "n", "value": "v", "limit": "l", "ok": True}
_SMOKE = {
    "schema": 1,
    "device": "cpu",
    "checks": [_CHECK],
    "figures": {},
    "frames_per_second": 1.0,
    "real_time_factor": 1.0,
    "load_seconds": 1.0,
    "bound_to": [["a", "b"]],
    "made_at": "now",
}
RECORDS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str], dict[str, Any]]] = {
    "receipt": (load_receipt, dump_receipt, _RECEIPT),
    "piece": (parse_line, dump_record, _PIECE),
    "arrival": (parse_line, dump_record, _ARRIVAL),
    "refuted": (parse_line, dump_record, {"schema": 1, "offset": 0, "refuted": "1" * 64}),
    "smoke": (lambda text: parse_record(text, SmokeReport), dump_record, _SMOKE),
}


@pytest.mark.parametrize("kind", RECORDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_record_is_understood_or_absent(kind: str, data: st.DataObject) -> None:
    """Any text in place of a receipt or journal is a record that writes back equal, or none."""
    load, dump, good = RECORDS[kind]
    content = data.draw(_mutated(good, *good, *_PRINT))
    record = load(content.decode("latin-1"))
    assert record is None or load(dump(record)) == record


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("text", ["[" * 500_000, "9" * 5_000, '{"schema": 1}', "\x00", ""])
def test_hostile_record_counts_as_absent(kind: str, text: str) -> None:
    """Text made to be costly is no record, and raises nothing."""
    assert RECORDS[kind][0](text) is None

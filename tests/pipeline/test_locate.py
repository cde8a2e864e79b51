"""Weights on this machine for a program: which files, and the digests that they must have."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import Kind, MissingInput, UsageError
from csm_weights.files import Fingerprint
from csm_weights.formats.architecture import parse_config
from csm_weights.hashing import git_sha1
from csm_weights.manifest.parse import load
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Edition, Manifest
from csm_weights.pipeline import locate
from csm_weights.pipeline.request import Request
from csm_weights.store.hub_cache import repository
from csm_weights.store.install import record
from csm_weights.store.receipts import Receipt
from tests.support.clone import REPOSITORY, copy_tiny

TINY = load(REPOSITORY / "manifests" / "csm-tiny.toml")
CONFIG = next(a for a in TINY.artifacts if a.path == "config.json")
TEXT = str(CONFIG.editions[0].text)
SAFETENSORS = next(a for a in TINY.artifacts if a.path == "model.safetensors")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with csm-tiny's manifest and chunk files; no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return copy_tiny(tmp_path / "root")


def write(root: Path, manifest: Manifest) -> Manifest:
    path = root / "manifests" / f"{manifest.name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(manifest))
    return load(path)


def found(root: Path) -> list[tuple[str, int]]:
    """The first file of each candidate, and how many ranges it is verified by."""
    candidates = locate.Weights(Request(root, "csm-tiny")).candidates()
    return [(one.paths[0].relative_to(root).as_posix(), len(one.digests)) for one in candidates]


# ---- candidates


def test_what_is_not_whole_is_no_candidate(root: Path) -> None:
    """One chunk file less, and another file of the right size that no digest pins."""
    parts = [
        f"chunks/csm-tiny/{f}.part-aa" for f in ("safetensors/model.safetensors", "ckpt/ckpt.pt")
    ]
    assert found(root) == [(part, 6) for part in parts]
    (root / parts[0]).unlink()
    assert found(root) == [(parts[1], 6)]
    (root / parts[1]).write_bytes(b"short")
    assert found(root) == []


def test_a_file_is_held_against_the_edition_that_is_pinned(root: Path) -> None:
    """Another edition may be installed; a program that loads takes the pinned one alone."""
    other = Edition(5, "0" * 64, None)
    pinned = replace(SAFETENSORS, alternatives=(other,))
    write(root, replace(TINY, artifacts=(pinned, CONFIG), default=("all",)))
    shutil.rmtree(root / "chunks")
    for content, expected in ((b"other", 0), (bytes(SAFETENSORS.size), 1)):
        path = root / "models" / "csm-tiny" / "model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert len(found(root)) == expected


def test_what_git_alone_identifies_is_not_loaded_unverified(root: Path) -> None:
    """Ranges are verified by sha256: a file without one is fetched and hashed first."""
    bare = replace(SAFETENSORS, pieces=(), sha256=None, blob_id=None, git_sha1="0" * 40)
    write(root, replace(TINY, artifacts=(bare, CONFIG), default=("all",)))
    path = root / "output" / "csm-tiny" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(SAFETENSORS.size))
    assert found(root) == []
    write(root, replace(TINY, artifacts=(replace(bare, sha256="0" * 64), CONFIG), default=("all",)))
    assert found(root) == [("output/csm-tiny/model.safetensors", 1)]


def test_weights_of_other_names_are_taken_by_their_format(root: Path) -> None:
    """In the order of the manifest; beside one of the usual names they do not count."""
    names = ("b.safetensors", "a.safetensors")
    others = [
        replace(SAFETENSORS, path=name, pieces=(), sha256="0" * 64, blob_id=None) for name in names
    ]
    for artifacts, expected in (
        (others, ["b.safetensors", "a.safetensors"]),
        ([*others, SAFETENSORS], ["model.safetensors.part-aa"]),
    ):
        every = (*artifacts, CONFIG, replace(others[0], path="z.bin", format="opaque"))
        write(root, replace(TINY, artifacts=every, default=("all",)))
        folder = root / "models" / "csm-tiny"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*names, "z.bin"):
            (folder / name).write_bytes(bytes(SAFETENSORS.size))
        assert [Path(path).name for path, _ in found(root)] == expected


def test_a_model_without_weights_is_a_missing_input(root: Path) -> None:
    """The finding names the manifest, or the repository where it has one."""
    manifest = write(root, replace(TINY, artifacts=(CONFIG,), default=("all",)))
    for repo, where in ((None, manifest.where), ("org/tiny", "org/tiny")):
        write(root, replace(manifest, repo=repo, revision=repo and "a" * 40))
        with pytest.raises(MissingInput, match="csm-tiny has no weights that can be") as caught:
            locate.Weights(Request(root, "csm-tiny"))
        (finding,) = caught.value.findings
        assert (finding.kind, finding.where) == (Kind.NOT_THERE, where)
        assert finding.expected == "model.safetensors or ckpt.pt"


# ---- config.json


@pytest.mark.parametrize("by_git", [True, False])
@pytest.mark.parametrize("where", ["installed", "staged", "cached", "nowhere"])
def test_the_config_is_read_wherever_it_is(root: Path, where: str, by_git: bool) -> None:
    """Where the manifest has only its digest or its git id; of another file it says nothing."""
    data, commit = TEXT.encode(), "a" * 40
    ids: dict[str, Any] = {"git_sha1": git_sha1(len(data), data).hexdigest(), "sha256": None}
    config = replace(CONFIG, text=None, alternatives=(), **(ids if by_git else {}))
    manifest = replace(TINY, artifacts=(SAFETENSORS, config), repo="o/t", revision=commit)
    write(root, replace(manifest, default=("all",), golden=None))
    folder = {
        "installed": root / "models" / "csm-tiny",
        "staged": root / "output" / "csm-tiny",
        "cached": repository(root.parent / "hf" / "hub", "o/t") / "snapshots" / commit,
        "nowhere": root / "elsewhere",
    }[where]
    folder.mkdir(parents=True)
    path = folder / "config.json"
    path.write_bytes(data)
    (first, *_) = locate.Weights(Request(root, "csm-tiny")).candidates()
    assert first.folder == root / "models" / "csm-tiny"
    assert first.config == (None if where == "nowhere" else parse_config(data, ""))
    path.write_bytes(data.replace(b"32", b"31", 1))
    (first, *_) = locate.Weights(Request(root, "csm-tiny")).candidates()
    assert first.config is None


def test_the_config_in_the_manifest_counts(root: Path) -> None:
    """No file is read for it; a manifest of none has no network."""
    (first, *_) = locate.Weights(Request(root, "csm-tiny")).candidates()
    assert first.config == locate.network_in(TINY) == parse_config(TEXT.encode(), "")
    other = replace(CONFIG, path="other.json")
    bare = replace(CONFIG, text=None, alternatives=())
    for artifacts in ((other,), (bare,), ()):
        assert locate.network_in(replace(TINY, artifacts=artifacts)) is None
    assert locate.network_in(replace(TINY, artifacts=(other, CONFIG))) == first.config


# ---- what is pinned of a file


def test_files_go_below_the_checkout_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the current folder is."""
    monkeypatch.chdir(tmp_path)
    assert locate.checkout() == REPOSITORY


def test_the_manifests_of_the_nearest_checkout_pin_a_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By size, and by name where one is given; none of another size, name or format."""
    monkeypatch.setattr(locate, "checkout", lambda: root)
    inner = root / "inner"
    size, folder = SAFETENSORS.size, inner / "models"
    folder.mkdir(parents=True)
    known = locate.pinned(folder, size)
    assert known is not None
    assert (known.model, known.artifact.path) == ("csm-tiny", "model.safetensors")
    assert len(known.digests) == 6 and known.config == locate.network_in(TINY)
    assert locate.pinned(folder, size, "model.safetensors") == known
    assert locate.pinned(folder, size, "ckpt.pt") is None
    assert locate.pinned(folder, size + 1) is None
    assert locate.pinned(folder, CONFIG.size) is None

    (root / "tasks.py").touch()
    (inner / "tasks.py").touch()
    write(inner, replace(TINY, name="mine", artifacts=(replace(SAFETENSORS, size=size),)))
    nearest = locate.pinned(folder, size)
    assert nearest is not None and nearest.model == "mine"
    (inner / "tasks.py").unlink()
    assert locate.pinned(folder, size) == known


def test_a_manifest_whose_files_go_into_the_folder_comes_first(root: Path) -> None:
    """A fine-tune has the size and name of what it was made from."""
    (root / "tasks.py").touch()
    tuned = Artifact("model.safetensors", "x", "safetensors", SAFETENSORS.size, "0" * 64)
    write(root, Manifest("zz-tuned", "output/zz", "models/zz", (tuned,)))
    bare = replace(tuned, sha256=None, git_sha1="0" * 40)
    write(root, Manifest("aa-bare", "output/aa", "models/aa", (bare,)))
    write(root, Manifest("yy-tuned", "output/yy", "models/a0", (tuned,)))
    for folder, model in (
        ("a0", "yy-tuned"),
        ("zz", "zz-tuned"),
        ("csm-tiny", "csm-tiny"),
        ("aa", "csm-tiny"),
    ):
        known = locate.pinned(root / "models" / folder, SAFETENSORS.size)
        assert known is not None and known.model == model


@pytest.mark.parametrize(
    ("model", "sha256", "is_known", "holds"),
    [
        ("csm-tiny", SAFETENSORS.sha256, True, True),
        ("csm-tiny", "0" * 64, True, False),
        ("tuned", "0" * 64, True, True),
        ("csm-tiny", "0" * 64, False, True),
    ],
)
def test_a_receipt_holds_for_what_it_says(
    tmp_path: Path, model: str, sha256: str, is_known: bool, holds: bool
) -> None:
    """That of the pinned model must have its digest; a touched file has none that holds."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(SAFETENSORS.size))
    known = locate.Pinned("csm-tiny", SAFETENSORS, (), None) if is_known else None
    assert locate.valid_receipt(file, known) is None
    now = Fingerprint.of(file.stat())
    receipt = Receipt(file.name, model, SAFETENSORS.size, sha256, (), now, "now", "test")
    record(tmp_path, receipt)
    assert locate.valid_receipt(file, known) == (receipt if holds else None)
    os.utime(file, ns=(1, 1))
    assert locate.valid_receipt(file, known) is None


def test_a_revision_that_cannot_be_one_is_a_wrong_use(root: Path) -> None:
    """It is refused before the Hub is asked for it."""
    with pytest.raises(UsageError, match="--revision 'a b' is not a commit, branch or tag"):
        locate.of_repo(root, "someone/tuned", "a b")

"""Folders that others keep: caches laid out as the Hub's, and those of ComfyUI. Only sources."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csm_weights.errors import CsmWeightsError, Kind, UsageError
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome
from csm_weights.store.inspect import FileState
from tests.support.toy import Toy, flip

COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture
def bare(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy model of a repository of the Hub, without chunk files and offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision=COMMIT))
    shutil.rmtree(toy.root / "chunks")
    return toy


def weights(toy: Toy, **options: object) -> Outcome:
    return apply.weights(replace(toy.request("a.bin"), **options), smoke=False)  # type: ignore[arg-type]


def shared_cache(toy: Toy, folder: Path) -> Path:
    """Make a cache like the Hub's with a.bin; return its blob."""
    data = toy.good("a.bin")
    home = folder / "models--org--toy"
    blob, name = home / "blobs" / hashlib.sha256(data).hexdigest(), home / "snapshots" / COMMIT
    for parent in (blob.parent, name):
        parent.mkdir(parents=True)
    blob.write_bytes(data)
    (name / "a.bin").symlink_to(f"../../blobs/{blob.name}")
    return blob


def listing(folder: Path) -> dict[Path, int]:
    """Everything below a folder, with its time of change."""
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def mounted() -> Iterator[Callable[[Path], object]]:
    """A function that mounts a folder over itself, read-only, until the test ends."""
    mounts: list[Path] = []

    def mount(folder: Path) -> None:
        for options in (["--bind", str(folder)], ["-o", "remount,bind,ro"]):
            if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
                pytest.skip("bind mounts are refused here")
            mounts[:] = [folder]

    yield mount
    for folder in mounts:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_shared_cache_is_a_source_and_is_not_written(
    bare: Toy, tmp_path: Path, mounted: Callable[[Path], object]
) -> None:
    """A file of a cache on a read-only mount is copied and verified."""
    cache = tmp_path / "shared"
    shared_cache(bare, cache)
    before = listing(cache)
    mounted(cache)
    done = weights(bare, caches=(str(tmp_path / "empty"), str(cache)))
    assert done.error is None
    assert bare.installed("a.bin").read_bytes() == bare.good("a.bin")
    assert listing(cache) == before


def test_a_wrong_byte_in_a_shared_cache_is_refused(bare: Toy, tmp_path: Path) -> None:
    """The file is not installed; with another cache beside it that one is taken."""
    bad, good = tmp_path / "bad", tmp_path / "good"
    flip(shared_cache(bare, bad))
    shared_cache(bare, good)
    with pytest.raises(CsmWeightsError) as caught:
        weights(bare, caches=(str(bad),))
    assert {finding.kind for finding in caught.value.findings} == {Kind.WRONG_DIGEST}
    assert not bare.installed("a.bin").exists()
    assert weights(bare, caches=(str(bad), str(good))).error is None


@pytest.mark.parametrize("below", ["models/sesame", "models/TTS/csm-1b"])
@pytest.mark.parametrize("named", ["itself", "models", "ComfyUI"])
def test_folders_of_comfyui_are_sources(bare: Toy, tmp_path: Path, below: str, named: str) -> None:
    """The folder itself may be named, or models/, or the one that ComfyUI is in."""
    home = tmp_path / "ComfyUI"
    (home / below).mkdir(parents=True)
    (home / below / "a.bin").write_bytes(bare.good("a.bin"))
    folder = {"itself": home / below, "models": home / "models", "ComfyUI": home}[named]
    done = weights(bare, urls=(folder.as_uri(),))
    assert [item.installed.state for item in done.state.artifacts] == [FileState.VERIFIED]


def test_a_shared_cache_that_is_not_there_is_named(bare: Toy, tmp_path: Path) -> None:
    """The folder is told where nothing else has the file."""
    with pytest.raises(CsmWeightsError) as caught:
        weights(bare, source="hf", caches=(str(tmp_path / "gone"),))
    assert str(tmp_path / "gone") in {finding.where for finding in caught.value.findings}


def test_a_cache_that_would_not_be_asked_is_misuse(tmp_path: Path) -> None:
    """With --source=chunks nothing but chunk files is asked."""
    with pytest.raises(UsageError, match="--source=chunks does not use --cache"):
        Request(tmp_path, source="chunks", caches=("/shared",))


@pytest.mark.parametrize("second", ["the same disk", "an empty one", "one that is not mounted"])
def test_the_next_disk_is_asked_for_whichever_was_inserted(
    toy: Toy, tmp_path: Path, second: str
) -> None:
    """Each piece that is on no disk is named, and a folder that is not there, run after run."""
    first, empty = tmp_path / "first", tmp_path / "empty"
    empty.mkdir()
    shutil.move(toy.root / "chunks", first / "chunks")
    lacking = {piece.part for piece in toy.artifact("a.bin").pieces[2:]}
    for part in lacking:
        (first / part).unlink()
    folder = {"the same disk": first, "an empty one": empty}.get(second, tmp_path / "gone")
    for named in (first, folder):
        with pytest.raises(CsmWeightsError) as caught:
            weights(toy, urls=(named.as_uri(),))
        found = {finding.where: finding.help for finding in caught.value.findings}
        assert lacking <= set(found)
        assert all("insert the" in help_text for help_text in found.values())
    assert (str(folder) in found) is (not folder.exists())

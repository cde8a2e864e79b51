"""Advice is about the files that are missing, with commands that fetch them and nothing more."""

from __future__ import annotations

import inspect
import re
import shutil
from dataclasses import replace

import pytest

from csm_weights.commands.cli import collection
from csm_weights.errors import CsmWeightsError, Kind, NoSpace
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.session import begin
from tests.support.toy import Toy, flip


def refusal(toy: Toy, *only: str) -> CsmWeightsError:
    """The error of a run that cannot go on."""
    with pytest.raises(CsmWeightsError) as caught:
        apply.weights(replace(toy.request(*only), source="chunks"), smoke=False)
    return caught.value


def test_the_missing_file_is_the_one_advised_about(toy: Toy) -> None:
    """With a chunk file of b.bin missing the ways are those to b.bin, for what was asked."""
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision="a" * 40))
    toy.chunk_file("b.bin", 1).unlink()
    advice = refusal(toy, "all").advice
    assert advice.startswith("Ways to get b.bin:") and "a.bin" not in advice
    assert "--source=hf" in advice


HUB = "the Hub: inv weights --model toy --only b.bin --source=hf"
OTHERS = """a mirror: inv weights --model toy --only b.bin --source=mirror --url=https://...
a disk: insert it, then inv weights --model toy --only b.bin --url=file:///... with its folder
a copy from anywhere: put it at output/toy/b.bin""".splitlines()
CHUNKS = (
    "chunk files: put them in chunks/toy/b.bin/; in a clone that has them, "
    "git restore chunks/toy/b.bin"
)


@pytest.mark.parametrize("repo", [None, "org/toy"])
@pytest.mark.parametrize("has_pieces", [True, False])
def test_the_ways_are_numbered_and_named_in_full(
    toy: Toy, repo: str | None, has_pieces: bool
) -> None:
    """Chunk files where the file has some, the Hub where it has a repository, and the others."""
    b = toy.artifact("b.bin")
    b = b if has_pieces else replace(b, pieces=(), sha256="0" * 64, blob_id=None)
    toy.write_manifest(replace(toy.manifest, artifacts=(b,), repo=repo, revision="a" * 40))
    shutil.rmtree(toy.root / "chunks")
    error = refusal(toy, "b.bin")
    ways = [*[CHUNKS] * has_pieces, *[HUB] * (repo is not None), *OTHERS]
    lines = [f"  {number}. {way}" for number, way in enumerate(ways, 1)]
    last = "Then run the same command again: every file is verified before it is used."
    assert error.advice.splitlines() == ["Ways to get b.bin:", *lines, last]
    assert error.message == "toy: not all files are here"


def test_what_is_wrong_with_the_hub_is_mended_first(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A staging folder elsewhere is named in full."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision="a" * 40))
    toy.chunk_file("b.bin", 1).unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(CsmWeightsError) as caught:
        apply.weights(replace(toy.request("b.bin"), staging=str(elsewhere)), smoke=False)
    lines = caught.value.advice.splitlines()
    command = f"inv weights --model toy --only b.bin --staging {elsewhere} --source=hf"
    mend = "unset HF_HUB_OFFLINE, or copy the files to this machine, then"
    assert lines[2] == f"  2. the Hub: {mend} {command}"
    assert lines[5] == f"  5. a copy from anywhere: put it at {elsewhere}/b.bin"


@pytest.mark.parametrize(("formats", "named"), [("o", "a.bin"), ("s", "b.bin"), ("sc", "b.bin")])
def test_the_first_missing_file_is_advised_about_weights_before_others(
    toy: Toy, formats: str, named: str
) -> None:
    """Of several that cannot be got."""
    shutil.rmtree(toy.root / "chunks")
    first, second, note = toy.manifest.artifacts
    kinds = {"o": "opaque", "s": "safetensors", "c": "torch-zip"}
    third = replace(second, path="c.bin", format=kinds[formats[-1]], pieces=(), sha256="0" * 64)
    artifacts = (first, replace(second, format=kinds[formats[0]]), third, note)
    toy.write_manifest(replace(toy.manifest, artifacts=artifacts))
    assert refusal(toy, "all").advice.startswith(f"Ways to get {named}:")


def test_a_missing_chunk_file_beside_a_wrong_one_is_no_missing_file(toy: Toy) -> None:
    """To get what is missing would not do: each finding has its own help."""
    toy.chunk_file("b.bin", 1).unlink()
    flip(toy.chunk_file("b.bin", 0))
    error = refusal(toy, "b.bin")
    assert (error.message, error.advice) == ("toy: cannot be completed", "")
    assert [f.kind for f in error.findings] == [Kind.MISSING, Kind.WRONG_DIGEST]
    assert apply.status(replace(toy.request("b.bin"), source="chunks")).advice


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1])
def test_attributes_of_git_are_read_up_to_64_kib(toy: Toy, size: int) -> None:
    """A file without end is no reason to fail."""
    line = "chunks/** filter=lfs"
    (toy.root / ".gitattributes").write_text("#" * (size - len(line) - 1) + f"\n{line}")
    toy.chunk_file("b.bin", 1).unlink()
    command = "git lfs pull" if size == 1 << 16 else "git restore chunks/toy/b.bin"
    assert f"in a clone that has them, {command}" in refusal(toy, "b.bin").advice


@pytest.mark.parametrize(
    ("attributes", "command"),
    [
        ("b.bin.part-aa filter=lfs\n", "git lfs pull"),
        (None, "git restore chunks/toy/b.bin"),
        ("* text=auto\n*.md filter=lfs\n", "git restore chunks/toy/b.bin"),
        ("chunks/** filter=lfs diff=lfs merge=lfs -text\n", "git lfs pull"),
        ("*.part-* filter=lfs\n", "git lfs pull"),
    ],
)
def test_git_lfs_is_advised_where_it_keeps_the_files(
    toy: Toy, attributes: str | None, command: str
) -> None:
    """Chunk files that git itself holds are restored by git."""
    if attributes:
        (toy.root / ".gitattributes").write_text(attributes)
    toy.chunk_file("b.bin", 1).unlink()
    assert f"in a clone that has them, {command}" in refusal(toy, "b.bin").advice


def test_a_full_disk_does_not_advise_the_other_files(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room is no reason to leave out a file that is right."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", refuse)
    monkeypatch.setattr("os.copy_file_range", refuse)
    error = refusal(toy, "all")
    assert isinstance(error, NoSpace)
    assert error.advice == ""


def test_a_wrong_chunk_file_says_how_to_go_on_without_it(toy: Toy) -> None:
    """The other files, also those that are done, are named in the option that takes them."""
    artifacts = (replace(toy.artifact("a.bin"), format="safetensors"), *toy.manifest.artifacts[1:])
    toy.write_manifest(replace(toy.manifest, artifacts=artifacts))
    flip(toy.chunk_file("b.bin", 1))
    error = refusal(toy, "all")
    assert [finding.kind for finding in error.findings] == [Kind.WRONG_DIGEST]
    others = ",".join(a.path for a in artifacts if a.path != "b.bin")
    assert others.count(",") > 0
    assert error.advice == f"No file was installed. To install the others: --only={others}"


@pytest.mark.parametrize("task", ["weights", "fetch", "place", "smoke"])
def test_an_advised_command_has_only_options_of_its_task(toy: Toy, task: str) -> None:
    """What was given is part of the advice where the advised task has such an option."""
    request = replace(toy.request("a.bin", dest="models/there"), staging="output/there")
    command = begin(request).paths.command(task)
    advised = re.findall(r" --([a-z]+) (\S+)", command)
    given = {"model": "toy", "only": "a.bin", "dest": "models/there", "staging": "output/there"}
    known = inspect.signature(collection(toy.root)[task].body).parameters
    assert advised == [(name, value) for name, value in given.items() if name in known]


def test_status_gives_the_same_advice(toy: Toy) -> None:
    """What status advises is what the run that would fail does."""
    toy.chunk_file("b.bin", 1).unlink()
    report = apply.status(replace(toy.request("b.bin"), source="chunks"))
    assert report.advice == refusal(toy, "b.bin").advice
    assert apply.status(toy.request("a.bin")).advice == ""


def test_a_full_disk_offers_one_format_only_where_there_are_two(toy: Toy) -> None:
    """`--only` is advised with a format's name, and not for a single one."""
    for formats in (("safetensors", "torch-zip"), ("safetensors", "opaque")):
        first, second = (
            replace(toy.artifact(name), format=format_, size=1 << 49, pieces=(), sha256="0" * 64)
            for name, format_ in zip(("a.bin", "b.bin"), formats, strict=True)
        )
        toy.write_manifest(
            replace(toy.manifest, artifacts=(first, second), repo="o/t", revision="a" * 40)
        )
        with pytest.raises(NoSpace) as caught:
            apply.plan(toy.request("all"), Target.BOTH)
        help_text = caught.value.findings[0].help
        assert caught.value.advice == ""
        assert ("--only=a" in help_text) is (formats[1] == "torch-zip")
        assert help_text.startswith("free some disk, ")

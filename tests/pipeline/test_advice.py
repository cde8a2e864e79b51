"""Advice is about the files that are missing, with commands that fetch them and nothing more."""

from __future__ import annotations

import inspect
import re
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


@pytest.mark.parametrize(
    ("attributes", "command"),
    [
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
        assert ("--only=a" in help_text) is (formats[1] == "torch-zip")
        assert help_text.startswith("free some disk, ")

"""What is asked for: the model by its name or path, folders, sources, and words that are none."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import Kind, UsageError, WrongContent
from csm_weights.manifest.types import Artifact
from csm_weights.pipeline import request as request_module
from csm_weights.pipeline.request import Request, find_manifest, known_name, manifests
from csm_weights.pipeline.session import begin
from csm_weights.store import atomic
from csm_weights.transfer.policy import HUB, SourcePolicy
from tests.support.toy import Toy

MIRRORS = ("https://a.example/toy", "https://b.example/toy")

#: As a command line gives them: no two of them are one object.
WORDS = [word.lower() for word in ("AUTO", "CHUNKS", "HF", "MIRROR")]


@pytest.fixture
def shipped(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package's own manifests, with those of `own` and `toy`."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    text = (toy.root / "manifests" / "toy.toml").read_text()
    for name in ("toy", "own"):
        (folder / f"{name}.toml").write_text(text.replace('name = "toy"', f'name = "{name}"'))
    monkeypatch.setattr(request_module, "SHIPPED", folder)
    return folder


# ---- manifests


def test_a_checkouts_manifests_come_before_the_packages(toy: Toy, shipped: Path) -> None:
    """Of two with one name the checkout's counts; the package's others come after all of its."""
    (toy.root / "manifests" / "zz.toml").touch()
    own = toy.root / "manifests"
    assert manifests(toy.root) == [own / "toy.toml", own / "zz.toml", shipped / "own.toml"]
    assert find_manifest(toy.root, "toy").where == str(own / "toy.toml")
    assert find_manifest(toy.root, "own").where == str(shipped / "own.toml")


@pytest.mark.parametrize("given", ["here.toml", "below/here", "below/here.toml"])
def test_a_manifest_may_be_given_by_its_path(
    toy: Toy, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends in .toml, or has a slash, is a path from the current folder."""
    folder = toy.root / "elsewhere"
    (folder / "below").mkdir(parents=True)
    text = (toy.root / "manifests" / "toy.toml").read_text()
    (folder / given).write_text(text.replace('name = "toy"', 'name = "here"'))
    monkeypatch.chdir(folder)
    assert find_manifest(toy.root, given).name == "here"


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("toyy", "no model called 'toyy'; there are toy, own; did you mean toy?"),
        ("xxxxxxxxx", "no model called 'xxxxxxxxx'; there are toy, own, or give the path of a "
         "manifest (.toml)"),
        ("gone.toml", "no model called 'gone.toml'"),
        ("manifests/", "no model called 'manifests/'"),
        ("my model\n", "'my model\\n' is not a valid model name"),
        ("", "'' is not a valid model name"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_is_misuse(
    toy: Toy, model: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names those there are, and the nearest."""
    monkeypatch.chdir(toy.root)
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        find_manifest(toy.root, model)
    assert str(caught.value).startswith(words)
    assert known_name(toy.root, model) is None


def test_a_manifest_that_is_a_loop_of_links_is_not_called_absent(toy: Toy) -> None:
    """Its own error says what is wrong with it."""
    path = toy.root / "manifests" / "loop.toml"
    path.symlink_to(path)
    with pytest.raises(Exception, match=r"loop\.toml") as caught:
        find_manifest(toy.root, "loop")
    assert "no model called" not in str(caught.value)


@pytest.mark.usefixtures("shipped")
def test_a_manifest_may_not_take_the_name_of_another(toy: Toy) -> None:
    """A copy of it may, and a link to it; one that differs could replace the files."""
    own = toy.root / "manifests" / "toy.toml"
    copy, link = toy.root / "copy.toml", toy.root / "link.toml"
    shutil.copy(own, copy)
    link.symlink_to(own)
    assert find_manifest(toy.root, str(copy)).name == find_manifest(toy.root, str(link)).name
    for path, name in ((copy, "toy"), (toy.root / "other.toml", "own")):
        text = own.read_text().replace('name = "toy"', f'name = "{name}"')
        path.write_text(text.replace('destination = "models/toy"', 'destination = "models/it"'))
        with pytest.raises(UsageError, match=f"has the name of another manifest.*: '{name}'"):
            find_manifest(toy.root, str(path))


def test_a_name_is_known_where_its_manifest_holds(toy: Toy) -> None:
    """A report is not about a model that cannot be."""
    assert known_name(toy.root, "toy") == "toy"
    assert known_name(toy.root, "") is None
    (toy.root / "manifests" / "bad.toml").write_text("rubbish")
    assert known_name(toy.root, "bad") is None


# ---- words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "huggingface"}, "no source called 'huggingface'; there are auto, chunks, hf, "
         "mirror; did you mean hf?"),
        ({"source": "URL"}, "no source called 'URL'; there are auto, chunks, hf, mirror; did you "
         "mean mirror?"),
        ({"source": "mirrro"}, "no source called 'mirrro'; there are auto, chunks, hf, mirror; did "
         "you mean mirror?"),
        ({"source": WORDS[1], "urls": MIRRORS}, "--source=chunks does not use --url"),
        ({"source": WORDS[2], "urls": MIRRORS}, "--source=hf does not use --url"),
        ({"source": WORDS[1], "caches": ("/c",)}, "--source=chunks does not use --cache"),
        ({"source": WORDS[3]}, "--source=mirror needs --url"),
        ({"source": WORDS[2], "consume": True}, "--consume needs chunk files"),
        ({"source": WORDS[3], "urls": MIRRORS, "consume": True}, "--consume needs chunk files"),
        ({"urls": (MIRRORS[0], "ftp://b.example")}, "--url 'ftp://b.example' is not a URL with "
         "file:// or http:// or https://."),
        ({"revision": "a b"}, "--revision 'a b' is not a commit, branch or tag"),
        ({"revision": "a" * 202}, "is not a commit, branch or tag"),
    ],
)  # fmt: skip
def test_words_that_make_no_sense_are_misuse(options: dict[str, Any], words: str) -> None:
    """Each has its own message, which says what would do."""
    with pytest.raises(UsageError) as caught:
        Request(Path("/root"), **options)
    assert words in f"{caught.value}."


@pytest.mark.parametrize(
    "options",
    [
        {"source": WORDS[0], "urls": MIRRORS, "caches": ("/c",), "consume": True},
        {"source": WORDS[1], "consume": True},
        {"source": WORDS[2], "caches": ("/c",)},
        {"source": WORDS[3], "urls": MIRRORS, "caches": ("/c",)},
        {"revision": "refs/pr/1"},
        {"revision": "a" * 201},
    ],
)
def test_words_that_make_sense_are_taken(options: dict[str, Any]) -> None:
    """What is asked for is kept as it is."""
    request = Request(Path("/root"), **options)
    assert {name: getattr(request, name) for name in options} == options


def test_the_options_name_the_same_files_and_folders() -> None:
    """In words for a shell; the model that is meant without a word is left out."""
    default = b"csm-1b".decode()
    assert Request(Path("/root"), default).options == ()
    for model in ("a-model", "toy"):
        request = Request(Path("/root"), model, ("a.bin", "b"), "models/my model", "out")
        expected = (f"--model {model}", "--only a.bin,b", "--dest 'models/my model'")
        assert request.options == (*expected, "--staging out")


# ---- the run that it begins


POLICIES: dict[str, tuple[dict[str, Any], SourcePolicy]] = {
    "auto": ({}, SourcePolicy(remote=(HUB,))),
    "auto, mirrors": (
        {"urls": MIRRORS, "consume": True}, SourcePolicy(remote=(*MIRRORS, HUB), consume=True)
    ),
    "chunks": ({}, SourcePolicy(cache=False)),
    "hf": ({}, SourcePolicy(chunks=False, remote=(HUB,), remote_first=True)),
    "mirror": ({"urls": MIRRORS}, SourcePolicy(chunks=False, cache=False, remote=MIRRORS)),
}  # fmt: skip


@pytest.mark.parametrize("words", POLICIES)
def test_a_word_is_a_choice_of_sources(
    toy: Toy, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrors are asked before the Hub, in their order."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision="a" * 40))
    options, expected = POLICIES[words]
    request = replace(toy.request(), source=words.split(",")[0], **options)
    assert begin(request).policy == expected


def test_offline_no_server_is_asked_and_it_is_said_of_the_first(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is a source all the same; one that is not there is told with its help."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shelf = toy.root / "shelf"
    request = replace(toy.request(), urls=(shelf.as_uri(), *MIRRORS))
    policy = begin(request).policy
    assert (policy.remote, policy.shelves) == ((), True)
    assert [(f.kind, f.where, f.expected, f.found) for f in policy.problems] == [
        (Kind.MISSING, str(shelf), "a folder", "none"),
        (Kind.OFFLINE, MIRRORS[0], "permission to ask a mirror", "HF_HUB_OFFLINE is set"),
    ]
    shelf.mkdir()
    assert begin(replace(request, urls=(shelf.as_uri(),))).policy == SourcePolicy(shelves=True)


def test_the_hub_without_a_repository_is_misuse_where_it_is_named(toy: Toy) -> None:
    """A mirror or chunk files need none."""
    with pytest.raises(UsageError, match="names no repository of the Hub"):
        begin(replace(toy.request(), source=WORDS[2]))
    assert begin(replace(toy.request(), source=WORDS[3], urls=MIRRORS)).policy.remote == MIRRORS
    assert begin(replace(toy.request(), source=WORDS[1])).policy.remote == ()


@pytest.mark.parametrize(
    ("staging", "read_only", "expected"),
    [
        (None, (), "output/toy"),
        (None, ("output/toy",), "models/toy/.csm-weights/staging"),
        (None, ("output/toy", "models/toy/.csm-weights/staging"), "output/toy"),
        ("output/mine", ("output/mine",), "output/mine"),
    ],
)
def test_a_checkout_that_is_only_read_has_its_staging_beside_the_installed_files(
    toy: Toy,
    monkeypatch: pytest.MonkeyPatch,
    staging: str | None,
    read_only: tuple[str, ...],
    expected: str,
) -> None:
    """What was staged before becomes a source; a folder that was named stays."""
    folders = {toy.root / name for name in read_only}
    monkeypatch.setattr(atomic, "why_read_only", lambda folder: "why" * (folder in folders))
    paths = begin(replace(toy.request(), staging=staging)).paths
    assert paths.staging == toy.root / expected
    assert paths.shelves == ((toy.root / "output/toy",) if "staging" in expected else ())


def test_twenty_names_that_cannot_be_installed_are_told(toy: Toy) -> None:
    """Twenty-one of them would tell no more."""
    files = [Artifact(f"{n}.bin", "all", "opaque", 1, "0" * 64) for n in range(22)]
    toy.write_manifest(replace(toy.manifest, artifacts=tuple(files)))
    for count in (19, 22):
        with pytest.raises(WrongContent, match="a model cannot be installed there") as caught:
            begin(toy.request(*(f.path for f in files[:count]), dest="mine"))
        assert len(caught.value.findings) == min(count, 20)

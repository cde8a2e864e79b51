"""Hostile manifests, as a user meets them: refused with exit 4, soon, in little memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.errors import ManifestInvalid, UsageError, WrongContent
from csm_weights.manifest import parse as manifests
from csm_weights.manifest.parse import parse
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from tests.e2e.test_hostile_files import watched
from tests.support import hostile
from tests.support.clone import Clone
from tests.support.toy import Toy
from tools.fuzz import probe


def test_hostile_manifests_are_refused_in_bounds(tmp_path: Path) -> None:
    """Every one is refused by `status --check` with its reason, and writes nothing anywhere."""
    names = {f"n{index}": name for index, name in enumerate(hostile.BAD_MANIFESTS)}
    (tmp_path / "manifests").mkdir()
    for key, name in names.items():
        hostile.written(tmp_path / "manifests", hostile.BAD_MANIFESTS[name][0], f"{key}.toml")
    (tmp_path / "jobs.json").write_text(json.dumps(list(names)))
    found = watched(tmp_path, "status")
    results = {names[result["name"]]: result for result in found["results"]}
    assert results.keys() == hostile.BAD_MANIFESTS.keys()
    assert [name for name, r in results.items() if r["code"] != 4] == []
    reasons = {name: why for name, (_, why) in hostile.BAD_MANIFESTS.items()}
    assert [name for name, r in results.items() if reasons[name] not in r["text"]] == []
    assert [name for name, r in results.items() if len(r["text"]) > 50_000] == []
    assert [name for name, r in results.items() if r["seconds"] > probe.SECONDS] == []
    assert found["grown"] < probe.MEMORY
    assert {path.name for path in tmp_path.iterdir()} == {"manifests", "jobs.json"}


@pytest.mark.parametrize("name", ["path_climbs_out", "pieces_by_the_million", "size_2_to_the_63"])
@pytest.mark.parametrize("command", ["status", "verify", "weights"])
def test_inv_refuses_with_exit_4(name: str, command: str, clone: Clone, tmp_path: Path) -> None:
    """Each command that reads a hostile manifest ends with code 4 and says why."""
    content, reason = hostile.BAD_MANIFESTS[name]
    path = hostile.written(tmp_path, content, "bad.toml")
    done = clone.inv(command, "--model", str(path))
    assert (done.returncode, reason in done.stderr) == (4, True), done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A checkout that these tests may write to."""
    return Clone.make(tmp_path_factory.mktemp("clone") / "root")


def test_the_least_manifest_passes_the_same_way() -> None:
    """What the bad ones are made from is accepted."""
    assert parse(hostile.manifest(), "bad.toml").name == "bad"


@pytest.mark.parametrize("to", ["models/bad", "output/bad"])
def test_code_of_a_model_may_lie_among_the_models(to: str) -> None:
    """Repositories of the Hub have Python files; where nothing imports them they do no harm."""
    assert parse(hostile.manifest("modeling.py", to=to + "2"), "bad.toml").artifacts


def test_the_largest_manifest_that_is_made_here_is_read() -> None:
    """As many pieces as `inv lock` gives at most, and thousands of files, are within bounds."""
    pieces = [hostile.piece(i, 1, f"chunks/{i:064}") for i in range(10_000)]
    assert parse(hostile.manifest(size=10_000, more=f"pieces = [{', '.join(pieces)}]"), "bad.toml")
    assert (
        len(parse(hostile.files(*(f"f{i}" for i in range(5_000))), "bad.toml").artifacts) == 5_000
    )


def test_many_broken_rules_are_counted() -> None:
    """Beyond fifty the broken rules are counted, so that no message is megabytes long."""
    with pytest.raises(ManifestInvalid) as caught:
        parse(b"[[artifact]]\n" * 9_000, "bad.toml")
    assert len(caught.value.findings) == manifests.MAX_FINDINGS + 1
    assert caught.value.findings[-1].found.endswith("more findings")


# ---- links on the way to the destination


def _with_folder(root: Path) -> Toy:
    """A toy whose a.bin goes into a folder `sub` of the destination."""
    toy = Toy.make(root)
    text = render(toy.manifest).replace('path = "a.bin"', 'path = "sub/a.bin"', 1)
    (root / "manifests" / "toy.toml").write_text(text)
    toy.manifest = manifests.load(root / "manifests" / "toy.toml")
    return toy


@pytest.mark.parametrize("where", ["models/toy", "output/toy"])
def test_a_folder_that_leads_out_is_refused(where: str, tmp_path: Path) -> None:
    """A link planted inside the destination or staging folder takes no byte elsewhere."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    toy = _with_folder(root)
    (root / where).mkdir(parents=True)
    (root / where / "sub").symlink_to(outside)
    with pytest.raises(WrongContent) as caught:
        apply.weights(toy.request("sub/a.bin"), smoke=False)
    assert caught.value.exit_code == 4
    assert "a link that leads to" in str(caught.value)
    assert list(outside.iterdir()) == []


def test_a_link_in_place_of_a_receipt_is_replaced(tmp_path: Path) -> None:
    """The receipt is a file of its own, and the target of the link is left alone."""
    toy, link = _with_link_among_receipts(tmp_path, "sub/a.bin.json")
    link.resolve().write_text("precious")
    apply.weights(toy.request("sub/a.bin"), smoke=False)
    assert not link.is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_link_in_place_of_a_folder_of_receipts_is_refused(tmp_path: Path) -> None:
    """No receipt is written through the link; the run ends with 4 and names it."""
    toy, link = _with_link_among_receipts(tmp_path, "sub")
    (tmp_path / "precious").mkdir()
    with pytest.raises(WrongContent) as caught:
        apply.weights(toy.request("sub/a.bin"), smoke=False)
    assert [finding.where for finding in caught.value.findings] == [str(link)]
    assert list((tmp_path / "precious").iterdir()) == []


def _with_link_among_receipts(tmp_path: Path, name: str) -> tuple[Toy, Path]:
    """A toy, and a link of that name among its receipts that leads out, to `precious`."""
    root = tmp_path / "root"
    root.mkdir()
    toy = _with_folder(root)
    link = root / "models" / "toy" / ".csm-weights" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "precious")
    return toy, link


# ---- manifests that take the place of another model's


def _installed_toy(root: Path) -> tuple[Toy, Path]:
    """A toy whose b.bin is installed, and a manifest elsewhere, with other bytes for it."""
    root.mkdir()
    toy, other = Toy.make(root), root.parent / "sent.toml"
    apply.weights(toy.request("b.bin"), smoke=False)
    b = toy.artifact("b.bin")
    evil = Artifact("b.bin", b.group, b.format, 4, sha256=hashlib.sha256(b"evil").hexdigest())
    other.write_text(render(replace(toy.manifest, artifacts=(evil,))))
    staged = toy.staged("b.bin")
    staged.parent.mkdir(parents=True, exist_ok=True)
    staged.write_bytes(b"evil")
    return toy, other


@pytest.mark.parametrize("is_known", [False, True])
def test_a_manifest_with_the_name_of_another_is_refused(is_known: bool, tmp_path: Path) -> None:
    """It ends with 2 and names both, whether it is sent or lies in manifests/."""
    toy, other = _installed_toy(tmp_path / "root")
    if is_known:
        other = other.rename(toy.root / "manifests" / "sent.toml")
    with pytest.raises(UsageError, match=r"sent\.toml has the name of .*toy\.toml: 'toy'"):
        apply.weights(Request(toy.root, "sent" if is_known else str(other)), smoke=False)
    assert toy.installed("b.bin").read_bytes() == toy.good("b.bin")


def test_a_manifest_that_ships_keeps_its_name(tmp_path: Path) -> None:
    """Also where the folder that is worked in has no manifests, as with the installed package."""
    other = tmp_path / "sent.toml"
    other.write_bytes(hostile.manifest().replace(b'"bad"', b'"csm-1b"', 1))
    with pytest.raises(UsageError, match=r"has the name of .*csm-1b\.toml"):
        apply.status(Request(tmp_path, str(other)))


def test_a_copy_of_a_manifest_is_that_manifest(tmp_path: Path) -> None:
    """A manifest may be named by any path, as long as nothing in it differs."""
    toy, other = _installed_toy(tmp_path / "root")
    other.write_text(render(toy.manifest))
    assert apply.status(Request(toy.root, str(other), ("b.bin",))).plan.is_done


# ---- properties


_WORDS = st.sampled_from(["a", "b.c", "..", ".git", "\u0301", "\u200c", "\x1b[2J", "x" * 300, ""])


@settings(deadline=None, max_examples=200)
@given(st.lists(_WORDS, min_size=1, max_size=6).map("/".join) | st.text(max_size=20))
def test_an_accepted_path_is_safe_to_join_and_to_print(path: str) -> None:
    """Whatever is accepted stays inside, names no hidden thing, and drives no terminal."""
    if not path_problem(path):
        parts = Path(path).parts
        assert "/".join(parts) == path
        assert not {".", "..", ".git"} & {part.lower() for part in parts}
        assert not any(c in path for c in "\x1b\u200c\u202e\x9b\n")


_VALUES = st.recursive(
    st.integers() | st.text(max_size=6) | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
_LINES = hostile.manifest().decode().splitlines()


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(_LINES) - 1), _VALUES)
def test_any_value_for_any_key_is_read_or_refused(index: int, value: Any) -> None:
    """A line of a good manifest with any other value gives a manifest or ManifestInvalid."""
    lines = list(_LINES)
    lines[index] = f"{lines[index].partition('=')[0]}= {_toml(value)}"
    try:
        read = parse("\n".join(lines).encode(), "bad.toml")
    except ManifestInvalid as error:
        assert error.findings
    else:
        assert isinstance(read, Manifest)


_SOUP = st.sampled_from(
    ["a", ".", "=", "[", "]", "[[", "]]", "{", "}", '"', "'", '"""', "'''", "\\", "\n", "#", " "]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(_SOUP, max_size=40).map("".join))
def test_any_soup_of_marks_is_refused(text: str) -> None:
    """Whatever quotes and brackets a text has, it is refused as no manifest and nothing else."""
    with pytest.raises(ManifestInvalid):
        parse(text.encode(), "bad.toml")

"""The place of a repository's manifest, by the repository's name or by words of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from csm_weights.errors import UsageError
from csm_weights.pipeline.repo_manifest import path_of

ROOT = Path("/root")


@pytest.mark.parametrize(
    ("repo", "model", "path"),
    [
        ("Acme/Any_Model.v2", "", ROOT / "manifests/any_model.v2.toml"),
        ("a/b", "mine", ROOT / "manifests/mine.toml"),
        ("a/b", "mine.toml", Path("mine.toml")),
        ("a/b", "there/mine.toml", Path("there/mine.toml")),
        ("a/b-._", "", ROOT / "manifests/b.toml"),
        (f"a/{'b' * 64}c", "", ROOT / f"manifests/{'b' * 64}.toml"),
        (f"{'a' * 96}/{'b' * 96}", "m", ROOT / "manifests/m.toml"),
    ],
)
def test_a_manifest_has_the_name_of_the_repository_or_a_given_one(
    repo: str, model: str, path: Path
) -> None:
    """In manifests/, unless what is given is a path."""
    assert path_of(ROOT, repo, "refs/pr/1", model) == path_of(ROOT, repo, model=model) == path


@pytest.mark.parametrize(
    ("repo", "revision", "model", "words"),
    [
        ("b", "", "", "--repo 'b' is not ORG/NAME"),
        (f"a/{'b' * 97}", "", "", "is not ORG/NAME"),
        ("a/b", "x y", "", "--revision 'x y' is not a commit, branch or tag"),
        ("a/b", "", "there/mine", "--model 'there/mine': the path of a manifest ends in .toml"),
        ("a/b", "", "My Model", "--model 'My Model': a model's name has lowercase letters"),
        ("a/b", "", "there/My.toml", "--model 'My': a model's name has lowercase letters"),
        ("a/b", "", "mine.lock", "--model 'mine.lock': a name kept for unfinished files"),
    ],
)
def test_what_can_be_no_name_is_misuse(repo: str, revision: str, model: str, words: str) -> None:
    """The error begins with the option."""
    with pytest.raises(UsageError) as caught:
        path_of(ROOT, repo, revision, model)
    assert words in str(caught.value)

"""`inv lock` as a person calls it, from a repository's name to a repair by piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from csm_weights.manifest.parse import load
from tests.commands.test_lock import FILES, NAME, ONE, REPO, TOKEN, entry, hub
from tests.support.clone import Clone
from tests.support.hub import HubServer
from tests.support.toy import flip

__all__ = ["hub"]


def test_a_gated_repository_from_its_name_to_a_repair_by_piece(
    hub: HubServer, tmp_path: Path
) -> None:
    """Locked, fetched, verified, locked again with pieces; then one bad byte costs one piece."""
    commit = hub.add_repo(REPO, FILES, gated=True)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    clone = Clone.make(tmp_path / "clone")
    clone.variables.update(variables)
    model, placed = ("--model", NAME), clone.root / "models" / NAME
    locked = clone.inv("lock", "--repo", REPO)
    assert locked.returncode == 0, locked.stderr
    assert {r.path.split("?")[0] for r in hub.log} == {
        f"/api/models/{REPO}",
        f"/api/models/{REPO}/tree/{commit}",
    }
    assert len(hub.requests(contains="/tree/")) > 2
    assert load(clone.root / "manifests" / f"{NAME}.toml").gated
    fetched = clone.inv("weights", *model)
    assert fetched.returncode == 0, fetched.stderr
    assert "OK: installed and verified" in fetched.stdout
    assert "no smoke test for this model" in fetched.stderr
    assert {name: (placed / name).read_bytes() for name in FILES} == FILES
    before, asked = clone.tree(), len(hub.log)
    assert clone.inv("weights", *model, "--no-smoke").returncode == 0
    assert clone.inv("verify", *model).returncode == 0
    pieces = clone.inv("lock", *model, "--size", "100000")
    assert (pieces.returncode, len(hub.log)) == (0, asked), pieces.stderr
    again = clone.inv("lock", *model, "--size", "100000")
    assert "nothing to add, it has every digest" in again.stdout
    known = f"manifests/{NAME}.toml"
    after = clone.tree()
    assert {name for name in before | after if before.get(name) != after.get(name)} == {known}
    assert len(entry(clone.root, ONE).pieces) == 4
    assert clone.inv("status", *model, "--check").returncode == 0
    flip(placed / ONE, 250_000)
    hub.clear()
    repaired = clone.inv("weights", *model, "--no-smoke")
    assert repaired.returncode == 0, repaired.stderr
    assert [r.range for r in hub.requests(host="storage")] == ["bytes=200000-299999"]
    assert (placed / ONE).read_bytes() == FILES[ONE]
    smoke = clone.inv("smoke", *model)
    assert (smoke.returncode, "there is no smoke test" in smoke.stderr) == (2, True)
    said = [r.stdout + r.stderr for r in (locked, fetched, pieces, again, repaired, smoke)]
    assert TOKEN not in "".join(said) + (clone.root / known).read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--revision", "main"),
        ("--repo", REPO, "--size", "1MiB"),
        ("--repo", REPO, "--dest", "elsewhere"),
        ("--repo", "datasets/acme/data"),
        ("--repo", REPO, "--model", "../x"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    """What does not go together is told, with exit code 2, before anything is asked."""
    clone = Clone.make(tmp_path / "clone")
    clone.variables.update({"HF_ENDPOINT": "http://127.0.0.1:9"})
    result = clone.inv("lock", *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --"), result.stderr

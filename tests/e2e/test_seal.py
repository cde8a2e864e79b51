"""`--seal` as a person gives it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.clone import Clone
from tests.verify.test_seal import mode


def test_the_commands_seal(tmp_path: Path) -> None:
    """`inv place`, `inv fetch --dest` and `inv weights` take --seal; fetch alone does not."""
    clone = Clone.make(tmp_path / "clone")
    tiny = ("--model", "csm-tiny", "--only", "safetensors")
    refused = clone.inv("fetch", *tiny, "--seal")
    assert (refused.returncode, "--dest" in refused.stderr) == (2, True)
    assert clone.inv("fetch", *tiny).returncode == 0
    for command in (("place", *tiny), ("fetch", *tiny, "--dest", "models/elsewhere")):
        done = clone.inv(*command, "--seal", "--json")
        assert (done.returncode, len(json.loads(done.stdout)["sealed"])) == (0, 2)
    for folder in ("models/csm-tiny", "models/elsewhere"):
        assert mode(clone.root / folder / "model.safetensors") == 0o444
    again = clone.inv("weights", *tiny, "--no-smoke", "--seal")
    assert (again.returncode, "read-only" in again.stdout) == (0, True)
    assert "inv smoke --model csm-tiny --only safetensors\n" in again.stdout

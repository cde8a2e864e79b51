"""`inv attest`, and `inv verify --attestation`, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.clone import Clone


def test_the_commands_attest_and_verify(tmp_path: Path) -> None:
    """`inv attest` signs, `inv verify` checks, and a wrong key ends with exit code 4."""
    clone = Clone.make(tmp_path / "clone")
    tiny = ("--model", "csm-tiny")
    clone.inv("weights", *tiny, "--no-smoke")
    made = clone.inv("attest", *tiny, "--new-key", "key", "--out", "a.json", "--json")
    assert (made.returncode, json.loads(made.stdout)["scheme"]) == (0, "ed25519")
    good = clone.inv("verify", *tiny, "--attestation", "a.json", "--key", "key.pub", "--json")
    signer = json.loads(good.stdout)["attested"]["signer"]
    assert (good.returncode, signer["scheme"]) == (0, "ed25519")
    clone.inv("attest", *tiny, "--new-key", "other", "--out", "b.json")
    bad = clone.inv("verify", *tiny, "--attestation", "a.json", "--key", "other.pub")
    assert (bad.returncode, "not signed by this key" in bad.stderr) == (4, True)
    alone = clone.inv("verify", *tiny, "--key", "key.pub")
    assert alone.returncode == 2

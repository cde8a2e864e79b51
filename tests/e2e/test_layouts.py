"""`inv smoke` and programs on a model that was converted, as a person would go about it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from csm_weights import api
from tests.support.clone import Clone
from tests.support.networks import TINY_CONFIG


@pytest.mark.parametrize("shards", [(), ("--shard-size", "200KB")])
def test_a_model_in_the_layout_of_transformers_is_smoke_tested(
    tmp_path: Path, shards: tuple[str, ...]
) -> None:
    """In bfloat16, whole or in shards: verified, smoke-tested, and loaded by its receipts."""
    clone = Clone.make(tmp_path / "clone")
    weights = clone.root / "chunks" / "csm-tiny" / "safetensors"
    (weights / "config.json").write_text(json.dumps(TINY_CONFIG))
    theirs = ("--to", "transformers", "--dtype", "bfloat16", *shards)
    files = ("--path", str(weights), "--out", "models/theirs", "--manifest", "theirs")
    assert clone.inv("convert", *files, *theirs).returncode == 0

    done = clone.inv("smoke", "--model", "theirs", "--frames", "2")
    assert (done.returncode, "smoke test passed" in done.stdout) == (0, True), done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = api.Model.from_local(clone.root / "models" / "theirs", dtype=None)
    assert model.verified
    assert model.projection.weight.dtype == torch.bfloat16

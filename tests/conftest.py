"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.toy import Toy

# Several test processes share the cores; torch would start a thread a core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh toy repository."""
    return Toy.make(tmp_path)

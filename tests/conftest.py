"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh toy repository."""
    return Toy.make(tmp_path)

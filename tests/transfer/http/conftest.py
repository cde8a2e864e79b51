"""Fixtures that the tests of HTTP share."""

from __future__ import annotations

import pytest

from tests.support.network import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on which time passes only while a client waits."""
    return Clock(monkeypatch)

"""Fixtures that many tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.prefork import skip_syncs
from tests.support.toy import Toy

skip_syncs()

# Several test processes share the cores; torch would start a thread a core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Where the tests run on GitHub, what they run is not to write to the page of that job.
for name in [name for name in os.environ if name.startswith("GITHUB_")]:
    del os.environ[name]

# A suite that was started by nohup or with `&` ignores SIGINT, and so would every program
# that a test starts and interrupts: an ignored signal is inherited, a handled one is not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """Run two workers on each core: many tests wait for the disk, servers and other processes."""
    return 2 * (os.cpu_count() or 1)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh toy repository."""
    return Toy.make(tmp_path)

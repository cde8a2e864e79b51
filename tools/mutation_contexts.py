"""A plugin of pytest for `tools.mutation`: record which test runs which line of the package.

Coverage is started in every Python process by COVERAGE_PROCESS_START. In the process of the tests
the lines are recorded under the test's id. A program that a test starts records them under
PYTEST_CURRENT_TEST, which the configuration names as its context.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

_PASSED_ON = ("COVERAGE_PROCESS_START", "PYTEST_CURRENT_TEST")
_start = subprocess.Popen.__init__


def _start_recorded(self: Any, *args: Any, **options: Any) -> None:
    if options.get("env") is not None:
        recorded = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        options["env"] = {**recorded, **options["env"]}
    _start(self, *args, **options)


def pytest_configure() -> None:
    """Record also the programs to which a test gives an environment of their own."""
    subprocess.Popen.__init__ = _start_recorded  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Record the lines of a test under its id."""
    if current := coverage.Coverage.current():
        current.switch_context(item.nodeid)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how long a test took that passed."""
    if report.when == "call" and report.passed:
        with Path(os.environ["COVERAGE_PROCESS_START"]).with_name("seconds").open("a") as file:
            file.write(f"{report.duration} {report.nodeid}\n")


def pytest_sessionfinish() -> None:
    """Save what was recorded, also in a worker, which ends without clean-up."""
    if current := coverage.Coverage.current():
        current.stop()
        current.save()

"""A fleet of real nodes on loopback, in one process: what is right at the end, and the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from csm_weights.fleet.job import Status
from csm_weights.pipeline import apply
from tests.support.fleet import Fleet
from tests.support.servers import serving
from tests.support.toy import Toy


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the nodes' folders: outside the checkout."""
    return tmp_path_factory.mktemp("fleet")


def give(toy: Toy, folder: Path) -> None:
    """Install the toy model in a folder, as a first holder has it."""
    assert apply.weights(toy.request("all", dest=str(folder)), smoke=False).error is None


def assert_right(toy: Toy, folder: Path) -> None:
    """Check the bytes of all files in a folder, and that a status trusts their receipts."""
    for artifact in toy.manifest.artifacts:
        assert (folder / artifact.path).read_bytes() == toy.good(artifact.path)
    report = apply.status(toy.request("all", dest=str(folder)))
    assert report.plan.is_verified


def test_one_holder_serves_all(toy: Toy, base: Path) -> None:
    """Three nodes get every file from the one that has them."""
    fleet = Fleet(base, toy.manifest, 4)
    give(toy, fleet.folder(0))
    reports = fleet.run()
    for node, report in reports.items():
        assert report.status is Status.VERIFIED, report
        assert_right(toy, fleet.folder(node))
        size = sum(a.size for a in fleet.job.layout.artifacts)
        assert report.from_disk + report.from_nodes == size
        assert {result.ok for result in report.gates} <= {True, None}


def test_what_nobody_has_is_fetched_once(toy: Toy, base: Path) -> None:
    """Empty nodes fetch each byte from the mirror once, all together."""
    with serving(toy.root, ranges=True) as mirror:
        fleet = Fleet(
            base, toy.manifest, 3, remote=(mirror.url,), source="mirror", urls=(mirror.url,)
        )
        reports = fleet.run()
    assert [r.status for r in reports.values()] == [Status.VERIFIED] * 3, reports
    for node in reports:
        assert_right(toy, fleet.folder(node))
    size = sum(a.size for a in fleet.job.layout.artifacts)
    assert sum(r.from_origin for r in reports.values()) == size

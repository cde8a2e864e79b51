"""Options about networks: what they take, and that they reach the transfers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from csm_weights.commands.task import make_request
from csm_weights.errors import UsageError
from csm_weights.pipeline import apply
from csm_weights.transfer.http import lines
from tests.support.servers import serving
from tests.support.toy import Toy


@pytest.mark.parametrize(
    ("text", "rate"),
    [("20M", 20 << 20), ("500k", 500 << 10), ("1G", 1 << 30), ("2048", 2048), ("1.5M", 3 << 19)],
)
def test_a_limit_has_the_units_of_curl(text: str, rate: float) -> None:
    """K is 1024 bytes a second, in either case."""
    assert make_request(Path(), limit_rate=text).limit_rate == rate


@pytest.mark.parametrize("text", ["0", "20", "-1M", "fast", "1T", "M", "1M M", "nan", "1e9"])
def test_other_limits_are_misuse(text: str) -> None:
    """What is no rate, or next to nothing, is refused with what is expected."""
    with pytest.raises(UsageError, match="20M"):
        make_request(Path(), limit_rate=text)


def test_without_a_limit_there_is_none() -> None:
    """An empty option is none."""
    assert make_request(Path(), limit_rate="").limit_rate is None


def test_the_lines_of_a_run_have_its_limit(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One limit is for all files together."""
    limits: list[float | None] = []

    class Watched(lines.Lines):
        def __init__(self, limit: float | None = None) -> None:
            limits.append(limit)
            super().__init__(limit)

    monkeypatch.setattr(lines, "Lines", Watched)
    shutil.rmtree(toy.root / "chunks")
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(toy.good(name))
    with serving(tmp_path, ranges=True) as server:
        options = {"model": "toy", "only": "a.bin,b.bin", "source": "mirror", "url": [server.url]}
        done = apply.weights(make_request(toy.root, **options, limit_rate="100M"), smoke=False)
    assert done.error is None
    assert limits == [100 << 20]

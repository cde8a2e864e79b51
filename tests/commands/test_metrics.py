"""The figures of a run for Prometheus: read back by its own parser, kept over failures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from invoke.program import Program

from csm_weights.commands.cli import collection
from csm_weights.commands.render import metrics
from csm_weights.commands.render.verdict import Ended
from csm_weights.errors import MissingInput
from tests.support.servers import serving
from tests.support.toy import Toy

Figures = dict[tuple[str, str], float]

LABELS = {"command", "model"}


def parsed(text: str) -> Figures:
    """Every sample, by its name and its source; each has the labels of all."""
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    found: Figures = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.type == "gauge" and family.documentation
        for sample in family.samples:
            assert sample.labels.keys() - {"source"} == LABELS
            name = sample.name.removeprefix("csm_weights_")
            found[name, sample.labels.get("source", "")] = sample.value
    return found


def run(root: Path, *words: str) -> str:
    """The figures of a task."""
    path = root / "run.prom"
    with pytest.raises(SystemExit):
        Program(namespace=collection(root)).run(["inv", *words, f"--metrics={path}"])
        raise SystemExit(0)
    return path.read_text()


def test_the_figures_of_a_run_are_written(toy: Toy, tmp_path: Path) -> None:
    """Bytes by source, seconds, verified files, exit code, and when it was."""
    (tmp_path / "a.bin").write_bytes(toy.good("a.bin"))
    shutil.rmtree(toy.root / "chunks" / "toy" / "a.bin")
    with serving(tmp_path, ranges=True) as server:
        options = ("--only=a.bin,b.bin", f"--url={server.url}")
        text = run(toy.root, "weights", "--no-smoke", "--model=toy", *options)
    host = server.url.removeprefix("http://")
    labels = 'command="weights",model="toy"'
    assert f'csm_weights_source_bytes{{{labels},source="{host}"}} ' in text
    figures = parsed(text)
    assert figures["source_bytes", host] == toy.artifact("a.bin").size
    assert figures["source_bytes", "chunk"] == toy.artifact("b.bin").size
    assert figures["verified_files", ""] == 2
    assert figures["exit_code", ""] == 0
    assert 0 < figures["duration_seconds", ""] < 600
    assert (
        abs(figures["last_success_timestamp_seconds", ""] - (toy.root / "run.prom").stat().st_mtime)
        < 5
    )
    assert (toy.root / "run.prom").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in toy.root.glob("run.prom*")] == ["run.prom"]


def test_a_run_with_nothing_to_do_takes_no_bytes(toy: Toy) -> None:
    """The bytes are those of the last run alone."""
    run(toy.root, "weights", "--no-smoke", "--model=toy", "--only=b.bin")
    text = run(toy.root, "weights", "--no-smoke", "--model=toy", "--only=b.bin")
    assert "source=" not in text
    assert parsed(text)["verified_files", ""] == 1


def test_a_failure_keeps_the_time_of_the_last_success(toy: Toy) -> None:
    """An alert can ask how long ago that was."""
    options = ("verify", "--model=toy", "--only=b.bin")
    run(toy.root, "weights", "--no-smoke", "--model=toy", "--only=b.bin")
    before = parsed((toy.root / "run.prom").read_text())
    toy.installed("b.bin").unlink()
    after = parsed(run(toy.root, *options))
    key = ("last_success_timestamp_seconds", "")
    assert after[key] == before[key]
    assert (after["exit_code", ""], after["verified_files", ""]) == (3, 0)


def test_without_a_success_there_is_no_time_of_one() -> None:
    """Nothing is made up, also where the file that was there is another one."""
    ended = Ended("weights", "toy", MissingInput("not here"), 1.0)
    figures = parsed(metrics.render(ended, {}, "csm_weights_last_success no such thing\n", 1e9))
    assert ("last_success_timestamp_seconds", "") not in figures
    assert figures["exit_code", ""] == 3


def test_a_hostile_name_ends_no_label() -> None:
    """Quotes, backslashes and line ends stay inside of it."""
    hostile = 'a"b\\c\nd{} # EOF'
    ended = Ended("weights", hostile, None, 1.0)
    text = metrics.render(ended, {hostile: 5}, "", 1e9)
    assert text.splitlines()[-1] == "# EOF" and text.count("\n# EOF") == 1
    assert parsed(text)["source_bytes", hostile] == 5


def test_a_name_that_is_no_text_is_escaped(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte of the command line that is not UTF-8 is written as an escape: exit code 2."""
    text = run(toy.root, "verify", "--model=a\udcff")
    assert parsed(text)["exit_code", ""] == 2
    assert r'model="a\\udcff"' in text
    assert "not a valid model name" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that has its name is named."""
    with pytest.raises(SystemExit) as ended:
        words = ["inv", "status", "--model=toy", f"--metrics={toy.root}"]
        Program(namespace=collection(toy.root)).run(words)
    assert ended.value.code == 7
    assert f"--metrics {toy.root}" in " ".join(capsys.readouterr().err.split())

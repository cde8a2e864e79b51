"""Progress as JSON: every line on stderr is an object of the schema, and the last is the result."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from invoke.program import Program

from csm_weights import progress
from csm_weights.commands.cli import collection
from csm_weights.progress import WORTH_SHOWING, JsonLines, Progress
from tests.support.clone import REPOSITORY
from tests.support.schema import checked
from tests.support.toy import Toy, flip


def run(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The objects that a task prints on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        Program(namespace=collection(root)).run(["inv", *words, "--progress=json"])
        raise SystemExit(0)
    lines = [checked(line, "progress-v1") for line in capsys.readouterr().err.splitlines()]
    assert lines[-1]["event"] == "result"
    assert lines[-1]["exit_code"] == (ended.value.code or 0)
    assert progress.listeners == [] and not Progress.is_quiet
    return lines


def test_the_bytes_of_a_run_are_told(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    """Each work begins, and ends with all its bytes, however small it is."""
    lines = run(toy.root, capsys, "weights", "--no-smoke", "--model=toy", "--only=a.bin")
    works = {line["work"]: line for line in lines if line["event"] == "begin"}
    ends = {line["work"]: line for line in lines if line["event"] == "end"}
    assert works.keys() == ends.keys()
    size = toy.artifact("a.bin").size
    assert {"label": "assembling a.bin", "done": size, "total": size}.items() <= next(
        end for end in ends.values() if end["label"] == "assembling a.bin"
    ).items()
    assert lines[0]["label"] == lines[-1]["command"] == "weights"
    assert lines[-1]["ok"] and lines[-1]["message"] == ""


def test_a_failure_is_the_last_line(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    """Its findings are there as they are with --json; the work that failed says so."""
    flip(toy.chunk_file("b.bin", 1))
    lines = run(toy.root, capsys, "fetch", "--model=toy", "--only=b.bin")
    assert lines[-1]["exit_code"] == 4
    assert [finding["kind"] for finding in lines[-1]["findings"]] == ["wrong digest"]
    assert "failed" in {line["event"] for line in lines}


@pytest.mark.parametrize(
    "words", [["status"], ["verify"], ["clean"], ["place"], ["fetch", "--dry"]]
)
def test_other_tasks_tell_of_theirs(
    toy: Toy, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """With bars or without, in success and failure."""
    lines = run(toy.root, capsys, *words, "--model=toy")
    assert lines[-1]["command"] == words[0]


def test_every_task_has_the_option() -> None:
    """None of them would print anything else on stderr."""
    for name, task in collection(Path()).tasks.items():
        assert "progress" in {argument.name for argument in task.get_arguments()}, name


def test_another_word_is_misuse(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused with the words there are, for a person."""
    with pytest.raises(SystemExit) as ended:
        Program(namespace=collection(toy.root)).run(["inv", "status", "--progress=jason"])
    assert ended.value.code == 2
    assert "did you mean json?" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_there_are_no_bars_and_no_lines_beside_it() -> None:
    """Work that is worth showing is shown as JSON alone, and so is what is logged."""
    stderr = Terminal()
    with JsonLines("weights", stderr), Progress("hashing", 2 * WORTH_SHOWING, stderr) as shown:
        shown.advance(WORTH_SHOWING)
        shown.log("a host gives nothing")
    lines = [checked(line, "progress-v1") for line in stderr.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["begin", "log", "end"]
    assert lines[1]["message"] == "a host gives nothing"
    assert lines[1]["done"] == WORTH_SHOWING


def test_lines_of_many_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is an object of its own."""
    stderr = io.StringIO()
    monkeypatch.setattr(progress, "EVENT_SECONDS", 0.0)
    with JsonLines("weights", stderr), Progress("hashing", 1 << 30) as shown:
        threads = [threading.Thread(target=shown.advance, args=(1,)) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [checked(line, "progress-v1") for line in stderr.getvalue().splitlines()]
    assert max(line["done"] for line in lines) == 50
    assert len(lines) == 52


class Told(io.StringIO):
    """A stream that says when a work has gone on."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        if '"event": "progress"' in text:
            self.goes_on.set()
        return super().write(text)


def test_work_that_stands_still_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader can tell a stall from an end of the process."""
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    stderr = Told()
    with JsonLines("weights", stderr), Progress("waiting", 0):
        assert stderr.goes_on.wait(30)


def test_a_closed_stderr_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without stderr there are no lines, and no error."""
    monkeypatch.setattr("sys.stderr", None)
    with JsonLines("weights") as lines, Progress("hashing", 10) as shown:
        shown.advance(10)
        lines.end(None)


def test_the_example_of_the_page_is_of_the_schema() -> None:
    """What docs/networks.md shows is what is printed."""
    block = (REPOSITORY / "docs" / "networks.md").read_text().split("```json\n")[1].split("```")[0]
    events = [checked(line, "progress-v1")["event"] for line in block.splitlines()]
    assert events == ["begin", "progress", "end", "result"]

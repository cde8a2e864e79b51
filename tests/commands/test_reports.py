"""Results for others than a person at a terminal: JUnit, a verdict, GitHub's pages."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from invoke.program import Program

from csm_weights.commands import console, verify
from csm_weights.commands.cli import collection
from csm_weights.commands.render import github, junit, verdict
from csm_weights.commands.render.verdict import Ended
from csm_weights.errors import Finding, Interrupted, Kind, MissingInput, WrongContent, printable
from csm_weights.model.smoke_report import Check
from csm_weights.pipeline import apply
from csm_weights.pipeline.session import Outcome
from csm_weights.verify.gates import Gate, GateResult
from tests.commands.test_render import BAD, SMOKE
from tests.support.clone import REPOSITORY
from tests.support.toy import Toy, flip

ROOT = Path("/srv")
NASTY = "50%,\r\n::error::x: | `a` <b> *c* _d_ $e$ \x1b]0;t\x07"


@pytest.fixture
def done(toy: Toy) -> Ended:
    """A toy model that was fetched and installed just now."""
    return Ended("weights", "toy", apply.weights(toy.request(), smoke=False), 1.25)


@pytest.fixture
def damaged(toy: Toy) -> Ended:
    """That model, verified after a byte of it was changed."""
    apply.weights(toy.request(), smoke=False)
    flip(toy.installed("a.bin"))
    return Ended("verify", "toy", verify.verify(toy.request()), 0.5)


def refused(*findings: Finding, message: str = "not here") -> Ended:
    return Ended("fetch", "toy", MissingInput(message, findings), 2.0)


def finding(where: str) -> Finding:
    return Finding(Kind.MISSING, where, NASTY, NASTY, NASTY)


def cases(ended: Ended) -> dict[str, ElementTree.Element]:
    """The tests of a report by their names, which must add up to its counts."""
    root = ElementTree.fromstring(junit.render(ended))
    [suite] = root
    found = {f"{case.get('classname')} {case.get('name')}": case for case in suite}
    for word, attribute in (("failure", "failures"), ("skipped", "skipped")):
        number = sum(case.find(word) is not None for case in suite)
        assert suite.get(attribute) == root.get(attribute) == str(number)
    assert suite.get("tests") == str(len(found)) == str(len(suite))
    return found


# ---- JUnit


def test_each_gate_of_each_file_is_a_test(done: Ended) -> None:
    """A verified model has a passed test for each gate of each file, and one for the task."""
    found = cases(done)
    pairs = itertools.product(("a.bin", "b.bin", "note.txt"), ("present", "size", "digest"))
    assert found.keys() == {f"toy.{file} {gate}" for file, gate in pairs} | {"weights weights toy"}
    assert [len(case) for case in found.values()] == [0] * 10
    assert found["weights weights toy"].get("time") == "1.250"


def test_a_gate_that_was_not_run_is_skipped(done: Ended) -> None:
    """A gate that had nothing to read neither passed nor failed."""
    assert isinstance(done.result, Outcome)
    result = GateResult(Gate.STRUCTURE, "a.bin", None, "a header", "not read")
    found = cases(replace(done, result=replace(done.result, results=(result,))))
    assert found["toy.a.bin structure"].find("skipped") is not None


def test_a_damaged_file_fails_its_test(damaged: Ended) -> None:
    """Only the gate that failed and the task fail, with what was expected and found."""
    failed = {
        name: case for name, case in cases(damaged).items() if case.find("failure") is not None
    }
    assert failed.keys() == {"toy.a.bin digest", "verify verify toy"}
    failure = failed["toy.a.bin digest"].find("failure")
    assert failure is not None and failure.text is not None
    assert "a.bin bytes 0 to 70,000: wrong digest: expected sha256 " in failure.text


def test_the_checks_of_a_smoke_test_are_tests(done: Ended) -> None:
    """Each check of a smoke test is there, with its limit where it failed."""
    assert isinstance(done.result, Outcome)
    smoke = replace(
        SMOKE, checks=(Check("finite", "1", "all", True), Check("rtf", "9", "8", False))
    )
    found = cases(replace(done, result=replace(done.result, smoke=smoke)))
    assert found["toy.smoke finite"].find("failure") is None
    failure = found["toy.smoke rtf"].find("failure")
    assert failure is not None and failure.get("message") == "found 9, limit 8"


@pytest.mark.parametrize("bad", [*BAD, "\ufffe", "]]>", "<&\"'"])
def test_any_name_makes_well_formed_xml(bad: str) -> None:
    """Whatever a name or a server's answer holds, the file can be parsed, and names it."""
    ended = replace(refused(finding(f"a{bad}b"), message=bad), model=bad)
    [case] = cases(ended).values()
    failure = case.find("failure")
    assert failure is not None and printable(f"a{bad}b") in str(failure.text)
    assert verdict.render(ended).isprintable()


# ---- the verdict


def test_a_verdict_is_one_line(done: Ended, damaged: Ended) -> None:
    """It says what is verified, or the exit code and the first finding."""
    assert verdict.render(done) == "OK: installed and verified: toy, 3 files, 522.8 KiB"
    line = verdict.render(damaged)
    assert line.startswith("NOT OK: verify toy: exit code 4: verification failed; /")
    assert "a.bin bytes 0 to 70,000: wrong digest" in line
    many = verdict.render(refused(*(finding(NASTY * 99) for _ in range(3))))
    assert (len(many), many.isprintable(), many.endswith(" ...")) == (1000, True, True)
    few = verdict.render(refused(*(Finding.missing(name, 1) for name in "abc")))
    assert few.endswith("a: missing: expected 1 bytes, found no such file; and 2 more findings")
    stopped = verdict.render(Ended("fetch", "toy", Interrupted("interrupted"), 1.0))
    assert stopped == "NOT OK: fetch toy: exit code 130: interrupted"
    assert verdict.render(Ended("status", "toy", "a report", 1.0)) == "OK: status toy"


# ---- GitHub Actions


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as GitHub's runner reads it: kind, properties, message."""
    assert line.isprintable()
    found = re.fullmatch(r"::(\w+) ([^:]*)::(.*)", line)
    assert found is not None
    pairs = (pair.split("=", 1) for pair in found[2].split(","))
    return found[1], {name: unquote(value) for name, value in pairs}, unquote(found[3])


def test_a_finding_is_an_annotation() -> None:
    """Each is an error at its file, named from the checkout; a URL is no file."""
    inside, other, url = "/srv/models/a.bin bytes 0 to 70,000", "/mnt/a,b:c%", "https://hub/org/m"
    lines = github.annotate(refused(*map(Finding.missing, (inside, other, url), (1, 2, 3))), ROOT)
    read = [parsed(line) for line in lines]
    assert [kind for kind, _, _ in read] == ["error"] * 3
    assert [one.get("file") for _, one, _ in read] == ["models/a.bin", other, None]
    assert read[1][1]["title"] == f"missing: {other}"
    assert read[2][2] == f"{url}: missing: expected 3 bytes, found no such file"


@pytest.mark.parametrize("text", [NASTY, *BAD])
def test_an_annotation_stays_one_command(text: str) -> None:
    """Nothing in a finding ends it, begins another, or becomes a property."""
    [line] = github.annotate(refused(finding(text)), None)
    kind, properties, message = parsed(line)
    assert (kind, properties["file"]) == ("error", printable(text))
    assert message == finding(text).line()
    [line] = github.annotate(refused(message=text), None)
    assert parsed(line) == ("error", {"title": "fetch toy"}, printable(text))


def test_repaired_things_are_notices_and_few_are_shown(done: Ended) -> None:
    """What was mended is no error; of each kind there are as many as GitHub shows."""
    assert isinstance(done.result, Outcome)
    notes = tuple(Finding.missing(f"a{number}", 1) for number in range(30))
    error = WrongContent("wrong", notes)
    lines = github.annotate(
        replace(done, result=replace(done.result, notes=notes, error=error)), None
    )
    assert [parsed(line)[0] for line in lines] == ["error"] * 10 + ["notice"] * 10


def rows(text: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_a_summary_has_files_gates_and_seconds(toy: Toy, done: Ended) -> None:
    """It begins with the verdict; each file has its bytes, where it came from, and its digest."""
    text = github.summary(done)
    assert text.startswith("### OK: installed and verified: toy, 3 files, 522.8 KiB\n\n")
    assert "`weights toy` took 1.2 s." in text
    for path in ("a.bin", "note.txt"):
        data = toy.installed(path).read_bytes()
        [row] = [row for row in rows(text) if row[0] == path]
        assert row[1:3] == [f"{len(data):,}", "verified"]
        assert re.fullmatch("`[0-9a-f]{64}`", row[4])
    assert "5 chunk files" in text
    assert ["OK", "digest", "3 of 3 files"] in rows(text)


def test_a_summary_of_a_failure_has_its_findings(damaged: Ended) -> None:
    """The verdict has the exit code; what was expected and found is in a table."""
    text = github.summary(damaged)
    assert text.startswith("### NOT OK: verify toy: exit code 4: verification failed\n")
    assert ["NOT OK", "digest", "2 of 3 files"] in rows(text)
    [row] = [row for row in rows(text) if row[0] == "wrong digest"]
    assert row[1].endswith("a.bin bytes 0 to 70,000") and len(row) == 5


def test_a_summary_shows_words_as_they_are() -> None:
    """Markdown and HTML in a name are shown and not obeyed; a long table is cut."""
    text = github.summary(refused(finding(NASTY), message=NASTY))
    for mark in ("`a`", "<b>", "*c*", "_d_", "$e$", "\r"):
        assert mark not in text
    assert len(rows(text)[-1]) == 5
    many = github.summary(refused(*(finding(str(number)) for number in range(999))))
    assert len(rows(many)) == 202 and many.endswith("\n\nand 799 more\n\n")
    long = github.summary(refused(*[finding("ö_" * 2_000)] * 150))
    assert len(long.encode()) < 1 << 20 and re.search(r"\n\nand 1\d\d more\n\n$", long)


def test_there_is_no_summary_without_an_outcome() -> None:
    """A report that only shows something leaves the page of the job as it is."""
    assert github.summary(Ended("status", "toy", "a report", 1.0)) == ""


# ---- in a task


def test_a_task_writes_what_it_was_asked_for(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --junit and --verdict; on GitHub also annotations on stderr, and a summary."""
    summary, pod = tmp_path / "summary.md", tmp_path / "termination-log"
    summary.write_text("before\n")
    pod.write_text("an older and much longer message\n" * 9)
    inode = pod.stat().st_ino
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(toy.root))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    toy.chunk_file("a.bin", 0).unlink()
    program = Program(namespace=collection(toy.root), name="csm-weights", version="1")
    options = [f"--junit={tmp_path / 'j.xml'}", f"--verdict={pod}", "--json"]
    with pytest.raises(SystemExit) as caught:
        program.run(["csm-weights", "fetch", "--model=toy", "--only=a.bin", *options])
    assert caught.value.code == 3
    out, err = capsys.readouterr()
    assert out.startswith("{") and "::error" not in out
    assert f"file=chunks/toy/a.bin/{toy.chunk_file('a.bin', 0).name}::" in err.splitlines()[0]
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "1"
    assert pod.read_text().startswith("NOT OK: fetch toy: exit code 3: toy: not all files are here")
    assert (pod.read_text().count("\n"), pod.stat().st_ino) == (1, inode)
    assert summary.read_text().startswith("before\n### NOT OK: fetch toy: exit code 3")


def test_a_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 7, or that of what went wrong before; the other file is written."""
    files = {"junit": str(tmp_path / "none" / "j.xml"), "verdict": str(tmp_path / "v")}
    assert console.run(lambda: "done", command="status", files=files) == 7
    out, err = capsys.readouterr()
    assert (out.strip(), (tmp_path / "v").read_text()) == ("done", "OK: status\n")
    assert "--junit" in err and "No such file or directory" in err

    def fail() -> object:
        raise MissingInput("not here")

    assert console.run(fail, command="status", files=files) == 3


def test_the_commands_are_those_that_a_person_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages in files name the program that was typed, as those on the screen do."""
    monkeypatch.setenv(console.TYPED, "csm-weights")

    def fail() -> object:
        raise MissingInput("x", [Finding.missing("a", 1, "inv fetch --model toy")])

    console.run(fail, command="status", files={"verdict": str(tmp_path / "v")})
    assert (tmp_path / "v").read_text().endswith(" -> csm-weights fetch --model toy\n")


@pytest.mark.parametrize(
    "task", ["weights", "status", "fetch", "place", "verify", "smoke", "doctor"]
)
def test_tasks_of_a_model_have_both_options(task: str) -> None:
    """Each task about a model's files can write its result to files."""
    names = {name for one in collection(REPOSITORY)[task].get_arguments() for name in one.names}
    assert {"junit", "verdict"} <= names

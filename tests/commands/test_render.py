"""Results in words and in JSON: aligned, clean, and with nothing left out."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from typing import Any

import pytest

from csm_weights.commands import verify
from csm_weights.commands.cli import collection
from csm_weights.commands.render import blocks
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.commands.render.blocks import SHORT, WIDTH, table
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    NoSpace,
    WrongContent,
    columns,
    printable,
)
from csm_weights.model.smoke_report import Check, Figures, SmokeReport
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.session import Outcome
from csm_weights.progress import format_size
from csm_weights.verify.gates import Gate, GateResult
from tests.support.clone import REPOSITORY
from tests.support.schema import checked
from tests.support.toy import Toy, flip

ESCAPE = "\x1b[2J\x1b]0;title\x07"

FIGURES = Figures(
    machine="a GPU",
    driver="1.2",
    torch="2.0",
    dtype="bfloat16",
    loaded_bytes=5_000_000_000,
    bus_rate=40e9,
    frame_bytes=6_000_000_000,
    memory_rate=90e9,
    peak_host=1_500_000_000,
    peak_device=3_000_000_000,
)
SMOKE = SmokeReport(
    device="cpu",
    checks=(Check("finite", "1.0", "all", True), Check("cache", "0.5", "at most 0.1", False)),
    frames_per_second=1.5,
    real_time_factor=8.0,
    load_seconds=0.25,
    figures=FIGURES,
    bound_to=(("model.safetensors", "1" * 64),),
    made_at="2025-01-01T00:00:00+00:00",
)


@pytest.fixture
def outcome(toy: Toy) -> Outcome:
    """The outcome of `weights` in a toy repository that had nothing installed."""
    return apply.weights(toy.request(), smoke=False)


def is_clean(text: str) -> bool:
    """Whether a terminal would show the text and do nothing else."""
    return all(c.isprintable() or c == "\n" for c in text)


# ---- tables


def test_a_table_is_aligned() -> None:
    """Each column starts at the same place in every line, as wide as its widest word."""
    text = table(("file", "bytes"), [("a", "1"), ("longer name", "22")])
    assert text == "file         bytes\na            1\nlonger name  22"


def test_any_table_is_aligned() -> None:
    """Whatever the words, they can be read back by the columns' paths."""
    rng = random.Random("table")
    for _ in range(50):
        width = rng.randint(1, 5)
        words = ["".join(rng.choices(string.ascii_letters, k=rng.randint(1, 9))) for _ in range(99)]
        rows = [words[i * width : (i + 1) * width] for i in range(5)]
        lines = table(rows[0], rows[1:]).split("\n")
        starts = [0]
        for i in range(width - 1):
            starts.append(starts[-1] + max(len(row[i]) for row in rows) + 2)
        ends = [*starts[1:], None]
        read = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]
        assert read == rows


def test_a_table_has_no_trailing_space() -> None:
    """Lines end with their last word."""
    text = table(("a", ""), [("long word", ""), ("x", "y")])
    assert [line for line in text.split("\n") if line != line.rstrip()] == []


def test_the_last_column_is_wrapped_at_eighty_columns() -> None:
    """Words of the last column go on below where they begin; no line is longer than 80."""
    lines = table(("file", "next"), [("a", "many words " * 20), ("b", "one")]).split("\n")
    assert max(map(len, lines)) <= WIDTH
    assert {line[:6] for line in lines[2:-1]} == {" " * 6}
    assert lines[-1] == "b     one"


@pytest.mark.parametrize(
    "name", ["\u30e2\u30c7\u30eb.bin", "\U0001f600.bin", "e\u0301t\u00e9.bin", "\uac00"]
)
def test_a_table_is_aligned_whatever_the_letters(name: str) -> None:
    """Wide letters take two columns and accents none, as terminals show them."""
    head, *rows = table(("file", "size"), [(name, "1 B"), ("a", "2 B")]).split("\n")
    places = [columns(line[: line.index(word)]) for line, word in ((rows[0], "1"), (rows[1], "2"))]
    assert places == [head.index("size")] * 2


def test_wide_letters_are_wrapped_by_the_columns_they_take() -> None:
    """No line of wide words is wider than the screen."""
    lines = table(("file", "next"), [("a", "\u30e2\u30c7\u30eb " * 40)]).split("\n")
    assert WIDTH - 8 < max(map(columns, lines)) <= WIDTH


def test_a_table_of_nothing_is_its_head() -> None:
    """No rows leave the head."""
    assert table(("a", "b"), []) == "a  b"


# ---- what a file name may hold


BAD = [ESCAPE, "\x9b2J", "\r", "\n", "\x08", "\x7f", "\u202e", "\u2028", "\udc80", "\0"]
BAD += ["\u200b", "\u2060", "\ufeff", "\u3164", "\u2800", "\ufe0f", "\U000e0101", "\xad"]


@pytest.mark.parametrize("bad", BAD)
def test_control_characters_are_cleaned(bad: str) -> None:
    """No control character, line end, bidirectional mark or broken byte is left in a word."""
    cleaned = printable(f"a{bad}b")
    assert is_clean(cleaned)
    assert (cleaned[0], cleaned[-1], cleaned.count("\n")) == ("a", "b", 0)
    assert cleaned == f"a{bad}b".encode("unicode_escape").decode()


@pytest.mark.parametrize("text", ["plain", "été", "日本語", "→ ok"])
def test_what_can_be_shown_is_kept(text: str) -> None:
    """Letters of any language stay as they are."""
    assert printable(text) == text


def refusal(toy: Toy) -> CsmWeightsError:
    """The error of a run that cannot go on."""
    with pytest.raises(CsmWeightsError) as caught:
        apply.weights(toy.request(), smoke=False)
    return caught.value


def test_a_hostile_chunk_file_name_cannot_drive_the_terminal(toy: Toy) -> None:
    """An escape sequence in the name of a file that is found is cleaned in every text."""
    toy.chunk_file("a.bin", 0).with_name(f"a.bin.part-{ESCAPE}").touch()
    report = apply.status(toy.request())
    assert "unexpected chunk file" in as_text.render(report)
    assert is_clean(as_text.render(report))
    assert is_clean(str(refusal(toy)))


def test_a_line_end_in_a_chunk_file_name_cannot_forge_a_line(toy: Toy) -> None:
    """A file name with a line end does not make a line of its own in any text."""
    forged = "OK: in place and proven"
    toy.chunk_file("a.bin", 0).with_name(f"a.bin.part-\n{forged}").touch()
    report = as_text.render(apply.status(toy.request()))
    error = str(refusal(toy))
    lines = [*report.split("\n"), *error.split("\n")]
    assert [line for line in lines if line.startswith(forged)] == []


def test_a_hostile_destination_cannot_drive_the_terminal(toy: Toy) -> None:
    """What a person, or a script, gave as --dest is cleaned too."""
    report = apply.status(toy.request(dest=f"models/there{ESCAPE}"))
    assert is_clean(as_text.render(report))
    state = replace(report.state)
    assert is_clean(as_text.render(Outcome(state)))


def test_a_hostile_finding_in_an_outcome_is_cleaned(outcome: Outcome) -> None:
    """Findings, notes and gate results of an outcome are cleaned."""
    bad = Finding(Kind.WRONG_SIZE, f"where{ESCAPE}", f"one{ESCAPE}", f"two{ESCAPE}", ESCAPE)
    result = GateResult(Gate.SIZE, f"a{ESCAPE}", False, "x", f"found{ESCAPE}", (bad,))
    error = WrongContent(f"message{ESCAPE}", [bad])
    hostile = replace(outcome, notes=(bad,), results=(result,), error=error)
    assert is_clean(as_text.render(hostile))


# ---- outcomes in words


def test_an_outcome_shows_files_gates_and_verdict(toy: Toy, outcome: Outcome) -> None:
    """Every file has a line with the start of its digest; the end is the verdict, and where."""
    text = as_text.render(outcome)
    for artifact in toy.manifest.artifacts:
        assert any(line.endswith(artifact.path) for line in text.split("\n"))
    digest = toy.artifact("a.bin").sha256 or ""
    assert digest[:SHORT] in text
    assert "assemble from 5 chunk files, then install" in text
    assert text.split("\n")[-2:] == [
        "OK: installed and verified",
        f"  files  {outcome.state.paths.destination}",
    ]


def test_a_fetch_says_what_places_the_files(toy: Toy) -> None:
    """Files that are only staged are shown with their folder and the command that installs them."""
    text = as_text.render(apply.apply(toy.request(), Target.STAGED))
    assert text.split("\n")[-3:] == [
        "OK: verified",
        f"  files  {toy.root / 'output' / 'toy'}",
        "  next   inv place --model toy",
    ]


def test_a_failed_outcome_says_what_is_wrong(toy: Toy) -> None:
    """The gate that fails is in the text, and the finding once, in that of its error."""
    apply.weights(toy.request(), smoke=False)
    flip(toy.installed("a.bin"))
    failed = verify.verify(toy.request())
    text = as_text.render(failed)
    assert failed.error is not None
    assert [line.split() for line in text.split("\n") if "digest " in line] == [
        ["NOT", "OK", "digest", "2", "of", "3", "files"]
    ]
    assert "OK:" not in text
    error = blocks.error(failed.error)
    assert error.startswith("error: verification failed\n  wrong digest: ")
    assert [line.split()[0] for line in error.split("\n")[2:]] == [
        "expected",
        toy.artifact("a.bin").pieces[0].sha256,
        "found",
        error.split("\n")[5].strip(),
        "help",
    ]


def test_a_gate_that_did_not_run_is_not_ok(outcome: Outcome) -> None:
    """`not run` is its own verdict: neither OK nor NOT OK."""
    results = (GateResult(Gate.STRUCTURE, "a", None, "x", "not run: no config"),)
    text = as_text.render(replace(outcome, results=results))
    line = next(line for line in text.split("\n") if "structure" in line)
    assert line.split() == ["not", "run", "structure", "0", "of", "1", "file"]


def test_a_status_shows_steps_and_bytes(toy: Toy) -> None:
    """The plan has a line for each file and piece, and the sums of bytes."""
    report = apply.status(toy.request())
    text = as_text.render(report)
    reads = sum(step.cost.read for step in report.plan.actions)
    writes = sum(step.cost.written for step in report.plan.actions)
    assert f"{format_size(reads)} to read, {format_size(writes)} to write" in text
    assert all(piece.part in text for piece in toy.artifact("a.bin").pieces)
    assert "assemble from 5 chunk files, then install" in text


def test_a_status_says_why_a_chunk_file_is_of_no_use(toy: Toy) -> None:
    """A missing chunk file is named where its bytes would come from."""
    toy.chunk_file("a.bin", 2).unlink()
    text = as_text.render(apply.status(toy.request()))
    assert f"nowhere: {toy.artifact('a.bin').pieces[2].part}: missing" in text
    assert "no source has it" in text


def test_a_status_says_how_to_get_what_is_missing(toy: Toy) -> None:
    """With nothing here, the ways to get the files are in the text and in the JSON."""
    for piece in toy.artifact("a.bin").pieces:
        (toy.root / piece.part).unlink()
    report = apply.status(toy.request("a.bin"))
    assert "output/toy/a.bin" in report.advice
    first, *_, last = report.advice.split("\n")
    text = as_text.render(report)
    assert first in text and text.endswith(last)
    assert checked(as_json.render(report, "status"))["advice"] == report.advice


def test_a_status_says_what_an_earlier_run_verified(toy: Toy) -> None:
    """Pieces that an earlier run verified are shown as kept, those in a row together."""
    flip(toy.chunk_file("a.bin", 2))
    refusal(toy)
    text = as_text.render(apply.status(toy.request()))
    assert text.count("the unfinished file, verified in an earlier run") == 3


def test_the_smoke_test_has_its_limits_and_verdicts(outcome: Outcome) -> None:
    """Each check has what was found, the limit, and OK or NOT OK."""
    text = as_text.render(replace(outcome, smoke=SMOKE))
    assert "OK       finite: 1.0; limit all\n" in text
    assert "NOT OK   cache: 0.5; limit at most 0.1\n" in text
    slow = replace(SMOKE, frames_per_second=0.25, real_time_factor=1250.0)
    text = as_text.render(replace(outcome, smoke=slow))
    assert "4,000 ms for 80 ms" in text and "real-time factor 1,250" in text
    assert SMOKE.ok is False


def test_a_smoke_report_of_an_earlier_run_says_so(outcome: Outcome) -> None:
    """A report of an earlier run is shown with its time, and not in full."""
    text = as_text.render(replace(outcome, smoke=SMOKE, smoke_is_known=True))
    assert "smoke test on cpu: passed in an earlier run, of 2025-01-01T00:00:00+00:00" in text
    assert "finite" not in text


def test_reports_are_pure(toy: Toy, outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    """Making a report prints nothing and changes no file."""
    capsys.readouterr()
    before = [(p, p.stat().st_mtime_ns) for p in sorted(toy.root.rglob("*"))]
    as_text.render(outcome)
    as_json.render(outcome)
    as_text.render(apply.status(toy.request()))
    assert capsys.readouterr() == ("", "")
    assert [(p, p.stat().st_mtime_ns) for p in sorted(toy.root.rglob("*"))] == before


# ---- JSON


def test_every_gate_says_what_it_expected_and_found(toy: Toy, outcome: Outcome) -> None:
    """The JSON of an outcome has a result for each gate and file, with both words."""
    data = checked(as_json.render(outcome, "verify"))
    places = {(gate["gate"], gate["path"]) for gate in data["gates"]}
    gates = ("present", "size", "digest")
    assert places == {(g, a.path) for g in gates for a in toy.manifest.artifacts}
    assert all(gate["expected"] and gate["found"] for gate in data["gates"])
    assert (data["ok"], data["exit_code"], data["findings"]) == (True, 0, [])


def test_a_failed_outcome_has_its_code_and_findings(toy: Toy) -> None:
    """The JSON of a failed check has the exit code and every field of each finding."""
    apply.weights(toy.request(), smoke=False)
    flip(toy.installed("a.bin"))
    failed = verify.verify(toy.request())
    data = checked(as_json.render(failed, "verify"))
    assert (data["ok"], data["exit_code"]) == (False, 4)
    assert failed.error is not None
    (finding,) = failed.error.findings
    assert data["findings"] == [{**vars(finding), "kind": "wrong digest"}]
    assert [g["gate"] for g in data["gates"] if g["ok"] is False] == ["digest"]


def test_every_task_has_json_and_a_schema_of_it() -> None:
    """Each task takes --json, and the schema names the commands of all and no others."""
    tasks = list(collection(REPOSITORY).tasks.values())
    assert [one.name for one in tasks if "json" not in one.argspec(one.body).parameters] == []
    schema = json.loads((REPOSITORY / "docs" / "json-schema" / "v1.json").read_text())
    known = {
        name
        for one in schema["$defs"].values()
        for name in one.get("properties", {}).get("command", {}).get("enum", ())
    }
    assert known == {one.name for one in tasks} | {"standin"}


def test_json_has_whole_digests_and_receipts(toy: Toy, outcome: Outcome) -> None:
    """What the table shortens, the JSON has in full, with where each piece came from."""
    data = checked(as_json.render(outcome, "verify"))
    entry = next(file for file in data["files"] if file["path"] == "a.bin")
    assert entry["receipt"]["sha256"] == toy.artifact("a.bin").sha256
    sources = [piece["source"] for piece in entry["receipt"]["pieces"]]
    assert sources == [piece.part for piece in toy.artifact("a.bin").pieces]
    assert (entry["state"], entry["file"]) == ("verified", str(toy.installed("a.bin")))


def test_json_of_a_status_adds_up(toy: Toy) -> None:
    """Steps, bytes and pieces of `status --json` are those of the plan."""
    report = apply.status(toy.request())
    data = checked(as_json.render(report, "status"))
    assert data["bytes_to_read"] == sum(step["reads"] for step in data["steps"])
    assert data["bytes_to_write"] == sum(step["writes"] for step in data["steps"])
    assert data["bytes_free"] == report.state.free_staging
    assert [len(a["pieces"]) for a in data["artifacts"]] == [5, 3, 0]
    assert (data["ok"], data["exit_code"]) == (False, 0)


def test_json_of_a_checked_status_has_its_exit_code(toy: Toy) -> None:
    """`status --check --json` has exit code 3 while a file is missing, 0 when all are verified."""
    toy.chunk_file("a.bin", 0).unlink()
    missing = apply.status(toy.request("a.bin"), check=True)
    assert checked(as_json.render(missing, "status"))["exit_code"] == 3
    apply.weights(toy.request("b.bin"), smoke=False)
    done = checked(as_json.render(apply.status(toy.request("b.bin"), check=True), "status"))
    assert (done["ok"], done["exit_code"]) == (True, 0)


def test_json_of_a_smoke_report_is_whole(outcome: Outcome) -> None:
    """The smoke report is in the JSON with its numbers."""
    data = checked(as_json.render(replace(outcome, smoke=SMOKE), "verify"))["smoke"]
    assert (data["device"], data["load_seconds"]) == ("cpu", 0.25)
    assert [check["ok"] for check in data["checks"]] == [True, False]
    assert [check["value"] for check in data["checks"]] == [1.0, 0.5]
    assert [check["limit"] for check in data["checks"]] == ["all", 0.1]
    assert data["earlier"] is False


FINDING = Finding(Kind.NO_SPACE, "a/\udc80\x1b", "10 bytes", "9", "free some disk")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MissingInput("none", [], "get it"), 3),
        (WrongContent("wrong", [FINDING, FINDING]), 4),
        (NoSpace("full", [FINDING]), 7),
    ],
)
def test_an_error_is_a_result_too(error: CsmWeightsError, code: int) -> None:
    """`--json` has an object also when a command fails, with code, message, findings, advice."""
    data = checked(as_json.render(error, "verify"))
    assert (data["ok"], data["exit_code"]) == (False, code)
    assert (data["message"], data["advice"]) == (error.message, error.advice)
    assert [set(f) for f in data["findings"]] == [set(vars(FINDING))] * len(error.findings)


SHARED = ["schema", "command", "model", "ok", "exit_code", "message", "findings", "notes", "advice"]


def test_every_result_begins_with_the_same_keys(toy: Toy, outcome: Outcome) -> None:
    """The version of the schema, the command and the verdict are first, whatever the result."""
    results = [
        (outcome, "weights"),
        (apply.status(toy.request()), "status"),
        (NoSpace("a"), "lock"),
    ]
    for result, command in results:
        data = checked(as_json.render(result, command))
        assert list(data)[: len(SHARED)] == SHARED
        assert (data["schema"], data["command"]) == (1, command)


def test_the_schema_refuses_what_is_not_in_it(outcome: Outcome) -> None:
    """A key too many, or one of another type, is found by the schema that these tests use."""
    data = json.loads(as_json.render(outcome, "weights"))
    wrongs: list[dict[str, Any]] = [{"more": 1}, {"exit_code": "0"}, {"steps": [{}]}, {"schema": 2}]
    for wrong in wrongs:
        with pytest.raises(AssertionError, match=r"\$"):
            checked(json.dumps(data | wrong))


def test_an_error_in_words_has_every_finding_and_the_help() -> None:
    """Python's text of an error has a line for each finding, with the way out at its end."""
    text = str(WrongContent("wrong", [replace(FINDING, where="a")], "the advice"))
    assert text.split("\n") == [
        "wrong",
        "  a: no space: expected 10 bytes, found 9 -> free some disk",
        "the advice",
    ]


def test_an_error_on_the_screen_is_blocks_of_eighty_columns() -> None:
    """A finding has a line each for what, expected, found and help; a command is not cut."""
    finding = replace(FINDING, where="a", help="word " * 20 + "inv weights --model toy --dest x")
    text = blocks.error(WrongContent("wrong", [finding], "  1. " + "advice " * 20))
    assert text.split("\n") == [
        "error: wrong",
        "  no space: a",
        "    expected  10 bytes",
        "    found     9",
        "    help      word word word word word word word word word word word word word",
        "              word word word word word word word",
        "              inv weights --model toy --dest x",
        "",
        "  1. advice advice advice advice advice advice advice advice advice advice",
        "     advice advice advice advice advice advice advice advice advice advice",
    ]

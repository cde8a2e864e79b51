"""What a task does to its streams, and what it takes from a terminal: signals, limits, colours."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke.program import Program

from csm_weights.commands import console
from csm_weights.commands.cli import collection
from csm_weights.commands.task import task
from csm_weights.errors import CsmWeightsError, Finding, Kind, MissingInput, NoSpace
from tests.support.clone import INV, REPOSITORY

ERROR = MissingInput("not here", [Finding.missing("a.bin", 10, "inv fetch --model toy")], "advice")


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


def test_a_result_is_shown_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """What a call returns is printed, and the exit code is 0."""
    assert console.run(lambda: "done", as_json=False) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_an_error_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """An error is told once, on stderr, and stdout stays empty."""
    assert console.run(raising(ERROR), as_json=False) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: not here\n  missing: a.bin\n    expected  10 bytes\n    found     no such file\n"
        "    help      inv fetch --model toy\n\nadvice\n"
    )


def test_an_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With JSON asked for, stdout has the error as an object and stderr its words."""
    assert console.run(raising(ERROR), as_json=True) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 3
    assert err.startswith("error: not here")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, "Input/output error", "file"), 4, "Input/output error"),
        (KeyboardInterrupt(), 130, "what was verified is kept"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("can't start new thread"), 1, "out of memory"),
    ],
)
def test_what_the_system_raises_is_an_error(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of the operating system, interrupts and a lack of memory end in a sentence."""
    assert console.run(raising(error), as_json=False) == code
    assert words in capsys.readouterr().err


def test_a_bug_is_a_traceback() -> None:
    """What nobody foresaw is not hidden."""
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: 1 // 0, as_json=False)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "painted"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)],
)
def test_verdicts_have_colour_on_a_terminal(
    variables: dict[str, str], painted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OK is green and an error red on a terminal, and nothing is where NO_COLOR says so."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    console.run(lambda: "OK       size\nOKAY\nOK: done", as_json=False)
    console.run(raising(CsmWeightsError("no")), as_json=False)
    assert ("\x1b[32mOK\x1b[0m: done" in out.getvalue()) is painted
    assert (err.getvalue() == "\x1b[31merror\x1b[0m: no\n") is painted
    assert "\nOKAY\n" in out.getvalue()
    assert ("\x1b" in out.getvalue() + err.getvalue()) is painted


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("inv weights --model a --source=hf, then", "make weights MODEL=a SOURCE=hf, then"),
        ("inv weights --model a --no-smoke could", "make weights MODEL=a SMOKE=no could"),
        ("inv lock --repo a/b && inv verify", ".venv/bin/inv lock --repo a/b && make verify"),
        ("leave --consume out, or --dest", "leave CONSUME=1 out, or DEST"),
        ("--source=mirror needs --url=https://x", "SOURCE=mirror needs URL=https://x"),
        ("a --model-like word and --other", "a --model-like word and --other"),
        ("wrote my--out.bin in inv/inv weights", "wrote my--out.bin in inv/inv weights"),
        ("no file '--out'", "no file '--out'"),
        ("run hf auth login, or", "run .venv/bin/hf auth login, or"),
    ],
)
def test_commands_are_told_as_they_are_typed(
    text: str, typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For those who use make the commands and options in a message are make's."""
    monkeypatch.setenv("CSM_WEIGHTS_TYPED", "make")
    console.run(lambda: text, as_json=False)
    monkeypatch.delenv("CSM_WEIGHTS_TYPED")
    console.run(lambda: text, as_json=False)
    assert capsys.readouterr().out.splitlines() == [typed, text]


def test_paths_in_an_error_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the help of a finding has make's words: a file may be called like an option."""
    monkeypatch.setenv("CSM_WEIGHTS_TYPED", "make")
    finding = Finding(Kind.MISSING, "a --out b", "inv verify", "--dest", "inv weights --dest b")
    console.run(raising(MissingInput("no", [finding])), as_json=False)
    shown = capsys.readouterr().err
    assert ("a --out b" in shown, "inv verify" in shown, " --dest\n" in shown) == (True,) * 3
    assert "make weights DEST=b" in shown


def test_a_program_of_its_own_can_have_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    """Invoke's Program runs the same tasks as a console program, for any root."""
    program = Program(namespace=collection(REPOSITORY), name="csm-weights", version="1")
    program.run(["csm-weights", "status", "--model", "csm-tiny", "--only", "config"], exit=False)
    out, err = capsys.readouterr()
    assert (out.startswith("csm-tiny -> "), err) == (True, "")
    with pytest.raises(SystemExit) as caught:
        program.run(["csm-weights", "status", "--model", "none"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "mend", "advised"),
    [
        (("staging", "dest"), "choose another folder", 1),
        (("staging", "dest"), "choose another --staging", 0),
        (("dest",), "choose another folder", 0),
    ],
)
def test_other_folders_are_advised_once_and_where_they_can_be_given(
    options: tuple[str, ...], mend: str, advised: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that cannot write names its options for folders, unless the finding does."""

    def full(root: Path, **_: str) -> None:
        raise NoSpace("full", [Finding(Kind.NO_SPACE, str(root), "room", "none", mend)])

    program = Program(namespace=collection(REPOSITORY, task(*options)(full)), name="inv")
    with pytest.raises(SystemExit) as caught:
        program.run(["inv", "full"])
    assert caught.value.code == 7
    assert capsys.readouterr().err.count("--staging and --dest name other folders") == advised


# ---- whole processes


def inv(*arguments: str, shell: str) -> subprocess.CompletedProcess[str]:
    """Runs `inv` with a redirection of the shell, or a limit that ends in a semicolon."""
    line = f'{shell} "$@"' if shell.endswith(";") else f'"$@" {shell}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", INV, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


TINY = ("--model", "csm-tiny")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_no_exit_code(closed: str) -> None:
    """With any stream closed a command does the same, and says what it still can."""
    good, bad = inv("status", *TINY, shell=closed), inv("status", "--model", "none", shell=closed)
    assert (good.returncode, bad.returncode) == (0, 2)
    assert ("csm-tiny" in good.stdout) is (closed in ("2>&-", "<&-"))
    assert bad.stdout == ""


def test_a_full_stdout_is_an_error() -> None:
    """A result that cannot be written ends with 7."""
    done = inv("status", *TINY, shell="> /dev/full")
    assert (done.returncode, "cannot be printed: No space left" in done.stderr) == (7, True)


@pytest.mark.parametrize("words", [("--list",), ("--help", "weights")])
def test_a_list_that_cannot_be_printed_is_no_bug(words: tuple[str, ...]) -> None:
    """What Invoke prints ends like a result: with 7 on a full disk, with 0 where nobody reads."""
    full, closed = (
        inv(*words, shell="> /dev/full"),
        inv(*words, shell="| true; exit ${PIPESTATUS[0]}"),
    )
    assert (full.returncode, "cannot be printed: No space left" in full.stderr) == (7, True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_reader_that_has_enough_is_no_error() -> None:
    """A closed pipe changes neither the exit code nor stderr, but for the name of slow work."""
    done = inv("status", *TINY, shell="| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr.removeprefix("status ...\n")) == (0, "")


@pytest.mark.parametrize("kilobytes", [80_000, 120_000])
def test_too_little_memory_is_told(kilobytes: int) -> None:
    """Under a limit of memory a command does its work, or says in a sentence why not."""
    done = inv("status", *TINY, shell=f"ulimit -v {kilobytes};")
    assert done.returncode in (0, 1)
    assert done.returncode == 0 or "out of memory" in done.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [((INV,), "tomllib"), ((sys.executable, "-m", "csm_weights"), "invoke")],
    ids=["a task's", "the program's"],
)
def test_an_interrupt_during_imports_is_130(
    command: tuple[str | Path, ...], module: str, tmp_path: Path
) -> None:
    """Ctrl-C while modules are imported ends with 130 and without a traceback."""
    slow = 'import time\nprint("importing", flush=True)\ntime.sleep(30)\n'
    (tmp_path / f"{module}.py").write_text(slow)
    # A shell starts what is in the background with SIGINT ignored; so may have done ours.
    restore = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    start = f"{restore}; import os; os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *command, "status", *TINY],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (130, False)


def test_an_interrupt_before_a_task_is_130() -> None:
    """Ctrl-C while the list of tasks is read ends the program at once; ignored, it stays so."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.exit_on_interrupt()
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught.value.code == 130
        assert console.run(lambda: None) == 0
        with pytest.raises(SystemExit):  # as well as after a task
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        console.exit_on_interrupt()
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

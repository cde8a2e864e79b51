"""The line as a person drives it: `inv` and `make`, in clones of this checkout."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csm_weights.store.journal import journal_path, partial_path
from tests.support.clone import BIN, INV, REPOSITORY, Clone, Result
from tests.support.schema import checked

TINY = ("--model", "csm-tiny")
WEIGHT_FILES = ("model.safetensors", "ckpt.pt")

#: Torch as a machine without it has it, and as something that must not be touched.
NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
FORBIDDEN_TORCH = "raise RuntimeError('torch was imported')\n"

#: Torch whose import takes forever, and says so.
SLOW_TORCH = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the caller ignores it
print("importing torch", file=sys.stderr, flush=True)
time.sleep(600)
"""

#: After the fourth read of a part, every read waits for Ctrl-C.
SLOW_READS = """
import itertools, os, signal, sys, threading

arrived = threading.Event()
calls, preadv = itertools.count(1), os.preadv

def interrupt(number, frame):
    arrived.set()
    raise KeyboardInterrupt

def slow(*arguments):
    if next(calls) > 4:
        print("reading", file=sys.stderr, flush=True)
        arrived.wait(60)
    return preadv(*arguments)

signal.signal(signal.SIGINT, interrupt)
os.preadv = slow
"""

#: The fifth call of a function of os fails, as when the disk is full or a cable is pulled.
FAILING = """
import errno, itertools, os

calls, real = itertools.count(1), os.{function}

def failing(*arguments):
    if next(calls) == 5:
        raise OSError(errno.{error}, os.strerror(errno.{error}))
    return real(*arguments)

os.{function} = failing
"""

#: From the fifth read on, files end where they are read.
SHRINKING = """
import itertools, os

calls, preadv = itertools.count(1), os.preadv
os.preadv = lambda *arguments: preadv(*arguments) if next(calls) < 5 else 0
"""


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone in which nothing has run yet."""
    return Clone.make(tmp_path / "clone")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, Result]:
    """A clone after its first `make weights MODEL=csm-tiny`, to be read only, and what it said."""
    clone = Clone.make(tmp_path_factory.mktemp("spoken") / "clone")
    return clone, clone.make_target("weights", "MODEL=csm-tiny")


def files_are_right(clone: Clone) -> bool:
    return all((clone.installed / n).read_bytes() == clone.joined(n) for n in WEIGHT_FILES)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 0xFF
    path.write_bytes(data)


def verdict(text: str) -> str:
    """The line with the verdict that all is well."""
    (line,) = [line for line in text.splitlines() if line.startswith("OK:")]
    return line


def imported_by(clone: Clone, *arguments: str) -> set[str]:
    """The names of all modules that an `inv` command imports."""
    result = clone.run(sys.executable, "-X", "importtime", INV, *arguments)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE))


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


# --- the whole line


def test_make_weights_ends_with_the_verdict_and_the_right_files(
    spoken: tuple[Clone, Result],
) -> None:
    """From a fresh clone, one command ends with OK, and the files are their chunk files joined."""
    clone, result = spoken
    assert result.returncode == 0, result.stderr
    assert verdict(result.stdout) == "OK: installed, verified, smoke test passed"
    assert files_are_right(clone)


def test_a_second_make_weights_writes_nothing_and_loads_no_torch(
    spoken: tuple[Clone, Result],
) -> None:
    """When all is verified, a second run ends the same, touches no file and imports no torch."""
    clone, _ = spoken
    before = clone.tree()
    clone.fake("torch", FORBIDDEN_TORCH)
    try:
        result = clone.make_target("weights", "MODEL=csm-tiny")
    finally:
        (clone.extra / "torch.py").unlink()
    assert (result.returncode, clone.tree()) == (0, before)
    assert verdict(result.stdout) == "OK: installed, verified, smoke test passed"


def test_weights_works_in_a_path_with_spaces(tmp_path: Path) -> None:
    """Spaces and letters beyond ASCII in the clone's path trouble neither make nor inv."""
    clone = Clone.make(tmp_path / "my models" / "clône (1)")
    result = clone.make_target("weights", "MODEL=csm-tiny", "SMOKE=no")
    assert (result.returncode, verdict(result.stdout)) == (0, "OK: installed and verified")
    assert files_are_right(clone)


def test_weights_from_a_subfolder_finds_the_clone(clone: Clone) -> None:
    """`inv` called below the clone's root puts the files where it does from the root."""
    result = clone.run("sh", "-c", f"cd docs && '{INV}' weights --model csm-tiny --no-smoke")
    assert result.returncode == 0, result.stderr
    assert files_are_right(clone)


def test_no_smoke_needs_no_torch(clone: Clone) -> None:
    """On a machine without torch, --no-smoke does all the rest."""
    clone.fake("torch", NO_TORCH)
    result = clone.inv("weights", *TINY, "--no-smoke")
    assert (result.returncode, verdict(result.stdout)) == (0, "OK: installed and verified")


def test_without_torch_the_way_around_is_shown(clone: Clone) -> None:
    """Without torch, weights ends with 77, names the option that needs none, keeps the files."""
    clone.fake("torch", NO_TORCH)
    result = clone.inv("weights", *TINY)
    assert result.returncode == 77
    assert "--no-smoke" in result.stderr
    assert files_are_right(clone)


def test_without_weights_five_ways_to_get_them_are_shown(clone: Clone) -> None:
    """Without CSM-1B a few lines name the file and five ways to get it, and nothing changes."""
    clone.inv("--list")
    before = clone.tree()
    result = clone.inv("weights")
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (3, "")
    assert lines[1].endswith("/model.safetensors") and "6,211,186,784 bytes" in lines[2]
    assert re.findall(r"^ *(\d)\. ", result.stderr, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert len(lines) <= 16 and max(map(len, lines[2:])) <= 80
    assert clone.tree() == before


def test_the_ways_are_those_of_the_file_that_is_missing(clone: Clone) -> None:
    """Where only a chunk file of ckpt.pt is missing, the ways to get ckpt.pt are named."""
    clone.chunk_files("ckpt.pt")[2].unlink()
    result = clone.inv("weights", *TINY)
    assert (result.returncode, "Ways to get ckpt.pt:" in result.stderr) == (3, True)


def test_a_full_disk_has_no_way_around_that_is_the_same_again(clone: Clone) -> None:
    """Where the disk has room for no file, the advice is not to ask for the same files."""
    full = "import shutil\nshutil.disk_usage = lambda _: type('Usage', (), {'free': 9})\n"
    clone.fake("sitecustomize", full)
    result = clone.inv("weights", *TINY)
    assert (result.returncode, "To go on without the rest" in result.stderr) == (7, False)


def test_advice_is_about_the_files_and_the_folder_that_were_named(clone: Clone) -> None:
    """The commands in results and errors have the --only and --dest of the one that was typed."""
    named = "--model csm-tiny --only ckpt --dest models/other"
    missing = clone.inv("verify", *named.split())
    assert (missing.returncode, f"inv weights {named}\n" in missing.stderr) == (3, True)
    done = clone.inv("weights", *named.split(), "--no-smoke")
    assert (done.returncode, f"inv smoke {named}\n" in done.stdout) == (0, True)
    by_path = clone.inv("verify", "--model", "manifests/csm-tiny.toml")
    assert "inv weights --model manifests/csm-tiny.toml\n" in by_path.stderr


def test_make_turns_a_failure_into_exit_code_2(clone: Clone) -> None:
    """`make weights` without weights prints what inv prints, and ends with make's own 2."""
    result = clone.make_target("weights")
    assert result.returncode == 2
    assert clone.inv("weights").stderr.splitlines()[:6] == result.stderr.splitlines()[:6]


def test_make_alone_names_every_task(clone: Clone) -> None:
    """Plain `make` shows a line for each task that `inv --list` has."""
    listed = json.loads(clone.inv("--list", "--list-format=json").stdout)
    tasks = {task["name"] for task in listed["tasks"]}
    result = clone.make_target()
    assert result.returncode == 0
    shown = set(re.findall(r"^  ([a-z-]+) +\S", result.stdout, re.MULTILINE))
    assert len(tasks) > 5
    assert tasks - shown == set()


def test_every_make_target_runs_even_where_a_file_has_its_name(clone: Clone) -> None:
    """A file called like a target does not make `make` think that it is done."""
    shown = clone.make_target().stdout
    targets = re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE)
    for target in targets:
        (clone.root / target).touch()
    plans = {target: clone.make_target("--dry-run", target).stdout for target in targets}
    first_lines = {target: plan.splitlines()[0] for target, plan in plans.items()}
    assert [t for t, line in first_lines.items() if "up to date" in line] == []


# --- exit codes


def readme_codes() -> dict[int, str]:
    """The table of exit codes in the README."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return {int(code): words for code, words in re.findall(r"^\| (\d+) \| (.+) \|$", text, re.M)}


def succeed(clone: Clone) -> Result:
    return clone.inv("weights", *TINY, "--no-smoke", "--json")


def name_no_model(clone: Clone) -> Result:
    return clone.inv("weights", "--model", "csm-2b", "--json")


def name_no_format(clone: Clone) -> Result:
    return clone.inv("weights", *TINY, "--only", "safetensor", "--json")


def miss_parts(clone: Clone) -> Result:
    clone.chunk_files("ckpt.pt")[2].unlink()
    return clone.inv("weights", *TINY, "--json")


def damage_part(clone: Clone) -> Result:
    flip_byte(clone.chunk_files("ckpt.pt")[2])
    return clone.inv("weights", *TINY, "--json")


def refuse_writes(clone: Clone) -> Result:
    command = f"ulimit -f 1024; exec '{INV}' weights --model csm-tiny --json"
    return clone.run("bash", "-c", command)


def fill_disk(clone: Clone) -> Result:
    clone.fake("sitecustomize", FAILING.format(function="pwrite", error="ENOSPC"))
    return clone.inv("weights", *TINY, "--json")


def fail_reading(clone: Clone) -> Result:
    clone.fake("sitecustomize", FAILING.format(function="preadv", error="EIO"))
    return clone.inv("weights", *TINY, "--json")


def shrink_parts(clone: Clone) -> Result:
    clone.fake("sitecustomize", SHRINKING)
    return clone.inv("weights", *TINY, "--json")


def ask_without_a_token(clone: Clone) -> Result:
    return clone.inv("fetch", "--source=hf", "--json")


def ask_where_nobody_listens(clone: Clone) -> Result:
    clone.variables.update(HF_TOKEN="hf_none", HF_ENDPOINT="http://127.0.0.1:9")
    return clone.inv("fetch", "--source=hf", "--patience=2", "--json")


def alter_golden_frames(clone: Clone) -> Result:
    path = clone.root / "manifests" / "csm-tiny.golden.json"
    golden = json.loads(path.read_text())
    golden["frames"][3][0] ^= 1
    path.write_text(json.dumps(golden))
    return clone.inv("weights", *TINY, "--json")


def require_absent_gpu(clone: Clone) -> Result:
    command = (INV, "weights", *TINY, "--require-gpu", "--json")
    return clone.run("env", "CUDA_VISIBLE_DEVICES=", *command)


def interrupt(clone: Clone, moment: str, number: signal.Signals, *arguments: str) -> Result:
    """Sends a signal to the process group of an `inv` command once stderr says `moment`."""
    process = clone.start(INV, *arguments)
    assert process.stderr is not None
    try:
        said = next((line for line in process.stderr if moment in line), "")
        assert said, "it ended before the moment came"
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return Result(process.args, process.returncode, out, said + err)


def interrupt_reading(clone: Clone) -> Result:
    clone.fake("sitecustomize", SLOW_READS)
    return interrupt(clone, "reading", signal.SIGINT, "weights", *TINY, "--json")


def press_ctrl_c(clone: Clone) -> Result:
    clone.fake("torch", SLOW_TORCH)
    return interrupt(clone, "importing torch", signal.SIGINT, "weights", *TINY, "--json")


def terminate(clone: Clone) -> Result:
    clone.fake("torch", SLOW_TORCH)
    return interrupt(clone, "importing torch", signal.SIGTERM, "weights", *TINY, "--json")


ENDINGS: list[tuple[int, Callable[[Clone], Result]]] = [
    (0, succeed),
    (2, name_no_model),
    (2, name_no_format),
    (3, miss_parts),
    (4, damage_part),
    (4, fail_reading),
    (4, shrink_parts),
    (5, ask_without_a_token),
    (6, ask_where_nobody_listens),
    (7, refuse_writes),
    (7, fill_disk),
    (8, alter_golden_frames),
    (77, require_absent_gpu),
    (130, interrupt_reading),
    (130, press_ctrl_c),
    (130, terminate),
]


def test_the_readme_has_every_exit_code() -> None:
    """The README's table has the codes that are produced here, 1 for bugs, and no other."""
    assert set(readme_codes()) == {1, *(code for code, _ in ENDINGS)}


@pytest.mark.parametrize(("code", "end"), ENDINGS, ids=[end.__name__ for _, end in ENDINGS])
def test_inv_ends_with_the_code_of_the_readme_and_says_so_in_json(
    clone: Clone, code: int, end: Callable[[Clone], Result]
) -> None:
    """The exit code of the process is the one in its JSON on stdout."""
    result = end(clone)
    data = checked(result.stdout)
    assert (result.returncode, data["exit_code"], data["ok"]) == (code, code, code == 0)
    assert code in readme_codes()
    assert "Traceback" not in result.stderr


def test_the_python_sample_of_the_readme_runs(clone: Clone) -> None:
    """The sample that loads csm-tiny runs as it is written, once csm-tiny is installed."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    samples = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (sample,) = (one for one in samples if "csm-tiny" in one)
    assert clone.inv("weights", *TINY, "--no-smoke").returncode == 0
    result = clone.run(str(BIN / "python"), "-c", sample + "print(codes.shape[1])")
    assert (result.returncode, result.stdout) == (0, "32\n"), result.stderr


def test_an_unknown_option_is_a_usage_error(clone: Clone) -> None:
    """An option that no task has ends with 2 and is named."""
    result = clone.inv("weights", "--smoke-test")
    assert result.returncode == 2
    assert "--smoke-test" in result.stderr


TRAPS = [
    (("weights", "csm-tiny"), "inv weights --model csm-tiny"),
    (("wieghts",), "did you mean weights?"),
    (("--help", "wieghts"), "did you mean weights?"),
    (("weights", "--sorce", "hf"), "did you mean --source?"),
    (("weights", "--model"), "--model needs a value"),
    (("weights", "--model", "csm-tinny"), "did you mean csm-tiny?"),
    (("weights", "csm-tinny"), "did you mean --model csm-tiny?"),
    (("weights", *TINY, "--source", "huggingface"), "did you mean hf?"),
    (("weights", *TINY, "--only", "safetensor"), "did you mean safetensors?"),
    (("--dry", "fetch", *TINY), "put it after the task: inv fetch --dry"),
    (("verify", *TINY, "--write-sums", "--dry"), "verify has no --dry"),
    (("smoke", *TINY, "--frames", "x"), "'x' is not a number"),
    (("split",), "split needs FILE: inv split FILE"),
    (("split", "--file="), "split needs --file; see inv --help split"),
    (("identify", "--path="), "identify needs --path; see inv --help identify"),
    (("speak",), "speak needs --text, --out; see inv --help speak"),
    (("convert", "weights"), "convert needs --to, --out; see inv --help convert"),
    (("clean", *TINY, "--keep-everything"), "see inv --help clean"),
    (("weights", *TINY, "-e"), "weights has no -e, only long options"),
    (("weights", *TINY, "-r", "main"), "weights has no -r, only long options"),
]


@pytest.mark.parametrize(("arguments", "said"), TRAPS, ids=[" ".join(a) for a, _ in TRAPS])
def test_a_slip_is_refused_with_what_was_meant(
    clone: Clone, arguments: tuple[str, ...], said: str
) -> None:
    """A typo, and an option that Invoke would take for its own, end with 2 and do nothing."""
    before = clone.tree()
    result = clone.inv(*arguments)
    assert (result.returncode, clone.tree()) == (2, before)
    assert said in " ".join(result.stderr.split())


def test_inv_alone_says_what_there_is_and_where_to_begin(clone: Clone) -> None:
    """Without words, inv shows every task on one screen of 80 columns, and does nothing."""
    before = clone.tree()
    result = clone.inv()
    assert (result.returncode, result.stderr, clone.tree()) == (0, "", before)
    listed = json.loads(clone.inv("--list", "--list-format=json").stdout)
    shown = set(re.findall(r"^([a-z-]+)  +\S", result.stdout, re.MULTILINE))
    assert {task["name"] for task in listed["tasks"]} - shown == set()
    assert "Begin with inv doctor" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_module_of_invoke_refuses_slips_too(clone: Clone) -> None:
    """`python -m invoke` ends as `inv` does."""
    result = clone.run(sys.executable, "-m", "invoke", "wieghts")
    assert (result.returncode, "did you mean weights?" in result.stderr) == (2, True)


@pytest.mark.parametrize("words", [("status", "-h"), ("--help", "status"), ("status", "--help")])
def test_help_of_a_task_explains_its_options(clone: Clone, words: tuple[str, ...]) -> None:
    """`inv status -h` and `inv --help status` show the help of status and of its options."""
    result = clone.inv(*words)
    assert (result.returncode, "Show what is here" in result.stdout) == (0, True)
    assert "-h" not in result.stdout
    assert "the result as JSON on stdout" in " ".join(result.stdout.split())


JSON_COMMANDS = [
    (0, ("status", *TINY)),
    (3, ("status", *TINY, "--check")),
    (0, ("weights", *TINY, "--dry")),
    (0, ("fetch", *TINY, "--only", "ckpt")),
    (3, ("place", *TINY)),
    (3, ("verify", *TINY)),
    (3, ("smoke", *TINY)),
    (2, ("fetch", *TINY, "--source", "somewhere")),
    (3, ("verify", "--sums", "SHA256SUMS")),
]


@pytest.mark.parametrize(
    ("code", "command"), JSON_COMMANDS, ids=[" ".join(c) for _, c in JSON_COMMANDS]
)
def test_every_task_with_json_prints_just_that(
    clone: Clone, code: int, command: tuple[str, ...]
) -> None:
    """With --json, stdout is one JSON object with the exit code, whatever the task has to say."""
    result = clone.inv(*command, "--json")
    data = checked(result.stdout)
    assert (result.returncode, data["exit_code"]) == (code, code)
    assert data["model"] == ("csm-tiny" if "csm-tiny" in command else "csm-1b")


WITH_RESULTS = [
    ("weights", *TINY, "--no-smoke", "--seal"),
    ("status", *TINY, "--check"),
    ("verify", *TINY),
    ("attest", *TINY),
    ("verify", *TINY, "--attestation", "models/csm-tiny/csm-tiny.intoto.json"),
    ("doctor", *TINY, "--no-smoke"),
    ("doctor", *TINY, "--offline"),
    ("compare", *TINY),
    ("seed-cache", *TINY, "--dry"),
    ("seed-cache", *TINY),
    ("fetch", *TINY, "--dest", "models/other", "--dry"),
    ("clean", *TINY, "--dry"),
    ("lock", *TINY, "--dry"),
    ("identify", "models/csm-tiny"),
    ("split", "models/csm-tiny/model.safetensors", "--chunks", "chunks/new"),
    ("split", "models/csm-tiny/model.safetensors", "--dry"),
    ("convert", "models/csm-tiny", "--to", "transformers", "--out", "models/new"),
    ("standin", "--name", "csm-tiny", "--dry"),
]


def test_json_is_of_the_documented_schema(clone: Clone) -> None:
    """What each task prints with --json is valid by docs/json-schema/v1.json."""
    path = clone.root / "manifests" / "csm-tiny.toml"
    hub = f'[hub]\nrepo = "org/tiny"\nrevision = "{"a" * 40}"\n\n[smoke]'
    path.write_text(path.read_text().replace("[smoke]", hub))
    for task, *options in WITH_RESULTS:
        result = clone.inv(task, *options, "--json")
        data = checked(result.stdout)
        assert (data["command"], data["exit_code"]) == (task, result.returncode), result.stderr
        assert len(data) > 9


def test_screens_are_at_most_80_columns_wide(clone: Clone) -> None:
    """Whatever a task prints fits 80 columns, but for paths, digests and a name on its own line."""
    path = clone.root / "manifests" / "csm-tiny.toml"
    hub = f'[hub]\nrepo = "org/tiny"\nrevision = "{"a" * 40}"\n\n[smoke]'
    path.write_text(path.read_text().replace("[smoke]", hub))
    shown = []
    others = [(task, *TINY) for task in ("status", "doctor", "place", "lock")]
    for command in [*others[:2], *WITH_RESULTS, *others[2:]]:
        result = clone.inv(*command)
        shown += [*result.stdout.splitlines(), *result.stderr.splitlines()]
    os.truncate(clone.installed / "ckpt.pt", 5)
    for model in ("csm-tiny", "csm-1b", "csm-2b"):
        for task in ("verify", "status", "weights", "doctor"):
            result = clone.inv(task, "--model", model)
            shown += [*result.stdout.splitlines(), *result.stderr.splitlines()]
    wide = [line for line in dict.fromkeys(shown) if len(line) > 80]
    assert len(shown) > 200
    words = [line for line in wide if "/" not in line and len(line.split()) > 1]
    assert [line for line in words if not re.search("[0-9a-f]{40}", line)] == []


# --- interrupted


def test_an_interrupted_run_is_taken_up_again(clone: Clone) -> None:
    """Ctrl-C while chunk files are read leaves no file; the next run keeps the verified pieces."""
    assert interrupt_reading(clone).returncode == 130
    (clone.extra / "sitecustomize.py").unlink()
    for name in WEIGHT_FILES:
        assert not (clone.installed / name).exists()
        assert not (clone.staged / name).exists()
    status = clone.inv("status", *TINY)
    assert "the unfinished file, verified in an earlier run" in status.stdout
    again = clone.inv("weights", *TINY, "--no-smoke")
    assert again.returncode == 0, again.stderr
    assert "verified in an earlier run" in " ".join(again.stdout.split())
    assert files_are_right(clone)


def test_an_interrupted_smoke_test_leaves_the_files_in_place(clone: Clone) -> None:
    """A termination signal during the smoke test ends in a sentence; the files stay verified."""
    result = terminate(clone)
    assert "interrupted; what was verified is kept" in result.stderr
    assert clone.inv("status", *TINY, "--check").returncode == 0


def test_speed_is_a_gate_only_where_asked(clone: Clone) -> None:
    """However slow, a model passes; with --max-rtf a slow one ends with 8, its files verified."""
    assert clone.inv("weights", *TINY).returncode == 0
    slow = clone.inv("smoke", *TINY, "--max-rtf", "0.0001")
    assert slow.returncode == 8
    assert "error: the smoke test failed: real-time factor" in slow.stderr
    assert "The files are installed and verified." in slow.stderr
    assert slow.stderr.count("NOT OK") == 0 and slow.stdout.count("NOT OK") == 1
    assert clone.inv("smoke", *TINY, "--max-rtf", "1000000").returncode == 0


def test_a_failed_smoke_test_is_not_taken_for_a_good_one(clone: Clone) -> None:
    """After a smoke test that was not OK, the next run loads the model again."""
    assert alter_golden_frames(clone).returncode == 8
    clone.fake("torch", NO_TORCH)
    assert clone.inv("weights", *TINY).returncode == 77


# --- other ways to the same bytes


def test_recombine_and_fetch_give_the_same_bytes(clone: Clone, tmp_path: Path) -> None:
    """The script for people without Python makes what `inv fetch` makes."""
    other = Clone.make(tmp_path / "other")
    results = [
        clone.inv("fetch", *TINY),
        other.run("bash", "recombine.sh", *TINY),
    ]
    assert [result.returncode for result in results] == [0, 0]
    for name in WEIGHT_FILES:
        assert (clone.staged / name).read_bytes() == (other.staged / name).read_bytes()


def test_what_recombine_made_is_adopted_where_it_lies(clone: Clone) -> None:
    """After recombine.sh, weights verifies and moves its files instead of copying them."""
    clone.run("bash", "recombine.sh", *TINY)
    inodes = [(clone.staged / name).stat().st_ino for name in WEIGHT_FILES]
    result = clone.inv("weights", *TINY, "--no-smoke")
    assert result.returncode == 0, result.stderr
    assert [(clone.installed / name).stat().st_ino for name in WEIGHT_FILES] == inodes


def test_standin_writes_the_committed_parts_and_manifest_again(clone: Clone) -> None:
    """csm-tiny can be made again from nothing, to the byte."""
    manifest = clone.root / "manifests" / "csm-tiny.toml"
    committed = clone.root / "chunks" / "csm-tiny"
    expected = {
        p.relative_to(committed): p.read_bytes() for p in committed.rglob("*") if p.is_file()
    }
    text = manifest.read_bytes()
    shutil.rmtree(committed)
    manifest.unlink()
    result = clone.inv("standin", "--name", "csm-tiny")
    assert result.returncode == 0, result.stderr
    made = {p.relative_to(committed): p.read_bytes() for p in committed.rglob("*") if p.is_file()}
    assert len(expected) == 12 + 2  # and two lists
    assert made == expected
    assert manifest.read_bytes() == text


def test_split_and_weights_give_a_file_back(clone: Clone) -> None:
    """A file that is split, with a manifest of its own, comes back through the line."""
    content = os.urandom(1_000_003)
    file = clone.root / "my.bin"
    file.write_bytes(content)
    manifest = ("--chunks", "chunks/mine", "--manifest", "manifests/mine.toml")
    assert clone.inv("split", "my.bin", "--size", "300KB", *manifest).returncode == 0
    file.unlink()
    result = clone.inv("weights", "--model", "mine", "--no-smoke")
    assert result.returncode == 0, result.stderr
    assert (clone.root / "models" / "mine" / "my.bin").read_bytes() == content


def test_split_makes_the_parts_that_split_makes(clone: Clone) -> None:
    """Parts have the names and bytes of those of split(1), and a SHA256SUMS that holds."""
    (clone.root / "my.bin").write_bytes(os.urandom(27 * 1000 + 1))
    folder, other = clone.root / "chunks" / "my", clone.root / "other"
    other.mkdir()
    assert clone.inv("split", "my.bin", "--size", "1000").returncode == 0
    clone.run("split", "-b", "1000", "my.bin", "other/my.bin.part-")
    expected = {part.name: part.read_bytes() for part in other.iterdir()}
    made = {part.name: part.read_bytes() for part in folder.iterdir()}
    sums = made.pop("SHA256SUMS").decode().splitlines()
    assert len(expected) == 28
    assert made == expected
    assert [line for line in sums if not line.startswith("#")] == [
        f"{hashlib.sha256(expected[name]).hexdigest()}  {name}" for name in sorted(expected)
    ]


def test_written_sums_pass_sha256sum(clone: Clone) -> None:
    """`sha256sum -c` accepts the SHA256SUMS that verify writes, and it names every file."""
    clone.inv("weights", *TINY, "--no-smoke")
    assert clone.inv("verify", *TINY, "--write-sums").returncode == 0
    checked = clone.run("sh", "-c", "cd models/csm-tiny && sha256sum --check SHA256SUMS")
    assert checked.returncode == 0, checked.stdout
    assert set(checked.stdout.splitlines()) == {
        f"{name}: OK" for name in (*WEIGHT_FILES, "config.json")
    }


def test_lock_adds_the_digest_of_ckpt_and_nothing_else(clone: Clone) -> None:
    """lock shows and writes one more sha256, the file's own; a dry run shows the same."""
    clone.inv("weights", *TINY, "--no-smoke")
    manifest = clone.root / "manifests" / "csm-tiny.toml"
    before = manifest.read_text()
    digest = hashlib.sha256(clone.joined("ckpt.pt")).hexdigest()
    dry = clone.inv("lock", *TINY, "--dry")
    assert manifest.read_text() == before
    locked = clone.inv("lock", *TINY)
    assert (locked.returncode, locked.stdout) == (0, dry.stdout)
    changed = [line for line in locked.stdout.splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
    assert [line for line in changed if "evidence" not in line] == [f'+sha256 = "{digest}"']
    assert pinned(before)["ckpt.pt"] is None
    assert pinned(manifest.read_text()) == pinned(before) | {"ckpt.pt": digest}


def test_a_locked_manifest_still_verifies(clone: Clone) -> None:
    """After lock, verify passes and a second lock has nothing to say."""
    clone.inv("weights", *TINY, "--no-smoke")
    clone.inv("lock", *TINY)
    text = (clone.root / "manifests" / "csm-tiny.toml").read_text()
    assert clone.inv("verify", *TINY).returncode == 0
    assert "nothing to add, it has every digest" in clone.inv("lock", *TINY).stdout
    assert (clone.root / "manifests" / "csm-tiny.toml").read_text() == text


def pinned(text: str) -> dict[str, str | None]:
    """The sha256 of each artifact of a manifest."""
    data: dict[str, Any] = tomllib.loads(text)
    return {a["path"]: a.get("sha256") for a in data["artifact"]}


# --- looking first


def prepare_nothing(clone: Clone) -> None:
    """The clone as it is."""


def prepare_fetched(clone: Clone) -> None:
    clone.inv("fetch", *TINY)


def prepare_placed(clone: Clone) -> None:
    clone.inv("weights", *TINY, "--no-smoke")


def prepare_unfinished(clone: Clone) -> None:
    clone.staged.mkdir(parents=True)
    for path in (partial_path(clone.staged / "ckpt.pt"), journal_path(clone.staged / "ckpt.pt")):
        path.touch()


ACTING = [
    (prepare_nothing, ("weights", *TINY, "--no-smoke")),
    (prepare_nothing, ("fetch", *TINY)),
    (prepare_fetched, ("place", *TINY)),
    (prepare_nothing, ("split", "README.md", "--size", "1000", "--manifest", "manifests/my.toml")),
    (prepare_placed, ("lock", *TINY)),
    (prepare_nothing, ("standin", "--name", "csm-tiny")),
    (prepare_unfinished, ("clean", *TINY)),
]


@pytest.mark.parametrize(("prepare", "command"), ACTING, ids=[c[0] for _, c in ACTING])
def test_a_dry_run_writes_nothing(
    clone: Clone, prepare: Callable[[Clone], None], command: tuple[str, ...]
) -> None:
    """With --dry an acting task changes no file, and without it the same command does."""
    prepare(clone)
    before = clone.tree()
    dry = clone.inv(*command, "--dry")
    assert (dry.returncode, clone.tree()) == (0, before)
    assert dry.stdout
    assert clone.inv(*command).returncode == 0
    assert clone.tree() != before


def test_status_shows_where_each_piece_would_come_from(clone: Clone) -> None:
    """For every piece status names its chunk file, or what is wrong with it."""
    parts = [p.relative_to(clone.root).as_posix() for p in clone.chunk_files("ckpt.pt")]
    (clone.root / parts[1]).unlink()
    os.truncate(clone.root / parts[3], 5)
    result = clone.inv("status", *TINY, "--only", "ckpt")
    _, block = result.stdout.split("pieces of ckpt.pt:")
    origins = re.findall(r"^\d of 6  +[\d.]+ KiB  +(.+)$", block, re.MULTILINE)
    expected = list(parts)
    expected[1] = f"nowhere: {parts[1]}: missing"
    expected[3] = f"nowhere: {parts[3]}: wrong size"
    assert (result.returncode, origins) == (0, expected)


def on_terminal(clone: Clone, *command: str | Path) -> tuple[int, str]:
    """Exit code and all that a command shows on a terminal."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with subprocess.Popen(
        command,
        cwd=clone.root,
        env=clone.environment() | {"TERM": "xterm", "NO_COLOR": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ) as process:
        os.close(slave)
        shown = bytearray()
        try:
            while block := os.read(master, 65536):
                shown += block
        except OSError:
            pass  # Linux says EIO when the last writer has closed the terminal.
        finally:
            os.close(master)
    return process.returncode, shown.decode()


def test_a_terminal_shows_what_a_pipe_gets(clone: Clone) -> None:
    """On a terminal status is the same text, and nowhere has it escape sequences."""
    code, shown = on_terminal(clone, INV, "status", *TINY, "--only", "ckpt")
    piped = clone.inv("status", *TINY, "--only", "ckpt")
    assert (code, piped.returncode) == (0, 0)
    without_free = re.compile(r"; [\d.]+ [KMGT]iB free")
    assert without_free.sub("", shown.replace("\r\n", "\n")) == without_free.sub("", piped.stdout)
    assert "\x1b" not in shown + piped.stderr


def test_work_that_takes_time_shows_a_bar_only_on_a_terminal(clone: Clone) -> None:
    """A terminal sees a bar without colours; a pipe sees whole lines."""
    with (clone.root / "my.bin").open("wb") as file:
        file.truncate(40 << 20)
    command = ("split", "my.bin", "--size", "20MiB")
    code, shown = on_terminal(clone, INV, *command)
    shutil.rmtree(clone.root / "chunks" / "my")
    piped = clone.inv(*command)
    assert (code, piped.returncode) == (0, 0)
    assert re.search(r"\rsplitting: +\d+%\|", shown)
    assert "\x1b[3" not in shown
    assert re.fullmatch(r"(splitting[^\r\x1b]*: [^\r\x1b]+\n)+", piped.stderr)


def test_listing_the_tasks_imports_only_their_list(clone: Clone) -> None:
    """`inv --list` answers at once: of the package it imports the list and the errors alone."""
    modules = imported_by(clone, "--list")
    assert {name for name in modules if name.startswith("csm_weights.")} == {
        "csm_weights.commands",
        "csm_weights.commands.cli",
        "csm_weights.commands.console",
        "csm_weights.commands.program",
        "csm_weights.commands.task",
        "csm_weights.errors",
    }
    assert top_level(modules) & {"torch", "numpy", "tqdm", "filelock", "requests"} == set()


def test_looking_imports_no_torch(clone: Clone) -> None:
    """`inv status` does with the light half, and it is the clone's own."""
    modules = imported_by(clone, "status", *TINY)
    assert "csm_weights.store.inspect" in modules
    assert top_level(modules) & {"torch", "numpy"} == set()


def test_a_bad_chunk_file_of_one_format_leaves_the_other(clone: Clone) -> None:
    """The error about ckpt.pt names the --only that places the other format, and it does."""
    part = clone.chunk_files("ckpt.pt")[2]
    part.write_bytes(bytes(len(part.read_bytes())))
    failed = clone.inv("weights", *TINY, "--no-smoke")
    advice = re.search(r"--only=(\S+)", failed.stderr)
    assert (failed.returncode, advice is not None) == (4, True)
    assert advice is not None
    assert clone.inv("weights", *TINY, "--no-smoke", "--only", advice[1]).returncode == 0
    assert (clone.installed / "model.safetensors").is_file()

"""The hostile files of the tests, before this project, two scanners and torch: who catches what.

    make scanners            (python -m benchmarks.scanners)

Makes a virtual environment with picklescan and modelscan in a temporary folder,
and writes the tables of docs/security-table.md. torch is this environment's.
Each file is judged under a time limit, in a process for each judge.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "security-table.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

SCANNERS = {"picklescan": "1.0.5", "modelscan": "0.8.8"}

#: Who judges, in the order of the columns; torch twice, as it is by default and as it was.
JUDGES = ("csm-weights", "picklescan", "modelscan", "weights_only", "unsafe")

#: Seconds for one file.
LIMIT = 60

#: The file that a payload makes when it is run, beside the hostile files.
CANARY = "was-run"


# ---- one judge, in the environment that has it; nothing above may be needed here


def judge(name: str, folder: Path) -> dict[str, str]:
    """The verdict of one judge on every file of a folder, and RAN where a payload was run."""
    verdicts = {}
    for path in sorted(folder.iterdir()):
        with _silent():
            verdicts[path.name] = _verdict(_JUDGES[name], path)
        canary = folder.parent / CANARY
        if canary.exists():
            canary.unlink()
            verdicts[path.name] = "RAN"
    return verdicts


def _verdict(act: Callable[[Path], str], path: Path) -> str:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        return act(path)
    except TimeoutError:
        return "hangs"
    except BaseException:  # a payload may raise what it likes, SystemExit too
        return "error"
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What a judge or a payload prints goes nowhere."""
    kept = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1), os.dup2(null, 2)
        yield
    finally:
        for number, fd in enumerate(kept, start=1):
            os.dup2(fd, number)
            os.close(fd)
        os.close(null)


def _ours(path: Path) -> str:
    from csm_weights.errors import WrongContent
    from csm_weights.formats.weights_file import open_weights

    try:
        open_weights([path]).source.close()
    except WrongContent:
        return "refused"
    return "passed"


def _picklescan(path: Path) -> str:
    """As its command: exit code 1 is a finding, 2 a file that could not be scanned."""
    from picklescan.scanner import scan_file_path

    found = scan_file_path(str(path))
    if found.scan_err:
        return "error"
    return "flagged" if found.issues_count else "passed"


def _modelscan(path: Path) -> str:
    """As its command: findings, else errors, else files that no scanner of it took."""
    from modelscan.modelscan import ModelScan

    found = ModelScan().scan(path)
    if found["summary"]["total_issues"]:
        return "flagged"
    if found["errors"]:
        return "error"
    return "passed" if found["summary"]["scanned"]["total_scanned"] else "skipped"


def _torch(weights_only: bool) -> Callable[[Path], str]:
    def load(path: Path) -> str:
        import torch

        try:
            torch.load(path, weights_only=weights_only)
        except TimeoutError:
            raise
        except Exception:
            return "refused"
        return "passed"

    return load


_JUDGES: Mapping[str, Callable[[Path], str]] = {
    "csm-weights": _ours,
    "picklescan": _picklescan,
    "modelscan": _modelscan,
    "weights_only": _torch(True),
    "unsafe": _torch(False),
}


# ---- all judges


def main() -> None:
    """Judges everything and writes the tables."""
    if len(sys.argv) == 3:
        sys.stdout.write(json.dumps(judge(sys.argv[1], Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        python = _scratch(base / "venv")
        print("judging ...", file=sys.stderr)
        page = PAGE.read_text()
        head, rest = page.split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{_tables(base, python)}\n{END}{tail}")


def _scratch(folder: Path) -> Path:
    """The Python of a new environment that has the scanners."""
    print("installing the scanners ...", file=sys.stderr)
    venv.create(folder, with_pip=True)
    wanted = [f"{name}=={version}" for name, version in SCANNERS.items()]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True)
    return folder / "bin" / "python"


def _tables(base: Path, python: Path) -> str:
    from tests.support import hostile

    target = str(base / "running" / CANARY)
    pickles = hostile.running_pickles(target).items()
    running = {name: (hostile.checkpoint(code), why) for name, (code, why) in pickles}
    running |= hostile.running_files(target)
    bad = {
        name: (hostile.checkpoint(code), why) for name, (code, why) in hostile.BAD_PICKLES.items()
    }
    sets: dict[str, Mapping[str, tuple[bytes, str]]] = {
        "pickles of another shape, tensors outside their storage": bad,
        "zips that lie, hide or repeat": hostile.BAD_ZIPS,
        "zips and pickles that are bombs": hostile.heavy_zips(),
    }
    found = _judged(base / "running", python, running)
    counts = [
        (title, len(files), _judged(base / f"set{index}", python, files))
        for index, (title, files) in enumerate(sets.items())
    ]
    return f"{_versions()}\n\n{_each(found)}\n\n{_counted(counts)}"


def _judged(
    folder: Path, python: Path, files: Mapping[str, tuple[bytes, str]]
) -> dict[str, dict[str, str]]:
    """The verdicts on some files, by judge."""
    held = folder / "files"
    held.mkdir(parents=True)
    for name, (content, _) in files.items():
        (held / f"{name}.pt").write_bytes(content)
    verdicts = {}
    for name in JUDGES:
        program = python if name in SCANNERS else Path(sys.executable)
        command = [str(program), "-m", "benchmarks.scanners", name, str(held)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        verdicts[name] = json.loads(done.stdout)
    return verdicts


def _versions() -> str:
    words = [f"{name} {version}" for name, version in SCANNERS.items()]
    words.append(f"torch {importlib.metadata.version('torch').partition('+')[0]}")
    return f"Measured with {', '.join(words)}."


def _each(found: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each file with a payload, and what torch does with it where nothing stops it."""
    columns = JUDGES[:-1]
    head = [*columns, "without protection"]
    lines = [_line(["payload", *head]), _line(["---"] * (len(head) + 1))]
    for name, unsafe in found["unsafe"].items():
        words = [found[judge][name] for judge in columns]
        lines.append(_line([name.removesuffix(".pt"), *words, _unsafe(unsafe)]))
    caught = [_caught(found[judge].values()) for judge in columns]
    ran = sum(word == "RAN" for word in found["unsafe"].values())
    count = len(found["unsafe"])
    lines.append(_line([f"**{count} files**", *caught, f"**{ran} run**"]))
    return "\n".join(lines)


def _unsafe(verdict: str) -> str:
    return {"RAN": "runs", "passed": "loads"}.get(verdict, "refused")


def _caught(verdicts: Any) -> str:
    """How many are refused or flagged; an error counts, for a job that looks at exit codes."""
    words = list(verdicts)
    caught = sum(word in ("refused", "flagged") for word in words)
    errors = sum(word == "error" for word in words)
    return f"**{caught}**" + (f" and {errors} errors" if errors else "")


def _counted(counts: Sequence[tuple[str, int, Mapping[str, Mapping[str, str]]]]) -> str:
    columns = JUDGES[:-1]
    lines = [_line(["files that run nothing", *columns]), _line(["---"] * (len(columns) + 1))]
    for title, count, found in counts:
        words = [f"{_caught(found[judge].values())} of {count}" for judge in columns]
        lines.append(_line([title, *words]))
    return "\n".join(lines)


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


if __name__ == "__main__":
    main()

"""Read hostile files as a user would, in a process whose memory and time are watched.

`python -m tools.fuzz.probe FOLDER COMMAND...` reads `FOLDER/jobs.json`: a list of names, each
with a manifest in `FOLDER/manifests/` and, for some commands, its file installed. It prints
as JSON the outcome of each, and by how many bytes the peak of memory grew over all of them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csm_weights.commands import compare, verify
from csm_weights.commands.render import text as as_text
from csm_weights.errors import CsmWeightsError
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, StatusReport

#: Bytes of address space for the process, so that a bomb ends it and not the machine.
ADDRESS_SPACE = 2 << 30

#: Bytes by which memory may grow over all files of a set.
MEMORY = 64 << 20

#: Seconds of processor time that one file may take, so that a busy machine changes nothing.
SECONDS = 10.0


def _verify(root: Path, name: str) -> tuple[int, str]:
    return _said(verify.verify(Request(root, name)))


def _compare(root: Path, name: str) -> tuple[int, str]:
    path = root / "models" / name / "weights"
    compared = compare.compare(Request(root, name), path, path)
    return compared.error.exit_code if compared.error else 0, "compared"


def _status(root: Path, name: str) -> tuple[int, str]:
    return _said(apply.status(Request(root, name), check=True))


def _said(result: Outcome | StatusReport) -> tuple[int, str]:
    """Return the exit code of a result, and what it and its error say."""
    error = result.error
    return error.exit_code if error else 0, f"{as_text.render(result)}\n{error or ''}"


COMMANDS: dict[str, Callable[[Path, str], tuple[int, str]]] = {
    "verify": _verify,
    "compare": _compare,
    "status": _status,
}


def _timed(command: str, root: Path, name: str) -> dict[str, Any]:
    started = time.process_time()
    try:
        code, text = COMMANDS[command](root, name)
    except CsmWeightsError as error:
        code, text = error.exit_code, str(error)
    seconds = time.process_time() - started
    return {"name": name, "command": command, "code": code, "text": text, "seconds": seconds}


def _peak() -> int:
    # ru_maxrss would begin at the peak of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Run the jobs of the folder that the command line names."""
    root = Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    jobs = json.loads((root / "jobs.json").read_text())
    before = _peak()
    results = [_timed(command, root, name) for name in jobs for command in sys.argv[2:]]
    sys.stdout.write(json.dumps({"results": results, "grown": _peak() - before}))


if __name__ == "__main__":
    main()

"""`inv` in a child of a process that has imported the libraries, so that no start is paid for.

The child runs Invoke's program with the tasks.py and the package of the folder that it starts in,
with the path, arguments, environment and streams that the script `inv` would have. Only
libraries are there beforehand: none that takes settings from the environment while it is imported.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

Result = subprocess.CompletedProcess[str]

#: Libraries that take long to import, and the start of variables that they, or Python, read then.
LIBRARIES = ("invoke.main", "requests", "torch")
READ_AT_START = ("LC_", "LANG", "LD_", "PYTHON", "OMP_", "MKL_", "TORCH", "CUDA_", "TQDM_")


class Server:
    """The client of the forking process, which ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, script: Path, arguments: tuple[str, ...], cwd: Path, env: dict[str, str], limit: float
    ) -> Result:
        """Run `script` with `arguments` in the folder `cwd`, for at most `limit` seconds."""
        command = [str(script), *arguments]
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            streams = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)]
            order = {"argv": command, "cwd": str(cwd), "env": env, "out": streams, "limit": limit}
            print(json.dumps(order), file=self._process.stdin, flush=True)
            code = json.loads(self._process.stdout.readline())
            if code is None:
                raise subprocess.TimeoutExpired(command, limit)
            return Result(command, code, *(_text(stream.fileno()) for stream in (out, err)))


def _text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(os.dup(fd), encoding="utf-8") as stream:
        return stream.read()


@cache
def server(environment: tuple[tuple[str, str], ...]) -> Server:
    """Start the forking process once for each environment that it starts in."""
    return Server(dict(environment))


def skip_syncs() -> None:
    """Let this process not wait for the disk: no test cuts the power."""
    for name in ("fsync", "fdatasync"):
        setattr(os, name, lambda _fd: None)


def serve() -> None:
    """Fork a child for each line of stdin; return in the child, when it is ready to run."""
    skip_syncs()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            return become(order)
        watched = select.poll()
        watched.register(process := os.pidfd_open(child), select.POLLIN)
        ended = watched.poll(1000 * order["limit"])
        os.close(process)
        if not ended:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps(code if ended else None) + "\n")
        sys.stdout.flush()
    sys.exit()


def become(order: dict[str, Any]) -> None:
    """Take the streams, folder, environment, arguments and module path of the order."""
    opened = [os.open(os.devnull, os.O_RDONLY)]
    opened += [os.open(path, os.O_WRONLY | os.O_APPEND) for path in order["out"]]
    for number, fd in enumerate(opened):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv[:] = order["argv"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), os.environ["PYTHONPATH"]]


def run() -> None:
    """Run Invoke's program to its end, but for the teardown of the libraries."""
    try:
        importlib.import_module("invoke.main").program.run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    serve()
    run()

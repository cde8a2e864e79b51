"""A process that has imported everything and forks a child for each command.

A command then costs no start of Python. The child runs Invoke's own program with the
tasks.py of the folder that it runs in, as `inv` does. `python -m tools.torture.fork_server`
reads one JSON request a line and answers each with one line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pkgutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Any

import csm_weights
from tools.torture.tracing import Injection, install

#: Seconds after which a child counts as hanging.
LIMIT = 60.0

#: Bytes of a block that is copied or transferred: small, so that toy files have many.
SMALL = 16 << 10

#: The environment variables that children inherit.
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Result:
    """The end of a child: its exit code (or minus the signal's number), output and seconds."""

    code: int
    output: str
    seconds: float = 0.0


@dataclass
class Child:
    """A running child; `pid` is valid until `ForkServer.wait` has returned."""

    pid: int
    out: Path
    began: float = field(default_factory=time.monotonic)


class ForkServer:
    """The client of the forking process; `folder` is for the output of children."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tools.torture.fork_server"]
        root = Path(__file__).resolve().parents[2]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=root)
        self.ask({})

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(LIMIT)

    def ask(self, order: dict[str, Any]) -> Any:
        """Send one request, and return the answer."""
        with self._lock:
            assert self._process.stdin and self._process.stdout
            print(json.dumps(order), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())

    def start(
        self, root: Path, argv: tuple[str, ...], env: dict[str, str], injection: Injection
    ) -> Child:
        """Start `inv` with these arguments in the folder `root`."""
        self._count += 1
        out = self._folder / f"said-{self._count}"
        out.touch()  # the child may be killed before it could
        order = {"argv": argv, "cwd": str(root), "env": env, "out": str(out)}
        pid = self.ask(order | {"injection": asdict(injection)})
        return Child(pid, out)

    def wait(self, child: Child, limit: float = LIMIT) -> Result:
        """Wait for a child; after `limit` seconds it is killed, and its code is -99."""
        code = self.ask({"wait": child.pid, "limit": limit})
        output = child.out.read_text(errors="replace")
        child.out.unlink()
        return Result(code, output, time.monotonic() - child.began)

    def run(
        self,
        root: Path,
        argv: tuple[str, ...],
        env: dict[str, str],
        injection: Injection | None = None,
    ) -> Result:
        """Run `inv` to its end."""
        return self.wait(self.start(root, argv, env, injection or Injection()))


# ---- the forking process


def _import_everything() -> None:
    """Import the package but for the room that imports torch, and make its blocks small."""
    for module in pkgutil.walk_packages(csm_weights.__path__, "csm_weights."):
        if not module.name.startswith(("csm_weights.model", "csm_weights.api")):
            importlib.import_module(module.name)
    for name in ("filelock", "invoke.main", "requests"):
        importlib.import_module(name)
    _set_sizes("store.block_io", STEP=SMALL)
    _set_sizes("transfer.reorder", BLOCK=SMALL, READ_BACK=8 * SMALL)
    _set_sizes("transfer.http.ranges", BLOCK=SMALL)
    _set_sizes("transfer.http.lines", SPAN=2 * SMALL)
    _set_sizes("transfer.consume", STEP=SMALL)


def _set_sizes(name: str, **sizes: int) -> None:
    module = sys.modules[f"csm_weights.{name}"]
    for constant, size in sizes.items():
        assert hasattr(module, constant), f"{name} has no {constant} any more"
        setattr(module, constant, size)


def _serve() -> None:
    sys.dont_write_bytecode = True
    _import_everything()
    print(json.dumps(0), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = _wait(order["wait"], order["limit"])
        elif order:
            answer = os.fork() or _child(order)
        else:
            continue
        print(json.dumps(answer), flush=True)


def _wait(pid: int, limit: float) -> int:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGUSR2)  # the child prints where its threads are
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -99


def _child(order: dict[str, Any]) -> int:
    code = 70
    try:
        code = _run(order)
    except KeyboardInterrupt:
        code = 1  # before the command had begun; invoke ends so too
    except BaseException as error:  # whatever it is, the child ends here
        with contextlib.suppress(Exception):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _run(order: dict[str, Any]) -> int:
    from invoke.main import program

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept | order["env"])
    fd = os.open(order["out"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0), os.dup2(fd, 1), os.dup2(fd, 2)
    faulthandler.register(signal.SIGUSR2)
    injection = Injection(**order["injection"])
    if injection.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tracer = install(injection) if injection.roots else None
    try:
        program.run(["inv", *order["argv"]])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        if tracer:
            tracer.dump()
    return 0


if __name__ == "__main__":
    _serve()

"""A temporary clone of this checkout, in which tests run `inv` and `make` as a person does."""

from __future__ import annotations

import atexit
import compileall
import functools
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import prefork

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
INV = BIN / "inv"

#: The chunk files that a clone gets: a repository of the real weights has 12 GB of others.
EMBEDDED = "chunks/csm-tiny/"

#: The variables of the caller that commands see; no other may change what a test finds.
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

#: Folders that no command writes to: clones share their files.
CODE = ("csm_weights", "docs", "tests", "tools", "benchmarks")

#: Seconds after which a command counts as hanging.
LIMIT = 120.0

Result = subprocess.CompletedProcess[str]
Tree = dict[str, tuple[int, int, int]]


def copy_tiny(root: Path) -> Path:
    """Copy csm-tiny's manifest and chunk files below `root`, which is no checkout; return it."""
    shutil.copytree(REPOSITORY / EMBEDDED, root / EMBEDDED)
    (root / "manifests").mkdir()
    shutil.copy(REPOSITORY / "manifests" / "csm-tiny.toml", root / "manifests")
    return root


@dataclass(frozen=True)
class Clone:
    """A checkout of its own, without the chunk files of CSM-1B, in which nothing has run yet.

    `extra` is a folder before all others on the module path of what runs in the clone.
    `variables` are set in its environment.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    extra: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", self.root.parent / f"{self.root.name}.extra")

    @classmethod
    def make(cls, root: Path) -> Clone:
        """Copy the files that git knows or would add, and link a virtual environment."""
        shutil.copytree(_template(), root, copy_function=_copy, symlinks=True, dirs_exist_ok=True)
        clone = cls(root)
        clone.extra.mkdir()
        return clone

    @property
    def installed(self) -> Path:
        """Return the folder in which csm-tiny is installed."""
        return self.root / "models" / "csm-tiny"

    @property
    def staged(self) -> Path:
        """Return the staging folder of csm-tiny."""
        return self.root / "output" / "csm-tiny"

    def chunk_files(self, name: str) -> list[Path]:
        """Return the chunk files of a file of csm-tiny, in order."""
        return sorted((self.root / EMBEDDED).rglob(f"{name}.part-*"))

    def joined(self, name: str) -> bytes:
        """Return the chunk files of a file of csm-tiny, joined as `cat` would."""
        return b"".join(part.read_bytes() for part in self.chunk_files(name))

    def fake(self, module: str, code: str) -> None:
        """Put a module with that code before the real one of that name."""
        path = self.extra / f"{module}.py"
        path.write_text(code)

    def environment(self) -> dict[str, str]:
        """Return the environment for commands: little of the caller's, and a home of their own.

        torch gets one thread: several threads on cores that other tests use spin far longer than
        the tiny model takes.
        """
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        own = {"HOME": str(self.extra), "PYTHONPATH": str(self.extra), "OMP_NUM_THREADS": "1"}
        return kept | own | self.variables

    def run(
        self, *command: str | Path, limit: float = LIMIT, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run a command in the clone to its end, for at most `limit` seconds.

        `env` is added to its environment.
        """
        result = subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        return _without_delays(result)

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the clone, in a process group of its own; `env` as for `run`."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def inv(self, *arguments: str, limit: float = LIMIT) -> Result:
        """Run `inv` for at most `limit` seconds, in a fork unless the start of Python matters."""
        at_start = prefork.READ_AT_START
        # Coverage tells tests apart by the environment of what they start.
        if (
            "COVERAGE_PROCESS_START" in os.environ
            or any(self.extra.glob("*.py"))
            or any(n.startswith(at_start) for n in self.variables)
        ):
            return self.run(INV, *arguments, limit=limit)
        environment = self.environment()
        started = {name: environment[name] for name in environment if name.startswith(at_start)}
        started.pop("PYTHONPATH")
        server = prefork.server(tuple(started.items()))
        return _without_delays(server.run(INV, arguments, self.root, environment, limit))

    def make_target(self, *arguments: str) -> Result:
        """Run `make` with these arguments."""
        return self.run("make", *arguments)

    def tree(self) -> Tree:
        """Return inode, time of writing (ns) and bytes of every file and folder, but caches."""
        found = (p for p in self.root.rglob("*") if "__pycache__" not in p.parts)
        return {p.relative_to(self.root).as_posix(): _stamp(p.lstat()) for p in found}


def _without_delays(result: Result) -> Result:
    """Take away the lines that name work that takes long: they come on a busy machine alone."""
    result.stderr = re.sub(r"(?m)^[\w ,./-]+(?: \.\.\.|: \d+ s so far)\n", "", result.stderr)
    return result


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    # A folder's time and size change with Python's caches in it.
    if stat.S_ISDIR(status.st_mode):
        return status.st_ino, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


@functools.cache
def _template() -> Path:
    """Make the checkout that the clones of this process are copies of, its modules compiled."""
    folder = Path(tempfile.mkdtemp(prefix="csm-clone-"))
    atexit.register(shutil.rmtree, folder)
    for name in _names():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    compileall.compile_dir(folder / "csm_weights", quiet=1)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(BIN)
    for stamp in (".base", ".smoke", ".speak", ".test"):
        (folder / ".venv" / stamp).touch()
    return folder


def _copy(source: str, target: str) -> None:
    is_code = Path(source).relative_to(_template()).parts[0] in CODE
    is_near = Path(source).stat().st_dev == Path(target).parent.stat().st_dev
    if is_code and is_near:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def _names() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    embedded = (EMBEDDED, "chunks/mimi-tiny/")
    wanted = (n for n in names if not n.startswith("chunks/") or n.startswith(embedded))
    return tuple(name for name in wanted if (REPOSITORY / name).is_file())

"""A temporary clone of this checkout, driven as a person does: by `inv` and `make`."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
INV = BIN / "inv"

#: The parts that a clone gets: a repository of the real weights has 12 GB of others.
EMBEDDED = "chunks/csm-tiny/"

#: Whatever else the caller's environment says must not decide what a test finds.
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

#: Seconds after which a command is taken to hang.
LIMIT = 120.0

Result = subprocess.CompletedProcess[str]
Tree = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Clone:
    """A checkout of its own, without parts of CSM-1B, in which nothing has run yet.

    `extra` is a folder before all others on the module path of what runs in it.
    `variables` are set for what runs in it.
    """

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    extra: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", self.root.parent / f"{self.root.name}.extra")

    @classmethod
    def make(cls, root: Path) -> Clone:
        """Copies the files that git knows or would take, and a virtual environment by link."""
        for name in _names():
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target)
        venv = root / ".venv"
        venv.mkdir()
        (venv / "bin").symlink_to(BIN)
        for stamp in (".base", ".smoke", ".test"):
            (venv / stamp).touch()
        clone = cls(root)
        clone.extra.mkdir()
        return clone

    @property
    def placed(self) -> Path:
        """The folder of csm-tiny in place."""
        return self.root / "models" / "csm-tiny"

    @property
    def staged(self) -> Path:
        """The staging folder of csm-tiny."""
        return self.root / "output" / "csm-tiny"

    def parts(self, name: str) -> list[Path]:
        """The parts of a file of csm-tiny, in order."""
        return sorted((self.root / EMBEDDED).rglob(f"{name}.part-*"))

    def joined(self, name: str) -> bytes:
        """What `cat` makes of the parts of a file of csm-tiny."""
        return b"".join(part.read_bytes() for part in self.parts(name))

    def fake(self, module: str, code: str) -> None:
        """Puts a module of that code before the real one of that name."""
        path = self.extra / f"{module}.py"
        path.write_text(code)

    def environment(self) -> dict[str, str]:
        """What commands see of the caller's environment, and a home of their own.

        One thread for torch: several of it on cores that other tests use spin
        far longer than the tiny model takes.
        """
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        own = {"HOME": str(self.extra), "PYTHONPATH": str(self.extra), "OMP_NUM_THREADS": "1"}
        return kept | own | self.variables

    def run(
        self, *command: str | Path, limit: float = LIMIT, env: Mapping[str, str] | None = None
    ) -> Result:
        """Runs a command in the clone to its end, at most `limit` seconds away.

        `env` is added to what it sees of the environment.
        """
        return subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command in the clone, in a process group of its own; `env` as for `run`."""
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

    def inv(self, *arguments: str) -> Result:
        """`inv` with these arguments."""
        return self.run(INV, *arguments)

    def make_target(self, *arguments: str) -> Result:
        """`make` with these arguments."""
        return self.run("make", *arguments)

    def tree(self) -> Tree:
        """Every file and folder but Python's caches: inode, time of writing (ns), size."""
        found = (p for p in self.root.rglob("*") if "__pycache__" not in p.parts)
        return {p.relative_to(self.root).as_posix(): _stamp(p.lstat()) for p in found}


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    # Time and size of a folder change with Python's caches in it.
    if stat.S_ISDIR(status.st_mode):
        return status.st_ino, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


@functools.cache
def _names() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    wanted = (n for n in names if not n.startswith("chunks/") or n.startswith(EMBEDDED))
    return tuple(name for name in wanted if (REPOSITORY / name).is_file())

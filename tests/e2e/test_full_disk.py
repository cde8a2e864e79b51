"""A disk that fails at any one moment: the exit code, what is kept, and the next run."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from csm_weights.commands import lock as locking
from csm_weights.errors import CsmWeightsError, from_os_error
from csm_weights.manifest import parse
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.store import block_io
from csm_weights.store.consumed import CONSUMING_ROOM
from csm_weights.transfer import consume
from tests.support.clone import Clone
from tests.support.toy import Toy

MIB = 1 << 20

#: What a full disk, or a limit, refuses; a broken or closed one refuses everything.
_GROWING = frozenset({"open", "write", "pwrite", "fsync", "fdatasync", "mkdir", "replace"})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_ACTS = (*sorted(_GROWING), "ftruncate", "unlink", "link")


class Act(enum.Enum):
    """The fault at one call that changes the disk."""

    NOTHING = "nothing"
    FAIL = "an error, at this act and at those after it"
    GLITCH = "an error, at this act alone"
    KILL = "SIGKILL before it"
    TEAR = "SIGKILL when half of it is written"
    CUT = "the power goes before it, and with it what was not made durable"


class Tripwire:
    """A counter of calls on files below a folder; at the `at`-th of them `act` happens."""

    def __init__(self, root: Path, at: int = 0, act: Act = Act.NOTHING, code: int = 0) -> None:
        self.names: list[str] = []
        self._root = str(root)
        self._at, self._act, self._code = at, act, code
        self._lock = threading.Lock()
        self._real: dict[str, Any] = {name: getattr(os, name) for name in _ACTS}
        self._punch = block_io.punch
        self._durable: dict[str, bytes] = {}
        self._written: set[str] = set()

    def __enter__(self) -> Tripwire:
        for name in _ACTS:
            setattr(os, name, self._watched(name, self._real[name]))
        consume.punch = self._watched("punch", self._punch)  # type: ignore[attr-defined]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in _ACTS:
            setattr(os, name, self._real[name])
        consume.punch = self._punch  # type: ignore[attr-defined]

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            path = self._path(arguments[0])
            if not path.startswith(self._root) or not self._counts(name, arguments):
                return real(*arguments, **options)
            with self._lock:
                self.names.append(name)
                self._meet(name, arguments)
                done = real(*arguments, **options)
                self._remember(name, path, arguments)
                return done

        return watched

    @property
    def count(self) -> int:
        """The number of calls."""
        return len(self.names)

    def _path(self, of: Any) -> str:
        return str(Path(f"/proc/self/fd/{of}").readlink() if isinstance(of, int) else Path(of))

    def _counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "open":
            return bool(arguments[1] & os.O_CREAT)
        return self._code not in _FULL or name in _GROWING

    def _meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        is_now = self.count == self._at
        fails = (self._act is Act.GLITCH and is_now) or (
            self._act is Act.FAIL and self._at and self.count >= self._at
        )
        if fails:
            raise OSError(self._code, os.strerror(self._code))
        if is_now and self._act is Act.TEAR and name in ("write", "pwrite"):
            fd, data, *rest = arguments
            # A direct write takes no half block; then nothing of it is written.
            with contextlib.suppress(OSError):
                self._real[name](fd, bytes(data)[: len(data) // 2], *rest)
        if is_now and self._act is Act.CUT:
            self._lose()
        if is_now and self._act in (Act.KILL, Act.TEAR, Act.CUT):
            os.kill(os.getpid(), signal.SIGKILL)

    def _remember(self, name: str, path: str, arguments: tuple[Any, ...]) -> None:
        """Keep what would survive a power cut: the files as they were when last made durable."""
        if name in ("write", "pwrite", "ftruncate"):
            self._written.add(path)
        elif name in ("fsync", "fdatasync") and Path(path).is_file():
            self._durable[path] = Path(path).read_bytes()
        elif name == "replace" and path in self._written:
            new = os.fspath(arguments[1])
            self._written.add(new)
            self._durable[new] = self._durable.pop(path, b"")

    def _lose(self) -> None:
        for path in self._written:
            if path not in self._durable:
                with contextlib.suppress(FileNotFoundError):
                    self._real["unlink"](path)
            elif Path(path).exists():
                with Path(path).open("wb") as file:
                    file.write(self._durable[path])


# ---- one fault, at every call


def fetch(toy: Toy) -> None:
    apply.apply(toy.request("b.bin"), Target.STAGED)


def place(toy: Toy) -> None:
    apply.apply(toy.request("b.bin"), Target.PLACED)


def line(toy: Toy) -> None:
    apply.weights(toy.request("b.bin"), smoke=False)


def lock(toy: Toy) -> None:
    locking.lock(toy.request("b.bin"), False, "")


def nothing(toy: Toy) -> None:
    """Prepare nothing before a fetch."""


FAULTS = [
    (errno.ENOSPC, Act.FAIL),
    (errno.EDQUOT, Act.FAIL),
    (errno.EROFS, Act.FAIL),
    (errno.EIO, Act.GLITCH),
]


def exit_code(error: BaseException) -> int:
    """The exit code that a task ends with for an error."""
    if isinstance(error, OSError):
        error = from_os_error(error)
    assert isinstance(error, CsmWeightsError), repr(error)
    return error.exit_code


def good_bytes(toy: Toy) -> dict[Path, bytes]:
    """The bytes that no fault may change: every chunk file, and each file with a final name."""
    chunk_files = [toy.root / p.part for a in toy.manifest.artifacts for p in a.pieces]
    names = [a.path for a in toy.manifest.artifacts]
    named = [f for n in names for f in (toy.staged(n), toy.installed(n)) if f.exists()]
    return {path: path.read_bytes() for path in (*chunk_files, *named)}


@pytest.mark.parametrize(("before", "act"), [(nothing, fetch), (fetch, place), (line, lock)])
@pytest.mark.parametrize(("code", "how"), FAULTS)
def test_a_fault_at_any_act_costs_nothing_that_was_good(
    tmp_path: Path,
    before: Callable[[Toy], None],
    act: Callable[[Toy], None],
    code: int,
    how: Act,
) -> None:
    """Wherever the disk fails: exit 7 or 4, what was good is kept, and a plain run finishes."""
    (tmp_path / "model").mkdir()
    model = Toy.make(tmp_path / "model")
    before(model)
    total = acts_of(model, tmp_path / "whole", act, code)
    assert total > 3
    for at in range(1, total + 1):
        toy = copy_of(model, tmp_path / "toy")
        there = good_bytes(toy)
        failed = False
        try:
            with Tripwire(toy.root, at, how, code):
                act(toy)
        except (CsmWeightsError, OSError) as error:
            failed = True
            assert exit_code(error) in (4, 7), (at, error)
        # How many writes a piece takes depends on the threads; and one fault may be mended.
        assert failed or how is Act.GLITCH or at > total - 3, at
        assert nothing_is_worse(toy, there), at
        line(toy)
        assert toy.installed("b.bin").read_bytes() == toy.good("b.bin"), at
        shutil.rmtree(toy.root)


def copy_of(model: Toy, root: Path) -> Toy:
    """A copy of a toy, receipts included: with its times, but other inodes."""
    shutil.copytree(model.root, root)
    return Toy(root, model.manifest)


def acts_of(model: Toy, root: Path, act: Callable[[Toy], None], code: int) -> int:
    toy = copy_of(model, root)
    with Tripwire(root, code=code) as wire:
        act(toy)
    return wire.count


def nothing_is_worse(toy: Toy, there: dict[Path, bytes]) -> bool:
    """Whether the chunk files are unchanged, and every file with a final name is right."""
    parse.load(toy.root / "manifests" / "toy.toml")
    now = good_bytes(toy)
    chunk_files = {path for path in there if "chunks" in path.parts}
    whole = {path for path in now if path not in chunk_files}
    kept = {path.name for path in there if path not in chunk_files}
    return (
        all(now[path] == there[path] for path in chunk_files)
        and all(now[path] == toy.good(path.name) for path in whole)
        and kept <= {path.name for path in whole}
    )


# ---- real file systems


@contextmanager
def mounted(kind: str, size: int, folder: Path) -> Iterator[Path]:
    """A fresh file system of `size` bytes on an empty folder."""
    if os.geteuid() != 0 or not shutil.which(f"mkfs.{kind}"):
        pytest.skip(f"mounting needs root and mkfs.{kind}")
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size)
    force = {"ext4": ["-F"], "xfs": ["-f"], "btrfs": ["-f"]}.get(kind, [])
    subprocess.run([f"mkfs.{kind}", *force, str(image)], check=True, capture_output=True)
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop mount of {kind} here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        image.unlink()


def model_on(folder: Path, count: int, size: int) -> Clone:
    """A clone with the chunk files of one file, each of `size` bytes."""
    clone = Clone.make(folder / "clone")
    large = clone.root / "large.bin"
    with large.open("wb") as file:
        for _ in range(count * size // MIB):
            file.write(os.urandom(MIB))
    into = ("--size", str(size), "--chunks", "chunks/large", "--manifest", "manifests/large.toml")
    assert clone.inv("split", "large.bin", *into).returncode == 0
    large.unlink()
    return clone


LARGE = ("--model", "large", "--no-smoke")


class Peak:
    """The most bytes that were used of a file system while this was open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.before = self.most = self._used()

    def _used(self) -> int:
        return shutil.disk_usage(self._folder).used

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._used())

    def __enter__(self) -> Peak:
        os.sync()
        self.before = self.most = self._used()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.full
@pytest.mark.parametrize("count", [4, 12])
def test_a_disk_with_room_for_one_step_is_enough(tmp_path: Path, count: int) -> None:
    """On ext4 the exit code is 7 without --consume; with it 0, and the peak is below 128 MiB."""
    size = 64 * MIB
    with mounted("ext4", (2 * count * 64 + 200) * MIB, tmp_path / "disk") as disk:
        clone = model_on(disk, count, size)
        free = shutil.disk_usage(disk).free
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - CONSUMING_ROOM - 8 * MIB)
        refused = clone.inv("weights", *LARGE)
        assert refused.returncode == 7
        assert "too few" in " ".join(refused.stderr.split())
        assert "--consume needs only" in " ".join(refused.stderr.split())
        with Peak(disk) as peak:
            done = clone.inv("weights", *LARGE, "--consume")
        assert done.returncode == 0, done.stderr
        assert peak.most - peak.before < 128 * MIB
        assert clone.inv("verify", "--model", "large").returncode == 0


@pytest.mark.full
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_sharing_file_systems_need_no_consuming(tmp_path: Path, kind: str) -> None:
    """On XFS and Btrfs --consume shares blocks, which takes no disk, and says so."""
    with mounted(kind, 512 * MIB, tmp_path / "disk") as disk:
        clone = model_on(disk, 3, 16 * MIB)
        done = clone.inv("weights", *LARGE, "--consume")
        assert done.returncode == 0, done.stderr
        assert "there is nothing to consume" in " ".join(done.stdout.split())
        assert len(list((clone.root / "chunks" / "large").iterdir())) == 4


@pytest.mark.full
def test_a_file_system_that_can_do_neither_says_so(tmp_path: Path) -> None:
    """On vfat too little room is 7, and the message says that --consume cannot help."""
    with mounted("vfat", 128 * MIB, tmp_path / "disk") as disk:
        clone = model_on(disk, 2, 24 * MIB)
        with (disk / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 8 * MIB))
        refused = clone.inv("weights", *LARGE, "--consume")
        assert refused.returncode == 7
        assert "vfat cannot free parts of a file" in " ".join(refused.stderr.split())

"""`--consume` in the room that is documented: killed again and again on a nearly full disk.

`python -m tools.torture.room [--gib N] [--kills 20] [--seed 1] [--folder DIR]` (`make
torture-room`). An ext4 image gets the chunk files of a stand-in of CSM-1B's size (with
--gib, of two files that have that size together) and 66 MiB of room. `inv weights --consume`
is killed (SIGKILL) while it moves their bytes, once in each part of the way; every second
run is one without --consume, for the file that was begun. Then it runs to its end, and all
bytes are compared.

Exit code 1 if a run ended badly by itself, or a byte is wrong; 77, with the reason, where no
such disk can be made: it needs root, mkfs.ext4, a loop device, and twice the bytes in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csm_weights.manifest.parse import load
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.store.journal import journal_path, partial_path, read_journal
from tests.support.clone import INV, Clone

MIB, GIB = 1 << 20, 1 << 30

#: Bytes that are free on the disk before the first run.
ROOM = 66 * MIB

#: Bytes of both stand-in files, as published, and the name of their model.
FULL = 6_211_186_784 + 6_219_618_714
STANDIN = "csm-1b-standin"

#: Seconds after which a run counts as hanging.
LIMIT = 3600.0


class Skipped(Exception):
    """The reason why this machine cannot make the disk."""


def main() -> int:
    """Make the disk, kill, finish, compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.torture.room", description=__doc__)
    parser.add_argument("--gib", type=float, default=0, help="of both files; 0 is full size")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    size = int(options.gib * GIB) or FULL
    try:
        with tempfile.TemporaryDirectory(prefix="room-", dir=options.folder) as folder:
            return _torture(Path(folder), size, options.kills, random.Random(options.seed))
    except Skipped as why:
        print(f"skipped: {why}")
        return 77


def _torture(folder: Path, size: int, kills: int, rng: random.Random) -> int:
    with _disk(folder, size * 104 // 100 + GIB) as disk:
        made, clone = Clone.make(folder / "made"), Clone.make(disk / "clone")
        manifest = _make_files(made, size)
        parts = [piece.part for artifact in manifest.artifacts for piece in artifact.pieces]
        for name in (f"manifests/{manifest.name}.toml", *parts):
            (clone.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made.root / name, clone.root / name)
        _fill(disk / "filler")
        print(f"{size:,} bytes of chunk files, {_free(disk):,} bytes free", flush=True)
        for number in range(kills):
            after = int(size * (number + rng.random()) / kills)
            if not _kill(clone, manifest, after, with_consume=number % 2 == 0):
                return 1
            moved = _moved(clone, manifest)
            print(f"kill {number + 1}: {moved:,} bytes moved, {_free(disk):,} free", flush=True)
        model = ("--model", manifest.name)
        done = clone.run(INV, "weights", *model, "--no-smoke", "--consume", limit=LIMIT)
        verified = clone.run(INV, "verify", *model, limit=LIMIT)
        print(done.stdout, done.stderr, verified.stderr)
        wrong = [a.path for a in manifest.artifacts if a.pieces and not _is_right(clone, a)]
        left = [part for part in parts if (clone.root / part).exists()]
        codes = (done.returncode, verified.returncode)
        print(f"weights and verify: {codes}; wrong files: {wrong}; chunk files left: {left}")
    return int(codes != (0, 0) or bool(wrong or left))


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount an ext4 file system of that size in a folder."""
    free = _free(folder)
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        raise Skipped("making a disk needs root and mkfs.ext4")
    if free < 2 * size:
        raise Skipped(f"{2 * size:,} bytes are needed in {folder}, {free:,} are free: use --gib")
    image, disk = folder / "ext4.img", folder / "disk"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    disk.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no loop mount here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def _make_files(clone: Clone, size: int) -> Manifest:
    """Make the chunk files of both files, and return their manifest."""
    if size == FULL:
        done = clone.run(INV, "standin", "--name", STANDIN, limit=LIMIT)
        assert done.returncode == 0, done.stderr
        return load(clone.root / "manifests" / f"{STANDIN}.toml")
    for name in ("a.bin", "b.bin"):
        file = clone.root / name
        with file.open("wb") as output:
            for _ in range(size // 2 // MIB):
                output.write(os.urandom(MIB))
        into = ("--chunks", f"chunks/room/{name}", "--manifest", "manifests/room.toml")
        done = clone.inv("split", name, "--size", str(size // 12), *into)
        assert done.returncode == 0, done.stderr
        file.unlink()
    return load(clone.root / "manifests" / "room.toml")


def _fill(file: Path) -> None:
    """Fill a disk but for the room."""
    with file.open("wb") as filler:
        while True:
            os.sync()
            more = _free(file.parent) - ROOM
            if more < 4096:
                return
            os.posix_fallocate(filler.fileno(), file.stat().st_size, more // 4096 * 4096)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _staged(clone: Clone, manifest: Manifest) -> dict[Path, Artifact]:
    """Return the artifacts that have chunk files, by the path of the staged file."""
    folder = clone.root / manifest.staging
    return {folder / a.path: a for a in manifest.artifacts if a.pieces}


def _moved(clone: Clone, manifest: Manifest) -> int:
    """Return how many bytes the journals, or finished files, say have moved."""
    moved = 0
    for staged, artifact in _staged(clone, manifest).items():
        if staged.exists() or (clone.root / manifest.destination / artifact.path).exists():
            moved += artifact.size
        else:
            moved += sum(record.consumed for record in read_journal(staged, artifact).consumed)
    return moved


def _kill(clone: Clone, manifest: Manifest, after: int, with_consume: bool) -> bool:
    """Kill a run once it moves bytes and that many have moved; return whether that was done."""
    staged = _staged(clone, manifest)
    begun = [artifact.path for path, artifact in staged.items() if partial_path(path).exists()]
    options = ["--consume"] if with_consume or not begun else ["--only", begun[0]]
    command = [str(INV), "weights", "--model", manifest.name, "--no-smoke", *options]
    before = [_stamp(journal_path(path)) for path in staged]
    with (clone.root.parent / "said").open("w+") as said:
        run = subprocess.Popen(
            command, cwd=clone.root, env=clone.environment(), stdout=said, stderr=said
        )
        ends = time.monotonic() + LIMIT
        while run.poll() is None and time.monotonic() < ends:
            is_moving = [_stamp(journal_path(path)) for path in staged] != before
            if is_moving and _moved(clone, manifest) >= after:
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        if run.wait(LIMIT) == -signal.SIGKILL:
            return True
        if run.returncode == 0 and not with_consume:
            # It has finished the file that was begun; the other one needs --consume.
            return _kill(clone, manifest, after, with_consume=True)
        said.seek(0)
        print(f"{' '.join(command)} ended with {run.returncode}:\n{said.read()}")
    return False


def _stamp(path: Path) -> tuple[int, int] | None:
    status = path.stat() if path.exists() else None
    return (status.st_ino, status.st_size) if status else None


def _is_right(clone: Clone, artifact: Artifact) -> bool:
    """Hash an installed file by hashlib alone, piece by piece."""
    file = next(clone.root.glob(f"models/*/{artifact.path}"), None)
    if file is None or file.stat().st_size != artifact.size:
        return False
    with file.open("rb") as content:
        for piece in artifact.pieces:
            digest = hashlib.sha256()
            for _ in range(0, piece.size, MIB):
                digest.update(content.read(min(MIB, piece.end - content.tell())))
            if digest.hexdigest() != piece.sha256:
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())

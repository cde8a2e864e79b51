"""Sealing: read-only, fs-verity where there is, and everything goes on as before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from csm_weights.commands import verify
from csm_weights.commands.clean import clean
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.commands.seal import seal_placed
from csm_weights.errors import CsmWeightsError, Kind, NoSpace, WrongContent
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.session import Outcome
from csm_weights.store import install
from csm_weights.store.inspect import FileState
from csm_weights.store.journal import partial_path
from csm_weights.store.receipts import Receipt, load_receipt, receipt_path
from csm_weights.verify import seal
from tests.support.toy import Toy, flip

#: What linux/fsverity.h says: the two ioctls, and the argument for SHA-256 and 4,096-byte blocks.
ENABLE, MEASURE = 0x40806685, 0xC0046686
ARGUMENT = struct.pack("=4I", 1, 1, 4096, 0) + bytes(112)


def weights(toy: Toy, *only: str, dest: str | None = None) -> Outcome:
    """`inv weights --seal`."""
    request = toy.request(*only, dest=dest)
    return seal_placed(request, apply.weights(request, smoke=False))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def receipt_of(toy: Toy, path: str) -> Receipt:
    found = load_receipt(receipt_path(toy.root / "models/toy", path).read_text())
    assert found is not None
    return found


class Kernel:
    """A kernel with fs-verity, as far as the ioctls show it; `refusals` are answered first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *refusals: int) -> None:
        self.refusals = list(refusals)
        self.sealed: set[int] = set()
        self.asked: list[bytes] = []
        self.real = fcntl.ioctl
        self.before: Callable[[], None] = lambda: None
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, fd: int, request: int, argument: bytes) -> bytes:
        if request not in (ENABLE, MEASURE):
            return self.real(fd, request, argument)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        inode = os.fstat(fd).st_ino
        if request == MEASURE:
            assert struct.unpack_from("=HH", argument) == (0, len(argument) - 4)
            if inode not in self.sealed:
                raise OSError(errno.ENODATA, "No data available")
            return argument
        self.asked.append(argument)
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        self.before()
        self.sealed.add(inode)
        os.utime(fd)  # as ext4 does
        return argument


def test_files_are_read_only_and_stay_proven(toy: Toy) -> None:
    """Every installed file is 0444, and its receipt still fits it."""
    outcome = weights(toy)
    paths = [a.path for a in toy.manifest.artifacts]
    assert [mode(toy.installed(path)) for path in paths] == [0o444] * 3
    assert [s.path for s in outcome.sealed] == paths
    assert {i.installed.state for i in outcome.state.artifacts} == {FileState.VERIFIED}
    assert apply.status(toy.request(), check=True).error is None


def test_the_result_says_which_was_done(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result tells read-only alone from fs-verity, as text and as JSON."""
    kernel = Kernel(monkeypatch, errno.EOPNOTSUPP)
    outcome = weights(toy, "a.bin", "b.bin")
    assert [s.verity for s in outcome.sealed] == [False, True]
    assert len(kernel.sealed) == 1
    lines = [line for line in as_text.render(outcome).splitlines() if "read-only" in line]
    assert [(line.split()[0], line.partition("read-only")[2]) for line in lines] == [
        ("a.bin", " (no fs-verity here)"),
        ("b.bin", ", fs-verity"),
    ]
    assert [s["verity"] for s in json.loads(as_json.render(outcome))["sealed"]] == [0, 1]


def test_the_kernel_is_asked_for_sha256_over_4096_bytes(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument is struct fsverity_enable_arg without salt or signature."""
    kernel = Kernel(monkeypatch)
    weights(toy, "a.bin")
    assert kernel.asked == [ARGUMENT]


def test_what_the_kernel_froze_is_what_is_proven(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes just before the kernel takes the file is found after it has."""
    kernel = Kernel(monkeypatch)
    apply.weights(toy.request("a.bin"), smoke=False)
    kernel.before = lambda: flip(toy.installed("a.bin"))
    with pytest.raises(WrongContent, match="while it was being sealed"):
        weights(toy, "a.bin")
    assert apply.status(toy.request("a.bin"), check=True).error is not None


def test_fs_verity_keeps_where_the_pieces_came_from(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is renewed for the new time of writing, and keeps everything else."""
    Kernel(monkeypatch)
    weights(toy, "a.bin")
    sources = [piece.source for piece in receipt_of(toy, "a.bin").pieces]
    assert sources == [piece.part for piece in toy.artifact("a.bin").pieces]
    assert apply.status(toy.request("a.bin"), check=True).error is None


def test_sealing_again_does_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run finds everything sealed, and touches neither file nor receipt."""
    kernel = Kernel(monkeypatch)
    weights(toy, "a.bin")
    before = toy.installed("a.bin").stat(), receipt_path(toy.root / "models/toy", "a.bin").stat()
    again = weights(toy, "a.bin")
    after = toy.installed("a.bin").stat(), receipt_path(toy.root / "models/toy", "a.bin").stat()
    assert [(s.st_ino, s.st_ctime_ns) for s in before] == [(s.st_ino, s.st_ctime_ns) for s in after]
    assert (again.sealed[0].verity, len(kernel.asked)) == (True, 1)


def test_no_other_permission_is_left(toy: Toy) -> None:
    """Nobody may write to a sealed file or run it, whoever could before."""
    apply.weights(toy.request("a.bin"), smoke=False)
    toy.installed("a.bin").chmod(0o777)
    weights(toy, "a.bin")
    assert mode(toy.installed("a.bin")) == 0o444


def test_what_is_in_place_already_can_be_sealed(toy: Toy) -> None:
    """Files that an earlier run has installed are sealed without being made again."""
    apply.weights(toy.request(), smoke=False)
    inode = toy.installed("a.bin").stat().st_ino
    outcome = weights(toy)
    assert (outcome.actions, mode(toy.installed("a.bin"))) == ((), 0o444)
    assert toy.installed("a.bin").stat().st_ino == inode


def test_a_read_only_file_gets_fs_verity(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel wants a file that may be written, it may be for that moment only."""
    weights(toy, "a.bin")
    kernel = Kernel(monkeypatch, errno.EACCES)
    assert weights(toy, "a.bin").sealed[0].verity
    assert (len(kernel.asked), mode(toy.installed("a.bin"))) == (2, 0o444)
    assert apply.status(toy.request("a.bin"), check=True).error is None


BUSY = "a program that has it open for writing"


@pytest.mark.parametrize(
    ("number", "kind", "expected", "found", "code"),
    [
        (errno.ETXTBSY, Kind.CHANGED, "a file that does not change", BUSY, 4),
        (errno.ENOSPC, Kind.NO_SPACE, "room for its hash tree", "No space left on device", 7),
        (errno.EDQUOT, Kind.NO_SPACE, "room for its hash tree", "Disk quota exceeded", 7),
        (errno.EROFS, Kind.NOT_WRITABLE, "a file that this user may seal", None, 7),
        (errno.EIO, Kind.UNREADABLE, "a file or folder that can be used", None, 4),
    ],
)
def test_what_a_kernel_with_fs_verity_refuses_is_told(
    toy: Toy,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: Kind,
    expected: str,
    found: str | None,
    code: int,
) -> None:
    """A busy file or a full disk is an error; the file stays as it was, installed and verified."""
    Kernel(monkeypatch, number)
    with pytest.raises(CsmWeightsError) as caught:
        weights(toy, "a.bin")
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (kind, str(toy.installed("a.bin")))
    assert (finding.expected, finding.found) == (expected, found or os.strerror(number))
    assert caught.value.exit_code == code
    assert apply.status(toy.request("a.bin"), check=True).error is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_is_no_fs_verity_the_kernel_is_asked_once(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Only for EACCES is the file made writable and the kernel asked again."""
    kernel = Kernel(monkeypatch, number)
    assert [sealed.verity for sealed in weights(toy, "a.bin").sealed] == [False]
    assert (len(kernel.asked), mode(toy.installed("a.bin"))) == (1, 0o444)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_have_no_fs_verity(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Their kernels are not asked with Linux's numbers; the file is read-only all the same."""
    kernel = Kernel(monkeypatch)
    request = toy.request("a.bin")
    outcome = apply.weights(request, smoke=False)
    monkeypatch.setattr(sys, "platform", system)
    assert [sealed.verity for sealed in seal_placed(request, outcome).sealed] == [False]
    assert (kernel.asked, mode(toy.installed("a.bin"))) == ([], 0o444)


def test_another_ones_file_cannot_be_sealed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the permissions cannot be changed, the error says whose act it is."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(NoSpace, match="its owner"):
        weights(toy, "a.bin")


def test_a_link_in_place_is_not_sealed(toy: Toy) -> None:
    """What a link leads to keeps its permissions; the error names the link."""
    apply.weights(toy.request("a.bin"), smoke=False)
    real = toy.root / "real"
    toy.installed("a.bin").rename(real)
    toy.installed("a.bin").symlink_to(real)
    with pytest.raises(WrongContent, match=r"a\.bin"):
        weights(toy, "a.bin")
    assert mode(real) == 0o644


def test_a_file_that_was_changed_meanwhile_is_not_sealed(toy: Toy) -> None:
    """A receipt that does not fit the file seals nothing."""
    apply.weights(toy.request("a.bin"), smoke=False)
    receipt = receipt_of(toy, "a.bin")
    os.utime(toy.installed("a.bin"))
    with pytest.raises(WrongContent, match="only verified files are sealed") as caught:
        seal.seal(toy.root / "models/toy", receipt)
    assert [finding.kind for finding in caught.value.findings] == [Kind.EDITED]
    assert mode(toy.installed("a.bin")) == 0o644


def test_files_whose_gates_are_closed_are_left_alone(toy: Toy) -> None:
    """An outcome with findings of the gates is passed on as it is."""
    weights_of = apply.weights(toy.request(), smoke=False)
    flip(toy.installed("a.bin"))
    closed = replace(weights_of, results=verify.verify(toy.request()).results)
    assert seal_placed(toy.request(), closed) is closed
    assert mode(toy.installed("b.bin")) == 0o644


# ---- the other commands go on as before


def test_a_sealed_file_that_became_wrong_is_repaired(toy: Toy) -> None:
    """Good pieces are copied, the wrong one comes from its chunk file; it is sealed again."""
    weights(toy)
    path = toy.installed("a.bin")
    path.chmod(0o644)
    flip(path)
    path.chmod(0o444)
    outcome = weights(toy)
    assert (path.read_bytes(), mode(path)) == (toy.good("a.bin"), 0o444)
    assert outcome.error is None and outcome.actions


def test_a_repair_without_seal_leaves_an_ordinary_file(toy: Toy) -> None:
    """Sealing is asked for each time: what is made anew has the usual permissions."""
    weights(toy)
    toy.installed("a.bin").unlink()
    apply.weights(toy.request(), smoke=False)
    assert (mode(toy.installed("a.bin")), mode(toy.installed("b.bin"))) == (0o644, 0o444)


def test_a_staged_file_replaces_a_sealed_one(toy: Toy) -> None:
    """`inv place` puts another edition in the place of a sealed file."""
    weights(toy, "note.txt")
    toy.staged("note.txt").parent.mkdir(parents=True, exist_ok=True)
    toy.staged("note.txt").write_text("another edition")
    toy.installed("note.txt").unlink()
    request = toy.request("note.txt")
    outcome = seal_placed(request, apply.apply(request, Target.PLACED))
    assert toy.installed("note.txt").read_text() == "another edition"
    assert (mode(toy.installed("note.txt")), len(outcome.sealed)) == (0o444, 1)


def test_verify_and_clean_work_on_sealed_files(toy: Toy) -> None:
    """Every gate is passed, and only what is unfinished goes."""
    weights(toy)
    partial = partial_path(toy.installed("a.bin"))
    partial.write_text("unfinished")
    clean(toy.request("all"), dry=False)
    assert not partial.exists()
    assert verify.verify(toy.request(), write_sums=True).error is None


def test_a_kill_between_seal_and_receipt_costs_one_hashing(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is out of date then, so the file is verified again, and found right."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    apply.weights(toy.request("a.bin"), smoke=False)
    with monkeypatch.context() as patch:
        patch.setattr(install, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            weights(toy, "a.bin")
    assert mode(toy.installed("a.bin")) == 0o444
    outcome = weights(toy, "a.bin")
    assert [action.verb for action in outcome.actions] == ["verify"]
    assert outcome.state.artifacts[0].installed.state is FileState.VERIFIED


# ---- a real file system with fs-verity


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 with the verity feature, mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not Path("/sys/fs/ext4/features/verity").exists():
        pytest.skip("this kernel's ext4 has no fs-verity (CONFIG_FS_VERITY)")
    if not (mkfs := shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")):
        pytest.skip("there is no mkfs.ext4")
    image, point = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([mkfs, "-q", "-O", "verity", "-b", "4096", str(image)], check=True)
    point.mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(point)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is refused: {mounted.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.full
def test_the_kernel_guards_a_sealed_file(disk: Path) -> None:
    """On ext4 with fs-verity not even root can write to it, and a repair still replaces it."""
    (disk / "repository").mkdir()
    toy = Toy.make(disk / "repository")
    assert [s.verity for s in weights(toy).sealed] == [True] * 3
    path = toy.installed("a.bin")
    path.chmod(0o644)
    with pytest.raises(PermissionError):
        path.open("r+b")
    apply.weights(toy.request(), smoke=False)
    assert [s.verity for s in weights(toy).sealed] == [True] * 3
    path.unlink()
    apply.weights(toy.request(), smoke=False)
    assert path.read_bytes() == toy.good("a.bin")
    assert verify.verify(toy.request()).error is None


@pytest.mark.full
def test_a_block_that_rots_under_fs_verity_is_found(disk: Path) -> None:
    """The kernel gives an error for the block, and the gates say so."""
    (disk.parent / "repository").mkdir()
    toy = Toy.make(disk.parent / "repository")
    placed = str(disk / "placed")
    weights(toy, dest=placed)
    path = disk / "placed" / "a.bin"
    _rot(disk, path)
    with pytest.raises(OSError, match="Input/output error"):
        path.read_bytes()
    error = verify.verify(toy.request(dest=placed)).error
    assert error is not None and error.exit_code == 4
    path.unlink()
    assert weights(toy, dest=placed).error is None
    assert path.read_bytes() == toy.good("a.bin")


def _rot(disk: Path, path: Path) -> None:
    """Turns over a block of a file on the disk, below the file system."""
    image = disk.parent / "disk.img"
    content = path.read_bytes()[8192:8256]
    subprocess.run(["umount", str(disk)], check=True)
    data = image.read_bytes()
    at = data.index(content)
    with image.open("r+b") as file:
        file.seek(at)
        file.write(bytes(64))
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)

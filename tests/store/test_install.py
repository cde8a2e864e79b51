"""Installing: only verified bytes, one rename, the receipt last."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import CsmWeightsError, Kind, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.pipeline import apply
from csm_weights.store import install
from csm_weights.store.atomic import write_whole
from csm_weights.store.receipts import Receipt, VerifiedFile, load_receipt, receipt_path
from csm_weights.transfer.assemble import write_text
from tests.support.toy import Toy

TEXT = "pinned\n"


class Hall:
    """A verified unfinished file, the folder it is to go to, and its receipt."""

    def __init__(self, root: Path, path: str = "sub/model.bin") -> None:
        made = write_text(root / "staging" / path, TEXT)
        self.source = made.path
        self.folder = root / "placed"
        self.final = self.folder / path
        self.record = receipt_path(self.folder, path)
        self.receipt = receipt_of(path, made)

    def install(self) -> Receipt:
        return install.install(self.source, self.folder, self.receipt)

    def occupy(self, text: str) -> None:
        """Puts another file where the verified one is to go."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.final.write_text(text)


def receipt_of(path: str, made: VerifiedFile) -> Receipt:
    return Receipt(path, "toy", len(TEXT), made.sha256, (), made.fingerprint, "now", "test")


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    """A fresh hall."""
    return Hall(tmp_path)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed, in order, by file name."""
    seen: list[tuple[str, str]] = []
    real_replace, real_fsync = Path.replace, os.fsync

    def replacing(self: Path, target: Any) -> Path:
        seen.append(("rename", Path(target).name))
        return real_replace(self, target)

    def syncing(fd: int) -> None:
        seen.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        real_fsync(fd)

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    return seen


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")


def test_a_verified_file_gets_its_name_and_receipt(hall: Hall) -> None:
    """The bytes are in place, the unfinished name is gone, the receipt says what is there."""
    written = hall.install()
    assert (hall.final.read_text(), hall.source.exists()) == (TEXT, False)
    assert load_receipt(hall.record.read_text()) == written
    assert written == replace(hall.receipt, fingerprint=Fingerprint.of(hall.final.stat()))


@needs_proc
def test_bytes_are_durable_before_the_name_and_the_receipt_is_last(
    hall: Hall, events: list[tuple[str, str]]
) -> None:
    """File, folders that are new, rename, both folders, receipt: each before the next."""
    hall.install()
    name, folder, above = hall.source.name, "sub", hall.folder.parent.name
    assert events == [
        ("sync", name),
        ("sync", above),
        ("sync", "placed"),
        ("rename", "model.bin"),
        ("sync", folder),
        ("sync", folder),
        ("sync", "placed"),
        ("sync", ".csm-weights"),
        ("sync", "model.bin.json.partial"),
        ("rename", "model.bin.json"),
        ("sync", folder),
    ]


def test_the_final_name_appears_whole(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the one rename the old file stands, and at it the new one is whole."""
    hall.occupy("old")
    seen: list[tuple[str, str]] = []
    real = Path.replace

    def watching(self: Path, target: Any) -> Path:
        if Path(target) == hall.final:
            seen.append((hall.final.read_text(), self.read_text()))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watching)
    hall.install()
    assert seen == [("old", TEXT)]


def test_no_run_names_a_file_before_all_its_bytes_are_right(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole run, whatever gets a name of the manifest has the right bytes that moment."""
    good = {toy.good(a.path) for a in toy.manifest.artifacts}
    names = {Path(a.path).name for a in toy.manifest.artifacts}
    real, seen = Path.replace, []

    def watching(self: Path, target: Any) -> Path:
        if Path(target).name in names:
            seen.append(self.read_bytes() in good)
            assert not Path(target).exists()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watching)
    apply.weights(toy.request(), smoke=False)
    assert seen == [True] * 6


def test_a_file_that_was_touched_since_is_refused(hall: Hall) -> None:
    """Bytes that changed after they were verified never get the name, nor drive out a good file."""
    hall.occupy("good")
    hall.source.write_text("tamper\n")
    with pytest.raises(WrongContent) as caught:
        hall.install()
    assert [(f.kind, f.where) for f in caught.value.findings] == [(Kind.CHANGED, str(hall.source))]
    assert (hall.final.read_text(), hall.source.exists()) == ("good", True)
    assert not hall.record.exists()


def test_another_file_under_the_verified_name_is_refused(hall: Hall) -> None:
    """A file that was swapped in, with the same size and time, is not the verified one."""
    status = hall.source.stat()
    other = hall.source.with_name("other")
    other.write_text("tamper\n")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(hall.source)
    with pytest.raises(WrongContent):
        hall.install()
    assert not hall.final.exists()


def test_a_stop_before_the_receipt_leaves_a_good_file_without_one(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the receipt, the installed bytes are good, and unverified."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        hall.install()
    assert (hall.final.read_text(), hall.record.exists()) == (TEXT, False)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o000, 0o644)])
def test_placed_files_are_never_executable(tmp_path: Path, mask: int, mode: int) -> None:
    """A placed file and its receipt are 0644, less what the umask takes."""
    with umask(mask):
        hall = Hall(tmp_path)
        hall.install()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (hall.final, hall.record)]
    assert modes == [mode, mode]


def test_assembled_files_are_never_executable(toy: Toy) -> None:
    """Parts that are executable do not make an executable file."""
    for index in range(5):
        toy.chunk_file("a.bin", index).chmod(0o755)
    with umask(0o022):
        apply.weights(toy.request("a.bin"), smoke=False)
    assert stat.S_IMODE(toy.installed("a.bin").stat().st_mode) == 0o644


def test_a_folder_in_the_way_is_kept(hall: Hall) -> None:
    """A folder under the final name is reported; what is in it and the verified file stay."""
    hall.final.mkdir(parents=True)
    (hall.final / "precious").write_text("precious")
    with pytest.raises(CsmWeightsError, match="move it away"):
        hall.install()
    assert ((hall.final / "precious").read_text(), hall.source.read_text()) == ("precious", TEXT)


def test_a_file_in_the_way_of_the_folder_is_reported(hall: Hall) -> None:
    """When the destination's name is taken by a file, the error is ours, and that file stays."""
    hall.folder.write_text("precious")
    with pytest.raises(CsmWeightsError, match="placed"):
        hall.install()
    assert (hall.folder.read_text(), hall.source.read_text()) == ("precious", TEXT)


def test_a_link_under_the_final_name_is_replaced(hall: Hall, tmp_path: Path) -> None:
    """The link gives way to the file; what it pointed to is not written."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    hall.final.parent.mkdir(parents=True)
    hall.final.symlink_to(precious)
    hall.install()
    assert (hall.final.is_symlink(), precious.read_text()) == (False, "precious")


def test_a_staged_link_is_installed_as_a_copy(toy: Toy) -> None:
    """A link to the right bytes in the staging folder, as caches make them, becomes a file."""
    real = toy.root / "cache"
    real.write_bytes(toy.good("a.bin"))
    toy.staged("a.bin").parent.mkdir(parents=True)
    toy.staged("a.bin").symlink_to(real)
    apply.weights(toy.request("a.bin"), smoke=False)
    assert not toy.installed("a.bin").is_symlink()
    assert toy.installed("a.bin").read_bytes() == toy.good("a.bin")
    assert not toy.staged("a.bin").exists()
    assert real.read_bytes() == toy.good("a.bin")


def test_an_adopted_file_is_recorded_where_it_lies(hall: Hall) -> None:
    """`record` writes the receipt of a file that is in place already, and moves nothing."""
    hall.occupy(TEXT)
    now = Fingerprint.of(hall.final.stat())
    written = install.record(hall.folder, replace(hall.receipt, fingerprint=now))
    assert load_receipt(hall.record.read_text()) == written


def test_an_adopted_file_that_was_touched_is_refused(hall: Hall) -> None:
    """A file that changed since it was verified gets no receipt."""
    hall.occupy(TEXT)
    now = Fingerprint.of(hall.final.stat())
    hall.final.write_text("tamper\n")
    with pytest.raises(WrongContent):
        install.record(hall.folder, replace(hall.receipt, fingerprint=now))
    assert not hall.record.exists()


def test_forgetting_is_fine_twice(hall: Hall) -> None:
    """The receipt of a file that was moved away goes; a missing one is no error."""
    hall.install()
    install.forget(hall.folder, hall.receipt.path)
    install.forget(hall.folder, hall.receipt.path)
    assert (hall.record.exists(), hall.final.exists()) == (False, True)


def test_small_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing a small file fails, the old one stands as it was."""
    path = tmp_path / "SHA256SUMS"
    path.write_text("old")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CsmWeightsError):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_file_that_is_exchanged_at_the_last_moment_loses_the_name(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was renamed is compared once more: another file goes back, and has no receipt."""
    real = Path.replace

    def exchanging(self: Path, target: Any) -> Path:
        if Path(target) == hall.final:
            self.unlink()
            self.write_text("tamper\n")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", exchanging)
    with pytest.raises(WrongContent, match="changed while it was being installed") as caught:
        hall.install()
    assert [(f.kind, f.where) for f in caught.value.findings] == [(Kind.CHANGED, str(hall.final))]
    assert (hall.final.exists(), hall.source.read_text()) == (False, "tamper\n")
    assert not hall.record.exists()

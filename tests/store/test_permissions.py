"""Permissions: 0644 less umask, never executable, never out of the tree, never another user's."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import filelock  # noqa: F401 - a stranger may not be able to import it later
import pytest

from csm_weights.commands import attest
from csm_weights.errors import CsmWeightsError, Kind, NoSpace, WrongContent
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.pipeline import apply
from csm_weights.store import atomic, install
from csm_weights.store.journal import journal_path, partial_path
from csm_weights.store.receipts import Receipt
from csm_weights.transfer.assemble import write_text
from tests.support.privileges import unprivileged
from tests.support.toy import Toy

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")

#: Some other user, who needs no account.
STRANGER = 54321


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def as_stranger() -> Iterator[None]:
    """The rights of another user for a while."""
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


def weights(toy: Toy, *only: str) -> None:
    apply.weights(toy.request(*only), smoke=False)


def made(toy: Toy) -> list[Path]:
    """Every file that a run has made."""
    folders = (toy.root / "output", toy.root / "models")
    return [p for folder in folders for p in folder.rglob("*") if p.is_file()]


# ---- modes


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_every_file_is_0644_less_umask(toy: Toy, mask: int, mode: int) -> None:
    """Files, receipts, locks and attestations alike; the parts' own modes are not copied."""
    for part in (toy.root / "chunks").rglob("*.part-*"):
        part.chmod(0o777)
    with umask(mask):
        weights(toy)
        attest.attest_files(toy.request())
    names = {path.name for path in made(toy)}
    assert {"a.bin", "a.bin.json", ".lock", "toy.intoto.json"} <= names
    assert {stat.S_IMODE(path.stat().st_mode) for path in made(toy)} == {mode}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_unfinished_files_are_no_more_open(toy: Toy, mask: int, mode: int) -> None:
    """The partial and its journal have these permissions from their first moment."""
    toy.chunk_file("a.bin", 4).write_bytes(bytes(toy.artifact("a.bin").pieces[4].size))
    with umask(mask), pytest.raises(WrongContent):
        weights(toy, "a.bin")
    for path in (partial_path(toy.staged("a.bin")), journal_path(toy.staged("a.bin"))):
        assert stat.S_IMODE(path.stat().st_mode) == mode


# ---- links that lead out


def lead_out(toy: Toy, folder: Path) -> Path:
    """Puts a link in a folder's place that leads to one outside; returns that."""
    outside = toy.root.parent / f"{toy.root.name}.outside"
    outside.mkdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(outside)
    return outside


def deepen(toy: Toy) -> None:
    """Gives a.bin a folder of its own below staging and destination."""
    inside = replace(toy.artifact("a.bin"), path="sub/a.bin")
    toy.write_manifest(replace(toy.manifest, artifacts=(inside,)))


@pytest.mark.parametrize("folder", ["output/toy", "models/toy"])
@pytest.mark.parametrize("name", [RECEIPTS, "sub"])
def test_no_link_is_followed_out_of_the_folders(toy: Toy, folder: str, name: str) -> None:
    """Below staging and destination a link that leads out ends the run before it writes."""
    deepen(toy)
    outside = lead_out(toy, toy.root / folder / name)
    with pytest.raises(WrongContent) as caught:
        weights(toy)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.IN_THE_WAY, str(toy.root / folder / name))
    assert str(outside) in finding.found
    assert list(outside.iterdir()) == []


def test_a_link_that_stays_inside_is_followed(toy: Toy) -> None:
    """A link to another folder of the same destination leads nowhere else."""
    deepen(toy)
    (toy.root / "models/toy/real").mkdir(parents=True)
    (toy.root / "models/toy/sub").symlink_to("real")
    weights(toy)
    assert (toy.root / "models/toy/real/a.bin").exists()


def test_the_destination_itself_may_be_anywhere(toy: Toy, tmp_path: Path) -> None:
    """Which folder is meant is the user's choice, also by a link; receipts go along."""
    disk = tmp_path.with_name(f"{tmp_path.name}-disk")
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    apply.weights(toy.request("a.bin", dest=str(tmp_path / "link")), smoke=False)
    assert (disk / RECEIPTS / "a.bin.json").exists()


def test_what_is_verified_stays_usable_behind_a_link(toy: Toy) -> None:
    """With nothing to write, a linked folder that leads out does no harm."""
    deepen(toy)
    weights(toy)
    sub = toy.root / "models/toy/sub"
    moved = toy.root.parent / f"{toy.root.name}.moved"
    sub.rename(moved)
    sub.symlink_to(moved)
    assert apply.status(toy.request(), check=True).error is None


def test_no_receipt_is_written_through_a_link(toy: Toy) -> None:
    """Also of a file that is in place already, and only has to be verified."""
    weights(toy, "a.bin")
    records = toy.root / "models/toy" / RECEIPTS
    for path in records.iterdir():
        path.unlink()
    records.rmdir()
    outside = lead_out(toy, records)
    with pytest.raises(WrongContent, match="through a link"):
        weights(toy, "a.bin")
    assert list(outside.iterdir()) == []


def test_the_one_door_leads_nowhere_else(toy: Toy) -> None:
    """Whoever calls it: neither a file nor a receipt goes through a link out of the folder."""
    made = write_text(toy.root / "output/toy/sub/n", "text")
    receipt = Receipt("sub/n", "toy", 4, made.sha256, (), made.fingerprint, "now", "test")
    outside = lead_out(toy, toy.root / "models/toy/sub")
    with pytest.raises(WrongContent, match="through a link"):
        install.install(made.path, toy.root / "models/toy", receipt)
    (toy.root / "models/toy/sub").unlink()
    (toy.root / "models/toy" / RECEIPTS).symlink_to(outside)
    with pytest.raises(WrongContent, match="through a link"):
        install.install(made.path, toy.root / "models/toy", receipt)
    assert list(outside.iterdir()) == []


PLANTED: dict[str, Callable[[Toy], Path]] = {
    "partial": lambda toy: partial_path(toy.staged("a.bin")),
    "journal": lambda toy: journal_path(toy.staged("a.bin")),
    "staging lock": lambda toy: toy.root / "output/toy/.lock",
    "destination lock": lambda toy: toy.root / "models/toy" / RECEIPTS / ".lock",
}


def plant(toy: Toy, name: str) -> Path:
    """A file under one of our names, which its owner alone may write."""
    path = PLANTED[name](toy)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("planted")
    return path


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_link_under_one_of_our_names_is_not_followed(toy: Toy, name: str) -> None:
    """A link planted there ends the run, and what it leads to is not written."""
    path = plant(toy, name)
    precious = toy.root / "precious"
    path.rename(precious)
    path.symlink_to(precious)
    with pytest.raises(WrongContent) as caught:
        weights(toy, "a.bin")
    assert {f.where for f in caught.value.findings} == {str(path)}
    assert precious.read_text() == "planted"


def test_a_link_under_the_name_of_an_unfinished_receipt_is_not_followed(toy: Toy) -> None:
    """A small file is written through none either."""
    path = toy.root / "models/toy" / RECEIPTS / "a.bin.json.partial"
    precious = toy.root / "precious"
    precious.write_text("precious")
    path.parent.mkdir(parents=True)
    path.symlink_to(precious)
    with pytest.raises(WrongContent):
        weights(toy, "a.bin")
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_pipe_under_one_of_our_names_is_refused(toy: Toy, name: str) -> None:
    """What is not a regular file is reported, and nobody waits for it."""
    path = plant(toy, name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WrongContent) as caught:
        weights(toy, "a.bin")
    assert "not a regular file" in caught.value.findings[0].found


def test_a_hard_link_under_the_name_of_an_unfinished_receipt_is_let_go(toy: Toy) -> None:
    """A second name of another file is not emptied, but given up."""
    path = toy.root / "models/toy" / RECEIPTS / "a.bin.json.partial"
    precious = toy.root / "precious"
    precious.write_text("precious")
    path.parent.mkdir(parents=True)
    path.hardlink_to(precious)
    weights(toy, "a.bin")
    assert precious.read_text() == "precious"


# ---- other users


@needs_root
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_file_of_another_user_is_not_trusted(toy: Toy, name: str) -> None:
    """Their lock or unfinished file ends the run with its own message, and is left as it is."""
    path = plant(toy, name)
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(WrongContent) as caught:
        weights(toy, "a.bin")
    (finding,) = caught.value.findings
    assert "another user is not trusted" in caught.value.message
    assert (finding.kind, finding.where) == (Kind.IN_THE_WAY, str(path))
    assert finding.found == f"one of user {STRANGER}"
    assert path.read_text() == "planted"


@needs_root
@pytest.mark.parametrize("name", sorted(PLANTED))
def test_it_is_told_to_a_user_who_may_not_even_open_it(name: str) -> None:
    """Root's lock in a folder of all is named as root's, not as a disk that is full."""
    with tempfile.TemporaryDirectory() as folder:
        toy = Toy.make(Path(folder))
        plant(toy, name).chmod(0o600)
        for path in (toy.root, *toy.root.rglob("*")):
            if path.is_dir():
                path.chmod(0o777)
        _refused_as_roots(toy)


def _refused_as_roots(toy: Toy) -> None:
    with as_stranger(), pytest.raises(WrongContent) as caught:
        weights(toy, "a.bin")
    assert caught.value.findings[0].found == "one of user 0"


@needs_root
def test_once_it_is_removed_the_run_goes_on(toy: Toy) -> None:
    """What the message says helps."""
    path = plant(toy, "staging lock")
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(WrongContent, match="remove the file"):
        weights(toy, "a.bin")
    path.unlink()
    weights(toy, "a.bin")
    assert toy.installed("a.bin").read_bytes() == toy.good("a.bin")


@needs_root
def test_a_strangers_verified_pieces_do_not_count(toy: Toy) -> None:
    """Even right bytes in a partial of another user are not taken over."""
    toy.chunk_file("a.bin", 4).unlink()
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(toy.good("a.bin"))
    os.chown(partial, STRANGER, STRANGER)
    with pytest.raises(CsmWeightsError):
        weights(toy, "a.bin")
    assert not toy.staged("a.bin").exists() and not toy.installed("a.bin").exists()


def test_a_mount_that_gives_every_file_one_owner_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a new file has that owner too, as on FAT or a squashed NFS, the file is ours."""
    path = tmp_path / "lock"
    path.touch()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    os.close(atomic.create(path))


@pytest.mark.parametrize("owner", [STRANGER, -1])
def test_elsewhere_the_owner_decides_without_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int
) -> None:
    """The same file, in a folder where new ones would be this user's, is another user's."""
    path = tmp_path / "lock"
    path.touch()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    monkeypatch.setattr(atomic, "_owner_of_new_files", lambda _: owner)
    with pytest.raises(WrongContent, match="another user"):
        atomic.create(path)


def test_a_refused_file_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose a file is is found out before anything of it is cut off."""
    path = tmp_path / "x.partial"
    path.write_text("precious")
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    monkeypatch.setattr(atomic, "_owner_of_new_files", lambda _: None)
    with pytest.raises(WrongContent):
        atomic.create(path, os.O_TRUNC)
    assert path.read_text() == "precious"


def test_a_folder_that_takes_no_file_is_no_disk_of_a_stranger(tmp_path: Path) -> None:
    """Where there is no such file, the message is that of the folder."""
    tmp_path.chmod(0o555)
    with unprivileged(), pytest.raises(NoSpace):
        atomic.create(tmp_path / "x")


@needs_root
def test_a_strangers_file_in_a_folder_that_takes_none_is_not_trusted(tmp_path: Path) -> None:
    """Whose new files there would be cannot be found out, so the file is the stranger's."""
    path = tmp_path / "x"
    path.touch()
    path.chmod(0o666)
    os.chown(path, STRANGER, STRANGER)
    tmp_path.chmod(0o555)
    with unprivileged(), pytest.raises(WrongContent) as caught:
        atomic.create(path)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.IN_THE_WAY, str(path))
    assert (finding.found, finding.expected) == (
        f"one of user {STRANGER}",
        f"a file of this user ({os.geteuid()}), or none",
    )

"""Safe writes: what errors become, what is made durable, and which folder takes files."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from csm_weights.errors import CsmWeightsError, Kind, NoSpace, WrongContent
from csm_weights.files import NotRegular
from csm_weights.store import atomic
from tests.support.privileges import unprivileged

IN_THE_WAY = (WrongContent, "the file cannot be written", Kind.IN_THE_WAY)
FULL = (NoSpace, "the disk is full", Kind.NO_SPACE)
REFUSED = (NoSpace, "the file cannot be written there", Kind.NOT_WRITABLE)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ELOOP, "a link"), IN_THE_WAY),
        (OSError(errno.ENOTDIR, "a file"), IN_THE_WAY),
        (OSError(errno.EISDIR, "a folder"), IN_THE_WAY),
        (OSError(errno.EEXIST, "a file"), IN_THE_WAY),
        (OSError(errno.ENOTEMPTY, "a folder"), IN_THE_WAY),
        (NotRegular(Path("x"), 0), IN_THE_WAY),
        (OSError(errno.ENOSPC, "no space"), FULL),
        (OSError(errno.EDQUOT, "the quota"), FULL),
        (OSError(errno.EFBIG, "too large"), FULL),
        (OSError(errno.EACCES, "no permission"), REFUSED),
        (OSError(errno.EIO, "an error"), REFUSED),
        (OSError("a word"), REFUSED),
    ],
)
def test_an_error_of_a_write_has_a_class_by_its_cause(
    error: OSError, expected: tuple[type[CsmWeightsError], str, Kind]
) -> None:
    """Something else has the name, there is no room, or the place takes no files."""
    with pytest.raises(CsmWeightsError) as caught, atomic.writing(Path("x")):
        raise error
    (finding,) = caught.value.findings
    assert (type(caught.value), caught.value.message, finding.kind) == expected
    assert (finding.where, finding.found) == ("x", error.strerror or "a word")


def test_a_rename_to_another_disk_stays_an_error_of_the_system() -> None:
    """The caller copies the file then."""
    with pytest.raises(OSError, match="another disk") as caught, atomic.writing(Path("x")):
        raise OSError(errno.EXDEV, "another disk")
    assert caught.value.errno == errno.EXDEV


def test_a_write_that_the_system_takes_in_parts_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call may take fewer bytes than it was given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with atomic.created(tmp_path / "x") as fd:
        atomic.write_all(fd, b"ten bytes.", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"ten bytes."


@pytest.mark.parametrize(("flags", "content"), [(0, b"new kept"), (os.O_TRUNC, b"new")])
def test_a_file_that_is_there_is_opened_for_reading_and_writing(
    tmp_path: Path, flags: int, content: bytes
) -> None:
    """It is emptied only where that is asked for, and its folders are made."""
    path = tmp_path / "a" / "b" / "x"
    os.close(atomic.create(path))
    path.write_bytes(b"old kept")
    fd = atomic.create(path, flags)
    try:
        os.pwrite(fd, b"new", 0)
        assert os.pread(fd, 100, 0) == content
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("flags", "size"),
    [(0, 3), (os.O_APPEND, 3), (os.O_TRUNC, 0), (os.O_APPEND | os.O_TRUNC, 0)],
)
def test_a_file_is_emptied_only_where_that_is_asked_for(
    tmp_path: Path, flags: int, size: int
) -> None:
    """Of all of its bytes; one that is to be gone on with keeps them."""
    (tmp_path / "x").write_bytes(b"old")
    fd = atomic.create(tmp_path / "x", flags)
    os.close(fd)
    assert (tmp_path / "x").stat().st_size == size


def test_a_name_that_is_not_opened_is_closed_again(tmp_path: Path) -> None:
    """What is refused leaves no open file behind."""
    os.mkfifo(tmp_path / "x")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(WrongContent, match="not a regular file"):
        atomic.create(tmp_path / "x")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("content", ["ünï", "ünï".encode()])
def test_a_small_file_is_written_as_text_or_as_bytes(tmp_path: Path, content: str | bytes) -> None:
    """A text is in UTF-8; nothing unfinished is left."""
    for _ in range(2):
        atomic.write_whole(tmp_path / "x", content)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == ["ünï".encode()]


@pytest.mark.parametrize("is_link", [False, True])
def test_what_leads_out_of_a_folder_is_refused(tmp_path: Path, is_link: bool) -> None:
    """By a link, or by its name; the folder itself may be a link, and so may one inside it."""
    inside, outside = tmp_path / "inside", tmp_path / "inside-too"
    for folder in (inside / "real", outside):
        folder.mkdir(parents=True)
    base = tmp_path / "base"
    base.symlink_to(inside)
    (inside / "link").symlink_to("real")
    for folder in (base, base / "link" / "new", base / "real"):
        atomic.stay_inside(folder, base)
    folder = inside / "out" if is_link else outside
    if is_link:
        folder.symlink_to(outside)
    with pytest.raises(WrongContent, match="through a link out of the folder") as caught:
        atomic.stay_inside(folder, base)
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.IN_THE_WAY, str(folder))
    assert finding.expected == f"a folder inside {base}"
    assert finding.found == f"a link that leads to {outside}"


def test_a_new_folder_is_durable_in_the_one_above_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the top down; a folder that only takes entries cannot be opened to sync it."""
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "sync", synced.append)
    atomic.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    atomic.make_folder(tmp_path / "a" / "b")
    monkeypatch.setattr(
        os, "access", lambda path, mode: (path, mode) != (path.parent / "b", os.R_OK)
    )
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a"]
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_folder_that_another_run_makes_at_the_same_time_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no error, whichever run was the first."""
    real = Path.mkdir

    def mkdir(path: Path, **options: bool) -> None:
        os.mkdir(path)  # noqa: PTH102
        real(path, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    atomic.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_second_name_of_an_unfinished_file_goes_and_the_only_one_stays(tmp_path: Path) -> None:
    """The content belongs to the other name then; no name at all is no error."""
    atomic.unlink_shared(tmp_path / "x")
    (tmp_path / "x").touch()
    atomic.unlink_shared(tmp_path / "x")
    (tmp_path / "y").hardlink_to(tmp_path / "x")
    atomic.unlink_shared(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


# ---- which folder takes files


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        (0o755, ""),
        (0o300, ""),
        (0o555, "no permission to write"),
        (0o600, "no permission to write"),
    ],
)
def test_a_folder_takes_files_where_its_permissions_let_it(
    tmp_path: Path, mode: int, why: str
) -> None:
    """Of one that is not there yet, the nearest above it decides."""
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    try:
        with unprivileged():
            assert atomic.why_read_only(folder) == why
            if mode & 0o100:
                assert atomic.why_read_only(folder / "a" / "b") == why
    finally:
        folder.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_the_user_for_whom_the_program_acts_decides() -> None:
    """A program that took another user's rights may not write where only root may."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.seteuid(54321)
        try:
            why = atomic.why_read_only(Path(folder))
        finally:
            os.seteuid(0)
    assert why == "no permission to write"


@pytest.mark.parametrize("flags", [os.ST_RDONLY, os.ST_RDONLY | os.ST_NOSUID, os.ST_NOSUID])
def test_a_read_only_file_system_takes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """Whatever its permissions say; it has other flags as well."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    read_only = "a read-only file system" if flags & os.ST_RDONLY else ""
    assert atomic.why_read_only(tmp_path / "folder") == read_only


def test_a_file_that_cannot_be_written_is_told_before_long_work(tmp_path: Path) -> None:
    """By the option that names it, with the reason."""
    atomic.require_writable(tmp_path / "new" / "x", "--out")
    with pytest.raises(NoSpace, match=f"^{tmp_path.name} cannot be written") as caught:
        atomic.require_writable(tmp_path, "--out")
    (finding,) = caught.value.findings
    assert (finding.kind, finding.where) == (Kind.NOT_WRITABLE, str(tmp_path))
    assert (finding.found, finding.help) == ("a folder of that name", "choose another --out")

"""Files, and chunk files, that are read as one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csm_weights.errors import Finding, WrongContent
from csm_weights.formats.multipart import MultipartFile, find_chunk_files, read_at
from csm_weights.untrusted import Malformed

CONTENT = b"0123456789"

Parts = Callable[..., list[Path]]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Writes the content in chunk files of so many bytes."""

    def write(*sizes: int) -> list[Path]:
        paths, at = [], 0
        for number, size in enumerate(sizes):
            paths.append(tmp_path / f"w.part-{number}")
            paths[-1].write_bytes(CONTENT[at : at + size])
            at += size
        return paths

    return write


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("sizes", [(10,), (3, 7), (1, 0, 4, 5), (0, 10), (10, 0), (4, 4, 2)])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_every_range_is_read(
    sizes: tuple[int, ...], most: int, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range is a slice of the content, wherever its files end and however little a read gives."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, [b[0][:most]], at))
    with MultipartFile(parts(*sizes)) as file:
        assert file.size == 10
        for offset in range(13):
            for size in range(-1, 13):
                assert file.read(offset, size) == CONTENT[offset : offset + max(0, size)]


@pytest.mark.parametrize(
    ("sizes", "more"),
    [((10,), ""), ((5, 5), " and 1 more chunk files"), ((2, 3, 5), " and 2 more chunk files")],
)
def test_bytes_after_the_end_are_not_there(sizes: tuple[int, ...], more: str, parts: Parts) -> None:
    """Reading them is an error that names all files, by the first and the count of the others."""
    paths = parts(*sizes)
    with MultipartFile(paths) as file:
        assert file.where == f"{paths[0]}{more}"
        buffer = memoryview(bytearray(4))
        file.read_into(buffer, 6)
        assert buffer == CONTENT[6:]
        with pytest.raises(WrongContent, match="the weights ended early") as caught:
            file.read_into(buffer, 7)
        (finding,) = caught.value.findings
        assert finding == Finding.changed(file.where, "its end before byte 11")
        with pytest.raises(Malformed) as malformed:
            read_at(file, 7, 4)
        assert (malformed.value.expected, malformed.value.found) == ("4 bytes at byte 7", "3")
        assert read_at(file, 7, 3) == CONTENT[7:]


def test_a_chunk_file_that_is_cut_is_named(parts: Parts) -> None:
    """The file that has become shorter is the one in the error."""
    paths = parts(4, 4, 2)
    with MultipartFile(paths) as file:
        os.truncate(paths[1], 3)
        assert file.read(0, 7) == CONTENT[:7]
        with pytest.raises(WrongContent, match="the weights ended early") as caught:
            file.read(0, 8)
        assert caught.value.findings == (Finding.changed(paths[1], "a shorter one"),)


def test_a_file_that_was_written_to_is_found(parts: Parts) -> None:
    """Each file with another stat than when it was opened is a finding."""
    paths = parts(4, 4, 2)
    with MultipartFile(paths) as file:
        assert file.changes() == []
        for path in (paths[0], paths[2]):
            os.utime(path, ns=(1, 1))
        assert file.changes() == [Finding.changed(paths[0]), Finding.changed(paths[2])]


def test_a_single_file_is_mapped(parts: Parts) -> None:
    """What is written to the map stays out of the file; chunk files and an empty file have none."""
    path = parts(10)[0]
    with MultipartFile([path]) as file, file.map() or pytest.fail("no map") as mapped:
        assert mapped[:] == CONTENT
        mapped[0] = 7
        assert path.read_bytes() == CONTENT
    for sizes in ((0,), (5, 5), (10, 0)):
        with MultipartFile(parts(*sizes)) as file:
            assert file.map() is None


def test_no_file_stays_open(parts: Parts, tmp_path: Path) -> None:
    """Those that were opened are closed, whether or not a later one can be."""
    before = open_files()
    with MultipartFile(parts(5, 5)):
        assert open_files() == before + 2
    assert open_files() == before
    with pytest.raises(FileNotFoundError):
        MultipartFile([*parts(5, 5), tmp_path / "none"])
    with pytest.raises(Malformed) as caught:
        MultipartFile([*parts(5, 5), tmp_path])
    error = caught.value
    assert (error.at, error.expected, error.found) == (str(tmp_path), "a regular file", "a folder")
    assert open_files() == before


def test_chunk_files_are_those_of_one_file(tmp_path: Path) -> None:
    """After `zz` split goes on with three letters; other names are of no chunk file."""
    names = ["w.x.part-aa", "w.x.part-zz", "w.x.part-aaa"]
    others = ["w.x.part-a", "w.x.part-aA", "w.x.part-aa.partial", "w.x", "wx.part-aa", "w.part-aa"]
    for name in (*names, *others, "vw.x.part-aa", "w.x.part-aa\n"):
        (tmp_path / name).touch()
    assert [path.name for path in find_chunk_files(tmp_path, "w.x")] == names
    assert find_chunk_files(tmp_path / "none", "w.x") == []
    assert find_chunk_files(tmp_path / "w.x", "w.x") == []

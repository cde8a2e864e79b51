"""Inspecting a disk: what is known of files from their stats, receipts and journals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint, NotRegular, open_regular, read_bounded
from csm_weights.manifest.types import Artifact, Manifest, Piece
from csm_weights.model.smoke_report import read_report, report_path
from csm_weights.pipeline import apply
from csm_weights.store import inspect as inspecting
from csm_weights.store import journal
from csm_weights.store.inspect import (
    ArtifactState,
    FileState,
    FileStatus,
    Paths,
    Shelved,
    filesystem_type,
    inspect,
)
from csm_weights.store.install import record
from csm_weights.store.journal import Arrival, PieceRecord, journal_path, partial_path
from csm_weights.store.receipts import receipt_path
from csm_weights.untrusted import dump_record
from tests.support.privileges import unprivileged
from tests.support.toy import Toy, flip

VERIFIED, UNVERIFIED = FileState.VERIFIED, FileState.UNVERIFIED
ABSENT, INVALID = FileState.ABSENT, FileState.INVALID
SHA = "5" * 64


def finding(where: object, kind: Kind = Kind.WRONG_SIZE) -> Finding:
    return Finding(kind, str(where), "one thing", "another")


def inspected(toy: Toy, known_bad: dict[Path, Finding] | None = None) -> dict[str, ArtifactState]:
    paths = Paths.of(toy.manifest, toy.root)
    state = inspect(toy.manifest, toy.manifest.artifacts, paths, known_bad or {})
    return {item.artifact.path: item for item in state.artifacts}


@pytest.fixture
def on_disk(toy: Toy) -> Toy:
    """A toy repository whose files are all in place."""
    apply.weights(toy.request(), smoke=False)
    return toy


def test_a_fresh_repository_has_chunk_files_only(toy: Toy) -> None:
    """Chunk files are seen with their sizes; files, partials and receipts are absent."""
    item = inspected(toy)["a.bin"]
    assert (item.installed.state, item.staged.state) == (ABSENT, ABSENT)
    assert not (item.installed.is_link or item.installed.is_shared)
    assert [part.state for part in item.chunks] == [UNVERIFIED] * 5
    assert [part.size for part in item.chunks] == [p.size for p in toy.artifact("a.bin").pieces]
    assert (item.journal.pieces, item.extras) == ((), ())


def test_an_installed_file_is_verified_by_its_receipt(on_disk: Toy) -> None:
    """An untouched file with a receipt is verified without being read."""
    assert [i.installed.state for i in inspected(on_disk).values()] == [VERIFIED] * 3


def test_what_hashing_found_wrong_stays_wrong(on_disk: Toy) -> None:
    """A file that this run has found wrong is invalid whatever its receipt says."""
    wrong = finding(on_disk.installed("a.bin"), Kind.WRONG_DIGEST)
    item = inspected(on_disk, {on_disk.installed("a.bin"): wrong})["a.bin"]
    assert (item.installed.state, item.installed.finding) == (INVALID, wrong)


@pytest.mark.parametrize("state", FileState)
def test_only_the_receipt_of_a_verified_file_counts(on_disk: Toy, state: FileState) -> None:
    """Of a file in any other state it may be out of date, or wrong."""
    file = inspected(on_disk)["a.bin"].installed
    assert file.receipt
    expected = file.receipt if state is VERIFIED else None
    assert replace(file, state=state).valid_receipt == expected


def edit_receipt(toy: Toy, name: str, **changes: Any) -> None:
    path = receipt_path(toy.root / "models/toy", name)
    data = json.loads(path.read_text())
    for key, value in changes.items():
        field, _, inner = key.partition("__")
        if inner:
            data[field][inner] = value
        else:
            data[field] = value
    path.write_text(json.dumps(data))


FORGERIES: list[tuple[str, dict[str, Any]]] = [
    ("a.bin", {"model": "csm-1b"}),
    ("a.bin", {"size": 1}),
    ("a.bin", {"sha256": "0" * 64}),
    ("a.bin", {"schema": 2}),
    ("a.bin", {"fingerprint__inode": 1}),
    ("a.bin", {"fingerprint__size": 1}),
    ("a.bin", {"fingerprint__mtime_ns": 1}),
    ("a.bin", {"fingerprint__ctime_ns": 1}),
    ("a.bin", {"fingerprint": None}),
    ("a.bin", {"unknown": 1}),
    ("b.bin", {"sha256": "0" * 64}),
    ("b.bin", {"pieces": []}),
    ("b.bin", {"pieces": None}),
    ("b.bin", {"pieces": [{"offset": 0, "size": 1, "sha256": "0", "source": "x"}]}),
]


@pytest.mark.parametrize(("name", "changes"), FORGERIES)
def test_a_receipt_that_does_not_fit_counts_for_nothing(
    on_disk: Toy, name: str, changes: dict[str, Any]
) -> None:
    """Any figure of a receipt that is not the file's and the manifest's voids it."""
    edit_receipt(on_disk, name, **changes)
    assert inspected(on_disk)[name].installed.state is UNVERIFIED


def test_bytes_that_have_arrived_are_enough_to_be_here(toy: Toy) -> None:
    """Without a piece that is verified, a chunk file, or a consumed one."""
    a = toy.artifact("a.bin")
    for part in toy.root.glob("chunks/toy/*/*"):
        part.unlink()
    assert not inspected(toy)["a.bin"].is_here
    staged = toy.staged("a.bin")
    staged.parent.mkdir(parents=True)
    partial_path(staged).write_bytes(toy.good("a.bin"))
    arrival = Arrival(a.pieces[0].offset, 10, a.pieces[0].sha256)
    journal_path(staged).write_text(dump_record(arrival) + "\n")
    assert inspected(toy)["a.bin"].is_here


def test_a_file_without_a_digest_of_its_own_may_have_one_piece(on_disk: Toy) -> None:
    """The receipt's one piece is that of the manifest."""
    receipt = inspected(on_disk)["b.bin"].installed.receipt
    assert receipt
    b = on_disk.artifact("b.bin")
    assert replace(receipt, pieces=receipt.pieces[:1]).fits(replace(b, pieces=b.pieces[:1]))


@pytest.mark.parametrize("text", ["", "rubbish", "null", "[]", "[" * 9999, "\x00\xff", "9" * 9999])
def test_a_damaged_receipt_counts_as_absent(on_disk: Toy, text: str) -> None:
    """A receipt that cannot be understood leaves the file unverified."""
    receipt_path(on_disk.root / "models/toy", "a.bin").write_text(text)
    file = inspected(on_disk)["a.bin"].installed
    assert (file.state, file.receipt) == (UNVERIFIED, None)


def test_journal_lines_of_other_pieces_do_not_count(toy: Toy) -> None:
    """Only lines about pieces that the manifest pins today are kept, each once, in order."""
    a = toy.artifact("a.bin").pieces
    good = [PieceRecord(p.offset, p.size, p.sha256, "x") for p in (a[3], a[1], a[3])]
    stale = [
        replace(good[0], sha256="0" * 64),
        replace(good[0], size=1),
        replace(good[0], offset=1),
    ]
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.touch()
    lines = [dump_record(r) for r in (*stale, *good)] + [dump_record(good[0])[:-5]]
    journal_path(toy.staged("a.bin")).write_text("\n".join(lines))
    assert [r.offset for r in inspected(toy)["a.bin"].journal.pieces] == [a[1].offset, a[3].offset]


def test_a_journal_without_its_partial_does_not_count(toy: Toy) -> None:
    """Lines about a file that has gone are no claim on anything."""
    piece = toy.artifact("a.bin").pieces[0]
    journal = journal_path(toy.staged("a.bin"))
    journal.parent.mkdir(parents=True)
    journal.write_text(dump_record(PieceRecord(piece.offset, piece.size, piece.sha256, "x")) + "\n")
    assert inspected(toy)["a.bin"].journal.pieces == ()


def test_files_named_like_chunk_files_are_found_and_others_are_not(toy: Toy) -> None:
    """A file that is named like a chunk file is reported; SHA256SUMS beside them is not."""
    folder = toy.chunk_file("a.bin", 0).parent
    (folder / "a.bin.part-af").touch()
    (folder / "SHA256SUMS").touch()
    extras = inspected(toy)["a.bin"].extras
    assert [(f.kind, f.where) for f in extras] == [
        (Kind.EXTRA_CHUNK_FILE, "chunks/toy/a.bin/a.bin.part-af")
    ]


def test_inspecting_changes_nothing(on_disk: Toy) -> None:
    """No file is made, removed or touched by inspecting."""

    def snapshot() -> list[tuple[str, int, int]]:
        paths = sorted(on_disk.root.rglob("*"))
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in paths]

    before = snapshot()
    inspected(on_disk)
    assert snapshot() == before


def test_a_wrong_size_says_what_the_file_is(toy: Toy) -> None:
    """A pointer, a refusal and an empty file are told apart by their first bytes."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    page = "Access to model sesame/csm-1b is restricted. You must have access to it"
    for index, text in enumerate((pointer, page, "", "x")):
        toy.chunk_file("a.bin", index).write_text(text)
    findings = [part.finding for part in inspected(toy)["a.bin"].chunks[:4]]
    expected = [Kind.LFS_POINTER, Kind.ACCESS_PAGE, Kind.WRONG_SIZE, Kind.WRONG_SIZE]
    assert [f.kind for f in findings if f] == expected
    assert all(f.help for f in findings if f)


def test_the_destination_can_be_overridden(toy: Toy) -> None:
    """An own destination may be relative to the root, or absolute."""
    manifest = toy.manifest
    assert Paths.of(manifest, toy.root).destination == toy.root / "models/toy"
    assert Paths.of(manifest, toy.root, "here").destination == toy.root / "here"
    assert Paths.of(manifest, toy.root, "/else/where").destination == Path("/else/where")


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="no mountinfo here")
def test_the_type_of_a_file_system_is_known() -> None:
    """A folder on a mounted file system has that one's type."""
    assert filesystem_type(Path("/proc/self")) == "proc"


def test_without_a_list_of_mounts_no_type_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without /proc has none, which is no error."""

    def refuse(*_: object) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(inspecting, "read_bounded", refuse)
    assert filesystem_type(Path("/")) == ""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/", "ext4"), ("/disk", "xfs"), ("/disk/a b/c", "btrfs"), ("/diskette", "ext4")],
)
def test_the_innermost_mount_decides(
    monkeypatch: pytest.MonkeyPatch, folder: str, kind: str
) -> None:
    """The longest mount point above the folder counts, and of two at one point the later."""
    lines = [
        "1 0 8:1 / / rw shared:1 - ext4 /dev/a rw",
        "3 1 8:3 / /disk/a\\040b rw - btrfs /dev/c rw",
        "2 1 8:2 / /disk rw - vfat /dev/b rw",
        "4 1 8:4 / /disk rw - xfs /dev/d rw",
    ]
    monkeypatch.setattr(inspecting, "read_bounded", lambda _: "\n".join(lines).encode())
    assert filesystem_type(Path(folder)) == kind


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no second file system here")
def test_chunk_files_on_another_disk_than_staging_make_no_room(toy: Toy) -> None:
    """Why is said with the folder that is there of staging."""
    paths = Paths.of(toy.manifest, toy.root)
    assert inspected(toy)["a.bin"].saves_nothing == ""
    state = inspect(
        toy.manifest, toy.manifest.artifacts, replace(paths, staging=Path("/proc/x")), {}
    )
    expected = "the chunk files are on another file system than /proc"
    assert [item.saves_nothing for item in state.artifacts][:2] == [expected] * 2


def test_a_chunk_file_that_may_not_be_read_is_unfit(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before the run begins, with its path; one of the wrong size is that first."""
    victims = {toy.chunk_file("a.bin", 1), toy.chunk_file("a.bin", 2)}
    os.truncate(toy.chunk_file("a.bin", 2), 5)
    real = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **more: (
            not (path in victims and mode == os.R_OK) and real(path, mode, **more)
        ),
    )
    chunks = inspected(toy)["a.bin"].chunks
    assert [chunk.state for chunk in chunks[:4]] == [UNVERIFIED, INVALID, INVALID, UNVERIFIED]
    first, second = (chunk.finding for chunk in chunks[1:3])
    assert first and second and second.kind is Kind.WRONG_SIZE
    assert (first.kind, first.where) == (Kind.UNREADABLE, toy.artifact("a.bin").pieces[1].part)
    assert first.found == "permission denied"


def test_a_cache_that_may_not_be_read_holds_nothing(toy: Toy) -> None:
    """Another user's cache, or a folder of it, is no error: the bytes come from elsewhere."""
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision="a" * 40))
    cache = toy.root / "cache"
    blob = cache / "models--org--toy/blobs" / str(toy.artifact("a.bin").sha256)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(toy.good("a.bin"))
    paths = replace(Paths.of(toy.manifest, toy.root), cache=cache, shelves=(cache,))

    def found() -> tuple[bool, int]:
        item = inspect(toy.manifest, toy.manifest.artifacts, paths, {}).artifacts[0]
        return item.cached is not None, len(item.shelved)

    assert found() == (True, 1)
    for folder in (blob.parent, blob.parent.parent, cache):
        folder.chmod(0)
        with unprivileged():
            assert found() == (False, 0)


@pytest.mark.parametrize("value", [[], {}, None, "0", 0.5, True])
def test_a_journal_of_odd_values_only_costs_time(toy: Toy, value: object) -> None:
    """A journal line with a value of another type does not stop the inspection."""
    partial = partial_path(toy.staged("a.bin"))
    partial.parent.mkdir(parents=True)
    partial.touch()
    line = {"schema": 1, "offset": value, "size": value, "sha256": value, "source": value}
    journal_path(toy.staged("a.bin")).write_text(json.dumps(line) + "\n")
    assert inspected(toy)["a.bin"].journal.pieces == ()


def test_a_copy_of_a_verified_file_is_not_verified(on_disk: Toy) -> None:
    """A receipt is for one file: another one of the same size and time has to be hashed."""
    file = on_disk.installed("a.bin")
    shutil.copy2(file, file.with_name("copy"))
    flip(file.with_name("copy"))
    os.utime(file.with_name("copy"), ns=(0, file.stat().st_mtime_ns))
    file.with_name("copy").replace(file)
    assert inspected(on_disk)["a.bin"].installed.state is UNVERIFIED


@pytest.mark.parametrize(
    ("mode", "links", "is_shared"),
    [
        (0o644, 1, False),
        (0o444, 2, False),
        (0o555, 2, False),
        (0o200, 2, True),
        (0o020, 2, True),
        (0o002, 3, True),
    ],
)
def test_a_file_with_another_name_is_shared_where_anyone_may_write_to_it(
    on_disk: Toy, mode: int, links: int, is_shared: bool
) -> None:
    """An edit under one name would change it under the other as well."""
    file = on_disk.installed("a.bin")
    for number in range(1, links):
        file.with_name(f"name-{number}").hardlink_to(file)
    file.chmod(mode)
    assert inspected(on_disk)["a.bin"].installed.is_shared is is_shared


def test_a_link_is_followed_and_told(on_disk: Toy) -> None:
    """A file behind one is inspected as what it is."""
    file = on_disk.installed("a.bin")
    assert not inspected(on_disk)["a.bin"].installed.is_link
    real = file.rename(on_disk.root / "real")
    file.symlink_to(real)
    status = inspected(on_disk)["a.bin"].installed
    assert (status.is_link, status.size, status.finding) == (True, real.stat().st_size, None)


STATES = dict.fromkeys(FileState, False) | {UNVERIFIED: True, FileState.CONSUMED: True}


@pytest.mark.parametrize(("state", "is_usable"), STATES.items())
def test_a_chunk_file_is_usable_where_nothing_is_known_to_be_wrong(
    state: FileState, is_usable: bool
) -> None:
    """One of which bytes have moved is, too."""
    assert FileStatus(Path("x"), state).is_usable is is_usable


@pytest.mark.parametrize(
    ("installed", "staged", "file", "verified"),
    [
        (ABSENT, ABSENT, "staged", None),
        (ABSENT, VERIFIED, "staged", "staged"),
        (UNVERIFIED, VERIFIED, "installed", "staged"),
        (VERIFIED, VERIFIED, "installed", "installed"),
        (INVALID, UNVERIFIED, "installed", None),
    ],
)
def test_the_installed_file_comes_before_the_staged_one(
    installed: FileState, staged: FileState, file: str, verified: str | None
) -> None:
    """Where both are there, or both are verified."""
    item = state_of(installed, staged)
    assert item.file.path.name == file
    assert (item.verified.path.name if item.verified else None) == verified


def state_of(
    installed: FileState = ABSENT, staged: FileState = ABSENT, **changes: Any
) -> ArtifactState:
    """What inspecting finds of an artifact without chunk files."""
    artifact = Artifact("a", "a", "opaque", 1, SHA)
    files = (FileStatus(Path("installed"), installed), FileStatus(Path("staged"), staged))
    item = ArtifactState(artifact, *files, journal.Journal(), (), ())
    return replace(item, **changes)


def test_an_artifact_is_here_where_anything_of_it_is_or_was(on_disk: Toy) -> None:
    """A file, a receipt, a chunk file, or a line of a journal is enough."""
    receipt = inspected(on_disk)["a.bin"].installed.receipt
    gone = FileStatus(Path("x"), ABSENT)
    here = [
        state_of(UNVERIFIED),
        state_of(staged=INVALID),
        state_of(chunks=(gone, FileStatus(Path("x"), FileState.CONSUMED))),
        state_of(installed=ABSENT, staged=ABSENT, chunks=(gone, replace(gone, receipt=receipt))),
        state_of(journal=journal.Journal(pieces=(PieceRecord(0, 1, SHA, "x"),))),
        state_of(journal=journal.Journal(arrived=(Arrival(0, 1, SHA),))),
        state_of(journal=journal.Journal(consumed=(journal.Consumed(0, 1, SHA),))),
    ]
    assert [item.is_here for item in here] == [True] * len(here)
    assert not state_of(chunks=(gone,)).is_here
    assert not state_of(journal=journal.Journal(is_begun=True)).is_here


def test_the_room_is_that_of_the_nearest_folders_that_exist(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of staging and destination each; with all on one disk the files can be renamed."""
    free = {toy.root / "output": 3, toy.root: 5}
    (toy.root / "output").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    state = inspect(toy.manifest, toy.manifest.artifacts, Paths.of(toy.manifest, toy.root), {})
    assert (state.free_staging, state.free_destination, state.same_filesystem) == (3, 5, True)


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "bcachefs", "ext4"])
def test_a_cache_shares_blocks_where_the_file_system_can(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With the staging folder, if both are on one disk; without a cache there is nothing to."""
    monkeypatch.setattr(inspecting, "filesystem_type", lambda _: kind)
    paths = Paths.of(toy.manifest, toy.root)

    def shares(cache: Path | None) -> bool:
        asked = replace(paths, cache=cache)
        return inspect(toy.manifest, toy.manifest.artifacts, asked, {}).cache_shares_blocks

    assert (shares(toy.root / "cache"), shares(None)) == (kind != "ext4", False)
    assert not shares(Path("/proc/x"))


def shelves_of(toy: Toy, *shelves: Path) -> tuple[Mapping[int, Shelved], ...]:
    paths = replace(Paths.of(toy.manifest, toy.root), shelves=shelves)
    return inspect(toy.manifest, [toy.artifact("a.bin")], paths, {}).artifacts[0].shelved


def test_pieces_in_a_folder_are_those_of_files_of_the_right_size(toy: Toy, tmp_path: Path) -> None:
    """The whole file comes first, then chunk files by their path or their name."""
    shelf, size = tmp_path / "shelf", toy.artifact("a.bin").size
    pieces = toy.artifact("a.bin").pieces
    assert shelves_of(toy, shelf) == ()
    inside, beside = shelf / pieces[1].part, shelf / Path(pieces[3].part).name
    inside.parent.mkdir(parents=True)
    shutil.copy(toy.root / pieces[1].part, inside)
    shutil.copy(toy.root / pieces[3].part, beside)
    (shelf / Path(pieces[0].part).name).touch()
    (shelf / "a.bin").write_bytes(bytes(size - 1))
    chunks = {
        p.offset: Shelved(f, p.size, 0) for p, f in ((pieces[1], inside), (pieces[3], beside))
    }
    assert shelves_of(toy, shelf) == (chunks,)
    (shelf / "a.bin").write_bytes(bytes(size))
    whole = {p.offset: Shelved(shelf / "a.bin", size, p.offset) for p in pieces}
    assert shelves_of(toy, tmp_path / "gone", shelf) == (whole,)


def test_a_cached_file_is_known_by_its_size_until_it_is_hashed(toy: Toy) -> None:
    """What hashing found wrong, and the pieces of it that are right, are not forgotten."""
    toy.write_manifest(replace(toy.manifest, repo="org/toy", revision="a" * 40))
    a = toy.artifact("a.bin")
    blob = toy.root / "cache" / "models--org--toy/blobs" / str(a.sha256)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(toy.good("a.bin"))
    paths = replace(Paths.of(toy.manifest, toy.root), cache=toy.root / "cache")
    wrong, good = finding(blob, Kind.WRONG_DIGEST), frozenset({a.pieces[1].offset})
    for known, expected in (
        ({}, FileStatus(blob, UNVERIFIED, a.size)),
        ({blob: wrong}, FileStatus(blob, INVALID, a.size, wrong, good=good)),
    ):
        pieces = {blob: good} if known else {}
        state = inspect(toy.manifest, toy.manifest.artifacts, paths, known, pieces)
        assert [item.cached for item in state.artifacts] == [expected, None, None]


def test_files_that_are_named_like_chunk_files_are_told(toy: Toy) -> None:
    """One by its name, of several the first, with their number; in each folder."""
    a = toy.artifact("a.bin")
    last = replace(a.pieces[-1], part="chunks/else/a.bin.part-zz")
    (toy.root / "chunks/else").mkdir()
    toy.write_manifest(
        replace(toy.manifest, artifacts=(replace(a, pieces=(*a.pieces[:-1], last)),))
    )
    for name in ("toy/a.bin/a.bin.part-b", "else/a.bin.part-1", "else/a.bin.part-0"):
        (toy.root / "chunks" / name).touch()
    for name in ("else/a.bin.part", "else/a.bin.part-0.partial", "else/b.bin.part-0"):
        (toy.root / "chunks" / name).touch()
    expected, mend = "only the 5 chunk files of a.bin", "move it away; is the manifest that of"
    assert [
        (f.where, f.expected, f.found, f.help.startswith(mend))
        for f in inspected(toy)["a.bin"].extras
    ] == [
        ("chunks/else/a.bin.part-0", expected, "2 more, this one first", True),
        ("chunks/toy/a.bin/a.bin.part-ae", expected, "2 more, this one first", True),
    ]


@pytest.mark.parametrize(("need_blocks", "state"), [(False, VERIFIED), (True, UNVERIFIED)])
def test_a_file_without_the_digests_of_its_blocks_is_hashed_where_they_are_needed(
    on_disk: Toy, need_blocks: bool, state: FileState
) -> None:
    """A file of no bytes has no blocks."""
    paths = Paths.of(on_disk.manifest, on_disk.root)
    found = inspect(on_disk.manifest, on_disk.manifest.artifacts, paths, {}, None, need_blocks)
    assert found.artifacts[0].installed.state is state
    receipt = found.artifacts[0].installed.receipt
    assert receipt
    empty = Artifact("empty", "e", "opaque", 0, hashlib.sha256().hexdigest())
    manifest = replace(on_disk.manifest, artifacts=(empty,))
    path = on_disk.installed("empty")
    path.touch()
    now = Fingerprint.of(path.stat())
    digest = str(empty.sha256)
    record(
        path.parent,
        replace(receipt, path="empty", size=0, sha256=digest, pieces=(), fingerprint=now),
    )
    (item,) = inspect(manifest, [empty], paths, {}, None, need_blocks).artifacts
    assert item.installed.state is VERIFIED


def test_a_chunk_file_that_is_missing_or_none_is_told_with_what_helps(toy: Toy) -> None:
    """By its path below the root; one whose bytes have moved need not be there."""
    a = toy.artifact("a.bin")
    for piece in a.pieces[:3]:
        (toy.root / piece.part).unlink()
    (toy.root / a.pieces[1].part).mkdir()
    staged = toy.staged("a.bin")
    staged.parent.mkdir(parents=True)
    partial_path(staged).touch()
    lines = [
        journal.Consumed(p.offset, size, p.sha256)
        for p, size in ((a.pieces[2], a.pieces[2].size), (a.pieces[3], 5))
    ]
    journal_path(staged).write_text("\n".join(map(dump_record, lines)))
    chunks = inspected(toy)["a.bin"].chunks
    states = [ABSENT, INVALID, FileState.CONSUMED, FileState.CONSUMED, UNVERIFIED]
    assert [chunk.state for chunk in chunks] == states
    assert [chunk.size for chunk in chunks] == [
        None,
        None,
        None,
        a.pieces[3].size,
        a.pieces[4].size,
    ]
    mend = "copy the chunk file there, or restore it from git"
    assert chunks[0].finding == Finding.missing(a.pieces[0].part, a.pieces[0].size, mend)
    assert chunks[1].finding and chunks[1].finding.where == a.pieces[1].part
    wrong = finding(a.pieces[2].part, Kind.WRONG_DIGEST)
    again = inspected(toy, {toy.root / a.pieces[2].part: wrong})["a.bin"].chunks[2]
    assert again.state is ABSENT


def fifo(path: Path) -> None:
    os.mkfifo(path)


def test_a_chunk_file_that_was_found_wrong_or_leads_out_is_not_used(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What hashing found is told first; a link may lead to another place inside chunks/."""
    first, second, third = (toy.chunk_file("a.bin", index) for index in range(3))
    outside = tmp_path_factory.mktemp("outside") / "x"
    second.symlink_to(second.rename(outside))
    third.symlink_to(third.rename(toy.root / "chunks" / "x"))
    wrong = finding(first, Kind.WRONG_DIGEST)
    chunks = inspected(toy, {first: wrong})["a.bin"].chunks
    assert [chunk.state for chunk in chunks[:3]] == [INVALID, INVALID, UNVERIFIED]
    assert chunks[0].finding == wrong
    assert chunks[1].finding == Finding(
        Kind.IN_THE_WAY,
        toy.artifact("a.bin").pieces[1].part,
        "a file inside chunks/",
        f"a link that leads to {outside}",
        "copy the file there, or let chunks/ itself be the link",
    )


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "state", "kind", "found"),
    [
        (Path.mkdir, INVALID, Kind.IN_THE_WAY, "a folder"),
        (fifo, INVALID, Kind.UNREADABLE, "neither file nor folder"),
        (dangling, ABSENT, Kind.MISSING, "a symbolic link that leads to no file"),
    ],
)
def test_what_is_no_file_in_the_place_of_one_is_told(
    toy: Toy, make: Callable[[Path], None], state: FileState, kind: Kind, found: str
) -> None:
    """A link that leads nowhere can be replaced; the others are in the way."""
    path = toy.installed("a.bin")
    path.parent.mkdir(parents=True)
    make(path)
    file = inspected(toy)["a.bin"].installed
    assert file.finding
    assert (file.state, file.size) == (state, None)
    assert (file.finding.kind, file.finding.where) == (kind, str(path))
    assert file.finding.found == found


@pytest.mark.parametrize(
    ("format_", "content", "found"),
    [
        ("safetensors", "short", "5 bytes: another model"),
        ("opaque", "short", "5 bytes"),
        ("safetensors", "Access to model x is restricted.", "the Hub's error page saved as a file"),
    ],
)
def test_weights_of_the_wrong_size_are_told_by_what_they_are(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, format_: str, content: str, found: str
) -> None:
    """Other files by their size alone, and a page of the Hub as one."""
    monkeypatch.setattr("csm_weights.formats.identify.describe", lambda _: "another model")
    toy.write_manifest(
        replace(toy.manifest, artifacts=(replace(toy.artifact("a.bin"), format=format_),))
    )
    path = toy.installed("a.bin")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    wrong = inspected(toy)["a.bin"].installed.finding
    assert wrong and wrong.found.partition(" (")[0] == found


def test_a_file_system_that_frees_nothing_makes_no_room(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why is said with its type."""
    monkeypatch.setattr(inspecting, "filesystem_type", lambda _: "vfat")
    assert inspected(toy)["a.bin"].saves_nothing == "vfat cannot free parts of a file"


# ---- files that are none


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.fixture
def alarm() -> Iterator[None]:
    """An error instead of a wait without end."""

    def ring(*_: object) -> None:
        raise RuntimeError("it waits")  # an OSError would be taken for the file's

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("make", [fifo, endless, Path.mkdir])
@pytest.mark.parametrize("name", ["receipt", "journal", "partial", "smoke report", "chunk file"])
def test_what_is_no_file_counts_as_absent_at_once(
    on_disk: Toy, name: str, make: Callable[[Path], None]
) -> None:
    """A pipe, a device or a folder in place of a record is passed over, and nothing waits."""
    folder, staged = on_disk.root / "models/toy", on_disk.staged("a.bin")
    path = {
        "receipt": receipt_path(folder, "a.bin"),
        "journal": journal_path(staged),
        "partial": partial_path(staged),
        "smoke report": report_path(folder),
        "chunk file": on_disk.root / on_disk.artifact("a.bin").pieces[0].part,
    }[name]
    partial_path(staged).touch()
    path.unlink(missing_ok=True)
    make(path)
    item = inspected(on_disk)["a.bin"]
    assert (item.journal.pieces, item.journal.arrived) == ((), ())
    assert (item.installed.state is VERIFIED) == (name != "receipt")
    assert (item.chunks[0].state is INVALID) == (name == "chunk file")
    assert read_report(report_path(folder)) is None


@pytest.mark.parametrize("limit", [0, 1, 65_536, 65_537, 200_000, 300_000])
def test_reading_ends_at_the_limit_or_the_end(tmp_path: Path, limit: int) -> None:
    """A file is read up to its end, in blocks, or just as far as is allowed."""
    data = os.urandom(200_000)
    (tmp_path / "x").write_bytes(data)
    assert read_bounded(tmp_path / "x", limit) == data[:limit]


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("make", [fifo, endless, Path.mkdir])
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Whatever else has the name is refused before a byte is read."""
    make(tmp_path / "x")
    with pytest.raises(NotRegular):
        open_regular(tmp_path / "x")


def test_a_file_that_waits_for_more_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some files of /proc look like regular ones, and have nothing to read until later."""
    end, other = os.pipe()
    os.set_blocking(end, False)
    monkeypatch.setattr("csm_weights.files.open_regular", lambda *_: end)
    with pytest.raises(BlockingIOError, match="unavailable"):
        read_bounded(tmp_path, 10)
    os.close(other)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("make", [fifo, endless, Path.mkdir])
def test_what_is_no_file_holds_no_token(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Something else in the place of the Hub's token file is no token, and nothing waits."""
    make(tmp_path / "token")
    assert HubEnvironment.read({"HF_TOKEN_PATH": str(tmp_path / "token")}).token_from == ""


# ---- what is salvaged, shared and freed


@pytest.mark.parametrize(("cut", "good"), [(0, 2), (1, 1), (-1, 2)])
def test_the_pieces_before_a_cut_are_salvaged(on_disk: Toy, cut: int, good: int) -> None:
    """Of a file that was cut short all pieces that end before the cut may be right."""
    pieces, file = on_disk.artifact("a.bin").pieces, on_disk.root / "models/toy/a.bin"
    os.truncate(file, pieces[1].end - cut)
    status = inspected(on_disk)["a.bin"].installed
    assert status.state is INVALID
    assert status.good == frozenset(piece.offset for piece in pieces[:good])


def test_nothing_is_salvaged_from_a_file_that_is_too_long(on_disk: Toy) -> None:
    """Bytes may have been put in anywhere."""
    file = on_disk.installed("a.bin")
    os.truncate(file, file.stat().st_size + 1)
    status = inspected(on_disk)["a.bin"].installed
    assert (status.state, status.good) == (INVALID, frozenset())


def spread(toy: Toy, other: Path) -> Manifest:
    """The toy's manifest with the last chunk file of b.bin in a folder elsewhere."""
    b = toy.artifact("b.bin")
    (toy.root / "elsewhere").symlink_to(other)
    last = replace(b.pieces[-1], part=f"elsewhere/{Path(b.pieces[-1].part).name}")
    shutil.move(toy.root / b.pieces[-1].part, toy.root / last.part)
    return replace(toy.manifest, artifacts=(replace(b, pieces=(*b.pieces[:-1], last)),))


def test_chunk_files_on_two_disks_make_too_little_room(toy: Toy, tmp_path: Path) -> None:
    """One chunk file on another file system is enough: consuming would free too little here."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shm) as other:
        manifest = spread(toy, Path(other))
        state = inspect(manifest, manifest.artifacts, Paths.of(manifest, toy.root), {})
    assert "on another file system" in state.artifacts[0].saves_nothing


@pytest.mark.parametrize(("size", "shares"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_only_pieces_that_begin_at_a_block_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, shares: bool
) -> None:
    """On XFS a file of aligned pieces takes no room; of others it is copied."""
    monkeypatch.setattr(inspecting, "filesystem_type", lambda _: "xfs")
    pieces = tuple(Piece(f"chunks/x-{i}", i * size, size, "5" * 64) for i in range(3))
    artifact = Artifact("x", "x", "opaque", 3 * size, "5" * 64, pieces=pieces)
    manifest = Manifest("toy", "output/toy", "models/toy", (artifact,))
    state = inspect(manifest, [artifact], Paths.of(manifest, tmp_path), {})
    assert state.shares_blocks is shares


@pytest.mark.parametrize(
    ("size", "grown", "is_stranded"),
    [(4 << 20, 0, True), (4 << 20, 4096, False), (4096, 0, True), (4095, 0, False)],
)
def test_a_chunk_file_of_another_size_is_no_consumed_one(
    tmp_path: Path, size: int, grown: int, is_stranded: bool
) -> None:
    """A hole at the start means that bytes have moved only in a file of the piece's size.

    Less than a block is never given back.
    """
    piece = Piece("chunks/x-0", 0, size, "5" * 64)
    artifact = Artifact("x", "x", "opaque", size, "5" * 64, pieces=(piece,))
    manifest = Manifest("toy", "output/toy", "models/toy", (artifact,))
    chunk, partial = tmp_path / piece.part, partial_path(tmp_path / "output/toy/x")
    for path in (chunk, partial):
        path.parent.mkdir(parents=True)
        path.touch()
    os.truncate(chunk, size + grown)
    (item,) = inspect(manifest, [artifact], Paths.of(manifest, tmp_path), {}).artifacts
    assert (item.stranded is not None) == is_stranded


# ---- cost


def many(count: int) -> Manifest:
    """A manifest of so many artifacts, each with a chunk file of its own in one folder."""
    artifacts = tuple(
        Artifact(name, "x", "opaque", 9, SHA, pieces=(Piece(f"chunks/{name}.part-aa", 0, 9, SHA),))
        for name in (f"f{number:04}" for number in range(count))
    )
    return Manifest("many", "output/many", "models/many", artifacts)


def test_the_disk_is_asked_about_folders_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many artifacts there are, mounts are read once and folders listed once."""
    asked: list[str] = []
    scandir = os.scandir

    def listing(path: Path) -> Any:
        asked.append(Path(path).name)
        return scandir(path)

    def mounts(_: Path) -> str:
        asked.append("mounts")
        return "ext4"

    (tmp_path / "chunks").mkdir()
    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(inspecting, "filesystem_type", mounts)
    manifest = many(300)
    inspect(manifest, manifest.artifacts, Paths.of(manifest, tmp_path), {})
    assert sorted(asked) == ["chunks", "mounts"]


def test_many_stray_files_are_one_finding(tmp_path: Path) -> None:
    """Files named like chunk files are counted, not listed; chunk files are none of them."""
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "f0000.part-aa").touch()
    for number in range(1000):
        (tmp_path / "chunks" / f"f0000.part-z{number:03}").touch()
    manifest = many(2)
    first, second = inspect(
        manifest, manifest.artifacts, Paths.of(manifest, tmp_path), {}
    ).artifacts
    assert [finding.found for finding in first.extras] == ["1,000 more, this one first"]
    assert second.extras == ()


def test_each_line_of_a_journal_is_read_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long journal costs one look at each line, and none at the empty ones between them."""
    lines: list[str] = []

    def counted(line: str) -> journal.Record | None:
        lines.append(line)
        return real(line)

    real = journal.parse_line
    monkeypatch.setattr(journal, "parse_line", counted)
    piece, staged = toy.artifact("a.bin").pieces[0], toy.staged("a.bin")
    staged.parent.mkdir(parents=True)
    partial_path(staged).touch()
    arrivals = [journal.Arrival(n, 1, piece.sha256) for n in range(500)]
    journal_path(staged).write_text("\n\n".join(map(dump_record, arrivals)))
    assert len(inspected(toy)["a.bin"].journal.arrived) == len(lines) == 500

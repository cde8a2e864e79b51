"""Chunk files whose bytes have moved: what is held twice, what may not go on, what may not go."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csm_weights.errors import Finding, Kind
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.store.consumed import held_twice, why_stranded, why_unfit
from csm_weights.store.journal import Arrival, Consumed, Journal, PieceRecord, partial_path

A, B = "a" * 64, "b" * 64
PIECES = (Piece("chunks/x.part-aa", 0, 10_000, A), Piece("chunks/x.part-ab", 10_000, 9_000, B))
ARTIFACT = Artifact("sub/x", "x", "opaque", 19_000, pieces=PIECES)


def record(piece: Piece) -> PieceRecord:
    return PieceRecord(piece.offset, piece.size, piece.sha256, "x")


@pytest.mark.parametrize(
    ("blocks", "journal", "held"),
    [
        # Blocks of 512 bytes: of the unfinished file, of the first and of the second chunk file.
        ((40, 20, 18), {}, 20_480),
        ((40, 20, 18), {"pieces": (record(PIECES[0]),)}, 10_480),
        ((40, 20, 18), {"arrived": (Arrival(0, 500, A), Arrival(10_000, 80, B))}, 19_900),
        (
            (40, 20, 18),
            {"pieces": (record(PIECES[0]),), "arrived": (Arrival(10_000, 80, B),)},
            10_400,
        ),
        ((10, 20, 18), {"pieces": (record(PIECES[0]),)}, 0),
        ((40, 20, 18), {"consumed": (Consumed(0, 4_000, A),)}, 16_480 + 4_240),
        ((20, 12, 18), {"consumed": (Consumed(0, 4_000, A),)}, 6_240 + 144),
        ((20, 11, 18), {"consumed": (Consumed(0, 4_000, A),)}, 6_240),
        ((20, 0, 18), {"consumed": (Consumed(0, 10_000, A), Consumed(10_000, 1, B))}, 239 + 217),
        ((40, 0, 0), {"consumed": (Consumed(0, 1, A),), "pieces": (record(PIECES[0]),)}, 10_480),
    ],
)
def test_what_is_on_disk_twice_is_what_the_journal_does_not_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: tuple[int, int, int],
    journal: dict[str, tuple[object, ...]],
    held: int,
) -> None:
    """Bytes of the unfinished file beyond its lines, and of chunk files that have moved."""
    files = (partial_path(tmp_path / "x"), *(tmp_path / piece.part for piece in PIECES))
    sizes = dict(zip(files, blocks, strict=True))
    real = Path.stat

    def stat(path: Path, **options: bool) -> Any:
        known = path in sizes
        return SimpleNamespace(st_blocks=sizes[path]) if known else real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    begun = Journal(**journal, is_begun=True)  # type: ignore[arg-type]
    assert held_twice(ARTIFACT, tmp_path / "x", begun, tmp_path) == held
    assert held_twice(ARTIFACT, tmp_path / "x", Journal(), tmp_path) == 0


def test_what_is_not_on_disk_is_not_held_twice(tmp_path: Path) -> None:
    """Neither the unfinished file nor a chunk file need be there."""
    for moved in ((), (Consumed(0, 4_000, A),)):
        journal = Journal(consumed=moved, is_begun=True)
        assert held_twice(ARTIFACT, tmp_path / "x", journal, tmp_path) == 0


MOVED = Consumed(0, 10, A)


@pytest.mark.parametrize(
    ("journal", "links", "found"),
    [
        (Journal(), 2, None),
        (Journal(is_begun=True), 2, None),
        (Journal(consumed=(MOVED,), is_begun=True), 1, None),
        (Journal(consumed=(MOVED,), is_begun=True), 2, "more hard links to it"),
        (Journal(foreign=(MOVED,), is_begun=True), 1, "chunk files that sub/x no longer has"),
    ],
)
def test_an_unfinished_file_that_may_have_the_only_bytes_is_not_continued(
    tmp_path: Path, journal: Journal, links: int, found: str | None
) -> None:
    """Where its lines are of other pieces, or another name leads to it as well."""
    partial = partial_path(tmp_path / "x")
    partial.touch()
    if links > 1:
        (tmp_path / "other").hardlink_to(partial)
    why = why_stranded(ARTIFACT, tmp_path / "x", journal, tmp_path)
    assert (why and why.found) == found
    if why:
        assert (why.kind, why.where) == (Kind.STRANDED, str(partial))


def test_a_chunk_file_that_begins_with_a_hole_is_named(tmp_path: Path) -> None:
    """Its bytes may be in the unfinished file alone, of which no journal tells."""
    partial_path(tmp_path / "x").touch()
    (tmp_path / "chunks").mkdir()
    first, second = (tmp_path / piece.part for piece in PIECES)
    first.write_bytes(b"\1" * 10_000)
    with second.open("wb") as file:
        file.seek(4096)
        file.write(b"\1" * (9_000 - 4096))
    journal = Journal(is_begun=True)
    why = why_stranded(ARTIFACT, tmp_path / "x", journal, tmp_path)
    assert why and why.found == "no journal, and chunks/x.part-ab begins with a hole"
    os.truncate(second, 9_001)
    assert why_stranded(ARTIFACT, tmp_path / "x", journal, tmp_path) is None


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("gone", None),
        ("fit", None),
        ("named", "a name that no chunk file of sub/x has"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("linked", "2 hard links to it"),
        ("read-only", "no permission to write"),
        ("in a read-only folder", "no permission to write"),
    ],
)
def test_a_chunk_file_that_cannot_go_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, found: str | None
) -> None:
    """Only a regular file under its own name, without others, that may be removed, can."""
    folder = tmp_path / "chunks"
    folder.mkdir()
    chunk = folder / ("y.part-aa" if case == "named" else "x.part-aa")
    if case == "dangling":
        chunk.symlink_to(tmp_path / "nowhere")
    elif case != "gone":
        chunk.touch()
    if case == "link":
        chunk.symlink_to(chunk.rename(tmp_path / "real"))
    if case == "linked":
        (tmp_path / "y").hardlink_to(chunk)
    read_only = {"read-only": chunk, "in a read-only folder": folder}.get(case)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (read_only, os.W_OK))
    why = why_unfit(chunk, "there", ARTIFACT)
    expected, mend = "a regular file without other links, that may be removed", "leave --consume"
    assert (why and why.found) == found
    if why:
        assert why == Finding(Kind.NOT_CONSUMABLE, "there", expected, why.found, why.help)
        assert why.help.startswith(mend)

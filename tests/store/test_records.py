"""Receipts, journal lines and smoke reports, as they are written and as anyone may have."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Piece
from csm_weights.model.smoke_report import SmokeReport, report_path
from csm_weights.store.journal import (
    Arrival,
    Consumed,
    Journal,
    PieceRecord,
    Refuted,
    is_unfinished,
    journal_path,
    parse_line,
    partial_path,
    read_journal,
)
from csm_weights.store.receipts import Receipt, dump_receipt, load_receipt, receipt_path
from csm_weights.untrusted import dump_record, parse_record

SHA = "5" * 64

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
PIECE = PieceRecord(0, 10, SHA, "chunks/a-0")
OID = "6" * 40
RECEIPT = Receipt("a", "toy", 10, SHA, (PIECE,), Fingerprint(1, 10, 2, 3), "now", "test", OID)


def has_types(record: Any, example: Any) -> bool:
    """Whether a record's fields have the types of those of a good one, all the way down."""
    if isinstance(example, tuple):
        return isinstance(record, tuple) and all(has_types(r, example[0]) for r in record)
    if hasattr(example, "__dataclass_fields__"):
        return type(record) is type(example) and all(
            has_types(value, getattr(example, key)) for key, value in vars(record).items()
        )
    return type(record) is type(example) or (record is None and example == OID)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(asdict(PIECE))), value=trees)
def test_a_journal_line_of_other_types_counts_as_absent(key: str, value: object) -> None:
    """A line is understood with the right types in it, or not at all."""
    record = parse_line(json.dumps({"schema": 1, **asdict(PIECE), key: value}))
    assert record is None or has_types(record, PIECE)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(json.loads(dump_receipt(RECEIPT)))), value=trees)
def test_a_receipt_of_other_types_counts_as_absent(key: str, value: object) -> None:
    """A receipt is understood with the right types in it, or not at all."""
    record = load_receipt(json.dumps(json.loads(dump_receipt(RECEIPT)) | {key: value}))
    assert record is None or has_types(record, RECEIPT)


@settings(max_examples=150, deadline=None)
@given(text=st.text() | trees.map(json.dumps))
def test_no_text_crashes_the_reader_of_records(text: str) -> None:
    """Whatever a record's file holds, reading it gives a record or nothing."""
    assert (load_receipt(text), parse_line(text), parse_record(text, SmokeReport)) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize("path", ["smoke", "smoke.json", "smoke-report"])
def test_no_receipt_is_kept_where_the_smoke_report_is(path: str) -> None:
    """A file may be called as it likes without its receipt meeting the smoke report."""
    folder = Path("/placed")
    assert receipt_path(folder, path) != report_path(folder)


def test_records_read_back_as_written() -> None:
    """Dumping and loading are inverse."""
    assert parse_line(dump_record(PIECE)) == PIECE
    assert load_receipt(dump_receipt(RECEIPT)) == RECEIPT


def test_what_was_refuted_has_no_lines_before_that(tmp_path: Path) -> None:
    """A piece that was found wrong counts from there on; those of other pieces stay."""
    pieces = (Piece("chunks/a-0", 0, 10, SHA), Piece("chunks/a-1", 10, 10, "6" * 64))
    artifact = Artifact("a", "g", "opaque", 20, "7" * 64, pieces=pieces)
    early, late, other = Arrival(0, 4, SHA), Arrival(4, 2, SHA), Arrival(10, 10, "6" * 64)
    lines = [early, other, PIECE, Refuted(0, SHA), Refuted(10, SHA), late]
    partial_path(tmp_path / "a").touch()
    journal_path(tmp_path / "a").write_text("\n".join(map(dump_record, lines)))
    assert read_journal(tmp_path / "a", artifact) == Journal(arrived=(other, late), is_begun=True)


def test_a_range_beyond_the_end_of_its_piece_is_left_out(tmp_path: Path) -> None:
    """Bytes behind a piece are another piece's; up to its end they count."""
    artifact = Artifact("a", "g", "opaque", 10, SHA, pieces=(Piece("chunks/a-0", 0, 10, SHA),))
    beyond, last = Arrival(6, 6, SHA), Arrival(5, 5, SHA)
    partial_path(tmp_path / "a").touch()
    journal_path(tmp_path / "a").write_text("\n".join(map(dump_record, [beyond, last])))
    assert read_journal(tmp_path / "a", artifact) == Journal(arrived=(last,), is_begun=True)


@pytest.mark.parametrize(("moved", "counts"), [(0, False), (1, True), (10, True), (11, False)])
def test_bytes_that_moved_count_up_to_the_size_of_the_piece(
    moved: int, counts: bool, tmp_path: Path
) -> None:
    """From its first byte to its last; a line about more bytes is wrong."""
    artifact = Artifact("a", "g", "opaque", 10, SHA, pieces=(Piece("chunks/a-0", 0, 10, SHA),))
    partial_path(tmp_path / "a").touch()
    journal_path(tmp_path / "a").write_text(dump_record(line := Consumed(0, moved, SHA)))
    assert read_journal(tmp_path / "a", artifact).consumed == ((line,) if counts else ())


@pytest.mark.parametrize(
    ("fields", "record"),
    [
        ({"offset": 0, "size": 1, "piece": SHA}, Arrival(0, 1, SHA)),
        ({"offset": 0, "size": 0, "piece": SHA}, None),
        ({"offset": -1, "size": 1, "piece": SHA}, None),
        ({"offset": 0, "consumed": 0, "piece": SHA}, Consumed(0, 0, SHA)),
        ({"offset": 0, "consumed": -1, "piece": SHA}, None),
        ({"offset": -1, "consumed": 0, "piece": SHA}, None),
        ({"offset": 0, "refuted": SHA}, Refuted(0, SHA)),
    ],
)
def test_a_range_begins_at_the_first_byte_and_has_one(
    fields: dict[str, object], record: object
) -> None:
    """Bytes that moved may be none; what is said of bytes before the first is not understood."""
    assert parse_line(json.dumps({"schema": 1, **fields})) == record


def test_a_journal_is_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Whatever the order of its lines; bytes of pieces that are not today's are kept apart."""
    b, c = "b" * 64, "c" * 64
    pieces = tuple(Piece(f"chunks/a-{n}", 10 * n, 10, s) for n, s in enumerate((SHA, b, c)))
    artifact = Artifact("a", "g", "opaque", 30, "7" * 64, pieces=pieces)
    verified = [PieceRecord(p.offset, p.size, p.sha256, "x") for p in pieces]
    moved = [Consumed(20, 3, c), Consumed(10, 9, b), Consumed(10, 2, b)]
    foreign, empty = [Consumed(10, 1, c), Consumed(0, 99, "d" * 64)], Consumed(0, 0, "e" * 64)
    lines = [*reversed(verified[:2]), *moved, *foreign, empty, Arrival(19, 1, b), Arrival(20, 9, c)]
    lines += [replace(verified[0], offset=-10), Refuted(-1, c), Refuted(20, b), Refuted(21, c)]
    partial_path(tmp_path / "a").touch()
    other = json.dumps({"schema": 1, "a record of": "another version", "which is": "longer"})
    journal_path(tmp_path / "a").write_text("\n".join([other, *map(dump_record, lines)]))
    assert read_journal(tmp_path / "a", artifact) == Journal(
        tuple(verified[:2]),
        (Arrival(20, 9, c),),
        (Consumed(10, 2, b), Consumed(20, 3, c)),
        tuple(foreign),
        is_begun=True,
    )


def test_an_unfinished_file_without_a_journal_is_begun(tmp_path: Path) -> None:
    """A journal alone is not."""
    artifact = Artifact("a", "g", "opaque", 10, SHA)
    journal_path(tmp_path / "a").write_text(dump_record(Arrival(0, 1, SHA)))
    assert read_journal(tmp_path / "a", artifact) == Journal()
    journal_path(tmp_path / "a").unlink()
    partial_path(tmp_path / "a").touch()
    assert read_journal(tmp_path / "a", artifact) == Journal(is_begun=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.partial", True),
        ("a.partial.journal", True),
        ("a.recombine-partial.17", True),
        ("a.partial.bin", False),
        ("a", False),
    ],
)
def test_unfinished_files_are_known_by_their_names(name: str, expected: bool) -> None:
    """Those of this package, and of recombine.sh."""
    assert is_unfinished(name) is expected


def test_a_fingerprint_survives_a_rename_but_not_an_edit(tmp_path: Path) -> None:
    """A rename keeps inode, size and mtime; a write does not, nor does another file."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 70_001)
    before = Fingerprint.of(path.stat())
    path = path.rename(tmp_path / "b")
    assert Fingerprint.of(path.stat()).same_bytes(before)
    os.utime(path, ns=(1, 1))
    assert not Fingerprint.of(path.stat()).same_bytes(before)

"""The cost of `inv status` grows with what there is, and no faster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from csm_weights.byte_ranges import Ranges
from csm_weights.commands.render import text
from csm_weights.errors import ManifestInvalid
from csm_weights.manifest.parse import MAX_FILES, parse
from csm_weights.pipeline import apply
from csm_weights.pipeline.request import Request
from csm_weights.store.journal import Arrival, journal_path, partial_path
from csm_weights.untrusted import dump_record
from tests.support import hostile
from tests.support.toy import Toy

#: How many things there are in the smaller case; the larger one has twice as many.
FEW = 400


def files(root: Path, count: int) -> Request:
    """A model of so many files, none of which is here."""
    (root / "manifests").mkdir()
    names = (f"data/{number}.bin" for number in range(count))
    (root / "manifests" / "bad.toml").write_bytes(hostile.files(*names))
    return Request(root, "bad", ("all",))


def wrong_files(root: Path, count: int) -> Request:
    """Such a model, of which every file is here and has another size."""
    request = files(root, count)
    (root / "models" / "bad" / "data").mkdir(parents=True)
    for number in range(count):
        (root / "models" / "bad" / "data" / f"{number}.bin").write_text("wrong")
    return request


def strays(root: Path, count: int) -> Request:
    """So many files that are named like chunk files, and belong to none."""
    toy = Toy.make(root)
    folder, name = toy.chunk_file("a.bin", 0).parent, toy.chunk_file("a.bin", 0).name
    for number in range(count):
        (folder / f"{name[:-1]}-{number}").touch()
    return toy.request("all")


def journal(root: Path, *lines: str) -> Request:
    """A journal of these lines, beside an unfinished file."""
    toy = Toy.make(root)
    staged = toy.staged("a.bin")
    staged.parent.mkdir(parents=True)
    partial_path(staged).touch()
    journal_path(staged).write_text("\n".join(lines))
    return toy.request("all")


def arrivals(root: Path, count: int) -> Request:
    """So many ranges that have arrived of one piece."""
    (root / "other").mkdir()
    sha256 = Toy.make(root / "other").artifact("a.bin").pieces[0].sha256
    records = (Arrival(i, 1, sha256) for i in range(0, 2 * count, 2))
    return journal(root, *map(dump_record, records))


def foreign(root: Path, count: int) -> Request:
    """So many lines that are well-formed, and about nothing."""
    return journal(root, *(f'{{"offset": {i}, "schema": 1, "{i:064}": 1}}' for i in range(count)))


def cost(make: Callable[[Path, int], Request], root: Path, count: int) -> int:
    """Return how many functions `inv status` calls."""
    root.mkdir()
    request, calls = make(root, count), 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        text.render(apply.status(request, check=True))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("make", [files, wrong_files, strays, arrivals, foreign])
def test_status_grows_linearly(make: Callable[[Path, int], Request], tmp_path: Path) -> None:
    """Twice as many files, strays or lines of a journal take at most twice the calls."""
    cost(make, tmp_path / "warm", FEW)
    few, many = (cost(make, tmp_path / str(count), count) for count in (FEW, 2 * FEW))
    assert many <= 2.05 * few


def test_sets_of_ranges_grow_slowly() -> None:
    """Ranges that do not touch, in whatever order, are put in order once and looked up."""

    def comparisons(count: int) -> int:
        seen: list[str] = []

        def counted(name: str) -> Callable[[int, int], bool]:
            def compare(one: int, other: int) -> bool:
                seen.append(name)
                return bool(getattr(int, name)(one, other))

            return compare

        names = ("__lt__", "__le__", "__gt__", "__ge__")
        Number = type("Number", (int,), {name: counted(name) for name in names})
        starts = [4 * (number * 7919 % count) for number in range(count)]
        ranges = Ranges([(Number(start), Number(start + 2)) for start in starts])
        for start in starts:
            assert ranges.missing(Number(start), Number(start + 4)) == [(start + 2, start + 4)]
            assert ranges.end_of(Number(start + 1)) == start + 2
        return len(seen)

    assert comparisons(2 * FEW) <= 2.4 * comparisons(FEW)


def test_lines_that_are_no_records_cost_nothing(tmp_path: Path) -> None:
    """A journal of garbage is passed over, however many lines it has."""

    def garbage(root: Path, count: int) -> Request:
        return journal(root, *["{}", "x", '{"' + "x" * 60] * count)

    cost(garbage, tmp_path / "warm", 1)
    few, many = (cost(garbage, tmp_path / str(count), count) for count in (1, 1000))
    assert many <= few + 100


def test_a_manifest_names_fifty_thousand_files() -> None:
    """As many files are read, and one more is refused before any is."""
    names = [f"f{number}" for number in range(MAX_FILES + 1)]
    assert len(parse(hostile.files(*names[:-1]), "big.toml").artifacts) == 50_000
    with pytest.raises(ManifestInvalid, match="at most 50,000 files"):
        parse(hostile.files(*names), "big.toml")

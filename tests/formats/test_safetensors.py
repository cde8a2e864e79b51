"""The header of a safetensors file: its bounds, and each rule that it may break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csm_weights.errors import GET_AGAIN, Finding, Kind, WrongContent
from csm_weights.formats import safetensors, sniff
from csm_weights.formats.tensor_index import TensorIndex
from tests.support import hostile
from tests.support.hostile import entry
from tests.support.readers import read_safetensors


def read(folder: Path, header: object, data: bytes = b"", **options: Any) -> TensorIndex:
    return read_safetensors(hostile.written(folder, hostile.safetensors(header, data, **options)))


def refused(folder: Path, *content: Any, **options: Any) -> list[Finding]:
    title = "weights cannot be read as safetensors"
    with pytest.raises(WrongContent, match=title) as caught:
        read(folder, *content, **options)
    return list(caught.value.findings)


def of_unknown(begin: Any, end: Any) -> dict[str, Any]:
    """A tensor that is not supported, though its bytes are known."""
    return entry(begin, end, [1], "F31")


def test_the_length_of_a_header_has_its_bounds(tmp_path: Path) -> None:
    """It is 2 bytes at least, and at most the rest of the file, or 100,000,000."""
    assert read(tmp_path, "{}").tensors == {}
    assert read(tmp_path, "{}      ").tensors == {}
    for length, most in ((1, 2), (3, 2), (0, 8)):
        (finding,) = refused(tmp_path, "{}" + " " * (most - 2), length=length)
        where, words = str(tmp_path / "weights"), (f"2 to {most} bytes", str(length))
        assert finding == Finding(Kind.MALFORMED, f"{where}: header length", *words, help=GET_AGAIN)
    assert refused(tmp_path, "{}", length=2 | 1 << 56)[0].found == str(2 | 1 << 56)
    for size in range(8):
        path = hostile.written(tmp_path, bytes(size))
        with pytest.raises(WrongContent, match=f"8 bytes of header length, .* {size} bytes"):
            read_safetensors(path)
    with pytest.raises(WrongContent, match="expected 2 to 0 bytes, found 0"):
        read_safetensors(hostile.written(tmp_path, bytes(8)))
    path = hostile.written(tmp_path, (100_000_001).to_bytes(8, "little") + b"{")
    with path.open("r+b") as file:
        file.truncate(1 << 28)
    with pytest.raises(WrongContent, match="expected 2 to 100000000 bytes, found 100000001"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("length", "first", "is_one"),
    [
        (2, b'{"', True),
        (100_000_000, b"{}", True),
        (100_000_001, b"{}", False),
        (2 | 1 << 56, b"{}", False),
        (2, b"}}", False),
        (2, b"[]", False),
    ],
)
def test_a_file_is_known_by_its_first_nine_bytes(length: int, first: bytes, is_one: bool) -> None:
    """They are the length of a header that may be, and a brace."""
    found = sniff(length.to_bytes(8, "little") + first)
    assert (found is safetensors.FORMAT) is is_one


def test_an_index_has_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and dimensions count, of tensors that are not supported the names."""
    header = {"w": entry(), "word": entry(8, 12, [1, 1, 1]), "odd": of_unknown(12, 16)}
    cost = 3 * 400 + len("wwordodd") + 4 * 32
    for least, is_read in ((cost, True), (cost - 1, False)):
        monkeypatch.setattr(safetensors, "MAX_INDEX", least)
        findings = refused(tmp_path, header, bytes(16))
        expected = ["a known dtype", "an index of about 100,000 tensors"][: 2 - is_read]
        assert [finding.expected for finding in findings] == expected
        assert {finding.kind for finding in findings} == {Kind.UNSUPPORTED}


@pytest.mark.parametrize(
    ("fields", "expected", "found"),
    [
        ({"dtype": 4}, "a known dtype", "4"),
        ({"dtype": None}, "a known dtype", "None"),
        ({"dtype": ["F32"]}, "a known dtype", "a list"),
        ({"shape": "2"}, "a shape of whole numbers", "something else"),
        ({"shape": [-1]}, "a shape of whole numbers", "something else"),
        ({"begin": -1}, "data_offsets [begin, end]", "something else"),
        ({"begin": 9}, "data_offsets [begin, end]", "something else"),
        ({"end": None}, "data_offsets [begin, end]", "something else"),
        ({"shape": [3]}, "12 bytes for F32 [3]", "8 bytes"),
        ({"begin": 1}, "8 bytes for F32 [2]", "7 bytes"),
        ({"shape": []}, "4 bytes for F32 []", "8 bytes"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_said(
    fields: dict[str, Any], expected: str, found: str, tmp_path: Path
) -> None:
    """The finding has the tensor, and the next one is read all the same."""
    header = {"w": entry(**fields), "v": {}}
    findings = refused(tmp_path, header, bytes(8))
    where = f"{tmp_path / 'weights'}: "
    keys = ("dtype, shape and data_offsets", "something else")
    assert findings == [
        Finding(Kind.MALFORMED, f"{where}w", expected, found, GET_AGAIN),
        Finding(Kind.MALFORMED, f"{where}v", *keys, help=GET_AGAIN),
    ]


@pytest.mark.parametrize("span", [[], [0], [0, 8, 8], {"0": 8}, "08", None])
def test_an_entry_has_two_offsets(span: object, tmp_path: Path) -> None:
    header = {"w": entry() | {"data_offsets": span}}
    (finding,) = refused(tmp_path, header, bytes(8))
    assert finding.expected == "data_offsets [begin, end]"


@pytest.mark.parametrize(
    ("spans", "size", "found"),
    [
        ([(0, 4), (4, 8), (8, 8), (8, 12)], 12, []),
        ([(8, 12), (8, 8), (4, 8), (0, 4)], 12, []),
        ([(1, 4), (4, 8)], 8, [("t0", 0, "a hole", 1)]),
        ([(0, 4), (5, 8)], 8, [("t1", 4, "a hole", 5)]),
        ([(0, 4), (3, 8)], 8, [("t1", 4, "an overlap", 3)]),
        ([(0, 8), (4, 6)], 8, [("t1", 8, "an overlap", 4)]),
        ([(0, 8), (2, 4), (8, 9)], 9, [("t1", 8, "an overlap", 2)]),
        ([(0, 2), (3, 4), (3, 8)], 8, [("t1", 2, "a hole", 3), ("t2", 4, "an overlap", 3)]),
        ([(0, 4)], 5, [("data", 5, "the end", 4)]),
        ([(0, 6)], 5, [("data", 5, "the end", 6)]),
        ([], 1, [("data", 1, "the end", 0)]),
    ],
)
@pytest.mark.parametrize("unread", [(), (0,), (1, 2), (0, 1, 2, 3)])
def test_the_data_have_no_hole_and_no_overlap(
    spans: list[tuple[int, int]],
    size: int,
    found: list[tuple[str, int, str, int]],
    unread: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """Each gap is a finding of the tensor after it; tensors that are not supported count."""
    header = {
        f"t{n}": of_unknown(*span) if n in unread else entry(*span, [span[1] - span[0]], "U8")
        for n, span in enumerate(spans)
    }
    path = hostile.written(tmp_path, hostile.safetensors(header, bytes(size)))
    start = path.stat().st_size - size
    expected = [
        (
            f"{path}: {at}",
            f"data up to the end, byte {start + end}",
            f"up to byte {start + begin}",
        )
        if what == "the end"
        else (
            f"{path}: {at}",
            f"data from byte {start + end}",
            f"{what}: from byte {start + begin}",
        )
        for at, end, what, begin in found
    ]
    if not expected and not unread:
        assert len(read_safetensors(path).tensors) == len(spans)
        return
    try:
        read_safetensors(path)
        findings: tuple[Finding, ...] = ()
    except WrongContent as error:
        findings = error.findings
    odd = [f for f in findings if f.kind is Kind.UNSUPPORTED]
    assert [f.where for f in odd] == [f"{path}: t{n}" for n in unread if n < len(spans)]
    broken = [(f.where, f.expected, f.found) for f in findings if f.kind is Kind.MALFORMED]
    assert broken == expected


def test_a_gap_after_a_broken_entry_is_not_told(tmp_path: Path) -> None:
    """Where a tensor lies is not known then."""
    findings = refused(tmp_path, {"w": {}, "v": entry(8, 16)}, bytes(17))
    assert [finding.where.rpartition(": ")[2] for finding in findings] == ["w"]


@pytest.mark.parametrize("dims", [64, 65])
def test_a_tensor_has_at_most_64_dimensions(dims: int, tmp_path: Path) -> None:
    header = {"w": entry(0, 4, [1] * dims), "v": entry(4, 8, [1])}
    if dims == 64:
        assert read(tmp_path, header, bytes(8)).tensors["w"].stride == (1,) * 64
        return
    (finding,) = refused(tmp_path, header, bytes(8))
    assert (finding.kind, finding.expected, finding.found, finding.help) == (
        Kind.UNSUPPORTED,
        "at most 64 dimensions",
        "65",
        "",
    )


@pytest.mark.parametrize(
    ("header", "at", "expected", "found"),
    [
        ("[]", "header", "a header that starts with '{'", "b'['"),
        ("}}", "header", "a header that starts with '{'", "b'}'"),
        ("{]", "header", "JSON", "JSONDecodeError: Expecting"),
        ('{"a": {}, "a": {}}', "header", "JSON", "ValueError: the name a twice"),
        ('{"__metadata__": {"a": 1}}', "header: __metadata__", "text to text", "expected one of"),
        ("{}x", "header", "JSON", "ValueError: something after the end"),
        ('{"__metadata__": {}, "__metadata__": {}', "header", "JSON", "ValueError: expected"),
    ],
)
def test_a_header_that_is_no_json_is_said(
    header: str, at: str, expected: str, found: str, tmp_path: Path
) -> None:
    """The finding is of the header, or of the metadata in it."""
    finding = refused(tmp_path, header)[-1]
    assert finding.where == f"{tmp_path / 'weights'}: {at}"
    assert finding.expected == expected
    assert finding.found.startswith(found)


def test_only_the_metadata_have_their_name(tmp_path: Path) -> None:
    """Any other name is that of a tensor."""
    names = ["", "A", "__", "__metadata_", "__metadata__ ", "__metadata__", "z"]
    header: dict[str, object] = {name: entry(0, 0, [0]) for name in names}
    header["__metadata__"] = {"a": "b"}
    assert list(read(tmp_path, header).tensors) == [n for n in names if n != "__metadata__"]


def test_a_header_ends_where_its_length_says(tmp_path: Path) -> None:
    """What the data begin with is no part of it."""
    header = {"w": entry(0, 8, [8], "U8")}
    assert set(read(tmp_path, header, b'}{"a":1}').tensors) == {"w"}
    assert refused(tmp_path, '{"w": {', b"}}")[0].expected == "JSON"

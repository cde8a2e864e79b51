"""JSON that is read key by key, through a window that moves over it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from csm_weights.formats import json_stream
from csm_weights.formats.json_stream import STRICT, JsonStream

#: Blanks of each kind, escapes, letters of two to four bytes, and texts longer than a window.
TEXT = (
    ' \t\r\n{ "a" :\n[1, "\\u00e9\\"é"] ,"notes":{"k\\n" : "'
    + "long \\\\ \\u4e2d 中 \U0001d11e \\t" * 9
    + '" , "":"" }\r, "none": {} ,"b":-1.5e3\t,"null":null }'
    + " " * 41
)


def stream_of(content: bytes | str) -> JsonStream:
    data = content.encode() if isinstance(content, str) else content
    return JsonStream(lambda offset, size: data[offset : offset + size])


def parsed(content: bytes | str, *skipped: str) -> dict[str, Any]:
    """Read an object; of the keys that are skipped the values are None."""
    stream, found = stream_of(content), dict[str, Any]()
    for key in stream.read_keys():
        if key in skipped:
            stream.skip_texts()
            found[key] = None
        else:
            found[key] = stream.read_value()
    stream.finish()
    return found


@pytest.mark.parametrize("window", [*range(16, 60), 300, 10_000])
def test_the_window_does_not_matter(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it cuts a name, a value, an escape, a letter or blanks, the object is the same."""
    monkeypatch.setattr(json_stream, "WINDOW", window)
    expected = json.loads(TEXT) | dict.fromkeys(("notes", "none", "null"))
    assert parsed(TEXT, "notes", "none", "null") == expected


@pytest.mark.parametrize("blanks", range(9))
def test_a_value_may_fill_the_window(blanks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that fills the window is read; one of two windows is not JSON."""
    monkeypatch.setattr(json_stream, "WINDOW", 8)
    assert stream_of(" " * blanks + '"123456"' + " " * 20).read_value() == "123456"
    with pytest.raises(ValueError, match="Unterminated"):
        stream_of(" " * blanks + '"12345678901234"').read_value()


def test_a_value_has_at_most_a_mebibyte() -> None:
    """A value of 2^20 characters is read from the beginning of a text, and no longer one."""
    text = '"' + "x" * ((1 << 20) - 2) + '"'
    assert len(stream_of(text).read_value()) == (1 << 20) - 2
    with pytest.raises(ValueError, match="Unterminated"):
        stream_of(f'"x{text[1:]}').read_value()


def test_no_more_than_the_window_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is read in one pass, up to the first read that gives less."""
    monkeypatch.setattr(json_stream, "WINDOW", 10)
    data, asked = b'{"name": {"a": "text"}}       ', []

    def read(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return data[offset : offset + size]

    stream = JsonStream(read)
    for _ in stream.read_keys():
        stream.skip_texts()
    stream.finish()
    assert asked == [(0, 10), (10, 10), (20, 10), (30, 10)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "expected one of {, found"),
        ("[]", "expected one of {, found ["),
        ("{", "Expecting value"),
        ('{"a" 1}', "expected one of :, found 1"),
        ('{"a": 1', "expected one of ,}, found"),
        ('{"a": 1 "b": 2}', 'expected one of ,}, found "'),
        ('{"a": 1,}', "Expecting value"),
        ('{"a": 1}}', "something after the end"),
        ('{"a": 1} x', "something after the end"),
        ("{} {}", "something after the end"),
        ("{}x", "something after the end"),
        ("{~}", "Expecting value"),
        ("{7: 1}", "the name 7 is no text, or not UTF-8"),
        ('{"\\ud800": 1}', r"the name '\ud800' is no text, or not UTF-8"),
        ('{"a": {"b": 1, "b": 2}}', "the name b twice, or not UTF-8"),
        ('{"a": {"\\ud800": 1}}', r"the name '\ud800' twice, or not UTF-8"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": "\xff"}', "codec can't decode byte 0xff"),
        ('{"t": 0}', "neither null nor text to text"),
        ('{"t": []}', "neither null nor text to text"),
        ('{"t": |}', "Expecting value"),
        ('{"t": "text"}', "neither null nor text to text"),
        ('{"t": {"a": 1}}', 'expected one of ", found 1'),
        ('{"t": {"a": "1\n"}}', r"""expected one of ", found '\n'"""),
        ('{"t": {"a": "1\t"}}', r"""expected one of ", found '\t'"""),
        ('{"t": {"a": "\\x"}}', 'expected one of ", found \\'),
        ('{"t": {"a": "\\u12"}}', 'expected one of ", found \\'),
        ('{"t": {"a": "b" "c"}}', 'expected one of ,}, found "'),
        ('{"t": {"a": "b', "found "),
    ],
)
def test_what_is_not_json_is_refused(content: bytes | str, reason: str) -> None:
    """The error says what stands there; `t` has to be texts."""
    with pytest.raises(ValueError) as caught:
        parsed(content, "t")
    assert reason in str(caught.value)


def test_a_whole_text_is_as_strict() -> None:
    """The decoder for whole texts refuses names that are there twice as well."""
    assert STRICT.decode('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="the name a twice"):
        STRICT.decode('{"a": 1, "a": 1}')

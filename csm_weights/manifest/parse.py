"""Read a manifest from text into frozen values, and refuse one that breaks a rule.

`parse` opens no file; `load` opens one.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csm_weights.errors import Finding, Kind, ManifestInvalid
from csm_weights.files import read_file
from csm_weights.manifest import types
from csm_weights.manifest.paths import CHUNKS, NAME, folded, path_problem
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.untrusted import Malformed, show

#: What the strings of a key must match whole, and that in words.
_RULES = {
    "name": (re.compile(NAME), "lowercase letters, digits, '.', '_', '-'"),
    "group": (re.compile(NAME), "a lowercase word"),
    "codec": (re.compile(NAME), "the name of a manifest"),
    "repo": (re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII), "ORG/NAME"),
    **{
        key: (re.compile(f"[0-9a-f]{{{digits}}}"), f"{digits} lowercase hex digits")
        for key, digits in (("revision", 40), ("sha256", 64), ("blob_id", 40), ("git_sha1", 40))
    },
}

#: The keys that are paths inside a folder; a destination may be the folder itself.
_PATHS = ("path", "part", "staging", "destination", "golden")

#: Most broken rules that become findings; the rest are counted.
MAX_FINDINGS = 50

# tomllib takes time and memory that grow with the square of the depth of a key, and up to
# two hundred times the text for tables of a few letters: 40 kB take 4 s and 1.5 GB. So the
# marks that make tables, keys and items are counted first.

#: Most words of a dotted key.
MAX_DEPTH = 8

#: Most files, each with its header, of which a reader makes one list.
_FILE = b"[[artifact]]"
MAX_FILES = 50_000

#: Most other tables and arrays: `[`, `{`, and `.` between the words of a key. One for
#: each piece, two for each file.
MAX_TABLES = 40_000

#: Most keys and items: `=` and `,`. Eight for each piece.
MAX_ITEMS = 300_000

#: Strings and comments, in which marks mean nothing; a quote that begins no whole
#: string, at which any reader stops; and the marks.
_TOKEN = re.compile(
    rb'"""(?:[^"\\]|\\.|"(?!""))*+"{3,5}'
    rb"|'''(?:[^']|'(?!''))*+'{3,5}"
    rb'|(?!""")"(?:[^"\\\n]|\\[^\n])*+"'
    rb"|(?!''')'[^'\n]*+'"
    rb"|\#[^\n]*+"
    rb"|(?P<broken>[\"'])"
    rb"|(?P<mark>\[\[artifact\]\]|[\[\]{}=,.\n])",
    re.DOTALL,
)


def load(path: Path) -> Manifest:
    """Read the manifest at `path`.

    Raises MissingInput where there is none, WrongContent for what is no
    regular file or too large, ManifestInvalid with every broken rule.
    """
    return parse(read_file(path, types.MAX_TEXT, "a manifest"), str(path))


def parse(text: bytes, where: str) -> Manifest:
    """Turn TOML text into a Manifest; `where` names its file in messages.

    Raises ManifestInvalid with every broken rule, each by its key.
    """
    problems = _Problems(where)
    limit = types.MAX_TEXT if text.isascii() else types.MAX_OTHER_TEXT
    if len(text) > limit:
        problems.add("", f"at most {limit:,} bytes", "more")
        raise problems.error()
    try:
        data = _read_toml(text)
    except Malformed as error:
        problems.add("", error.expected, error.found)
        raise problems.error() from None
    manifest = _manifest(_Table(data, "", problems), where)
    if problems.findings:
        raise problems.error()
    return manifest


def _read_toml(text: bytes) -> dict[str, Any]:
    """Return the table in the text; raises Malformed for what is no TOML, or too much of it."""
    marks: Counter[bytes] = Counter()
    dots = 0
    for token in _TOKEN.finditer(text):
        mark = token["mark"]
        if token["broken"]:
            break
        if mark:
            marks[mark] += 1
            dots = dots + 1 if mark == b"." else 0
        if dots >= MAX_DEPTH:
            raise Malformed(f"keys of at most {MAX_DEPTH} words", "a key of more")
    for what, some, most in (
        ("files", (_FILE,), MAX_FILES),
        ("tables", (b"[", b"{", b"."), MAX_TABLES),
        ("items", (b"=", b","), MAX_ITEMS),
    ):
        if (count := sum(marks[mark] for mark in some)) > most:
            raise Malformed(f"at most {most:,} {what}", f"{count:,}")
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed("TOML", show(str(error) or type(error).__name__)) from None


class _Problems:
    """The broken rules, each with its file and key; beyond MAX_FINDINGS they are counted."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.findings: list[Finding] = []
        self.count = 0

    def add(self, key: str, expected: str, found: object) -> None:
        self.count += 1
        if self.count <= MAX_FINDINGS:
            where = f"{self.where}: {key[:200]}" if key else self.where
            words = (expected, str(found)[:200], "correct the manifest, or restore it from git")
            self.findings.append(Finding(Kind.MALFORMED, where, *words))

    def error(self) -> ManifestInvalid:
        rest = self.count - len(self.findings)
        if rest:
            more = f"{rest:,} more findings"
            self.findings.append(Finding(Kind.MALFORMED, self.where, "nothing else wrong", more))
        return ManifestInvalid(f"{self.where} is not a valid manifest", self.findings)


class _Table:
    """One TOML table: values are taken by name and type, what is left is refused."""

    def __init__(self, data: Any, key: str, problems: _Problems) -> None:
        if not isinstance(data, dict):
            problems.add(key, "a table", type(data).__name__)
            data = {}
        self.left = dict(data)
        self.key = key
        self.problems = problems

    def at(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name

    def refuse(self, name: str, expected: str, found: object) -> None:
        self.problems.add(self.at(name), expected, found)

    def text(self, name: str, default: str | None = None) -> str:
        """Take a string that keeps the rule of its key."""
        value = self.left.pop(name, default)
        if not isinstance(value, str):
            self.refuse(name, "a string", "nothing" if value is None else show(value))
            return ""
        if name in _PATHS and (name, value) != ("destination", "."):
            if problem := path_problem(value):
                found = f"{value[:80]!r}: {problem}"
                self.refuse(name, "a path that stays inside its folder", found)
        elif name in _RULES and not _RULES[name][0].fullmatch(value):
            self.refuse(name, _RULES[name][1], repr(value))
        return value

    def optional(self, name: str) -> str | None:
        return self.text(name) if name in self.left else None

    def number(self, name: str, low: int) -> int:
        value = self.left.pop(name, None)
        if type(value) is not int or not low <= value <= types.MAX_SIZE:
            found = "nothing" if value is None else show(value)
            self.refuse(name, f"an integer of bytes from {low} to {types.MAX_SIZE}", found)
            return low
        return value

    def table(self, name: str) -> _Table:
        return _Table(self.left.pop(name, {}), self.at(name), self.problems)

    def tables(self, name: str) -> Iterator[_Table]:
        value = self.left.pop(name, [])
        if not isinstance(value, list):
            self.refuse(name, "an array of tables", type(value).__name__)
            value = []
        for index, item in enumerate(value):
            yield _Table(item, f"{self.at(name)}[{index}]", self.problems)

    def finish(self) -> None:
        for name in self.left:
            self.refuse(name, "only known keys", "an unknown key")


def _manifest(table: _Table, where: str) -> Manifest:
    schema = table.left.pop("schema", None)
    if type(schema) is not int or schema != types.SCHEMA:
        table.refuse("schema", f"{types.SCHEMA}", "another, or none")
    layout, hub, smoke = table.table("layout"), table.table("hub"), table.table("smoke")
    speech = table.table("speech")
    has_hub = bool(hub.left)
    gated, default = hub.left.pop("gated", False), table.left.pop("default", [])
    if not isinstance(gated, bool):
        hub.refuse("gated", "true or false", show(gated))
    if not isinstance(default, list) or not all(isinstance(word, str) for word in default):
        table.refuse("default", "an array of strings", show(default))
        default = []
    manifest = Manifest(
        name=table.text("name"),
        description=table.text("description", ""),
        staging=layout.text("staging"),
        destination=layout.text("destination"),
        repo=hub.text("repo") if has_hub else None,
        revision=hub.text("revision") if has_hub else None,
        gated=gated is True,
        default=tuple(default),
        golden=smoke.text("golden") if smoke.left else None,
        codec=speech.text("codec") if speech.left else None,
        artifacts=tuple(_artifact(t) for t in table.tables("artifact")),
        where=where,
    )
    for part in (layout, hub, smoke, speech, table):
        part.finish()
    if not manifest.artifacts:
        table.refuse("artifact", "at least one", "none")
    if manifest.staging and manifest.staging.casefold() == manifest.destination.casefold():
        layout.refuse("staging", "a folder other than the destination", manifest.staging)
    known = {"all", *(word for a in manifest.artifacts for word in (a.group, a.path))}
    for word in manifest.default:
        if word not in known:
            table.refuse("default", "groups or paths of artifacts, or all", repr(word))
    artifacts = list(enumerate(manifest.artifacts))
    paths = {f"artifact[{i}].path": a.path for i, a in artifacts}
    parts = {
        f"artifact[{i}].pieces[{j}].part": piece.part
        for i, a in artifacts
        for j, piece in enumerate(a.pieces)
    }
    for names in (paths, parts):
        _check_unique(names, table)
    return manifest


def _check_unique(names: Mapping[str, str], table: _Table) -> None:
    """Refuse two paths, by their keys, that are one file on some file system."""
    seen: dict[str, str] = {}
    for key, name in names.items():
        if path_problem(name):
            continue  # refused already, and it may be megabytes long
        first = seen.setdefault(folded(name), key)
        if first != key:
            table.refuse(key, "a path of its own", f"{name!r}, as at {first}")
    for name, key in seen.items():
        above = name
        while above := above.rpartition("/")[0]:
            if above in seen:
                found = f"{name!r}, below the file at {seen[above]}"
                table.refuse(key, "a path of its own", found)
                break


def _artifact(table: _Table) -> Artifact:
    artifact = Artifact(
        path=table.text("path"),
        group=table.text("group"),
        format=table.text("format"),
        size=table.number("size", 0),
        sha256=table.optional("sha256"),
        blob_id=table.optional("blob_id"),
        git_sha1=table.optional("git_sha1"),
        text=table.optional("text"),
        pieces=tuple(_piece(t) for t in table.tables("pieces")),
        alternatives=tuple(_edition(t) for t in table.tables("alternative")),
        evidence=_evidence(table.table("evidence")),
        note=table.text("note", ""),
    )
    table.finish()
    if artifact.format not in types.FORMATS:
        table.refuse("format", " or ".join(types.FORMATS), repr(artifact.format))
    if artifact.is_pinned_by_git and artifact.git_sha1 is None:
        table.refuse("sha256", "a digest, or pieces that have one", "neither")
    sizes: set[int] = set()
    for index, edition in enumerate(artifact.editions):
        at = f"alternative[{index - 1}]." if index else ""
        if edition.size in sizes:
            table.refuse(f"{at}size", "a size of its own", edition.size)
        sizes.add(edition.size)
        if edition.text is not None:
            content = edition.text.encode()
            if len(content) != edition.size:
                table.refuse(f"{at}text", f"{edition.size} bytes, its size", len(content))
            elif edition.sha256 not in (None, hashlib.sha256(content).hexdigest()):
                expected = f"text with the sha256 {edition.sha256}"
                table.refuse(f"{at}text", expected, "text with another")
    # Pieces follow each other from 0 to the artifact's size.
    end = 0
    for index, piece in enumerate(artifact.pieces):
        if piece.offset != end:
            kind = "a hole" if piece.offset > end else "an overlap"
            table.refuse(f"pieces[{index}].offset", str(end), f"{piece.offset}, {kind}")
        end = piece.end
    if artifact.pieces and end != artifact.size:
        table.refuse("size", f"{end}, the sum of its pieces", artifact.size)
    return artifact


def _piece(table: _Table) -> Piece:
    piece = Piece(
        part=table.text("part"),
        offset=table.number("offset", 0),
        size=table.number("size", 1),
        sha256=table.text("sha256"),
    )
    if piece.part and not piece.part.startswith(f"{CHUNKS}/"):
        table.refuse("part", f"a file below {CHUNKS}/", repr(piece.part[:80]))
    table.finish()
    return piece


def _edition(table: _Table) -> Edition:
    edition = Edition(
        size=table.number("size", 0),
        sha256=table.text("sha256"),
        text=table.optional("text"),
        evidence=_evidence(table.table("evidence")),
        note=table.text("note", ""),
    )
    table.finish()
    return edition


def _evidence(table: _Table) -> dict[str, str]:
    for name, mark in table.left.items():
        if name not in types.FIGURES:
            table.refuse(name, " or ".join(types.FIGURES), "another figure")
        if mark not in types.MARKS:
            table.refuse(name, " or ".join(types.MARKS), show(mark))
    return table.left

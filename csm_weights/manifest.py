"""The manifest: what the model must be, read from text into frozen values.

A manifest is TOML, kept in git, and read-only to the pipeline. `parse` opens
no file; `load` opens exactly one. `render` writes the canonical text, which
`recombine.sh` reads with awk: one key a line, one piece a line.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csm_weights.errors import Finding, Kind, ManifestInvalid, MissingInput, UsageError
from csm_weights.malformed import Malformed, is_text, show
from csm_weights.toml import read_toml

SCHEMA = 1

#: Formats whose structure the gates can read; "opaque" has size and digest only.
FORMATS = ("safetensors", "torch-zip", "config", "opaque")

#: Formats that hold the weights, each of which is a whole model by itself.
WEIGHT_FORMATS = ("safetensors", "torch-zip")

#: Evidence marks: A read in a real artefact and recomputed, B one public
#: source, C inferred or simulated, H the Hub's own metadata.
MARKS = ("A", "B", "C", "H")

#: What has evidence.
FIGURES = ("size", "sha256", "blob_id", "git_sha1", "pieces")

#: Ceilings that keep a hostile manifest cheap: 1 PiB a file, 4 MiB of text.
MAX_SIZE = 1 << 50
MAX_TEXT = 4 << 20

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[0-9a-f]{40}")
_HEX = {
    "sha256": re.compile(r"[0-9a-f]{64}"),
    "blob_id": re.compile(r"[0-9a-f]{40}"),
    "git_sha1": re.compile(r"[0-9a-f]{40}"),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\:*?\"<>|]")

#: What makes up the pipeline itself: no file of a model may land there.
_OWN = frozenset(
    {
        ".ci",
        ".git",
        ".github",
        ".gitattributes",
        ".gitignore",
        ".venv",
        "benchmarks",
        "changelog.md",
        "chunks",
        "constraints.txt",
        "contributing.md",
        "csm_weights",
        "docs",
        "gnumakefile",
        "invoke.json",
        "invoke.yaml",
        "invoke.yml",
        "license",
        "makefile",
        "manifests",
        "pyproject.toml",
        "readme.md",
        "recombine.sh",
        "security.md",
        "tasks.py",
        "tests",
    }
)

#: Most bytes of a path; Linux takes 4,096 with the folders above it.
MAX_PATH = 1000

#: Most findings that are spelled out; the rest are counted.
MAX_FINDINGS = 50

#: What Python or make take for code, and the folders from which neither does.
_CODE = (".py", ".pyc", ".pyd", ".so", ".pth", ".mk")
_NO_CODE = frozenset({"models", "output"})

#: Folder beside placed files that holds their receipts; no artifact may live there.
RECEIPTS = ".csm-weights"


@dataclass(frozen=True)
class Piece:
    """The half-open byte range `[offset, offset + size)` of an artifact.

    `part` is the path of the local file that holds just these bytes,
    relative to the repository root. `sha256` is empty only in a tile of a
    file that is pinned by its `git_sha1` alone.
    """

    part: str
    offset: int
    size: int
    sha256: str

    @property
    def end(self) -> int:
        """First byte after the piece."""
        return self.offset + self.size


@dataclass(frozen=True)
class Edition:
    """One set of bytes that is accepted as an artifact, told from others by its size.

    `text`, where given, is the whole content, so that the file can be
    written without any source.
    """

    size: int
    sha256: str | None
    text: str | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Artifact:
    """One file of the model: `path` is relative to the destination.

    `blob_id` is the git blob SHA-1 of the file's LFS pointer, which the Hub
    shows for a large file; `git_sha1` that of the content itself, which it
    shows for a small one. `pieces` tile `[0, size)`, or are empty.
    `alternatives` are other editions that are just as acceptable.
    """

    path: str
    group: str
    format: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None
    git_sha1: str | None = None
    text: str | None = None
    pieces: tuple[Piece, ...] = ()
    alternatives: tuple[Edition, ...] = ()
    evidence: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def editions(self) -> tuple[Edition, ...]:
        """All accepted sets of bytes, the pinned one first."""
        pinned = Edition(self.size, self.sha256, self.text, self.evidence, self.note)
        return (pinned, *self.alternatives)

    @property
    def tiles(self) -> tuple[Piece, ...]:
        """What is brought and proven by itself: the pieces, or the whole file as one."""
        return self.pieces or (Piece(self.path, 0, self.size, self.sha256 or ""),)

    @property
    def is_git_proven(self) -> bool:
        """Whether nothing but `git_sha1` says what the content is."""
        return self.sha256 is None and not self.pieces

    @property
    def is_weights(self) -> bool:
        """Whether the file is one of the weight formats."""
        return self.format in WEIGHT_FORMATS


@dataclass(frozen=True)
class Manifest:
    """What a model must be, and where its files go (relative to the root).

    `staging` receives assembled files, `destination` placed ones. `revision`
    is a commit of the Hub's `repo`; `gated` says that the Hub gives its files
    only to those who accepted its terms. `default` are the words that are
    meant when nothing is named. `where` is the file it was read from, for
    messages.
    """

    name: str
    staging: str
    destination: str
    artifacts: tuple[Artifact, ...]
    description: str = ""
    repo: str | None = None
    revision: str | None = None
    gated: bool = False
    default: tuple[str, ...] = ()
    golden: str | None = None
    where: str = ""

    def select(self, words: Iterable[str]) -> tuple[Artifact, ...]:
        """The artifacts whose group or path is among `words`; `all` takes every one.

        Raises UsageError on a word that names nothing.
        """
        wanted = list(words)
        known = {word for a in self.artifacts for word in (a.group, a.path)}
        for word in wanted:
            if word != "all" and word not in known:
                groups = ", ".join(sorted({a.group for a in self.artifacts}))
                raise UsageError(
                    f"nothing called {word!r} in {self.name}; choose from {groups}, all"
                )
        return tuple(a for a in self.artifacts if {"all", a.group, a.path}.intersection(wanted))


def load(path: Path) -> Manifest:
    """Reads the manifest at `path`.

    Raises MissingInput when there is none, ManifestInvalid with every broken
    rule when it does not hold.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT + 1)
    except FileNotFoundError:
        finding = Finding(Kind.MISSING, str(path), "a manifest", "no such file")
        raise MissingInput(f"no manifest at {path}", [finding]) from None
    return parse(text, str(path))


def parse(text: bytes, where: str) -> Manifest:
    """Turns TOML text into a Manifest; `where` names its file in messages.

    Raises ManifestInvalid with every broken rule, each by its key.
    """
    problems = _Problems(where)
    if len(text) > MAX_TEXT:
        problems.add("", f"at most {MAX_TEXT:,} bytes", "more")
        raise problems.error()
    try:
        data = read_toml(text)
    except Malformed as error:
        problems.add("", error.expected, error.found)
        raise problems.error() from None
    manifest = _manifest(_Table(data, "", problems), where)
    if problems.findings:
        raise problems.error()
    return manifest


class _Problems:
    """Collects broken rules, each with the file and the key it is at, and counts too many."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.findings: list[Finding] = []
        self.count = 0

    def add(self, key: str, expected: str, found: object) -> None:
        self.count += 1
        if self.count <= MAX_FINDINGS:
            where = f"{self.where}: {key[:200]}" if key else self.where
            self.findings.append(Finding(Kind.MALFORMED, where, expected, str(found)[:200]))

    def error(self) -> ManifestInvalid:
        rest = self.count - len(self.findings)
        if rest:
            more = f"{rest:,} more findings"
            self.findings.append(Finding(Kind.MALFORMED, self.where, "nothing else wrong", more))
        return ManifestInvalid(f"{self.where} is not a valid manifest", self.findings)


class _Table:
    """One TOML table: values are taken by name and type, the rest is refused."""

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
        value = self.left.pop(name, default)
        if not isinstance(value, str):
            self.refuse(name, "a string", "nothing" if value is None else show(value))
            return ""
        return value

    def optional(self, name: str) -> str | None:
        return self.text(name) if name in self.left else None

    def number(self, name: str, low: int) -> int:
        value = self.left.pop(name, None)
        if type(value) is not int or not low <= value <= MAX_SIZE:
            found = "nothing" if value is None else show(value)
            self.refuse(name, f"an integer of bytes from {low} to {MAX_SIZE}", found)
            return low
        return value

    def matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str:
        is_text = isinstance(self.left.get(name), str)
        value = self.text(name)
        if is_text and not pattern.fullmatch(value):
            self.refuse(name, expected, repr(value))
        return value

    def digest(self, name: str) -> str | None:
        if name not in self.left:
            return None
        length = 64 if name == "sha256" else 40
        return self.matching(name, _HEX[name], f"{length} lowercase hex digits")

    def flag(self, name: str) -> bool:
        value = self.left.pop(name, False)
        if not isinstance(value, bool):
            self.refuse(name, "true or false", show(value))
        return value is True

    def words(self, name: str) -> tuple[str, ...]:
        value = self.left.pop(name, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            self.refuse(name, "an array of strings", show(value))
            return ()
        return tuple(value)

    def path(self, name: str, *, allow_here: bool = False) -> str:
        is_text = isinstance(self.left.get(name), str)
        value = self.text(name)
        if is_text and not (allow_here and value == ".") and (problem := path_problem(value)):
            self.refuse(name, "a path that stays inside its folder", f"{value[:80]!r}: {problem}")
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


def path_problem(path: str) -> str:
    """Why a relative POSIX path may not be used, or an empty string."""
    if not is_text(path) or len(path.encode()) > MAX_PATH:
        return f"not text of at most {MAX_PATH:,} bytes"
    parts = path.split("/")
    if not path or _CONTROL.search(path):
        return "empty, or a character that some file system refuses"
    if any(unicodedata.category(c) in ("Cf", "Zl", "Zp") for c in path):
        return "a character that cannot be seen"  # macOS takes .git with one in it for .git
    if path.startswith("/"):
        return "absolute"
    if any(part in {"", ".", ".."} for part in parts):
        return "an empty, '.' or '..' component"
    if any(part.endswith((".", " ")) or len(part.encode()) > 200 for part in parts):
        return "a component that is too long or ends in a dot or space"
    if {part.lower() for part in parts} & {".git", RECEIPTS}:
        return "inside a reserved folder"
    if parts[-1].endswith((".partial", ".journal", ".lock")):
        return "a name kept for unfinished files"
    return ""


def _manifest(table: _Table, where: str) -> Manifest:
    schema = table.left.pop("schema", None)
    if type(schema) is not int or schema != SCHEMA:
        table.refuse("schema", f"{SCHEMA}", "another, or none")
    layout, hub, smoke = table.table("layout"), table.table("hub"), table.table("smoke")
    has_hub = bool(hub.left)
    manifest = Manifest(
        name=table.matching("name", _NAME, "lowercase letters, digits, '.', '_', '-'"),
        description=table.text("description", ""),
        staging=layout.path("staging"),
        destination=layout.path("destination", allow_here=True),
        repo=hub.matching("repo", _REPO, "ORG/NAME") if has_hub else None,
        revision=hub.matching("revision", _REVISION, "a commit, 40 hex digits")
        if has_hub
        else None,
        gated=hub.flag("gated"),
        default=table.words("default"),
        golden=smoke.path("golden") if smoke.left else None,
        artifacts=tuple(_artifact(t) for t in table.tables("artifact")),
        where=where,
    )
    for part in (layout, hub, smoke, table):
        part.finish()
    if not manifest.artifacts:
        table.refuse("artifact", "at least one", "none")
    if manifest.staging and manifest.staging.casefold() == manifest.destination.casefold():
        layout.refuse("staging", "a folder other than the destination", manifest.staging)
    known = {"all", *(word for a in manifest.artifacts for word in (a.group, a.path))}
    for word in manifest.default:
        if word not in known:
            table.refuse("default", "groups or paths of artifacts, or all", repr(word))
    _check_unique(manifest, table)
    return manifest


def _check_unique(manifest: Manifest, table: _Table) -> None:
    """No two artifacts, and no two parts, may be one file on any file system."""
    artifacts = list(enumerate(manifest.artifacts))
    paths = {f"artifact[{i}].path": a.path for i, a in artifacts}
    parts = {
        f"artifact[{i}].pieces[{j}].part": piece.part
        for i, a in artifacts
        for j, piece in enumerate(a.pieces)
    }
    for names in (paths, parts):
        seen: dict[str, str] = {}
        for key, name in names.items():
            if path_problem(name):
                continue  # told already, and it may be megabytes long
            first = seen.setdefault(_folded(name), key)
            if first != key:
                table.refuse(key, "a path of its own", f"{name!r}, as at {first}")
        for name, key in seen.items():
            above = next((p.as_posix() for p in Path(name).parents if p.as_posix() in seen), "")
            if above:
                table.refuse(key, "a path of its own", f"{name!r}, below the file at {seen[above]}")
    for folder in (manifest.staging, manifest.destination):
        for key, name in paths.items() if manifest.staging and manifest.destination else ():
            if _is_ours(Path(folder) / name):
                table.refuse(key, "a place outside the pipeline's own files", f"{folder}/{name}")


def _folded(name: str) -> str:
    """The same for names that macOS or Windows take for one: case, and composed accents."""
    return unicodedata.normalize("NFC", name.casefold())


def _is_ours(path: Path) -> bool:
    """Whether a file there would replace the pipeline, or run when it is started next."""
    first = path.parts[0].casefold() if path.parts else ""
    is_code = path.name.casefold().endswith(_CODE) and first not in _NO_CODE
    return first in _OWN or is_code


def _artifact(table: _Table) -> Artifact:
    artifact = Artifact(
        path=table.path("path"),
        group=table.matching("group", _NAME, "a lowercase word"),
        format=table.text("format"),
        size=table.number("size", 0),
        sha256=table.digest("sha256"),
        blob_id=table.digest("blob_id"),
        git_sha1=table.digest("git_sha1"),
        text=table.optional("text"),
        pieces=tuple(_piece(t) for t in table.tables("pieces")),
        alternatives=tuple(_edition(t) for t in table.tables("alternative")),
        evidence=_evidence(table.table("evidence")),
        note=table.text("note", ""),
    )
    table.finish()
    if artifact.format not in FORMATS:
        table.refuse("format", " or ".join(FORMATS), repr(artifact.format))
    if artifact.is_git_proven and artifact.git_sha1 is None:
        table.refuse("sha256", "a digest, or pieces that have one", "neither")
    sizes = {artifact.size}
    for index, edition in enumerate(artifact.alternatives):
        if edition.size in sizes:
            found = str(edition.size)
            table.refuse(f"alternative[{index}].size", "a size by which it can be told", found)
        sizes.add(edition.size)
    for index, edition in enumerate(artifact.editions):
        _check_text(table, "text" if not index else f"alternative[{index - 1}].text", edition)
    _check_tiling(table, artifact)
    return artifact


def _piece(table: _Table) -> Piece:
    piece = Piece(
        part=table.path("part"),
        offset=table.number("offset", 0),
        size=table.number("size", 1),
        sha256=table.matching("sha256", _HEX["sha256"], "64 lowercase hex digits"),
    )
    table.finish()
    return piece


def _edition(table: _Table) -> Edition:
    edition = Edition(
        size=table.number("size", 0),
        sha256=table.matching("sha256", _HEX["sha256"], "64 lowercase hex digits"),
        text=table.optional("text"),
        evidence=_evidence(table.table("evidence")),
        note=table.text("note", ""),
    )
    table.finish()
    return edition


def _evidence(table: _Table) -> dict[str, str]:
    marks = {name: table.text(name) for name in list(table.left)}
    for name, mark in marks.items():
        if name not in FIGURES:
            table.refuse(name, " or ".join(FIGURES), "another figure")
        if mark not in MARKS:
            table.refuse(name, " or ".join(MARKS), repr(mark))
    return marks


def _check_text(table: _Table, key: str, edition: Edition) -> None:
    if edition.text is None:
        return
    content = edition.text.encode()
    if len(content) != edition.size:
        table.refuse(key, f"{edition.size} bytes, its size", len(content))
    elif edition.sha256 not in (None, hashlib.sha256(content).hexdigest()):
        table.refuse(key, f"text with the sha256 {edition.sha256}", "text with another")


def _check_tiling(table: _Table, artifact: Artifact) -> None:
    """The pieces must follow each other from 0 to the artifact's size."""
    expected = 0
    for index, piece in enumerate(artifact.pieces):
        if piece.offset != expected:
            kind = "a hole" if piece.offset > expected else "an overlap"
            table.refuse(f"pieces[{index}].offset", str(expected), f"{piece.offset}, {kind}")
        expected = piece.end
    if artifact.pieces and expected != artifact.size:
        table.refuse("size", f"{expected}, the sum of its pieces", artifact.size)


def render(manifest: Manifest) -> str:
    """The canonical TOML text of a manifest; `parse` reads it back equal."""
    lines = [f"schema = {SCHEMA}", f"name = {_quote(manifest.name)}"]
    if manifest.description:
        lines.append(f"description = {_quote(manifest.description)}")
    if manifest.default:
        lines.append(f"default = [{', '.join(map(_quote, manifest.default))}]")
    lines += ["", "[layout]", f"staging = {_quote(manifest.staging)}"]
    lines.append(f"destination = {_quote(manifest.destination)}")
    if manifest.repo and manifest.revision:
        lines += ["", "[hub]", f"repo = {_quote(manifest.repo)}"]
        lines.append(f"revision = {_quote(manifest.revision)}")
        lines += ["gated = true"] if manifest.gated else []
    if manifest.golden:
        lines += ["", "[smoke]", f"golden = {_quote(manifest.golden)}"]
    for artifact in manifest.artifacts:
        lines += ["", "[[artifact]]", *render_artifact(artifact)]
    return "\n".join(lines) + "\n"


def render_artifact(artifact: Artifact) -> list[str]:
    """The lines below `[[artifact]]` in the canonical text."""
    lines = [f"{name} = {_quote(getattr(artifact, name))}" for name in ("path", "group", "format")]
    ids = {"blob_id": artifact.blob_id, "git_sha1": artifact.git_sha1}
    lines += _render_edition(artifact.editions[0], ids)
    if artifact.pieces:
        lines.append("pieces = [")
        lines += [
            f"  {{ part = {_quote(p.part)}, offset = {p.offset}, size = {p.size},"
            f' sha256 = "{p.sha256}" }},'
            for p in artifact.pieces
        ]
        lines.append("]")
    for edition in artifact.alternatives:
        lines += ["", "[[artifact.alternative]]", *_render_edition(edition, {})]
    return lines


def _render_edition(edition: Edition, ids: Mapping[str, str | None]) -> list[str]:
    lines = [f"size = {edition.size}"]
    if edition.sha256:
        lines.append(f'sha256 = "{edition.sha256}"')
    lines += [f'{name} = "{value}"' for name, value in ids.items() if value]
    if edition.evidence:
        marks = ", ".join(f'{name} = "{mark}"' for name, mark in edition.evidence.items())
        lines.append(f"evidence = {{ {marks} }}")
    if edition.note:
        lines.append(f"note = {_quote(edition.note)}")
    if edition.text is not None:
        lines.append(f"text = {_quote(edition.text)}")
    return lines


def _quote(text: str) -> str:
    """A TOML basic string: JSON's escapes are all TOML's too, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")

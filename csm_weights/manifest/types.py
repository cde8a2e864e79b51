"""Manifest, artifact, piece: the values that say what a model's files must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from csm_weights.errors import UsageError

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

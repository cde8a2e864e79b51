"""The values that say what a model's files must be: manifest, artifact, edition, piece."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from csm_weights.errors import Finding, Kind, UsageError, did_you_mean
from csm_weights.hashing import blob_id
from csm_weights.manifest.paths import is_code

SCHEMA = 1

#: Formats that hold the weights, each a whole model by itself, with the word for --only and
#: the ending of their files.
WEIGHT_FORMATS = {"safetensors": ("safetensors", ".safetensors"), "torch-zip": ("ckpt", ".pt")}

#: Formats whose structure the gates can read; "opaque" has size and digest only.
FORMATS = (*WEIGHT_FORMATS, "config", "opaque")

#: Evidence marks: A read in a real artefact and recomputed, B one public
#: source, C inferred or simulated, H the Hub's own metadata.
MARKS = ("A", "B", "C", "H")

#: Facts that have evidence.
FIGURES = ("size", "sha256", "blob_id", "git_sha1", "pieces")

#: Ceilings that keep a hostile manifest cheap: 1 PiB a file; text in ASCII, and other
#: text, of which Python may take five times the bytes.
MAX_SIZE = 1 << 50
MAX_TEXT = 12 << 20
MAX_OTHER_TEXT = 4 << 20


@dataclass(frozen=True)
class Piece:
    """The half-open byte range `[offset, offset + size)` of an artifact.

    `part` is the path of the chunk file that holds just these bytes, relative
    to the repository root. `sha256` is empty only in the piece that stands
    for a whole file pinned by its `git_sha1` alone.
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
    """One set of bytes that is accepted as an artifact; editions differ in size.

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
    reports for a large file; `git_sha1` that of the content itself, which it
    reports for a small one. `pieces` tile `[0, size)`, or are empty.
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
        """All accepted editions, the pinned one first."""
        pinned = Edition(self.size, self.sha256, self.text, self.evidence, self.note)
        return (pinned, *self.alternatives)

    @property
    def tiles(self) -> tuple[Piece, ...]:
        """The units of transfer: the pieces, or one piece for the whole file."""
        return self.pieces or (Piece(self.path, 0, self.size, self.sha256 or ""),)

    @property
    def is_pinned_by_git(self) -> bool:
        """True where nothing but `git_sha1` pins the content."""
        return self.sha256 is None and not self.pieces

    @property
    def is_weights(self) -> bool:
        """True for a file in one of the weight formats."""
        return self.format in WEIGHT_FORMATS

    def digest_findings(
        self, edition: Edition, sha256: str, git_sha1: str | None, where: object
    ) -> list[Finding]:
        """Return a finding for each pinned digest of an edition that a file does not have.

        `sha256` and `git_sha1` are the hex digests of the whole file; the second
        is None where it was not taken. The Hub's ids are those of the pinned
        edition; alternatives have none.
        """
        pairs = [("sha256", edition.sha256, sha256)]
        if edition.size == self.size:
            pairs.append(("Hub blob id", self.blob_id, blob_id(sha256, edition.size)))
        if self.is_pinned_by_git and edition.sha256 is None:
            pairs.append(("git blob id", self.git_sha1 or "one", git_sha1 or "none"))
        mend = "this is not the published file; if its chunk files are right, the manifest is wrong"
        return [
            Finding(Kind.WRONG_DIGEST, str(where), f"{name} {pinned}", f"{name} {found}", mend)
            for name, pinned, found in pairs
            if pinned not in (None, found)
        ]


@dataclass(frozen=True)
class Manifest:
    """What a model must be, and where its files go (relative to the root).

    `staging` receives assembled files, `destination` installed ones.
    `revision` is a commit of the Hub's `repo`; `gated` means that the Hub
    serves its files only to those who accepted its terms. `default` are the
    words that are meant when nothing is named. `codec` is the name of the
    manifest with what a model needs to speak besides its own files. `where` is
    the file it was read from, for messages.
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
    codec: str | None = None
    where: str = ""

    def select(self, words: Iterable[str]) -> tuple[Artifact, ...]:
        """Return the artifacts whose group or path is among `words`; `all` takes every one.

        Files that some program would run or take its settings from are chosen
        by their path alone. Raises UsageError for a word that names nothing.
        """
        wanted = list(words)
        known = {word for a in self.artifacts for word in (a.group, a.path)}
        for word in wanted:
            if word != "all" and word not in known:
                groups = ", ".join(sorted({a.group for a in self.artifacts}))
                hint = did_you_mean(word, [*known, "all"])
                raise UsageError(
                    f"nothing called {word!r} in {self.name}; choose from {groups}, all{hint}"
                )
        chosen = tuple(
            a
            for a in self.artifacts
            if a.path in wanted or ({"all", a.group}.intersection(wanted) and not is_code(a.path))
        )
        if wanted and not chosen:
            raise UsageError(
                f"{', '.join(wanted)} has only files that can be executed; name each of them"
            )
        return chosen

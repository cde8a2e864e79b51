"""The gates: present, exact size, structure, digest.

They yield every finding and repair nothing. A gate that cannot run because a
cheaper one failed is reported as not run, which is not a pass.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csm_weights.concurrency import OnProgress
from csm_weights.errors import CsmWeightsError, Finding, Kind, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.formats.architecture import CsmConfig, read_config
from csm_weights.formats.identify import check_network
from csm_weights.formats.transformers_layout import name_tensors
from csm_weights.formats.weights_file import is_shard, open_weights
from csm_weights.hashing import Digests, HashJob, ShortRead, measure, sha256_of
from csm_weights.manifest.types import Artifact, Edition, Piece
from csm_weights.store.inspect import FileState, FileStatus
from csm_weights.store.journal import PieceRecord
from csm_weights.store.receipts import Receipt, VerifiedFile


class Gate(enum.StrEnum):
    """The gates in their order, cheap ones first."""

    PRESENT = "present"
    SIZE = "size"
    STRUCTURE = "structure"
    DIGEST = "digest"


@dataclass(frozen=True)
class Subject:
    """An inspected file to be gated; `mend` is the command that gets the right one."""

    artifact: Artifact
    file: FileStatus
    mend: str = "inv weights"

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @property
    def is_absent(self) -> bool:
        """True where there is no file to look into."""
        return self.finding is not None and self.finding.kind in (Kind.MISSING, Kind.UNREADABLE)

    @property
    def finding(self) -> Finding | None:
        """The finding of the inspection, or that the file is absent."""
        if self.file.state is FileState.ABSENT:
            return Finding.missing(self.path, self.artifact.size, self.mend)
        return self.file.finding

    @property
    def receipt(self) -> Receipt | None:
        """The receipt, where it still fits the file's stat: the digest is known by it."""
        return self.file.valid_receipt

    @property
    def edition(self) -> Edition:
        """The accepted edition that has this file's size, or the pinned one."""
        editions = self.artifact.editions
        return next((e for e in editions if e.size == self.file.size), editions[0])

    @property
    def is_pinned(self) -> bool:
        """True for the edition that the manifest pins, False for an alternative."""
        return self.edition == self.artifact.editions[0]


@dataclass(frozen=True)
class GateResult:
    """The result of one gate for one file; `ok` is None where it could not run.

    `sha256` is the whole file's, where the digest gate passed.
    """

    gate: Gate
    path: str
    ok: bool | None
    expected: str
    found: str
    findings: tuple[Finding, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True)
class Rejected:
    """A file that hashing has found wrong; `good` are the offsets of pieces that are right."""

    path: Path
    findings: tuple[Finding, ...]
    good: frozenset[int] = frozenset()

    def finding(self) -> Finding:
        """Return all that is wrong in one finding: wrong pieces as ranges of the file."""
        first, path = self.findings[0], str(self.path)
        if len(self.findings) == 1 or all(f.where == path for f in self.findings):
            return first
        ranges = "; ".join(f.where.removeprefix(path).strip() for f in self.findings)
        expected, found = "the sha256 of every piece", f"others at {ranges}"
        return Finding(first.kind, path, expected, found, first.help)


def check(subjects: Sequence[Subject], rehash: bool, on_progress: OnProgress) -> list[GateResult]:
    """Run all gates over all files and return every result, in gate order.

    With `rehash` every digest is taken again; otherwise a receipt that fits the
    file's stat answers for it. `on_progress` gets bytes as they are hashed.
    """
    results = []
    for subject in subjects:
        wrong = subject.finding if subject.is_absent else None
        found = wrong.found if wrong else "present"
        findings = [wrong] if wrong else []
        results.append(_result(Gate.PRESENT, subject, "a readable file", found, findings))
    results += [_size(subject) for subject in subjects]
    # config.json first: it says which tensors the others have to have.
    config: CsmConfig | None = None
    has_config = any(s.artifact.format == "config" for s in subjects)
    for subject in sorted(subjects, key=lambda s: s.artifact.format != "config"):
        if subject.artifact.format == "config":
            result, config = _config_structure(subject)
            results.append(result)
        elif subject.artifact.is_weights:
            results.append(_weights_structure(subject, config, has_config))
    to_hash = unhashed(subjects, rehash)
    hashed = {file.path: file for file in verify(to_hash, on_progress)}
    return results + [_digest(subject, hashed.get(subject.path)) for subject in subjects]


def unhashed(subjects: Sequence[Subject], rehash: bool) -> list[Subject]:
    """Return the files that `check` hashes: without a finding and, unless `rehash`, a receipt."""
    return [s for s in subjects if not s.finding and (rehash or not s.receipt)]


def _size(subject: Subject) -> GateResult:
    expected = " or ".join(f"{e.size:,}" for e in subject.artifact.editions) + " bytes"
    if subject.is_absent:
        return _not_run(Gate.SIZE, subject, expected, "the file is not present")
    wrong = subject.finding
    found = wrong.found if wrong else f"{subject.file.size:,} bytes"
    return _result(Gate.SIZE, subject, expected, found, [wrong] if wrong else [])


def _config_structure(subject: Subject) -> tuple[GateResult, CsmConfig | None]:
    expected = "a description of a CSM network"
    if subject.is_absent:
        return _not_run(Gate.STRUCTURE, subject, expected, "the file is not present"), None
    try:
        config = read_config(subject.path)
    except OSError as error:
        return _not_run(Gate.STRUCTURE, subject, expected, error.strerror or str(error)), None
    except WrongContent as error:
        return _result(Gate.STRUCTURE, subject, expected, "malformed", error.findings), None
    found = f"a network of {len(config.tensor_shapes())} tensors"
    return _result(Gate.STRUCTURE, subject, expected, found, ()), config


def _weights_structure(subject: Subject, config: CsmConfig | None, has_config: bool) -> GateResult:
    expected = "the tensors that config.json implies" if has_config else "a well-formed file"
    if subject.is_absent:
        return _not_run(Gate.STRUCTURE, subject, expected, "the file is not present")
    if has_config and config is None:
        return _not_run(Gate.STRUCTURE, subject, expected, "config.json cannot be used")
    findings: Sequence[Finding] = ()
    try:
        with open_weights([subject.path], subject.artifact.format) as weights:
            found = f"{len(weights.index.tensors)} tensors"
            if config is not None and not is_shard(subject.path.name):
                findings = check_network(name_tensors([weights], (), config), config).listed()
                expected = f"{len(config.tensor_shapes())} tensors as config.json implies"
    except CsmWeightsError as error:
        findings, found = error.findings, "malformed"
        if {finding.kind for finding in findings} == {Kind.UNSUPPORTED}:
            # the reader is narrower than the format: the digest decides
            found = f"not read: expected {findings[0].expected}, found {findings[0].found}"
            return GateResult(Gate.STRUCTURE, subject.artifact.path, None, expected, found)
    return _result(Gate.STRUCTURE, subject, expected, found, findings)


def _digest(subject: Subject, hashed: VerifiedFile | Rejected | None) -> GateResult:
    """Return the result of the digest gate, by the receipt where the file was not hashed."""
    artifact = subject.artifact
    if subject.edition.sha256:
        expected = f"sha256 {subject.edition.sha256}"
    elif artifact.is_pinned_by_git:
        expected = f"git blob id {artifact.git_sha1}"
    else:
        expected = f"the sha256 of {len(artifact.pieces)} pieces"
        expected += f" and Hub blob id {artifact.blob_id}" if artifact.blob_id else ""
    if isinstance(hashed, Rejected):
        found = "; ".join(f.found for f in hashed.findings)
        return _result(Gate.DIGEST, subject, expected, found, hashed.findings)
    known = hashed or subject.receipt
    if not known:
        why = "the file is not present or has the wrong size"
        return _not_run(Gate.DIGEST, subject, expected, why)
    by = f", by its receipt of {known.verified_at}" if isinstance(known, Receipt) else ""
    found = f"sha256 {known.sha256}{by}"
    return GateResult(Gate.DIGEST, artifact.path, True, expected, found, (), known.sha256)


def _result(
    gate: Gate, subject: Subject, expected: str, found: str, findings: Sequence[Finding]
) -> GateResult:
    path = subject.artifact.path
    return GateResult(gate, path, not findings, expected, found, tuple(findings))


def _not_run(gate: Gate, subject: Subject, expected: str, why: str) -> GateResult:
    return GateResult(gate, subject.artifact.path, None, expected, f"not run: {why}")


def check_chunk_files(
    chunks: Sequence[tuple[Piece, Path]], on_progress: OnProgress
) -> list[Finding]:
    """Hash chunk files of the right size and return a finding for each wrong one."""
    jobs = [HashJob(path, piece.size, whole=True) for piece, path in chunks]
    findings = []
    for (piece, _), found in zip(chunks, _measure(jobs, on_progress), strict=True):
        if isinstance(found, Finding):
            findings.append(found)
        elif found.whole != piece.sha256:
            mend = "get it again"
            findings.append(Finding.wrong_digest(piece.part, piece.sha256, found.whole, mend))
    return findings


def check_sum(folder: Path, path: str, digest: str, known: str | None) -> GateResult:
    """Return the result of the digest gate for one line of a SHA256SUMS file.

    `path` is relative to `folder`; `known` is its sha256 where it has just been taken.
    """
    file, expected = folder / path, f"sha256 {digest}"
    try:
        known = known or sha256_of(file)
    except OSError as error:
        finding = Finding(Kind.MISSING, str(file), expected, error.strerror or str(error))
        return GateResult(Gate.DIGEST, path, False, expected, finding.found, (finding,))
    findings = () if known == digest else (Finding.wrong_digest(file, digest, known),)
    return GateResult(Gate.DIGEST, path, not findings, expected, f"sha256 {known}", findings)


def verify(
    subjects: Sequence[Subject], on_progress: OnProgress, blocks: bool = False
) -> list[VerifiedFile | Rejected]:
    """Hash files of the right size and compare them with what is pinned.

    Every byte is read once, and covered by a sha256 of the manifest: by its
    piece's, or by the whole file's. Damage is reported piece by piece. `blocks`
    asks for the digests of blocks as well.
    """
    before = [_fingerprint(subject.path) for subject in subjects]
    jobs = []
    for subject in subjects:
        # The pieces, on all cores, or the whole file, or both.
        artifact, attested = subject.artifact, _attested(subject)
        ranges = tuple((p.offset, p.size) for p in artifact.pieces)
        if not subject.is_pinned or (artifact.sha256 is not None and not attested):
            ranges = ()
        whole, git = attested is None, artifact.is_pinned_by_git
        size = subject.edition.size
        jobs.append(HashJob(subject.path, size, ranges, whole, git, blocks))
    measured = _measure(jobs, on_progress)
    return [
        _judge(subject, found, first, on_progress)
        for subject, found, first in zip(subjects, measured, before, strict=True)
    ]


def _attested(subject: Subject) -> str | None:
    """Return the whole sha256 that a receipt attests, where it may stand for hashing the whole.

    Only where it belongs to just the pinned pieces and the manifest pins the
    whole too: then a forged receipt can claim nothing false. That these
    pieces make up this whole is arithmetic, not a claim about the disk.
    """
    receipt, artifact = subject.file.receipt, subject.artifact
    pins_whole = subject.is_pinned and (artifact.sha256 or artifact.blob_id)
    if not (receipt and pins_whole and receipt.covers_pieces(artifact)):
        return None
    return receipt.sha256 if receipt.fits(artifact) else None


def _fingerprint(path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.of(path.stat())
    except OSError:
        return None


def _judge(
    subject: Subject, found: Digests | Finding, before: Fingerprint | None, on_progress: OnProgress
) -> VerifiedFile | Rejected:
    path, artifact, after = subject.path, subject.artifact, _fingerprint(subject.path)
    if isinstance(found, Finding):
        return Rejected(path, (found,))
    whole, blamed = found.whole or _attested(subject) or "", found.ranges
    findings = _bad_pieces(subject, blamed) if blamed else []
    if not findings:
        findings = artifact.digest_findings(subject.edition, whole, found.git_sha1, path)
        blamed = ()
        if findings and not found.ranges and subject.is_pinned and artifact.pieces:
            # The whole is wrong: hash the pieces to say where.
            ranges = tuple((p.offset, p.size) for p in artifact.pieces)
            (again,) = measure([HashJob(path, artifact.size, ranges)], on_progress)
            blamed = again.ranges
            findings = _bad_pieces(subject, blamed) or findings
    if after is None or before != after:
        return Rejected(path, (*findings, Finding.changed(path)))
    if findings:
        pairs = zip(artifact.pieces, blamed, strict=bool(blamed))
        good = frozenset(p.offset for p, digest in pairs if digest == p.sha256)
        return Rejected(path, tuple(findings), good)
    pieces = artifact.pieces if found.ranges else ()
    records = tuple(PieceRecord(p.offset, p.size, p.sha256, "in place") for p in pieces)
    return VerifiedFile(path, whole, records, after, found.git_sha1, blocks=found.blocks)


def _measure(jobs: Sequence[HashJob], on_progress: OnProgress) -> list[Digests | Finding]:
    """Return the digests of each file, or why it could not be read to its end."""
    try:
        return [*measure(jobs, on_progress)]
    except (OSError, ShortRead) as error:
        if len(jobs) == 1:
            return [Finding.unreadable(jobs[0].path, error)]
        return [found for job in jobs for found in _measure([job], on_progress)]


def _bad_pieces(subject: Subject, digests: Sequence[str]) -> list[Finding]:
    """Return a finding for each wrong piece, or one for a file of which no piece is right."""
    pieces, path = subject.artifact.pieces, subject.path
    bad = [(p, d) for p, d in zip(pieces, digests, strict=True) if d != p.sha256]
    if len(bad) == len(pieces) > 1:
        expected = f"the sha256 of {len(pieces)} pieces"
        found = "none of them: another file of the same size"
        return [Finding(Kind.WRONG_DIGEST, str(path), expected, found, subject.mend)]
    return [
        Finding.wrong_digest(
            f"{path} bytes {p.offset:,} to {p.end - 1:,}", p.sha256, d, subject.mend
        )
        for p, d in bad
    ]

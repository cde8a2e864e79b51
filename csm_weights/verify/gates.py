"""The gates: present, exact size, structure, digest; all findings, never a repair.

A gate that cannot say anything because a cheaper one failed is reported as
not run, which is not a pass.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from csm_weights.concurrency import OnProgress
from csm_weights.errors import CsmWeightsError, Finding, Kind, WrongContent
from csm_weights.files import Fingerprint
from csm_weights.formats import format_named
from csm_weights.formats.architecture import CsmConfig, parse_config
from csm_weights.formats.tensor_index import check_against
from csm_weights.hashing import Digests, HashJob, ShortRead, measure, sha256_of
from csm_weights.manifest.digests import digest_findings
from csm_weights.manifest.types import Artifact, Edition, Piece
from csm_weights.store.journal import PieceRecord
from csm_weights.store.receipts import Receipt

#: A config.json is a few kilobytes; more than this is not one.
MAX_CONFIG = 1 << 20

#: Findings that say that there is no file to look into.
_NOT_PRESENT = frozenset({Kind.MISSING, Kind.UNREADABLE})


class Gate(enum.StrEnum):
    """The gates in their order, cheap ones first."""

    PRESENT = "present"
    SIZE = "size"
    STRUCTURE = "structure"
    DIGEST = "digest"


@dataclass(frozen=True)
class Subject:
    """One file to be gated.

    `finding` is what a look at its stat found wrong. `trusted` says that its
    receipt still fits its stat, so that its digest need not be taken again.
    `mend` is the command that puts the right file in its place.
    """

    artifact: Artifact
    path: Path
    size: int | None
    finding: Finding | None = None
    receipt: Receipt | None = None
    trusted: bool = False
    mend: str = "inv weights"

    @property
    def edition(self) -> Edition:
        """The accepted edition that has this file's size, or the pinned one."""
        editions = self.artifact.editions
        return next((e for e in editions if e.size == self.size), editions[0])


@dataclass(frozen=True)
class GateResult:
    """What one gate says of one file; `ok` is None where it could not run.

    `sha256` is the whole file's, where the digest gate came to know it.
    """

    gate: Gate
    path: str
    ok: bool | None
    expected: str
    found: str
    findings: tuple[Finding, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True)
class Proof:
    """What hashing a file found: its whole sha256 where known, or what is wrong.

    `fingerprint` is the file's stat while it was hashed, None where it has gone.
    `good` are the offsets of the pieces that are right in a file that is not.
    """

    subject: Subject
    sha256: str | None
    findings: tuple[Finding, ...]
    fingerprint: Fingerprint | None
    records: tuple[PieceRecord, ...] = ()
    git_sha1: str | None = None
    good: frozenset[int] = frozenset()

    def finding(self) -> Finding | None:
        """What is wrong, in one finding: several wrong pieces are told as ranges of one file."""
        path = str(self.subject.path)
        if len(self.findings) < 2 or all(f.where == path for f in self.findings):
            return self.findings[0] if self.findings else None
        ranges = "; ".join(f.where.removeprefix(path).strip() for f in self.findings)
        first = self.findings[0]
        return Finding(
            first.kind, path, "the sha256 of every piece", f"others at {ranges}", first.help
        )


def check(subjects: Sequence[Subject], rehash: bool, on_progress: OnProgress) -> list[GateResult]:
    """Runs all gates over all files and returns every result, in gate order.

    With `rehash` every digest is taken again; otherwise a trusted receipt
    answers for the file. `on_progress` gets bytes as they are hashed.
    """
    results = [_present(s) for s in subjects] + [_size(s) for s in subjects]
    results += _structures(subjects)
    results += _digests(subjects, rehash, on_progress)
    return results


def _present(subject: Subject) -> GateResult:
    finding = subject.finding if _is_absent(subject) else None
    found = finding.found if finding else "present"
    return _result(Gate.PRESENT, subject, "a readable file", found, [finding] if finding else [])


def _is_absent(subject: Subject) -> bool:
    return subject.finding is not None and subject.finding.kind in _NOT_PRESENT


def _size(subject: Subject) -> GateResult:
    sizes = " or ".join(f"{e.size:,}" for e in subject.artifact.editions)
    if _is_absent(subject):
        return _not_run(Gate.SIZE, subject, f"{sizes} bytes", "the file is not present")
    finding = subject.finding
    found = finding.found if finding else f"{subject.size:,} bytes"
    return _result(Gate.SIZE, subject, f"{sizes} bytes", found, [finding] if finding else [])


def _structures(subjects: Sequence[Subject]) -> list[GateResult]:
    config: CsmConfig | None = None
    has_config = any(s.artifact.format == "config" for s in subjects)
    results = []
    configs_first = sorted(subjects, key=lambda s: s.artifact.format != "config")
    for subject in configs_first:
        if subject.artifact.format == "config":
            result, config = _config_structure(subject)
            results.append(result)
        elif subject.artifact.is_weights:
            results.append(_weights_structure(subject, config, has_config))
    return results


def _config_structure(subject: Subject) -> tuple[GateResult, CsmConfig | None]:
    expected = "a description of a CSM network"
    if _is_absent(subject):
        return _not_run(Gate.STRUCTURE, subject, expected, "the file is not present"), None
    try:
        with subject.path.open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG), str(subject.path))
    except OSError as error:
        return _not_run(Gate.STRUCTURE, subject, expected, error.strerror or str(error)), None
    except WrongContent as error:
        return _result(Gate.STRUCTURE, subject, expected, "malformed", error.findings), None
    count = len(config.tensor_shapes())
    found = f"a network of {count} tensors"
    return _result(Gate.STRUCTURE, subject, expected, found, ()), config


def _weights_structure(subject: Subject, config: CsmConfig | None, has_config: bool) -> GateResult:
    expected = "the tensors that config.json implies" if has_config else "a well-formed file"
    if _is_absent(subject):
        return _not_run(Gate.STRUCTURE, subject, expected, "the file is not present")
    if has_config and config is None:
        return _not_run(Gate.STRUCTURE, subject, expected, "config.json cannot be used")
    findings: Sequence[Finding] = ()
    try:
        tensors = format_named(subject.artifact.format).read_index(subject.path)
        found = f"{len(tensors.tensors)} tensors"
        if config is not None:
            findings = check_against(tensors, config, str(subject.path))
            expected = f"{len(config.tensor_shapes())} tensors as config.json implies"
    except CsmWeightsError as error:
        findings, found = error.findings, "malformed"
    return _result(Gate.STRUCTURE, subject, expected, found, findings)


def _digests(
    subjects: Sequence[Subject], rehash: bool, on_progress: OnProgress
) -> list[GateResult]:
    results: dict[Path, GateResult] = {}
    to_hash = []
    for subject in subjects:
        expected = _pinned(subject)
        if subject.finding:
            results[subject.path] = _not_run(
                Gate.DIGEST, subject, expected, "the file is not present or has the wrong size"
            )
        elif subject.trusted and subject.receipt and not rehash:
            found = (
                f"sha256 {subject.receipt.sha256}, by its receipt of {subject.receipt.verified_at}"
            )
            result = _result(Gate.DIGEST, subject, expected, found, ())
            results[subject.path] = replace(result, sha256=subject.receipt.sha256)
        else:
            to_hash.append(subject)
    for proof in prove(to_hash, on_progress):
        found = "; ".join(f.found for f in proof.findings) or f"sha256 {proof.sha256}"
        subject, findings = proof.subject, proof.findings
        result = _result(Gate.DIGEST, subject, _pinned(subject), found, findings)
        results[subject.path] = replace(result, sha256=None if findings else proof.sha256)
    return [results[subject.path] for subject in subjects]


def check_parts(parts: Sequence[tuple[Piece, Path]], on_progress: OnProgress) -> list[Finding]:
    """What hashing finds wrong with part files of the right size, one finding a part."""
    findings = []
    jobs = [HashJob(path, piece.size, ((0, piece.size),)) for piece, path in parts]
    for (piece, _), found in zip(parts, _measure(jobs, on_progress), strict=True):
        if isinstance(found, Finding):
            findings.append(found)
        elif found.ranges[0] != piece.sha256:
            findings.append(
                Finding.wrong_digest(piece.part, piece.sha256, found.ranges[0], "get it again")
            )
    return findings


def check_sum(folder: Path, path: str, digest: str, known: str | None) -> GateResult:
    """The digest gate for one line of a SHA256SUMS file, relative to `folder`.

    `known` is the file's sha256 where it has just been taken.
    """
    file, expected = folder / path, f"sha256 {digest}"
    try:
        known = known or sha256_of(file)
    except OSError as error:
        finding = Finding(Kind.MISSING, str(file), expected, error.strerror or str(error))
        return GateResult(Gate.DIGEST, path, False, expected, finding.found, (finding,))
    findings = []
    if known != digest:
        findings = [Finding.wrong_digest(file, digest, known)]
    return GateResult(Gate.DIGEST, path, not findings, expected, f"sha256 {known}", tuple(findings))


def _pinned(subject: Subject) -> str:
    if subject.edition.sha256:
        return f"sha256 {subject.edition.sha256}"
    if subject.artifact.is_git_proven:
        return f"git blob id {subject.artifact.git_sha1}"
    pieces = f"the sha256 of {len(subject.artifact.pieces)} pieces"
    blob = subject.artifact.blob_id
    return f"{pieces} and Hub blob id {blob}" if blob else pieces


def _result(
    gate: Gate, subject: Subject, expected: str, found: str, findings: Sequence[Finding]
) -> GateResult:
    path = subject.artifact.path
    return GateResult(gate, path, not findings, expected, found, tuple(findings))


def _not_run(gate: Gate, subject: Subject, expected: str, why: str) -> GateResult:
    return GateResult(gate, subject.artifact.path, None, expected, f"not run: {why}")


@dataclass
class _Job:
    """How one file is proven: which ranges, whether the whole, and what is attested."""

    subject: Subject
    attested: str | None = None
    measure: HashJob = field(init=False)

    def __post_init__(self) -> None:
        subject, artifact = self.subject, self.subject.artifact
        receipt = subject.receipt
        ranges = tuple((p.offset, p.size) for p in artifact.pieces)
        if self.subject.edition != artifact.editions[0]:
            ranges = ()
        elif receipt and is_attested(receipt, artifact):
            # That these pieces make up this whole is arithmetic, not a claim about
            # the disk: the pieces prove the bytes, on all cores.
            self.attested = receipt.sha256
        elif artifact.sha256 is not None:
            ranges = ()
        whole = self.attested is None
        git = artifact.is_git_proven
        self.measure = HashJob(subject.path, subject.edition.size, ranges, whole, git)


def is_attested(receipt: Receipt, artifact: Artifact) -> bool:
    """Whether a receipt's whole digest may stand for hashing the whole once more.

    Only where it belongs to just the pinned pieces and the manifest pins the
    whole too: then a forged receipt can say nothing but the truth.
    """
    pinned = artifact.sha256 is not None or artifact.blob_id is not None
    return pinned and receipt.covers_pieces(artifact) and receipt.fits(artifact)


def prove(subjects: Sequence[Subject], on_progress: OnProgress) -> list[Proof]:
    """Hashes files of the right size and compares them with what is pinned.

    Every byte is read once, and covered by a sha256 of the manifest: by its
    piece's, or by the whole file's. Damage is told piece by piece.
    """
    jobs = [_Job(subject) for subject in subjects]
    before = [_fingerprint(subject) for subject in subjects]
    measured = _measure([job.measure for job in jobs], on_progress)
    return [
        _judge(job, found, first, on_progress)
        for job, found, first in zip(jobs, measured, before, strict=True)
    ]


def _fingerprint(subject: Subject) -> Fingerprint | None:
    try:
        return Fingerprint.of(subject.path.stat())
    except OSError:
        return None


def _judge(
    job: _Job, found: Digests | Finding, before: Fingerprint | None, on_progress: OnProgress
) -> Proof:
    subject, after = job.subject, _fingerprint(job.subject)
    if isinstance(found, Finding):
        return Proof(subject, None, (found,), after)
    findings, good = _compare(job, found, on_progress)
    if before != after or after is None:
        findings.append(Finding.changed(subject.path))
        good = frozenset()
    pieces = subject.artifact.pieces if job.measure.ranges else ()
    records = tuple(PieceRecord(p.offset, p.size, p.sha256, "in place") for p in pieces)
    whole = found.whole or job.attested
    return Proof(subject, whole, tuple(findings), after, records, found.git_sha1, good)


def _measure(jobs: Sequence[HashJob], on_progress: OnProgress) -> list[Digests | Finding]:
    """What was measured of each file, or why it could not be read to its end."""
    try:
        return [*measure(jobs, on_progress)]
    except (OSError, ShortRead):
        return [_measure_alone(job, on_progress) for job in jobs]


def _measure_alone(job: HashJob, on_progress: OnProgress) -> Digests | Finding:
    try:
        return measure([job], on_progress)[0]
    except (OSError, ShortRead) as error:
        return Finding.unreadable(job.path, error)


def _compare(
    job: _Job, found: Digests, on_progress: OnProgress
) -> tuple[list[Finding], frozenset[int]]:
    """What is wrong with a file, and the offsets of the pieces that are right all the same."""
    subject, artifact = job.subject, job.subject.artifact
    if found.ranges and (findings := _bad_pieces(subject, found.ranges)):
        return findings, _good_pieces(artifact, found.ranges)
    whole = found.whole or job.attested or ""
    findings = digest_findings(artifact, subject.edition, whole, found.git_sha1, subject.path)
    is_pinned = subject.edition == artifact.editions[0]
    if findings and is_pinned and artifact.pieces and not found.ranges:
        digests = _locate(subject, on_progress)
        return _bad_pieces(subject, digests) or findings, _good_pieces(artifact, digests)
    return findings, frozenset()


def _good_pieces(artifact: Artifact, digests: Sequence[str]) -> frozenset[int]:
    pairs = zip(artifact.pieces, digests, strict=True)
    return frozenset(piece.offset for piece, digest in pairs if digest == piece.sha256)


def _locate(subject: Subject, on_progress: OnProgress) -> tuple[str, ...]:
    """The piece digests of a file that is known to be wrong somewhere."""
    ranges = tuple((p.offset, p.size) for p in subject.artifact.pieces)
    return measure([HashJob(subject.path, subject.artifact.size, ranges)], on_progress)[0].ranges


def _bad_pieces(subject: Subject, digests: Sequence[str]) -> list[Finding]:
    """A finding for each wrong piece, or one for a file of which no piece is right."""
    pieces = subject.artifact.pieces
    bad = [(p, d) for p, d in zip(pieces, digests, strict=True) if d != p.sha256]
    if len(bad) == len(pieces) > 1:
        expected = f"the sha256 of {len(pieces)} pieces"
        found = "none of them: another file of the same size"
        return [Finding(Kind.WRONG_DIGEST, str(subject.path), expected, found, subject.mend)]
    return [
        Finding.wrong_digest(
            f"{subject.path} bytes [{piece.offset:,}, {piece.end:,})",
            piece.sha256,
            digest,
            subject.mend,
        )
        for piece, digest in bad
    ]

"""Attest installed files, and check installed files against an attestation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from csm_weights.commands.verify import digests_of, write_sums_of
from csm_weights.commands.verify import verify as verify_files
from csm_weights.errors import Finding, Kind, UsageError, WrongContent, error_for
from csm_weights.files import Fingerprint, read_bounded, read_file
from csm_weights.hashing import HashJob, measure, sha256_of
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, begin, gate_error, now
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import FileState, State
from csm_weights.store.receipts import VerifiedFile
from csm_weights.verify import envelope, statement
from csm_weights.verify.envelope import Attestation, Attested, Signer
from csm_weights.verify.statement import Facts


@dataclass(frozen=True)
class Attesting:
    """An attestation that was written: its file, its subjects' sha256 by name, who signed it.

    `signer` is None for one that nobody signed. `new_keys` are the files of a
    key pair that was made for it.
    """

    model: str
    file: Path
    subjects: Mapping[str, str]
    signer: Signer | None
    new_keys: tuple[Path, ...] = ()


def attest_files(request: Request, out: str = "", key: str = "", make_key: str = "") -> Attesting:
    """Write an attestation of the installed files, after hashing all of them again.

    `out` is the file for it, default NAME.intoto.json in the destination. It
    is signed with the private key in the file `key`, or with a new one:
    `make_key` and `make_key`.pub, neither of which may be there. Raises
    MissingInput or WrongContent unless every gate is passed: then nothing is
    written.
    """
    if key and make_key:
        raise UsageError("--key signs with an existing key, --new-key makes one: give one of them")
    secret = read_file(Path(key), envelope.MAX_KEY, "a private key") if key else None
    if key or make_key:
        envelope.require_library()
    session = begin(request)
    state = session.inspect()
    results = session.gate(state, rehash=True)
    if error := gate_error(results):
        raise error
    subjects, name = digests_of(results), state.manifest.name
    body = statement.payload(statement.statement(_facts(state, subjects)))
    new_keys, text, signer = _make_keys(make_key), body.decode(), None
    if new_keys:
        text, signer = envelope.sign(
            body, read_bounded(new_keys[0], envelope.MAX_KEY), make_key, None
        )
    elif secret is not None:
        password = os.environ.get(envelope.PASSPHRASE)
        text, signer = envelope.sign(body, secret, key, password.encode() if password else None)
    file = Path(out) if out else state.paths.destination / f"{name}.intoto.json"
    atomic.write_whole(file, text)
    return Attesting(name, file, subjects, signer, new_keys)


def _facts(state: State, digests: Mapping[str, str]) -> Facts:
    where, files = Path(state.manifest.where), []
    for item in state.artifacts:
        artifact, file = item.artifact, item.installed
        pieces = file.receipt.pieces if file.receipt and file.state is FileState.VERIFIED else ()
        stat = Fingerprint.of(file.path.stat())
        files.append((artifact, VerifiedFile(file.path, digests[artifact.path], pieces, stat)))
    of = (state.manifest, where.name, sha256_of(where))
    return Facts(*of, tuple(files), version("csm-weights"), _time())


def _time() -> str:
    """Return the time, or that of SOURCE_DATE_EPOCH, which makes the statement reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch.isdecimal():
        return now()
    try:
        return datetime.fromtimestamp(int(epoch), UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH={epoch[:40]} is not a time") from None


def _make_keys(name: str) -> tuple[Path, ...]:
    """Write a new key pair to two new files; only the owner can read the private one."""
    if not name:
        return ()
    private, public = Path(name), Path(f"{name}.pub")
    for file in (private, public):
        if os.path.lexists(file):
            finding = Finding(
                Kind.IN_THE_WAY, str(file), "no such file", "one", "choose another name"
            )
            raise WrongContent("keys are not written over existing files", [finding])
    for file, content, mode in zip(
        (private, public), envelope.new_key(), (0o600, 0o644), strict=True
    ):
        with atomic.writing(file):
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            atomic.write_all(fd, content, file)
        finally:
            os.close(fd)
    return private, public


def verify(
    request: Request,
    attestation: str,
    key: str = "",
    sums: str | None = None,
    write_sums: bool = False,
) -> Outcome:
    """Do what `verify` does, and check that an attestation is signed by `key` and true.

    Offline. The statement is checked before anything is hashed. The subjects
    have to be installed with the digests that were attested, and the chosen
    files among them; with names in `request.only`, only those are compared.
    Without `key` nobody has signed for it, and the result says so.
    Raises WrongContent or MissingInput.
    """
    said = envelope.read(
        read_file(Path(attestation), envelope.MAX_ATTESTATION, "an attestation"), attestation
    )
    signer = None
    if key:
        public = read_file(Path(key), envelope.MAX_KEY, "a public key")
        signer = envelope.check(said.body, said.signatures, public, key)
    outcome = verify_files(request, sums)
    if outcome.error:
        return outcome
    chosen = [item.artifact.path for item in outcome.state.artifacts]
    held = {n: d for n, d in said.subjects.items() if not request.only or n in chosen}
    found = digests_of(outcome.results)
    found |= _others(outcome.state.paths.destination, [n for n in held if n not in found])
    about = replace(said, subjects=held)
    if findings := envelope.differences(about, attestation, found, chosen):
        error = error_for("the attestation is not true of these files", findings)
        return replace(outcome, error=error)
    if write_sums:
        write_sums_of(outcome)
    names = tuple(held)
    notes = _notes(said, outcome.state, len(said.subjects) - len(held))
    checked = Attested(attestation, signer, len(said.signatures), names, notes)
    return replace(outcome, attested=checked)


def _others(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of attested files that are here and not among the chosen ones."""
    there = {name: folder / name for name in names if (folder / name).is_file()}
    jobs = [HashJob(path, path.stat().st_size, whole=True) for path in there.values()]
    with Progress("hashing what else is attested", sum(job.size for job in jobs)) as progress:
        measured = measure(jobs, progress.advance)
    return {name: found.whole or "" for name, found in zip(there, measured, strict=True)}


def _notes(said: Attestation, state: State, left_out: int) -> tuple[str, ...]:
    notes = []
    if sha256_of(Path(state.manifest.where)) not in said.manifests:
        notes.append("it was made with another manifest than today's; the files fit both")
    if left_out:
        notes.append(f"{left_out} more of its subjects were not asked for with --only")
    return tuple(notes)

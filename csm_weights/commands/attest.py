"""Attest installed files, and check installed files against an attestation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
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
from csm_weights.store.receipts import VerifiedFile
from csm_weights.verify import envelope, statement
from csm_weights.verify.envelope import Attested, Signer
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
    subjects, name, files = digests_of(results), state.manifest.name, []
    for item in state.artifacts:
        file, path = item.installed, item.artifact.path
        pieces = file.valid_receipt.pieces if file.valid_receipt else ()
        stat = Fingerprint.of(file.path.stat())
        files.append((item.artifact, VerifiedFile(file.path, subjects[path], pieces, stat)))
    where = Path(state.manifest.where)
    of = (state.manifest, where.name, sha256_of(where))
    facts = Facts(*of, tuple(files), version("csm-weights"), _time())
    body = statement.payload(statement.statement(facts))
    new_keys, text, signer = _make_keys(make_key), body.decode(), None
    if new_keys:
        text, signer = envelope.sign(
            body, read_bounded(new_keys[0], envelope.MAX_KEY), make_key, None
        )
    elif secret is not None:
        password = os.environ.get(envelope.PASSPHRASE)
        text, signer = envelope.sign(body, secret, key, password.encode() if password else None)
    out_file = Path(out) if out else state.paths.destination / f"{name}.intoto.json"
    atomic.write_whole(out_file, text)
    return Attesting(name, out_file, subjects, signer, new_keys)


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
            words = ("no such file", "one", "choose another name")
            finding = Finding(Kind.IN_THE_WAY, str(file), *words)
            raise WrongContent("existing key files are not overwritten", [finding])
    contents = envelope.new_key()
    for file, content, mode in zip((private, public), contents, (0o600, 0o644), strict=True):
        opener = partial(os.open, mode=mode)
        with atomic.writing(file), open(file, "xb", opener=opener) as new:
            new.write(content)
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
    text = read_file(Path(attestation), envelope.MAX_ATTESTATION, "an attestation")
    said, signer = envelope.read(text, attestation), None
    if key:
        public = read_file(Path(key), envelope.MAX_KEY, "a public key")
        signer = envelope.check(said.body, said.signatures, public, key)
    outcome = verify_files(request, sums)
    if outcome.error:
        return outcome
    state, found, notes = outcome.state, digests_of(outcome.results), []
    chosen = [item.artifact.path for item in state.artifacts]
    held = {n: d for n, d in said.subjects.items() if not request.only or n in chosen}
    found |= _others(state.paths.destination, [n for n in held if n not in found])
    about = replace(said, subjects=held)
    if findings := envelope.differences(about, attestation, found, chosen):
        error = error_for("the attestation does not match these files", findings)
        return replace(outcome, error=error)
    if write_sums:
        write_sums_of(outcome)
    if sha256_of(Path(state.manifest.where)) not in said.manifests:
        notes.append("it was made with another version of the manifest; the files match both")
    if left_out := len(said.subjects) - len(held):
        notes.append(f"{left_out} more subjects were left out with --only")
    checked = Attested(attestation, signer, len(said.signatures), tuple(held), tuple(notes))
    return replace(outcome, attested=checked)


def _others(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of attested files that are here and not among the chosen ones."""
    there = {name: folder / name for name in names if (folder / name).is_file()}
    jobs = [HashJob(path, path.stat().st_size, whole=True) for path in there.values()]
    with Progress("hashing other attested files", sum(job.size for job in jobs)) as progress:
        measured = measure(jobs, progress.advance)
    return {name: found.whole or "" for name, found in zip(there, measured, strict=True)}

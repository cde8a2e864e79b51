"""Statements of provenance: what is true of the files in place, and who says so.

A statement is an in-toto Statement v1 with a SLSA provenance v1 predicate:
its subjects are the files by sha256, its resolved dependencies what they were
made from. Signed, it lies in a DSSE envelope. Statements of others are read
with suspicion: bounded in size, depth and number, and strict in form.

Sources: in-toto.io/Statement/v1, slsa.dev/provenance/v1, and the DSSE
envelope of secure-systems-lab/dsse.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.store.receipts import Receipt
from csm_weights.untrusted import Malformed, is_text, show

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"

#: Who made the files, and how: package URLs, as no page on the web is needed to say so.
BUILDER = "pkg:generic/csm-weights"

#: Largest attestation that is read, in bytes; a piece takes about 250.
MAX_ATTESTATION = 16 << 20

#: Values in its JSON, at most: a piece has about 12, and each takes up to 100 bytes of memory.
MAX_VALUES = 1_000_000

#: More signatures, or subjects, than this are an attack on our time.
MAX_SIGNATURES = 16
MAX_SUBJECTS = 10_000

#: DSSE allows both alphabets of base64.
_URL_SAFE = str.maketrans("-_", "+/")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Descriptor = dict[str, Any]


# ---- what is said


@dataclass(frozen=True)
class Made:
    """A file in place: what the manifest says of it, and what was found just now.

    `sha256` was taken from its bytes. `receipt` tells where its pieces came
    from, None where there is none that fits the file.
    """

    artifact: Artifact
    size: int
    sha256: str
    receipt: Receipt | None


@dataclass(frozen=True)
class Facts:
    """All that a statement says: the files, the manifest's digest, the tool, the time.

    `manifest_name` is the manifest's file name. `version` is that of this
    package, `at` the time in ISO 8601, UTC.
    """

    manifest: Manifest
    manifest_name: str
    manifest_sha256: str
    made: tuple[Made, ...]
    version: str
    at: str


def statement(facts: Facts) -> dict[str, Any]:
    """The statement as JSON data; but for the time, the same facts give the same data."""
    parameters = {"model": facts.manifest.name, "files": [m.artifact.path for m in facts.made]}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": m.artifact.path, "digest": {"sha256": m.sha256}} for m in facts.made],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILDER}#assemble",
                "externalParameters": parameters,
                "resolvedDependencies": dependencies(facts),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"csm-weights": facts.version}},
                "metadata": {"finishedOn": facts.at},
            },
        },
    }


def dependencies(facts: Facts) -> list[Descriptor]:
    """What the files were made from: the manifest, the Hub's commit and blobs, parts."""
    found: list[Descriptor] = [
        {"name": facts.manifest_name, "digest": {"sha256": facts.manifest_sha256}}
    ]
    files = [d for made in facts.made for d in _materials(facts.manifest, made)]
    commit = facts.manifest.revision
    if commit and _COMMIT.fullmatch(commit) and any("uri" in d for d in files):
        found.append({"uri": _page(facts.manifest), "digest": {"gitCommit": commit}})
    return found + files


def _page(manifest: Manifest) -> str:
    """The repository's page on the Hub, whichever copy of the Hub was asked."""
    return f"https://huggingface.co/{manifest.repo}"


def _materials(manifest: Manifest, made: Made) -> list[Descriptor]:
    """The materials of one file: the Hub's blob where it came from there, else its pieces."""
    pieces = made.receipt.pieces if made.receipt else ()
    near = [p for p in pieces if not _is_of_hub(manifest, p.source)]
    materials = []
    if len(near) < len(pieces) or (not pieces and _blob_id(manifest, made)):
        materials.append(_blob(manifest, made))
    parts = {p.offset: p.part for p in made.artifact.pieces}
    for piece in near:
        known = parts.get(piece.offset, made.artifact.path)
        notes = {"file": made.artifact.path, "offset": piece.offset, "size": piece.size}
        name = {"name": known, "digest": {"sha256": piece.sha256}}
        materials.append(name | {"annotations": notes | {"from": _origin(piece.source)}})
    return materials or [_itself(made)]


def _blob_id(manifest: Manifest, made: Made) -> str | None:
    """The git blob id by which just these bytes are known to be in the Hub's repository."""
    artifact = made.artifact
    is_pinned = manifest.repo and manifest.revision and made.size == artifact.size
    return (artifact.blob_id or artifact.git_sha1) if is_pinned else None


def _is_of_hub(manifest: Manifest, source: str) -> bool:
    return bool(manifest.repo) and "://" in source and f"/{manifest.repo}/" in source


def _blob(manifest: Manifest, made: Made) -> Descriptor:
    path, blob = made.artifact.path, _blob_id(manifest, made)
    descriptor = {
        "name": path,
        "uri": f"{_page(manifest)}/resolve/{manifest.revision}/{path}",
        "digest": {"sha256": made.sha256} | ({"gitBlob": blob} if blob else {}),
    }
    if not (made.receipt and made.receipt.pieces):
        # A file that is proven whole has no record of its way here.
        return descriptor | {"annotations": {"from": "identified by its ids; its way is unknown"}}
    return descriptor


def _itself(made: Made) -> Descriptor:
    written = any(e.text is not None and e.size == made.size for e in made.artifact.editions)
    origin = "the manifest" if written else "not recorded"
    digest = {"sha256": made.sha256}
    return {"name": made.artifact.path, "digest": digest, "annotations": {"from": origin}}


def _origin(source: str) -> str:
    """Where a piece came from, without telling how this machine's folders are called."""
    if "://" in source:
        return source.partition("?")[0]
    return "a file on this machine" if source.startswith(("/", "~")) else source


def payload(data: Mapping[str, Any]) -> bytes:
    """A statement as the bytes that are signed: the keys sorted, in ASCII."""
    return json.dumps(data, sort_keys=True, ensure_ascii=True, indent=1).encode() + b"\n"


# ---- what others said


class Signer(NamedTuple):
    """A key that signed: its id, and its scheme, such as "ed25519"."""

    keyid: str
    scheme: str


class Signature(NamedTuple):
    """One signature of an envelope; `keyid` is a hint that nobody needs to believe."""

    keyid: str
    value: bytes


@dataclass(frozen=True)
class Attestation:
    """A statement as it was read: whom it is about, and the envelope it came in.

    `subjects` gives the sha256 of each file by name. `manifest` is the sha256
    of the manifest that it names, `model` that manifest's name, where told.
    """

    body: bytes
    subjects: Mapping[str, str]
    signatures: tuple[Signature, ...]
    model: str | None = None
    manifests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attested:
    """What was proven of an attestation: the key that signed it, and the files it is true of.

    `signer` is the key whose signature was checked, None without one;
    `signatures` is how many there are. `notes` are what a person should know.
    """

    file: str
    signer: Signer | None
    signatures: int
    subjects: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def by(self) -> str:
        """Who vouches for the statement."""
        if self.signer:
            return f"signed by {self.signer.scheme} key {self.signer.keyid[:16]}"
        if self.signatures:
            return f"NOT CHECKED who signed it ({self.signatures} signatures): give --key"
        return "NOBODY SIGNED IT: anyone may have written it"

    def lines(self) -> list[str]:
        """What was found, for a person."""
        said = f"attestation {self.file}: {self.by}"
        return [said, f"its subjects in place: {', '.join(self.subjects)}", *self.notes]


def read(data: bytes, where: str) -> Attestation:
    """An attestation, signed or not, from the bytes of a file.

    Raises WrongContent where anything is not as the formats say.
    """
    try:
        return _read(data)
    except Malformed as error:
        at = f"{where} {error.at}".rstrip()
        help_text = "it is no attestation of inv attest, or it was damaged; get it again"
        finding = Finding(Kind.MALFORMED, at, error.expected, error.found, help_text)
        raise WrongContent("the attestation cannot be read", [finding]) from None


def _read(data: bytes) -> Attestation:
    if len(data) > MAX_ATTESTATION:
        raise Malformed(f"at most {MAX_ATTESTATION:,} bytes", "more")
    outer = _json(data, "")
    if "payload" not in outer and "payloadType" not in outer:
        return _statement(data, outer, ())
    if outer.get("payloadType") != PAYLOAD_TYPE:
        raise Malformed(PAYLOAD_TYPE, show(outer.get("payloadType")), "payloadType")
    body = _base64(outer.get("payload"), "payload")
    return _statement(body, _json(body, "payload"), _signatures(outer.get("signatures")))


def _json(data: bytes, at: str) -> dict[str, Any]:
    # Every value but the first comes after one of these; counted in text too, which is harmless.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Malformed(f"at most {MAX_VALUES:,} values", "more", at)
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON, in UTF-8", _said(error), at) from None
    if not isinstance(found, dict):
        raise Malformed("a JSON object", show(found), at)
    return found


def _said(error: Exception) -> str:
    return show(str(error).partition("\n")[0]) if str(error) else "something else"


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; that two readers take different ones of two equal keys is an old trick."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word}, which is not JSON")


def _base64(text: object, at: str) -> bytes:
    if not isinstance(text, str):
        raise Malformed("base64", show(text), at)
    try:
        return base64.b64decode(text.translate(_URL_SAFE).encode(), validate=True)
    except (ValueError, binascii.Error):
        raise Malformed("base64", "something else", at) from None


def _signatures(found: object) -> tuple[Signature, ...]:
    if not isinstance(found, list) or len(found) > MAX_SIGNATURES:
        expected = f"a list of at most {MAX_SIGNATURES} signatures"
        raise Malformed(expected, f"{len(found)}" if isinstance(found, list) else show(found))
    signatures = []
    for number, one in enumerate(found):
        at = f"signatures[{number}]"
        keyid = one.get("keyid", "") if isinstance(one, dict) else None
        if not isinstance(one, dict) or not is_text(keyid):
            raise Malformed("an object with sig, and a keyid that is text", show(one), at)
        signatures.append(Signature(str(keyid), _base64(one.get("sig"), at)))
    if len({s.value for s in signatures}) != len(signatures):
        raise Malformed("signatures that differ", "one that is there twice", "signatures")
    return tuple(signatures)


def _statement(
    body: bytes, found: dict[str, Any], signatures: tuple[Signature, ...]
) -> Attestation:
    for key, wanted in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if found.get(key) != wanted:
            raise Malformed(wanted, show(found.get(key)), key)
    subjects = _subjects(found.get("subject"))
    build = _object(_object(found, "predicate"), "buildDefinition")
    model = _object(build, "externalParameters").get("model")
    given = build.get("resolvedDependencies", [])
    digests = [d.get("digest") for d in given if isinstance(d, dict)] if given else []
    known = {d["sha256"] for d in digests if isinstance(d, dict) and is_text(d.get("sha256"))}
    return Attestation(body, subjects, signatures, _name(model), frozenset(known))


def _object(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key)
    if not isinstance(value, dict):
        raise Malformed("an object", show(value), key)
    return value


def _name(model: object) -> str | None:
    return str(model) if is_text(model) and len(str(model)) <= 64 else None


def _subjects(found: object) -> dict[str, str]:
    if not isinstance(found, list) or not 0 < len(found) <= MAX_SUBJECTS:
        raise Malformed(f"a list of 1 to {MAX_SUBJECTS:,} subjects", show(found), "subject")
    subjects: dict[str, str] = {}
    for number, one in enumerate(found):
        at = f"subject[{number}]"
        name = one.get("name") if isinstance(one, dict) else None
        if not is_text(name) or path_problem(str(name)):
            raise Malformed("a file below the folder", show(name), at)
        if name in subjects:
            raise Malformed("every file once", show(name), at)
        subjects[str(name)] = _sha256_of(one, at)
    return subjects


def _sha256_of(subject: Mapping[str, Any], at: str) -> str:
    digest = subject.get("digest")
    found = digest.get("sha256") if isinstance(digest, dict) else None
    if not isinstance(found, str) or not _SHA256.fullmatch(found):
        raise Malformed("a sha256 of 64 hex digits", show(found), at)
    return found


# ---- what is true of it


def differences(
    attestation: Attestation, where: str, found: Mapping[str, str], chosen: Sequence[str]
) -> list[Finding]:
    """What the files in place and the subjects do not agree on.

    `found` has the sha256 of every file that is there, by name; `chosen` are
    the files that the attestation has to be about.
    """
    findings = []
    for name, wanted in attestation.subjects.items():
        expected, is_there = f"sha256 {wanted}, as attested", found.get(name)
        if is_there is None:
            findings.append(Finding.missing(name, expected, "inv weights"))
        elif is_there != wanted:
            help_text = "it is not the file that was attested"
            seen = f"sha256 {is_there}"
            findings.append(Finding(Kind.DIFFERENT, name, expected, seen, help_text))
    for name in chosen:
        if name not in attestation.subjects:
            subjects = ", ".join(attestation.subjects)
            help_text = f"--only {','.join(attestation.subjects)}"
            expected = f"to be among the subjects of {where}"
            found_words = f"only {subjects}"[:200]
            findings.append(Finding(Kind.DIFFERENT, name, expected, found_words, help_text))
    return findings

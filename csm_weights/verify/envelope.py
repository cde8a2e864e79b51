"""Attestations of others: statements, alone or in a DSSE envelope with signatures.

They are read with bounds of size, depth and number, and strictly.

Source: the DSSE envelope of secure-systems-lab/dsse.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from csm_weights.errors import Finding, Kind, WrongContent
from csm_weights.manifest.paths import path_problem
from csm_weights.untrusted import Malformed, is_text, show
from csm_weights.verify.statement import PREDICATE_TYPE, STATEMENT_TYPE

PAYLOAD_TYPE = "application/vnd.in-toto+json"

#: Largest attestation that is read, in bytes; a piece takes about 250.
MAX_ATTESTATION = 16 << 20

#: Most values in its JSON: a piece has about 12, and each takes up to 100 bytes of memory.
MAX_VALUES = 1_000_000

#: Most signatures and subjects: more is an attack on our time.
MAX_SIGNATURES = 16
MAX_SUBJECTS = 10_000

#: DSSE allows both alphabets of base64.
_URL_SAFE = str.maketrans("-_", "+/")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Signer(NamedTuple):
    """A key that signed: its id, and its scheme, such as "ed25519"."""

    keyid: str
    scheme: str


class Signature(NamedTuple):
    """One signature of an envelope; `keyid` is a hint that need not be true."""

    keyid: str
    value: bytes


@dataclass(frozen=True)
class Attestation:
    """A statement as it was read: its files, and the signatures of its envelope.

    `subjects` gives the sha256 of each file by name. `manifests` are the
    sha256 of its materials, the manifest among them.
    """

    body: bytes
    subjects: Mapping[str, str]
    signatures: tuple[Signature, ...]
    manifests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attested:
    """The result of checking an attestation: the key that signed it, and its files.

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
        """Return the result for a person."""
        first = f"attestation {self.file}: {self.by}"
        return [first, f"its installed subjects: {', '.join(self.subjects)}", *self.notes]


def read(data: bytes, where: str) -> Attestation:
    """Return an attestation, signed or not, from the bytes of the file `where`.

    Raises WrongContent where anything is not as the formats say.
    """
    try:
        if len(data) > MAX_ATTESTATION:
            raise Malformed(f"at most {MAX_ATTESTATION:,} bytes", "more")
        outer = _json(data, "")
        if "payload" not in outer and "payloadType" not in outer:
            return _statement(data, outer, ())
        if outer.get("payloadType") != PAYLOAD_TYPE:
            raise Malformed(PAYLOAD_TYPE, show(outer.get("payloadType")), "payloadType")
        body = _base64(outer.get("payload"), "payload")
        return _statement(body, _json(body, "payload"), _signatures(outer.get("signatures")))
    except Malformed as error:
        at = f"{where} {error.at}".rstrip()
        help_text = "it is no attestation of inv attest, or it was damaged; get it again"
        finding = Finding(Kind.MALFORMED, at, error.expected, error.found, help_text)
        raise WrongContent("the attestation cannot be read", [finding]) from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, in at most 80 ASCII characters."""
    return show(str(error).partition("\n")[0]) if str(error) else "something else"


def _json(data: bytes, at: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Two readers may take different ones of two equal keys.
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key that is there twice")
        return found

    def no_constant(word: str) -> None:
        raise ValueError(f"{word}, which is not JSON")

    # Every value but the first comes after one of these; counted in text too, which is harmless.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Malformed(f"at most {MAX_VALUES:,} values", "more", at)
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON, in UTF-8", first_line(error), at) from None
    return _dict(found, at)


def _dict(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed("a JSON object", show(value), at)
    return value


def _base64(text: object, at: str) -> bytes:
    if not isinstance(text, str):
        raise Malformed("base64", show(text), at)
    try:
        return base64.b64decode(text.translate(_URL_SAFE).encode(), validate=True)
    except ValueError:
        raise Malformed("base64", "something else", at) from None


def _signatures(found: object) -> tuple[Signature, ...]:
    if not isinstance(found, list) or len(found) > MAX_SIGNATURES:
        expected = f"a list of at most {MAX_SIGNATURES} signatures"
        raise Malformed(expected, f"{len(found)}" if isinstance(found, list) else show(found))
    signatures = []
    for number, one in enumerate(found):
        at = f"signatures[{number}]"
        if not isinstance(one, dict) or not is_text(one.get("keyid", "")):
            raise Malformed("an object with sig, and a keyid that is text", show(one), at)
        signatures.append(Signature(one.get("keyid", ""), _base64(one.get("sig"), at)))
    if len({s.value for s in signatures}) != len(signatures):
        raise Malformed("signatures that differ", "one that is there twice", "signatures")
    return tuple(signatures)


def _statement(
    body: bytes, found: dict[str, Any], signatures: tuple[Signature, ...]
) -> Attestation:
    for key, wanted in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if found.get(key) != wanted:
            raise Malformed(wanted, show(found.get(key)), key)
    build = _dict(found.get("predicate"), "predicate").get("buildDefinition")
    given = _dict(build, "buildDefinition").get("resolvedDependencies")
    listed = given if isinstance(given, list) else []
    digests = [d.get("digest") for d in listed if isinstance(d, dict)]
    known = {d["sha256"] for d in digests if isinstance(d, dict) and is_text(d.get("sha256"))}
    return Attestation(body, _subjects(found.get("subject")), signatures, frozenset(known))


def _subjects(found: object) -> dict[str, str]:
    if not isinstance(found, list) or not 0 < len(found) <= MAX_SUBJECTS:
        raise Malformed(f"a list of 1 to {MAX_SUBJECTS:,} subjects", show(found), "subject")
    subjects: dict[str, str] = {}
    for number, one in enumerate(found):
        at = f"subject[{number}]"
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or path_problem(name):
            raise Malformed("a file below the folder", show(name), at)
        if name in subjects:
            raise Malformed("every file once", show(name), at)
        digest = one.get("digest")
        sha256 = digest.get("sha256") if isinstance(digest, dict) else None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise Malformed("a sha256 of 64 hex digits", show(sha256), at)
        subjects[name] = sha256
    return subjects


def differences(
    attestation: Attestation, where: str, found: Mapping[str, str], chosen: Sequence[str]
) -> list[Finding]:
    """Return a finding for each file in which the subjects and the installed files differ.

    `found` has the sha256 of every file that is there, by name; `chosen` are
    the files that the attestation has to be about.
    """
    findings = []
    for name, wanted in attestation.subjects.items():
        expected, present = f"sha256 {wanted}, as attested", found.get(name)
        if present is None:
            findings.append(Finding.missing(name, expected, "inv weights"))
        elif present != wanted:
            help_text = "it is not the file that was attested"
            findings.append(Finding(Kind.DIFFERENT, name, expected, f"sha256 {present}", help_text))
    for name in chosen:
        if name not in attestation.subjects:
            names = ",".join(attestation.subjects)
            expected = f"to be among the subjects of {where}"
            findings.append(
                Finding(Kind.DIFFERENT, name, expected, f"only {names}"[:200], f"--only {names}")
            )
    return findings

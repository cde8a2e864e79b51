"""Attestations: statements, alone or in a DSSE envelope, and the signatures over them.

Those of others are read strictly, with bounds of size, depth and number. What
signs and checks is the ecosystem's own library, of the extra `attest`.

Source: the DSSE envelope of secure-systems-lab/dsse.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from csm_weights.config import pip_command
from csm_weights.errors import Finding, Kind, MissingInput, WrongContent
from csm_weights.formats.json_stream import STRICT
from csm_weights.hashing import SHA256_HEX
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

#: Environment variable with the passphrase of an encrypted private key.
PASSPHRASE = "CSM_KEY_PASSPHRASE"

#: Largest key file that is read, in bytes.
MAX_KEY = 64 << 10

_KEYS = "a {} key in PEM: Ed25519, ECDSA on P-256, P-384 or P-521, or RSA"


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
    """A statement as it was read, and the signatures of its envelope.

    `subjects` gives the sha256 of each file by name. `manifests` are the
    sha256 of its materials, the manifest among them.
    """

    body: bytes
    subjects: Mapping[str, str]
    signatures: tuple[Signature, ...]
    manifests: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attested:
    """The result of checking an attestation: whose signature was checked, and its files.

    `signatures` is how many there are, `notes` what a person should know.
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
            return f"SIGNATURES NOT CHECKED ({self.signatures}): give --key"
        return "NOT SIGNED: anyone may have written it"

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


def _json(data: bytes, at: str) -> dict[str, Any]:
    # Every value but the first comes after one of these; counted in text too, which is harmless.
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Malformed(f"at most {MAX_VALUES:,} values", "more", at)
    try:
        return _dict(STRICT.decode(data.decode()), at)
    except (ValueError, RecursionError) as error:
        raise Malformed("JSON, in UTF-8", show(str(error)), at) from None


def _dict(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed("a JSON object", show(value), at)
    return value


def _base64(text: object, at: str) -> bytes:
    if not isinstance(text, str):
        raise Malformed("base64", show(text), at)
    try:
        # DSSE allows both alphabets.
        return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except ValueError:
        raise Malformed("base64", "something else", at) from None


def _signatures(found: object) -> tuple[Signature, ...]:
    if not isinstance(found, list) or len(found) > MAX_SIGNATURES:
        count = str(len(found)) if isinstance(found, list) else show(found)
        raise Malformed(f"a list of at most {MAX_SIGNATURES} signatures", count)
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
    materials = given if isinstance(given, list) else []
    known = {sha256 for one in materials if is_text(sha256 := _sha256(one))}
    listed = found.get("subject")
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_SUBJECTS:
        raise Malformed(f"a list of 1 to {MAX_SUBJECTS:,} subjects", show(listed), "subject")
    subjects: dict[str, str] = {}
    for number, one in enumerate(listed):
        at = f"subject[{number}]"
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or path_problem(name):
            raise Malformed("a file below the folder", show(name), at)
        if name in subjects:
            raise Malformed("every file once", show(name), at)
        sha256 = _sha256(one)
        if not isinstance(sha256, str) or not SHA256_HEX.fullmatch(sha256):
            raise Malformed("a sha256 of 64 hex digits", show(sha256), at)
        subjects[name] = sha256
    return Attestation(body, subjects, signatures, frozenset(known))


def _sha256(resource: object) -> Any:
    """Return what a subject or a material has as its sha256, None for none."""
    digest = resource.get("digest") if isinstance(resource, dict) else None
    return digest.get("sha256") if isinstance(digest, dict) else None


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
    names = ",".join(attestation.subjects)
    words = (f"to be among the subjects of {where}", f"only {names}"[:200], f"--only {names}")
    others = [name for name in chosen if name not in attestation.subjects]
    return findings + [Finding(Kind.DIFFERENT, name, *words) for name in others]


def require_library() -> None:
    """Raise MissingInput, with the command that helps, unless signatures can be made."""
    try:
        import securesystemslib.dsse  # noqa: F401
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: F401
    except ImportError as error:
        words = ("securesystemslib", str(error), pip_command("attest"))
        finding = Finding(Kind.MISSING, "signatures", *words)
        raise MissingInput("what signs and checks signatures is not installed", [finding]) from None


def new_key() -> tuple[bytes, bytes]:
    """Return a fresh Ed25519 key pair in PEM: the private one, PKCS #8, and the public one."""
    require_library()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem, plain = forms.Encoding.PEM, forms.NoEncryption()
    private = key.private_bytes(pem, forms.PrivateFormat.PKCS8, plain)
    return private, key.public_key().public_bytes(pem, forms.PublicFormat.SubjectPublicKeyInfo)


def sign(body: bytes, key: bytes, where: str, password: bytes | None) -> tuple[str, Signer]:
    """Sign a statement with a private key in PEM, read from the file `where`.

    Returns the DSSE envelope as JSON, and the key that signed. Raises
    WrongContent for what is no such key, MissingInput without the library.
    """
    require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    try:
        signer = CryptoSigner(load_pem_private_key(key, password))
    except TypeError:
        found = f"a passphrase that is missing, or one too many; set it in {PASSPHRASE}"
        raise _wrong_key(where, "a private key and its passphrase", found) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong_key(where, _KEYS.format("private"), show(str(error))) from None
    envelope = Envelope(body, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    text = json.dumps(envelope.to_dict(), indent=1) + "\n"
    return text, Signer(signer.public_key.keyid, signer.public_key.scheme)


def check(body: bytes, signatures: Sequence[Signature], key: bytes, where: str) -> Signer:
    """Check that one of the signatures over a statement is by a public key in PEM; return it.

    `where` is the key's file. The key decides; the key id of a signature is
    not believed. Raises WrongContent unless one is by that key.
    """
    require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature as LibrarySignature
    from securesystemslib.signer import SSlibKey

    if b"PRIVATE KEY" in key:
        raise _wrong_key(where, _KEYS.format("public"), "a private key; never hand that out")
    try:
        public = SSlibKey.from_crypto(load_pem_public_key(key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _wrong_key(where, _KEYS.format("public"), show(str(error))) from None
    message = Envelope(body, PAYLOAD_TYPE, {}).pae()
    for _, value in signatures:
        try:
            public.verify_signature(LibrarySignature(public.keyid, value.hex()), message)
        except UnverifiedSignatureError:
            continue
        return Signer(public.keyid, public.scheme)
    expected = f"a signature by the {public.scheme} key {public.keyid[:16]}"
    ids = ", ".join(show(keyid[:16]) for keyid, _ in signatures)
    found = f"none by it, but of the keys {ids}" if ids else "a statement that nobody signed"
    help_text = "it was changed, or it is someone else's: get both again from whom you trust"
    finding = Finding(Kind.DIFFERENT, where, expected, found, help_text)
    raise WrongContent("the attestation is not signed by this key", [finding])


def _wrong_key(where: str, expected: str, found: str) -> WrongContent:
    help_text = "openssl genpkey -algorithm ed25519, openssl pkey -pubout, or inv attest --new-key"
    finding = Finding(Kind.MALFORMED, where, expected, found, help_text)
    return WrongContent("the key cannot be used", [finding])

"""Signatures over statements: DSSE envelopes, by the ecosystem's own library.

Imported only when something is signed or checked: it needs the extra `attest`.
"""

import json
from collections.abc import Sequence

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent
from csm_weights.untrusted import show
from csm_weights.verify.envelope import PAYLOAD_TYPE, Signature, Signer, first_line

#: Environment variable with the passphrase of an encrypted private key.
PASSPHRASE = "CSM_KEY_PASSPHRASE"

#: Largest key file that is read, in bytes.
MAX_KEY = 64 << 10

_KEYS = "a {} key in PEM: Ed25519, ECDSA on P-256, P-384 or P-521, or RSA"


def require_library() -> None:
    """Raise MissingInput, with the command that helps, unless signatures can be made."""
    try:
        import securesystemslib.dsse  # noqa: F401
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: F401
    except ImportError as error:
        help_text = ".venv/bin/pip install -c constraints.txt -e '.[attest]'"
        found = f"no {error.name or 'such module'}"
        finding = Finding(Kind.MISSING, "signatures", "securesystemslib", found, help_text)
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
        raise _wrong_key(where, _KEYS.format("private"), first_line(error)) from None
    envelope = Envelope(body, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    text = json.dumps(envelope.to_dict(), sort_keys=True, indent=1) + "\n"
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
        raise _wrong_key(where, _KEYS.format("public"), first_line(error)) from None
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

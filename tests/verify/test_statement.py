"""Attestations: what they say, who signed them, and what of others' is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from csm_weights.commands import attest
from csm_weights.commands.render import json as as_json
from csm_weights.commands.render import text as as_text
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    Kind,
    MissingInput,
    UsageError,
    WrongContent,
)
from csm_weights.files import Fingerprint
from csm_weights.manifest.types import Artifact, Edition, Manifest, Piece
from csm_weights.pipeline import apply
from csm_weights.pipeline.session import Outcome
from csm_weights.store.journal import PieceRecord
from csm_weights.store.receipts import VerifiedFile
from csm_weights.verify import envelope, statement
from csm_weights.verify.statement import Facts
from tests.support.toy import Toy, flip

COMMIT = "c0ffee" + "0" * 34
BLOB = "b10b" + "0" * 36
OPENSSL = ["openssl", "genpkey", "-algorithm"]
KEYS = {
    "ed25519": [*OPENSSL, "ed25519"],
    "p256": [*OPENSSL, "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "p384": [*OPENSSL, "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "rsa": [*OPENSSL, "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
}


class Desk:
    """A toy repository whose files are installed, and a key pair."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        apply.weights(toy.request(), smoke=False)
        self.private, self.public = toy.root / "key", toy.root / "key.pub"
        self.file = toy.root / "models/toy/toy.intoto.json"

    def attest(self, *only: str, **options: str) -> attest.Attesting:
        return attest.attest_files(self.toy.request(*only), **options)

    def sign(self, *only: str) -> Path:
        """Writes an attestation with a new key."""
        self.attest(*only, make_key=str(self.private))
        return self.file

    def verify(self, *only: str, key: bool = True, file: Path | None = None) -> Outcome:
        public = str(self.public) if key else ""
        return attest.verify(self.toy.request(*only), str(file or self.file), public)

    def refusal(self, *only: str, key: bool = True, file: Path | None = None) -> CsmWeightsError:
        """The error that verifying ends with, raised or in its result."""
        try:
            error = self.verify(*only, key=key, file=file).error
        except CsmWeightsError as raised:
            error = raised
        assert error is not None, "it was accepted"
        return error

    def statement(self) -> dict[str, Any]:
        data = json.loads(self.file.read_text())
        body = base64.b64decode(data["payload"]) if "payload" in data else self.file.read_bytes()
        statement: dict[str, Any] = json.loads(body)
        return statement

    def forge(self, change: Callable[[dict[str, Any]], None]) -> Path:
        """An unsigned statement that was changed."""
        data = self.statement()
        change(data)
        path = self.toy.root / "forged.json"
        path.write_text(json.dumps(data))
        return path


@pytest.fixture
def desk(toy: Toy) -> Desk:
    """A desk with installed files."""
    return Desk(toy)


def digests(toy: Toy) -> dict[str, str]:
    """The sha256 of every file of the toy model, by name."""
    return {a.path: sha256(toy.good(a.path)) for a in toy.manifest.artifacts}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_key(kind: str, path: Path) -> tuple[Path, Path]:
    """A key pair in PEM as openssl makes it."""
    run = {"check": True, "capture_output": True}
    subprocess.run([*KEYS[kind], "-out", str(path)], **run)  # type: ignore[call-overload]
    public = path.with_name(path.name + ".pub")
    openssl = ["openssl", "pkey", "-in", str(path), "-pubout", "-out", str(public)]
    subprocess.run(openssl, **run)  # type: ignore[call-overload]
    return path, public


def library_key(public: Path) -> SSlibKey:
    """A public key as securesystemslib reads it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: Any = load_pem_public_key(public.read_bytes())
    return SSlibKey.from_crypto(key)


# ---- the statement


def test_the_subjects_are_the_installed_files(desk: Desk) -> None:
    """Every chosen file is a subject, with the sha256 of its bytes."""
    done = desk.attest()
    said = {s["name"]: s["digest"]["sha256"] for s in desk.statement()["subject"]}
    assert said == dict(done.subjects) == digests(desk.toy)


def test_the_chunk_files_are_the_materials(desk: Desk) -> None:
    """Each chunk file is a material with its digest, in order, after the manifest."""
    desk.attest("a.bin")
    build = desk.statement()["predicate"]["buildDefinition"]
    manifest, *parts = build["resolvedDependencies"]
    toml = desk.toy.root / "manifests/toy.toml"
    assert manifest == {"name": "toy.toml", "digest": {"sha256": sha256(toml.read_bytes())}}
    assert [(p["name"], p["digest"]["sha256"]) for p in parts] == [
        (p.part, p.sha256) for p in desk.toy.artifact("a.bin").pieces
    ]


def test_the_tool_and_its_version_are_named(desk: Desk) -> None:
    """The builder says which release of the package it was."""
    desk.attest()
    builder = desk.statement()["predicate"]["runDetails"]["builder"]
    assert builder == {"id": "pkg:generic/csm-weights", "version": {"csm-weights": "0.1.0"}}


def test_the_same_files_give_the_same_statement(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the time held still, attesting twice writes the same bytes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    texts = set()
    for _ in range(2):
        desk.attest()
        texts.add(desk.file.read_bytes())
    assert len(texts) == 1
    assert b"2023-11-14T22:13:20" in texts.pop()


def test_a_time_that_is_none_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOURCE_DATE_EPOCH beyond all calendars is an error of ours."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "9" * 30)
    with pytest.raises(UsageError):
        desk.attest()


def hub_file(
    *sources: str, blob: str | None = BLOB
) -> tuple[Manifest, tuple[Artifact, VerifiedFile]]:
    """A file of a Hub repository in two pieces, and where its receipt says they came from."""
    pieces = tuple(PieceRecord(i * 5, 5, str(i) * 64, s) for i, s in enumerate(sources))
    artifact = Artifact("m.bin", "m", "opaque", 10, "a" * 64, blob)
    file = VerifiedFile(Path("m.bin"), "a" * 64, pieces, Fingerprint(1, 10, 1, 1))
    manifest = Manifest("m", "output", ".", (artifact,), repo="org/m", revision=COMMIT)
    return manifest, (artifact, file)


def materials(manifest: Manifest, made: tuple[Artifact, VerifiedFile]) -> list[dict[str, Any]]:
    return statement.dependencies(Facts(manifest, "m.toml", "f" * 64, (made,), "1", "now"))[1:]


def test_a_file_of_the_hub_is_named_by_commit_and_blob_id() -> None:
    """A file from the Hub is named by its commit, its address and its blob id."""
    page = "https://huggingface.co/org/m"
    commit, blob = materials(*hub_file(f"{page}/m.bin", f"{page}/m.bin"))
    assert commit == {"uri": page, "digest": {"gitCommit": COMMIT}}
    assert blob["uri"] == f"{page}/resolve/{COMMIT}/m.bin"
    assert blob["digest"] == {"sha256": "a" * 64, "gitBlob": BLOB}


def test_a_repaired_file_has_both_kinds_of_material() -> None:
    """A piece from the Hub gives the Hub's blob, a chunk file beside it gives its digest."""
    page = "https://huggingface.co/org/m"
    commit, blob, part = materials(*hub_file("chunks/m-aa", f"{page}/m.bin", blob=None))
    assert (commit["digest"], blob["digest"]) == ({"gitCommit": COMMIT}, {"sha256": "a" * 64})
    assert (part["digest"]["sha256"], part["annotations"]["from"]) == ("0" * 64, "chunks/m-aa")


def test_no_folder_of_this_machine_is_named() -> None:
    """A piece that came out of a home folder is said to be from this machine, and no more."""
    found = materials(*hub_file("/home/me/secret/m.bin", "https://mirror/m.bin?token=x"))
    assert [m["annotations"]["from"] for m in found] == [
        "a file on this machine",
        "https://mirror/m.bin",
    ]


def test_a_file_without_a_record_of_its_way_says_so(desk: Desk) -> None:
    """A file verified as a whole has no pieces: its origin is the Hub's id, or not recorded."""
    manifest, made = hub_file()
    assert "unknown" in materials(manifest, made)[1]["annotations"]["from"]
    (itself,) = materials(replace(manifest, repo=None), made)
    assert itself["annotations"]["from"] == "not recorded"
    desk.attest("note.txt")
    material = desk.statement()["predicate"]["buildDefinition"]["resolvedDependencies"][1]
    assert material["annotations"]["from"] == "the manifest"


PAGE = "https://huggingface.co/org/m"
FROM_HUB = {"name": "m.bin", "uri": f"{PAGE}/resolve/{COMMIT}/m.bin"}
UNKNOWN = "identified by its ids; its way is unknown"
WHOLE = {"sha256": "a" * 64}


def piece_from(source: str, name: str = "m.bin") -> dict[str, Any]:
    """The material of the first piece of that file."""
    notes = {"file": "m.bin", "offset": 0, "size": 5, "from": source}
    return {"name": name, "digest": {"sha256": "0" * 64}, "annotations": notes}


@pytest.mark.parametrize(
    ("sources", "artifact", "manifest", "expected"),
    [
        ([], {}, {}, [FROM_HUB | {"digest": WHOLE | {"gitBlob": BLOB}, "annotations": UNKNOWN}]),
        (
            [],
            {"blob_id": None, "git_sha1": COMMIT},
            {},
            [FROM_HUB | {"digest": WHOLE | {"gitBlob": COMMIT}, "annotations": UNKNOWN}],
        ),
        ([], {"blob_id": None}, {}, [{"name": "m.bin", "digest": WHOLE, "annotations": "?"}]),
        ([], {"size": 11}, {}, [{"name": "m.bin", "digest": WHOLE, "annotations": "?"}]),
        ([], {}, {"revision": None}, [{"name": "m.bin", "digest": WHOLE, "annotations": "?"}]),
        ([f"{PAGE}/x"], {"size": 11}, {}, [FROM_HUB | {"digest": WHOLE}]),
        (["~/m.bin"], {}, {}, [piece_from("a file on this machine")]),
        (["chunks/m-aa?x"], {}, {}, [piece_from("chunks/m-aa?x")]),
        (["https://x/org/m2/y?z"], {}, {}, [piece_from("https://x/org/m2/y")]),
        (["a/org/m/y"], {}, {}, [piece_from("a/org/m/y")]),
        ([f"{PAGE}/x"], {}, {"repo": None}, [piece_from(f"{PAGE}/x")]),
        (
            ["chunks/m-aa"],
            {"pieces": (Piece("chunks/m-aa", 0, 5, "0" * 64),)},
            {},
            [piece_from("chunks/m-aa", "chunks/m-aa")],
        ),
    ],
)
def test_the_materials_of_a_file_are_told_to_the_letter(
    sources: list[str],
    artifact: dict[str, Any],
    manifest: dict[str, Any],
    expected: list[dict[str, Any]],
) -> None:
    """By what its receipt says, and by the ids of the Hub where it says nothing."""
    known, (entry, file) = hub_file(*sources)
    found = materials(replace(known, **manifest), (replace(entry, **artifact), file))
    words = {UNKNOWN: {"from": UNKNOWN}, "?": {"from": "not recorded"}}
    for one in expected:
        notes = one.get("annotations")
        one |= {"annotations": words[notes]} if isinstance(notes, str) else {}
    commit = [{"uri": PAGE, "digest": {"gitCommit": COMMIT}}] if "uri" in expected[0] else []
    assert found == commit + expected


def test_a_text_of_the_manifest_comes_from_there() -> None:
    """If the edition that is there is the one whose text is known."""
    manifest, (artifact, file) = hub_file(blob=None)
    for size, text, source in ((10, "x", "the manifest"), (11, "x", "not recorded")):
        entry = replace(artifact, size=12, alternatives=(Edition(size, "a" * 64, text),))
        (found,) = materials(manifest, (entry, file))
        assert found["annotations"] == {"from": source}


def test_what_is_signed_and_written_is_in_one_form(desk: Desk) -> None:
    """In ASCII, with the keys in order, each on a line of its own."""
    assert statement.payload({"b": "é", "a": 1}) == b'{\n "a": 1,\n "b": "\\u00e9"\n}\n'
    desk.sign()
    data = json.loads(desk.file.read_text())
    assert desk.file.read_text() == json.dumps(data, indent=1) + "\n"
    assert base64.b64decode(data["payload"]) == statement.payload(desk.statement())


# ---- nothing is attested that is not so


def test_files_are_hashed_again_before_they_are_attested(desk: Desk) -> None:
    """A receipt that still fits a file's stat does not make a wrong byte true."""
    path = desk.toy.installed("a.bin")
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    record = path.parent / ".csm-weights/a.bin.json"
    receipt = json.loads(record.read_text())
    receipt["fingerprint"]["ctime_ns"] = path.stat().st_ctime_ns
    record.write_text(json.dumps(receipt))
    with pytest.raises(WrongContent) as caught:
        desk.attest()
    assert {f.kind for f in caught.value.findings} == {Kind.WRONG_DIGEST}
    assert not desk.file.exists()


def test_a_forged_receipt_attests_nothing(desk: Desk) -> None:
    """Where the manifest pins no whole digest, the subject's is that of the bytes."""
    bare = replace(desk.toy.artifact("b.bin"), blob_id=None)
    desk.toy.write_manifest(replace(desk.toy.manifest, artifacts=(bare,)))
    record = desk.toy.installed("b.bin").parent / ".csm-weights/b.bin.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": "0" * 64}))
    assert desk.attest().subjects == {"b.bin": sha256(desk.toy.good("b.bin"))}
    assert desk.statement()["subject"][0]["digest"]["sha256"] == sha256(desk.toy.good("b.bin"))


def test_a_missing_file_is_not_attested(desk: Desk) -> None:
    """A file that is not installed ends with exit code 3, and no key is made."""
    desk.toy.installed("a.bin").unlink()
    with pytest.raises(MissingInput):
        desk.attest("a.bin", make_key=str(desk.private))
    assert not desk.private.exists()


def test_a_key_is_never_written_over(desk: Desk) -> None:
    """A file under either name of a new key stays as it is."""
    desk.public.write_text("precious")
    with pytest.raises(WrongContent, match="not overwritten"):
        desk.attest(make_key=str(desk.private))
    assert (desk.public.read_text(), desk.private.exists()) == ("precious", False)


def test_a_new_private_key_is_for_its_owner_alone(desk: Desk) -> None:
    """Whatever the umask, nobody else may read it."""
    before = os.umask(0)
    try:
        desk.sign()
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (desk.private, desk.public)] == [0o600, 0o644]


def test_one_key_signs(desk: Desk) -> None:
    """A key that is there and a new one at once make no sense."""
    with pytest.raises(UsageError):
        desk.attest(key="a", make_key="b")


#: A kind of key that OpenSSL makes, and the libraries that sign do not know.
SM2 = b"""-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqBHM9VAYItBG0wawIBAQQg5Ek/d9VU8iwFNH4J
hkpv9D2I1dpPah7309qGJ8XDXouhRANCAAQlxHeqv5VrAcpNn9E8oI1SmXRZkFcZ
a8gBRm6TNXBQoOfNsRXmZiFbEDfu7WR6pSGhNLwjc/RCMCFGYnIq66Fl
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, b"0" * 100_000, SM2])
def test_what_is_no_private_key_signs_nothing(desk: Desk, content: bytes) -> None:
    """Garbage in a key's file is a finding about that file, and nothing is written."""
    desk.private.write_bytes(content)
    with pytest.raises(WrongContent) as caught:
        desk.attest(key=str(desk.private))
    assert caught.value.findings[0].where == str(desk.private)
    assert not desk.file.exists()


def test_a_public_key_does_not_sign(desk: Desk) -> None:
    """The wrong half of a pair is refused."""
    _, public = make_key("ed25519", desk.private)
    with pytest.raises(WrongContent, match="private key in PEM"):
        desk.attest(key=str(public))


def test_an_encrypted_key_needs_its_passphrase(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read from the environment; without it, or with another one, nothing is signed."""
    make_key("ed25519", desk.private)
    locked = desk.toy.root / "locked"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(desk.private), "-out", str(locked)]
    subprocess.run([*command, "-passout", "pass:word"], check=True, capture_output=True)
    with pytest.raises(WrongContent, match="CSM_KEY_PASSPHRASE"):
        desk.attest(key=str(locked))
    monkeypatch.setenv(envelope.PASSPHRASE, "another")
    with pytest.raises(WrongContent):
        desk.attest(key=str(locked))
    monkeypatch.setenv(envelope.PASSPHRASE, "word")
    desk.attest(key=str(locked))
    assert desk.verify().attested


def test_without_the_library_the_command_that_helps_is_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unsigned statement needs nothing; a signature says what is to be installed."""
    monkeypatch.setitem(sys.modules, "securesystemslib.dsse", None)
    desk.attest()
    with pytest.raises(MissingInput, match="attest"):
        desk.attest(make_key=str(desk.private))
    assert desk.verify(key=False).attested


# ---- the ecosystem's own tools read it


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_the_envelope_verifies_with_securesystemslib(desk: Desk, kind: str) -> None:
    """The library's own check accepts it with the right key, and refuses another one."""
    private, public = make_key(kind, desk.private)
    desk.attest(key=str(private))
    envelope = Envelope.from_dict(json.loads(desk.file.read_text()))
    assert list(envelope.verify([library_key(public)], 1).values()) == [library_key(public)]
    _, other = make_key(kind, desk.toy.root / "other")
    with pytest.raises(VerificationError):
        envelope.verify([library_key(other)], 1)
    assert desk.verify().attested


def test_the_signature_verifies_with_openssl(desk: Desk) -> None:
    """The signature is over DSSE's encoding of the payload, as openssl sees it."""
    desk.sign()
    data = json.loads(desk.file.read_text())
    body, kind = base64.b64decode(data["payload"]), data["payloadType"]
    message, signature = desk.toy.root / "message", desk.toy.root / "signature"
    message.write_bytes(f"DSSEv1 {len(kind)} {kind} {len(body)} ".encode() + body)
    signature.write_bytes(base64.b64decode(data["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(desk.public), "-rawin"]
    command += ["-in", str(message), "-sigfile", str(signature)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "Success" in done.stdout) == (0, True)


def test_the_statement_is_one_for_in_toto(desk: Desk) -> None:
    """in-toto's own reader takes it, with its predicate, and has nothing against it."""
    desk.sign()
    data = desk.statement()
    message = json_format.ParseDict(data, statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    subjects = {s.name: s.digest["sha256"] for s in message.subject}
    assert subjects == digests(desk.toy)
    predicate = json_format.ParseDict(data["predicate"], provenance_pb2.Provenance())
    names = [d.name for d in predicate.build_definition.resolved_dependencies]
    assert names[:2] == ["toy.toml", desk.toy.artifact("a.bin").pieces[0].part]
    assert predicate.run_details.metadata.finished_on.seconds > 0


def test_an_envelope_made_by_the_library_is_accepted(desk: Desk) -> None:
    """A statement that another tool signed, with a key id of its own, verifies here."""
    desk.attest()
    signer = CryptoSigner.generate_ecdsa(keyid="release-key")
    signed = Envelope(desk.file.read_bytes(), envelope.PAYLOAD_TYPE, {})
    signed.sign(signer)
    desk.file.write_text(json.dumps(signed.to_dict()))
    desk.public.write_text(signer.public_key.keyval["public"])
    attested = desk.verify().attested
    assert attested and attested.signer and attested.signer.scheme == "ecdsa-sha2-nistp256"


# ---- checking


def test_a_signed_attestation_verifies(desk: Desk) -> None:
    """Signature and files are right: the result names the key and the files."""
    done = desk.attest(make_key=str(desk.private))
    outcome = desk.verify()
    assert outcome.error is None and outcome.attested is not None
    assert outcome.attested.signer == done.signer
    assert set(outcome.attested.subjects) == set(digests(desk.toy))
    assert "signed by ed25519 key" in as_text.render(outcome)


def test_an_unsigned_one_says_that_nobody_signed_it(desk: Desk) -> None:
    """It can be checked against the files; the result says in capitals what it is worth."""
    written = desk.attest()
    outcome = desk.verify(key=False)
    assert outcome.error is None
    assert "NOT SIGNED" in as_text.render(outcome)
    assert "NOT SIGNED" in as_text.render(written)
    assert json.loads(as_json.render(outcome))["attested"]["signer"] is None


def test_without_a_key_no_one_is_said_to_have_signed(desk: Desk) -> None:
    """A signature that was not checked is not taken for one."""
    desk.sign()
    outcome = desk.verify(key=False)
    assert outcome.attested and outcome.attested.signer is None
    assert "NOT CHECKED" in as_text.render(outcome)


def test_an_unsigned_one_fails_with_a_key(desk: Desk) -> None:
    """Whoever asks for a signature is not content without one."""
    make_key("ed25519", desk.private)
    desk.attest()
    error = desk.refusal()
    assert (error.exit_code, "nobody signed" in str(error)) == (4, True)


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_another_key_is_refused(desk: Desk, kind: str) -> None:
    """A key of whatever type that did not sign it ends with exit code 4, and its own message."""
    desk.sign()
    theirs = library_key(desk.public).keyid
    desk.public.unlink()
    _, other = make_key(kind, desk.toy.root / "other")
    other.rename(desk.public)
    error, ours = desk.refusal(), library_key(desk.public)
    assert (error.exit_code, "not signed by this key" in str(error)) == (4, True)
    (finding,) = error.findings
    assert finding.expected == f"a signature by the {ours.scheme} key {ours.keyid[:16]}"
    assert finding.found == f"none by it, but of the keys {theirs[:16]}"


def test_the_key_id_is_not_believed(desk: Desk) -> None:
    """An envelope with the id of the right key and the signature of another is refused."""
    desk.sign()
    data = json.loads(desk.file.read_text())
    stranger = CryptoSigner.generate_ed25519()
    message = Envelope(base64.b64decode(data["payload"]), data["payloadType"], {}).pae()
    forged = bytes.fromhex(stranger.sign(message).signature)
    data["signatures"][0]["sig"] = base64.b64encode(forged).decode()
    desk.file.write_text(json.dumps(data))
    assert "not signed by this key" in str(desk.refusal())


def test_a_changed_payload_is_refused(desk: Desk) -> None:
    """A signature is over every byte of the statement."""
    desk.sign()
    data = json.loads(desk.file.read_text())
    body = base64.b64decode(data["payload"]).replace(b'"toy"', b'"TOY"')
    data["payload"] = base64.b64encode(body).decode()
    desk.file.write_text(json.dumps(data))
    assert "not signed by this key" in str(desk.refusal())


def test_one_right_signature_among_several_is_enough(desk: Desk) -> None:
    """Others may have signed it as well; the one by the key counts."""
    desk.sign()
    envelope = Envelope.from_dict(json.loads(desk.file.read_text()))
    ours = dict(envelope.signatures)
    envelope.signatures.clear()
    envelope.sign(CryptoSigner.generate_ed25519())
    envelope.signatures.update(ours)
    desk.file.write_text(json.dumps(envelope.to_dict()))
    attested = desk.verify().attested
    assert attested and attested.signer and attested.signatures == 2


def test_a_private_key_in_place_of_the_public_one_is_refused(desk: Desk) -> None:
    """Nobody is to get used to handing that one out."""
    desk.sign()
    desk.public.write_bytes(desk.private.read_bytes())
    error = desk.refusal()
    assert (error.exit_code, "never hand that out" in str(error)) == (4, True)


#: The public half of such a key.
SM2_PUBLIC = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoEcz1UBgi0DQgAEJcR3qr+VawHKTZ/RPKCNUpl0WZBX
GWvIAUZukzVwUKDnzbEV5mYhWxA37u1keqUhoTS8I3P0QjAhRmJyKuuhZQ==
-----END PUBLIC KEY-----
"""


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PUBLIC KEY-----\nAAAA\n", SM2_PUBLIC]
)
def test_what_is_no_public_key_checks_nothing(desk: Desk, content: bytes) -> None:
    """Garbage in a key's file is not called a bad signature."""
    desk.sign()
    desk.public.write_bytes(content)
    error = desk.refusal()
    assert (error.exit_code, "the key cannot be used" in str(error)) == (4, True)


def test_a_key_that_cannot_sign_is_refused(desk: Desk) -> None:
    """A key for agreeing on secrets is well-formed, and of the wrong type."""
    desk.sign()
    make = ["openssl", "genpkey", "-algorithm", "x25519", "-out", str(desk.private)]
    subprocess.run(make, check=True, capture_output=True)
    out = ["openssl", "pkey", "-in", str(desk.private), "-pubout", "-out", str(desk.public)]
    subprocess.run(out, check=True, capture_output=True)
    error = desk.refusal()
    assert (error.exit_code, "the key cannot be used" in str(error)) == (4, True)


def test_a_key_is_a_file_of_at_most_64_kib(desk: Desk) -> None:
    """Whatever else is in its place is not read, and the message says what may be."""
    desk.private.mkdir()
    with pytest.raises(WrongContent, match="a regular file of at most 65,536 bytes, found a fold"):
        desk.attest(key=str(desk.private))


@pytest.mark.parametrize("gone", ["file", "public"])
def test_what_is_not_there_is_exit_code_3(desk: Desk, gone: str) -> None:
    """A missing attestation, or key, is a finding of that kind."""
    desk.sign()
    path: Path = getattr(desk, gone)
    path.unlink()
    error = desk.refusal()
    assert (error.exit_code, error.findings[0].where) == (3, str(path))


def test_another_edition_of_a_file_is_refused(desk: Desk) -> None:
    """A file that the manifest accepts, but that is not the one attested, is a finding."""
    desk.sign()
    desk.toy.installed("note.txt").write_text("another edition")
    error = desk.refusal()
    (finding,) = error.findings
    assert (error.exit_code, finding.kind, finding.where) == (4, Kind.DIFFERENT, "note.txt")


def test_a_damaged_file_is_refused(desk: Desk) -> None:
    """A wrong byte closes the gates, whatever is attested."""
    desk.sign()
    flip(desk.toy.installed("b.bin"))
    assert desk.refusal().exit_code == 4


def test_a_subject_that_is_gone_is_exit_code_3(desk: Desk) -> None:
    """A file that was attested and is not here is missing, even where it is not the model's."""
    desk.attest()
    path = desk.forge(
        lambda s: s["subject"].append({"name": "more.bin", "digest": {"sha256": "0" * 64}})
    )
    error = desk.refusal(key=False, file=path)
    assert (error.exit_code, error.findings[0].where) == (3, "more.bin")


def test_a_subject_that_is_not_of_the_model_is_hashed(desk: Desk) -> None:
    """Every subject is held against its file, of whatever manifest it is."""
    (desk.file.parent / "more.bin").write_bytes(b"more")
    desk.attest()
    subject = {"name": "more.bin", "digest": {"sha256": sha256(b"more")}}
    path = desk.forge(lambda s: s["subject"].append(subject))
    assert desk.verify(key=False, file=path).error is None
    (desk.file.parent / "more.bin").write_bytes(b"less")
    assert desk.refusal(key=False, file=path).findings[0].kind is Kind.DIFFERENT


def test_a_file_that_was_not_attested_is_told(desk: Desk) -> None:
    """Files of the model that the statement says nothing of are not covered by it."""
    desk.sign("a.bin")
    error = desk.refusal()
    assert {f.where for f in error.findings} == {"b.bin", "note.txt"}
    assert {f.help for f in error.findings} == {"--only a.bin"}


def test_some_of_the_subjects_can_be_asked_for(desk: Desk) -> None:
    """With --only, the others need not be here, and the result says that they were left out."""
    desk.sign()
    desk.toy.installed("b.bin").unlink()
    attested = desk.verify("a.bin").attested
    assert attested and attested.subjects == ("a.bin",)
    assert "2 more subjects" in attested.notes[0]


def test_another_manifest_is_a_note(desk: Desk) -> None:
    """A manifest that was changed since does not make the files wrong; the result notes it."""
    desk.sign()
    toml = desk.toy.root / "manifests/toy.toml"
    toml.write_text(toml.read_text() + "# a comment\n")
    attested = desk.verify().attested
    assert attested and "another version of the manifest" in attested.notes[0]


@pytest.mark.parametrize(
    ("signer", "count", "words"),
    [
        (envelope.Signer("0123456789abcdefg", "rsa"), 2, "signed by rsa key 0123456789abcdef"),
        (None, 2, "SIGNATURES NOT CHECKED (2): give --key"),
        (None, 0, "NOT SIGNED: anyone may have written it"),
    ],
)
def test_the_result_says_who_vouches(
    signer: envelope.Signer | None, count: int, words: str
) -> None:
    """A key that signed it, others that were not asked, or nobody; then files and notes."""
    attested = envelope.Attested("x.json", signer, count, ("a", "b"), ("a note",))
    files = "its installed subjects: a, b"
    assert attested.lines() == [f"attestation x.json: {words}", files, "a note"]


def test_every_difference_between_subjects_and_files_is_a_finding() -> None:
    """Files that are gone or of other bytes, and chosen ones that nobody has attested."""
    names = ["gone" * 50, "more", "less", "same"]
    attested = envelope.Attestation(b"", dict(zip(names, "1253", strict=True)), ())
    found, chosen = {"more": "5", "less": "2", "same": "3"}, ["same", "another"]
    other, mend = Kind.DIFFERENT, "it is not the file that was attested"
    subjects, only = "to be among the subjects of x.json", f"--only {','.join(names)}"
    assert envelope.differences(attested, "x.json", found, chosen) == [
        Finding(Kind.MISSING, names[0], "sha256 1, as attested", "no such file", "inv weights"),
        Finding(other, "more", "sha256 2, as attested", "sha256 5", mend),
        Finding(other, "less", "sha256 5, as attested", "sha256 2", mend),
        Finding(other, "another", subjects, f"only {names[0]}"[:200], only),
    ]


# ---- hostile attestations


def enveloped(payload: str, kind: str = envelope.PAYLOAD_TYPE, signatures: Any = ()) -> bytes:
    data = {"payload": payload, "payloadType": kind, "signatures": list(signatures)}
    return json.dumps(data).encode()


def made(**changes: Any) -> bytes:
    """A well-formed statement, but for the changes."""
    digest = {"sha256": "0" * 64}
    predicate: dict[str, Any] = {"buildDefinition": {"externalParameters": {}}}
    data: dict[str, Any] = {
        "_type": statement.STATEMENT_TYPE,
        "predicateType": statement.PREDICATE_TYPE,
    }
    data |= {"subject": [{"name": "a", "digest": digest}], "predicate": predicate}
    return json.dumps(data | changes).encode()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_the_statement_that_the_hostile_ones_differ_from_is_read() -> None:
    """The table below is not refused for another reason than it says."""
    read = envelope.read(enveloped(in_base64(made())), "x")
    assert read == envelope.Attestation(made(), {"a": "0" * 64}, ())


def test_signatures_and_materials_are_read_as_they_are_written() -> None:
    """A key id may be left out, base64 has two alphabets, and odd materials are none."""
    sha256s = ["1" * 64, 5, None, "2" * 64]
    materials = [{"digest": {"sha256": sha256}} for sha256 in sha256s]
    build = {"resolvedDependencies": [*materials, {"digest": []}, {}, "text"]}
    body = made(predicate={"buildDefinition": build})
    signatures = [{"sig": "-_8="}, {"keyid": "k", "sig": "+/9/"}, {"sig": ""}]
    read = envelope.read(enveloped(in_base64(body), signatures=signatures), "x")
    assert read.signatures == (("", b"\xfb\xff"), ("k", b"\xfb\xff\x7f"), ("", b""))
    assert read.manifests == {"1" * 64, "2" * 64}


A, SIG = {"sha256": "0" * 64}, {"keyid": "k", "sig": "AAAA"}


def named(count: int) -> bytes:
    """A statement about so many files."""
    return made(subject=[{"name": f"f{i}", "digest": A} for i in range(count)])


def valued(count: int) -> bytes:
    """A statement of so many values, as they are counted before they are read."""
    plain = made(more=[0])
    return made(more=[0] * (1 + count - sum(plain.count(mark) for mark in (b",", b"[", b"{"))))


def signed(count: int) -> bytes:
    """A statement with so many signatures."""
    signatures = [{"sig": in_base64(bytes([i]))} for i in range(count)]
    return enveloped(in_base64(made()), signatures=signatures)


@pytest.mark.parametrize(
    "data",
    [made().ljust(16 << 20), valued(1_000_000), named(10_000), signed(16)],
    ids=["bytes", "values", "subjects", "signatures"],
)
def test_attestations_up_to_the_limits_are_read(data: bytes) -> None:
    """The largest that is allowed is; one more of each is among those below."""
    assert envelope.read(data, "x").subjects


#: Attestations that are refused: where, what is expected there, and the bytes.
HOSTILE = {
    "nothing": ("", "JSON, in UTF-8", b""),
    "not JSON": ("", "JSON, in UTF-8", b"\x00\x01"),
    "not UTF-8": ("", "JSON, in UTF-8", b'{"a": "\xff"}'),
    "a list": ("", "a JSON object", b"[]"),
    "a number of a million digits": ("", "JSON, in UTF-8", b"1" * 1_000_000),
    "deep": ("", "JSON, in UTF-8", b'{"a":' * 100_000),
    "deep lists": ("", "JSON, in UTF-8", b"[" * 900_000),
    "deep payload": ("payload", "JSON, in UTF-8", enveloped(in_base64(b"[" * 900_000))),
    "too many values": ("", "at most 1,000,000 values", valued(1_000_001)),
    "too many values in the payload": (
        "payload",
        "at most 1,000,000 values",
        enveloped(in_base64(made(more=[0] * 1_000_001))),
    ),
    "too large": ("", "at most 16,777,216 bytes", made().ljust((16 << 20) + 1)),
    "not a number": ("", "JSON, in UTF-8", made(more=float("nan"))),
    "a key twice": ("", "JSON, in UTF-8", made().replace(b'{"_type"', b'{"_type": 1, "_type"')),
    "another payload type": (
        "payloadType",
        envelope.PAYLOAD_TYPE,
        enveloped(in_base64(made()), "text/plain"),
    ),
    "no payload type": ("payloadType", envelope.PAYLOAD_TYPE, b'{"payload": "e30="}'),
    "a payload that is no text": ("payload", "base64", enveloped("").replace(b'""', b"1")),
    "a payload that is no base64": ("payload", "base64", enveloped("!!!!")),
    "a payload of letters abroad": ("payload", "base64", enveloped("ééé=")),
    "a payload with holes": ("payload", "base64", enveloped("\n".join(in_base64(made())))),
    "an empty payload": ("payload", "JSON, in UTF-8", enveloped("")),
    "another statement type": (
        "_type",
        statement.STATEMENT_TYPE,
        made(_type="https://in-toto.io/Statement/v0.1"),
    ),
    "another predicate": (
        "predicateType",
        statement.PREDICATE_TYPE,
        made(predicateType="https://slsa.dev/provenance/v0.2"),
    ),
    "no predicate": ("predicate", "a JSON object", made(predicate=None)),
    "a predicate that is a list": ("predicate", "a JSON object", made(predicate=[])),
    "no subject": ("subject", "a list of 1 to 10,000 subjects", made(subject=[])),
    "a subject that is a word": ("subject[0]", "a file below the folder", made(subject=["a"])),
    "a subject without a digest": (
        "subject[0]",
        "a sha256 of 64 hex digits",
        made(subject=[{"name": "a"}]),
    ),
    "a short digest": (
        "subject[0]",
        "a sha256 of 64 hex digits",
        made(subject=[{"name": "a", "digest": {"sha256": "00"}}]),
    ),
    "a digest in capitals": (
        "subject[0]",
        "a sha256 of 64 hex digits",
        made(subject=[{"name": "a", "digest": {"sha256": "A" * 64}}]),
    ),
    "only a sha1": (
        "subject[0]",
        "a sha256 of 64 hex digits",
        made(subject=[{"name": "a", "digest": {"sha1": "0" * 40}}]),
    ),
    "a subject twice": (
        "subject[1]",
        "every file once",
        made(subject=[{"name": "a", "digest": A}] * 2),
    ),
    "a subject outside": (
        "subject[0]",
        "a file below the folder",
        made(subject=[{"name": "../a", "digest": A}]),
    ),
    "an absolute subject": (
        "subject[0]",
        "a file below the folder",
        made(subject=[{"name": "/etc/passwd", "digest": A}]),
    ),
    "a surrogate": (
        "subject[0]",
        "a file below the folder",
        made(subject=[{"name": "\ud800", "digest": A}]),
    ),
    "a subject of escapes": (
        "subject[0]",
        "a file below the folder",
        made(subject=[{"name": "\x1b[2J", "digest": A}]),
    ),
    "ten thousand and one": (
        "subject",
        "a list of 1 to 10,000 subjects",
        named(10_001),
    ),
    "signatures that are an object": (
        "",
        "a list of at most 16 signatures",
        enveloped(in_base64(made())).replace(b"[]", b"{}"),
    ),
    "too many signatures": (
        "",
        "a list of at most 16 signatures",
        signed(17),
    ),
    "no list of signatures": (
        "",
        "a list of at most 16 signatures",
        b'{"payloadType": "application/vnd.in-toto+json", "payload": "%s"}'
        % in_base64(made()).encode(),
    ),
    "a key id of a surrogate": (
        "signatures[1]",
        "an object with sig, and a keyid that is text",
        enveloped(in_base64(made()), signatures=[SIG, {"keyid": "\ud800", "sig": "BBBB"}]),
    ),
    "no payload": ("payload", "base64", b'{"payloadType": "application/vnd.in-toto+json"}'),
    "no build": ("buildDefinition", "a JSON object", made(predicate={})),
    "subjects that are one": ("subject", "a list of 1 to 10,000 subjects", made(subject={"a": 1})),
    "a signature twice": (
        "signatures",
        "signatures that differ",
        enveloped(in_base64(made()), signatures=[SIG] * 2),
    ),
    "a signature that is a word": (
        "signatures[0]",
        "an object with sig, and a keyid that is text",
        enveloped(in_base64(made()), signatures=["x"]),
    ),
    "a signature of garbage": (
        "signatures[0]",
        "base64",
        enveloped(in_base64(made()), signatures=[{"sig": "?"}]),
    ),
    "a key id that is a list": (
        "signatures[0]",
        "an object with sig, and a keyid that is text",
        enveloped(in_base64(made()), signatures=[{"keyid": [], "sig": ""}]),
    ),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_attestations_are_refused(name: str) -> None:
    """Each ends with one finding of its own on a printable line and exit code 4, in no time."""
    at, expected, data = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(WrongContent) as caught:
        envelope.read(data, "evil.json")
    (finding,) = caught.value.findings
    assert (caught.value.exit_code, finding.kind) == (4, Kind.MALFORMED)
    assert (finding.where, finding.expected) == (f"evil.json {at}".rstrip(), expected)
    assert finding.line().isprintable() and len(finding.line()) < 600
    assert 0 < len(finding.found) <= 80
    assert time.monotonic() - start < 2


def test_a_file_without_end_is_not_read(desk: Desk) -> None:
    """What is no plain file is refused at once: /dev/zero, a pipe that nobody writes to."""
    pipe = desk.toy.root / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe):
        error = desk.refusal(key=False, file=path)
        assert error.exit_code == 4
        assert "a regular file of at most 16,777,216 bytes, found" in str(error)


def test_a_huge_file_is_not_read(desk: Desk) -> None:
    """A file of a terabyte is refused by its size."""
    path = desk.toy.root / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    error = desk.refusal(key=False, file=path)
    assert (error.exit_code, "found more" in str(error)) == (4, True)

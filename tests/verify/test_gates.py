"""The gates: every finding, cheap ones first, and what was not checked does not pass."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm_weights.byte_ranges import ByteRange
from csm_weights.commands.split import split_file as split
from csm_weights.errors import Finding, Kind
from csm_weights.files import Fingerprint
from csm_weights.formats.architecture import parse_config
from csm_weights.hashing import blob_id
from csm_weights.manifest.types import Artifact, Edition, Piece
from csm_weights.store.inspect import FileState, FileStatus
from csm_weights.store.journal import PieceRecord
from csm_weights.store.receipts import Receipt, VerifiedFile
from csm_weights.verify.gates import (
    Gate,
    GateResult,
    Rejected,
    Subject,
    check,
    check_chunk_files,
    check_sum,
    verify,
)
from tests.support.oracles import transformers_model
from tests.support.privileges import unprivileged
from tests.support.toy import flip
from tools.standin.recipes import RECIPES
from tools.standin.write import write_standin

RECIPE = RECIPES["csm-tiny"]
TINY = parse_config(RECIPE.config.encode(), "config.json")
PIECE = 300_000


def ignore(_: int) -> None:
    """Counts nothing."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def subject(artifact: Artifact, path: Path, finding: Finding | None = None) -> Subject:
    """A file as inspecting its size would see it."""
    if not path.exists():
        return Subject(artifact, FileStatus(path, FileState.ABSENT))
    size, state = path.stat().st_size, FileState.UNVERIFIED
    if size not in [e.size for e in artifact.editions]:
        finding = Finding(Kind.WRONG_SIZE, str(path), f"{artifact.size}", f"{size}")
    if finding:
        state = FileState.INVALID
    return Subject(artifact, FileStatus(path, state, size, finding))


def trusted(plain: Subject) -> Subject:
    """The same file with a receipt that fits its stat."""
    now = Fingerprint.of(plain.path.stat())
    pieces = tuple(PieceRecord(p.offset, p.size, p.sha256, "x") for p in plain.artifact.pieces)
    digest = sha256(plain.path)
    receipt = Receipt(plain.artifact.path, "toy", now.size, digest, pieces, now, "then", "test")
    return replace(plain, file=replace(plain.file, receipt=receipt, state=FileState.VERIFIED))


def rejected(file: Subject, on_progress: Callable[[int], None] = ignore) -> Rejected:
    """What hashing a wrong file finds."""
    (found,) = verify([file], on_progress)
    assert isinstance(found, Rejected)
    return found


def verdicts(results: Sequence[GateResult]) -> dict[tuple[Gate, str], bool | None]:
    return {(result.gate, result.path): result.ok for result in results}


def kinds(results: Sequence[GateResult], gate: Gate) -> list[Kind]:
    return [f.kind for result in results if result.gate is gate for f in result.findings]


# ---- plain files


@dataclass
class Plain:
    """One opaque file of four pieces, and the entry that pins it."""

    path: Path
    artifact: Artifact

    def subject(self, **changes: object) -> Subject:
        artifact = replace(self.artifact, **changes)  # type: ignore[arg-type]
        return subject(artifact, self.path)


@pytest.fixture
def plain(tmp_path: Path) -> Plain:
    """A fresh plain file."""
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(4 * PIECE - 99))
    return Plain(path, split(path, tmp_path, "chunks", PIECE, ignore))


def test_a_good_file_passes_every_gate(plain: Plain) -> None:
    """Present, size and digest are OK; an opaque file has no structure to check."""
    results = check([plain.subject()], rehash=True, on_progress=ignore)
    path = "model.bin"
    assert verdicts(results) == {
        (Gate.PRESENT, path): True,
        (Gate.SIZE, path): True,
        (Gate.DIGEST, path): True,
    }


def test_results_come_in_the_order_of_the_gates(plain: Plain, tmp_path: Path) -> None:
    """All files pass one gate before the next one, cheap gates first."""
    config = tmp_path / "config.json"
    config.write_text(RECIPE.config)
    entry = Artifact("config.json", "config", "config", len(RECIPE.config), sha256(config))
    results = check([plain.subject(), subject(entry, config)], rehash=True, on_progress=ignore)
    order = [list(Gate).index(result.gate) for result in results]
    assert order == sorted(order)
    assert {result.gate for result in results} == set(Gate)


def test_every_byte_is_hashed_once(plain: Plain) -> None:
    """The digest gate of a good file reads it once, with and without a receipt."""
    for file in (plain.subject(), plain.subject(sha256=None), trusted(plain.subject())):
        ticks: list[int] = []
        check([file], rehash=True, on_progress=ticks.append)
        assert sum(ticks) == plain.artifact.size


def test_a_trusted_receipt_answers_without_hashing(plain: Plain) -> None:
    """Unless asked to rehash, the digest comes from the receipt, and the result says so."""
    ticks: list[int] = []
    results = check([trusted(plain.subject())], rehash=False, on_progress=ticks.append)
    digest = results[-1]
    assert (digest.ok, digest.sha256, ticks) == (True, plain.artifact.sha256, [])
    assert digest.found == f"sha256 {plain.artifact.sha256}, by its receipt of then"


def test_rehashing_does_not_believe_a_receipt(plain: Plain) -> None:
    """A file that rotted under its old stat is found when it is hashed again."""
    file = trusted(plain.subject())
    flip(plain.path, PIECE + 1)
    assert check([file], rehash=False, on_progress=ignore)[-1].ok is True
    assert check([file], rehash=True, on_progress=ignore)[-1].ok is False


def test_an_untrusted_receipt_is_not_believed(plain: Plain) -> None:
    """A receipt that no longer fits the stat answers for nothing."""
    file = trusted(plain.subject())
    file = replace(file, file=replace(file.file, state=FileState.UNVERIFIED))
    flip(plain.path, PIECE + 1)
    assert check([file], rehash=False, on_progress=ignore)[-1].ok is False


@pytest.mark.parametrize("pins", ["sha256", "blob_id"])
def test_a_forged_receipt_gives_no_digest(plain: Plain, pins: str) -> None:
    """One whose digest is not what the manifest pins does not stand for hashing the whole."""
    changes: dict[str, object] = {"sha256": None, "blob_id": None}
    changes.pop(pins)
    file = trusted(plain.subject(**changes))
    assert file.receipt
    forged = replace(file, file=replace(file.file, receipt=replace(file.receipt, sha256="0" * 64)))
    (found,) = verify([forged], ignore)
    assert isinstance(found, VerifiedFile) and found.sha256 == plain.artifact.sha256


def test_a_receipt_does_not_stand_for_a_file_without_pieces(plain: Plain) -> None:
    """There is no piece that is hashed instead, so the whole is."""
    file = trusted(plain.subject(pieces=(), blob_id=None))
    flip(plain.path)
    assert [f.kind for f in rejected(file).findings] == [Kind.WRONG_DIGEST]


@pytest.mark.parametrize("pins", ["sha256", "blob_id", "pieces"])
@pytest.mark.parametrize("receipt", [False, True])
def test_a_flipped_byte_is_reported_by_its_piece(plain: Plain, pins: str, receipt: bool) -> None:
    """However the file is pinned, damage is reported with the byte range of its piece."""
    changes: dict[str, object] = {"sha256": None, "blob_id": None}
    changes.pop(pins, None)
    file = plain.subject(**changes)
    file = trusted(file) if receipt else file
    flip(plain.path, 2 * PIECE + 5)
    results = check([file], rehash=True, on_progress=ignore)
    piece = plain.artifact.pieces[2]
    expected = f"{plain.path} bytes {piece.offset:,} to {piece.end - 1:,}"
    assert [f.where for f in results[-1].findings] == [expected]
    assert (results[-1].ok, results[-1].sha256) == (False, None)


def test_all_damaged_pieces_are_reported(plain: Plain) -> None:
    """Two damaged pieces are two findings."""
    flip(plain.path, 5)
    flip(plain.path, 3 * PIECE + 5)
    results = check([plain.subject()], rehash=True, on_progress=ignore)
    assert kinds(results, Gate.DIGEST) == [Kind.WRONG_DIGEST] * 2


def test_another_file_of_the_same_size_is_one_finding(plain: Plain) -> None:
    """A file of which no piece is right is reported as a whole, not piece by piece."""
    plain.path.write_bytes(bytes(plain.artifact.size))
    two = plain.artifact.pieces[:2]
    for changes in ({}, {"sha256": None}, {"sha256": None, "blob_id": None, "pieces": two}):
        (found,) = rejected(plain.subject(**changes)).findings
        assert (found.kind, found.where) == (Kind.WRONG_DIGEST, str(plain.path))
        assert found.expected == f"the sha256 of {2 if 'pieces' in changes else 4} pieces"
        assert found.found == "none of them: another file of the same size"


def test_a_file_without_pieces_is_told_as_a_whole(plain: Plain) -> None:
    """Where the manifest has no pieces, the finding is about the file."""
    flip(plain.path, 5)
    file = plain.subject(pieces=(), blob_id=None)
    assert [f.where for f in rejected(file).findings] == [str(plain.path)]


def test_a_wrong_blob_id_fails_the_gate(plain: Plain) -> None:
    """Right pieces with a whole that is not the Hub's file do not pass."""
    file = plain.subject(sha256=None, blob_id="0" * 40)
    results = check([file], rehash=True, on_progress=ignore)
    assert results[-1].ok is False
    assert "blob id" in results[-1].findings[0].expected
    assert rejected(file).good == frozenset()  # whichever piece is at fault, it is not known


def test_a_missing_file_fails_the_first_gate_only(plain: Plain) -> None:
    """A gate that cannot run is not run: neither passed nor failed."""
    plain.path.unlink()
    results = check([plain.subject()], rehash=True, on_progress=ignore)
    path = "model.bin"
    assert verdicts(results) == {
        (Gate.PRESENT, path): False,
        (Gate.SIZE, path): None,
        (Gate.DIGEST, path): None,
    }
    assert all("not run" in r.found for r in results if r.ok is None)


def test_an_unreadable_file_does_not_pass_the_first_gate(plain: Plain) -> None:
    """A file that may not be read is not present, and the gates after it are not run."""
    wrong = subject(plain.artifact, plain.path, Finding.unreadable(plain.path, "denied"))
    results = check([wrong], rehash=True, on_progress=ignore)
    assert [result.ok for result in results] == [False, None, None]
    assert kinds(results, Gate.PRESENT) == [Kind.UNREADABLE]


def test_a_file_of_the_wrong_size_is_not_hashed(plain: Plain) -> None:
    """A short file is reported by its size, at no cost."""
    os.truncate(plain.path, 10)
    ticks: list[int] = []
    results = check([plain.subject()], rehash=True, on_progress=ticks.append)
    path = "model.bin"
    assert verdicts(results) == {
        (Gate.PRESENT, path): True,
        (Gate.SIZE, path): False,
        (Gate.DIGEST, path): None,
    }
    assert ticks == []


def words(results: Sequence[GateResult]) -> list[tuple[bool | None, str, str]]:
    return [(result.ok, result.expected, result.found) for result in results]


def test_every_result_says_what_was_expected_and_found(plain: Plain) -> None:
    """Each gate has both words, whether it passed, failed or could not run."""
    digest, sizes = f"sha256 {plain.artifact.sha256}", "1,199,901 or 15 bytes"

    def checked() -> list[tuple[bool | None, str, str]]:
        file = plain.subject(alternatives=(edition(OTHER),))
        return words(check([file], rehash=True, on_progress=ignore))

    assert checked() == [
        (True, "a readable file", "present"),
        (True, sizes, "1,199,901 bytes"),
        (True, digest, digest),
    ]
    os.truncate(plain.path, 10)
    assert checked() == [
        (True, "a readable file", "present"),
        (False, sizes, "10"),
        (None, digest, "not run: the file is not present or has the wrong size"),
    ]
    plain.path.unlink()
    assert checked() == [
        (False, "a readable file", "no such file"),
        (None, sizes, "not run: the file is not present"),
        (None, digest, "not run: the file is not present or has the wrong size"),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sha256": None}, "the sha256 of 4 pieces and Hub blob id {blob_id}"),
        ({"sha256": None, "blob_id": None}, "the sha256 of 4 pieces"),
        ({"sha256": None, "pieces": (), "blob_id": None, "git_sha1": "6" * 40}, "git blob id 66"),
    ],
)
def test_the_digest_gate_says_by_what_a_file_is_pinned(
    plain: Plain, changes: dict[str, object], expected: str
) -> None:
    """By its whole sha256 where there is one, else by pieces, the Hub's ids, or both."""
    flip(plain.path, 0)
    flip(plain.path, PIECE)
    result = check([plain.subject(**changes)], rehash=True, on_progress=ignore)[-1]
    assert result.ok is False
    assert result.expected.startswith(expected.format(blob_id=plain.artifact.blob_id))
    assert result.found == "; ".join(finding.found for finding in result.findings)


@pytest.mark.parametrize(
    ("flipped", "where", "good"),
    [
        ([5], "{path} bytes 0 to 299,999", [1, 2, 3]),
        ([4 * PIECE - 100], "{path} bytes 900,000 to 1,199,900", [0, 1, 2]),
        ([5, 3 * PIECE], "{path}", [1, 2]),
        ([5, PIECE, 2 * PIECE, 3 * PIECE], "{path}", []),
    ],
)
def test_what_is_wrong_is_told_in_one_finding(
    plain: Plain, flipped: list[int], where: str, good: list[int]
) -> None:
    """One for the run that goes on: the wrong piece, all wrong pieces, or the file."""
    for offset in flipped:
        flip(plain.path, offset)
    found = rejected(plain.subject())
    assert found.finding().where == where.format(path=plain.path)
    assert found.good == {n * PIECE for n in good}
    if len(flipped) == 2:
        assert found.finding().expected == "the sha256 of every piece"
        ranges = "bytes 0 to 299,999; bytes 900,000 to 1,199,900"
        assert found.finding().found == f"others at {ranges}"


def test_digests_of_a_whole_file_that_are_wrong_are_told_by_the_first(plain: Plain) -> None:
    """The sha256 and the Hub blob id are wrong together, for one cause."""
    flip(plain.path)
    found = rejected(plain.subject(pieces=()))
    assert [f.expected.rpartition(" ")[0] for f in found.findings] == ["sha256", "Hub blob id"]
    assert found.finding() == found.findings[0]


def test_a_file_of_one_piece_is_told_by_that(plain: Plain) -> None:
    """No other file of the same size is suspected where there is just one piece."""
    piece = Piece("chunks/x", 0, plain.artifact.size, str(plain.artifact.sha256))
    flip(plain.path)
    (found,) = rejected(plain.subject(sha256=None, blob_id=None, pieces=(piece,))).findings
    assert (found.where, found.help) == (f"{plain.path} bytes 0 to 1,199,900", "inv weights")
    assert (found.expected, found.found) == (
        f"sha256 {piece.sha256}",
        f"sha256 {sha256(plain.path)}",
    )


def test_a_write_during_the_hashing_is_reported(plain: Plain) -> None:
    """A file that changes while it is hashed is not verified, even if its digest fits."""

    def touch(_: int) -> None:
        os.utime(plain.path, ns=(1, 1))

    assert [f.kind for f in rejected(plain.subject(), touch).findings] == [Kind.CHANGED]


def test_a_file_that_is_cut_during_the_hashing_is_a_finding(plain: Plain) -> None:
    """A file that ends early fails the digest gate, and is no crash."""

    def cut(_: int) -> None:
        os.truncate(plain.path, 1)

    results = check([plain.subject()], rehash=True, on_progress=cut)
    assert (results[-1].ok, Kind.UNREADABLE in kinds(results, Gate.DIGEST)) == (False, True)


def test_a_file_that_cannot_be_read_does_not_hide_the_others(
    plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unreadable file is one finding; the files beside it are verified all the same."""
    bad = tmp_path / "bad.bin"
    shutil.copy(plain.path, bad)
    real = os.open

    def refuse(path: object, *rest: int) -> int:
        if path == bad:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    other = replace(plain.artifact, path="bad.bin")
    results = check([subject(other, bad), plain.subject()], rehash=True, on_progress=ignore)
    digests = {result.path: result for result in results if result.gate is Gate.DIGEST}
    assert {path: result.ok for path, result in digests.items()} == {
        "bad.bin": False,
        "model.bin": True,
    }
    assert [f.where for f in digests["bad.bin"].findings] == [str(bad)]


def test_a_disk_that_cannot_be_read_is_a_finding(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read error fails the digest gate of that file, by name, and is no crash."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    results = check([plain.subject()], rehash=True, on_progress=ignore)
    assert kinds(results, Gate.DIGEST) == [Kind.UNREADABLE]


def test_a_verified_file_names_its_pieces(plain: Plain) -> None:
    """A file that its pieces pin is recorded by them; one that the whole pins, by that."""
    by_pieces, by_whole = verify([plain.subject(sha256=None), plain.subject()], ignore)
    assert isinstance(by_pieces, VerifiedFile)
    assert isinstance(by_whole, VerifiedFile)
    assert [(r.offset, r.sha256) for r in by_pieces.pieces] == [
        (p.offset, p.sha256) for p in plain.artifact.pieces
    ]
    assert (by_whole.pieces, by_pieces.sha256) == ((), by_whole.sha256)
    assert by_whole.fingerprint == Fingerprint.of(plain.path.stat())
    assert (by_pieces.blocks, by_whole.blocks) == ((), ())


def test_digests_of_blocks_are_taken_where_they_are_asked_for(plain: Plain) -> None:
    """Those of a file of less than a block, and of each piece of one that its pieces pin."""
    by_pieces, by_whole = verify([plain.subject(sha256=None), plain.subject()], ignore, blocks=True)
    assert isinstance(by_pieces, VerifiedFile)
    assert isinstance(by_whole, VerifiedFile)
    artifact = plain.artifact
    assert by_whole.blocks == (ByteRange(0, artifact.size, str(artifact.sha256)),)
    assert by_pieces.blocks == tuple(ByteRange(p.offset, p.size, p.sha256) for p in artifact.pieces)


# ---- other editions


OTHER = b"another edition"


def edition(content: bytes) -> Edition:
    return Edition(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("pins", ["sha256", "pieces", "sha256 and pieces"])
def test_another_edition_passes(plain: Plain, pins: str) -> None:
    """Any accepted edition is held against its own digest, whatever pins the first one."""
    plain.path.write_bytes(OTHER)
    changes: dict[str, object] = {"alternatives": (edition(OTHER),)}
    changes |= {} if "sha256" in pins else {"sha256": None}
    changes |= {} if "pieces" in pins else {"pieces": ()}
    results = check([plain.subject(**changes)], rehash=True, on_progress=ignore)
    assert {r.ok for r in results} == {True}


@pytest.mark.parametrize("pieces", [True, False], ids=["pieces", "no pieces"])
def test_damage_to_another_edition_is_reported(plain: Plain, pieces: bool) -> None:
    """A file of another edition's size with other bytes is one finding with that digest."""
    plain.path.write_bytes(OTHER[::-1])
    changes: dict[str, object] = {"alternatives": (edition(OTHER),)}
    changes |= {} if pieces else {"pieces": ()}
    results = check([plain.subject(**changes)], rehash=True, on_progress=ignore)
    assert [f.expected for f in results[-1].findings] == [f"sha256 {edition(OTHER).sha256}"]


# ---- a real network


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both files of the tiny stand-in, and its config.json."""
    folder = tmp_path_factory.mktemp("tiny")
    config = RECIPE.config.encode()
    write_standin(parse_config(config, "config.json"), RECIPE.seed, folder)
    (folder / "config.json").write_bytes(config)
    return folder


NAMES = {"model.safetensors": "safetensors", "ckpt.pt": "torch-zip", "config.json": "config"}


def network(folder: Path, *names: str) -> list[Subject]:
    """The files of a network with entries that pin them as they are now."""
    subjects = []
    for name in names or NAMES:
        path = folder / name
        size, digest = path.stat().st_size, sha256(path)
        subjects.append(subject(Artifact(name, name, NAMES[name], size, digest), path))
    return subjects


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A folder with the tiny stand-in that may be damaged."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    return tmp_path


def structure(results: Sequence[GateResult]) -> dict[str, bool | None]:
    return {r.path: r.ok for r in results if r.gate is Gate.STRUCTURE}


def test_a_whole_network_passes(tiny: Path) -> None:
    """Both weight formats have the tensors that config.json implies."""
    results = check(network(tiny), rehash=True, on_progress=ignore)
    assert {result.ok for result in results} == {True}
    assert structure(results) == dict.fromkeys(NAMES, True)
    count = len(TINY.tensor_shapes())
    of_weights = (True, f"{count} tensors as config.json implies", f"{count} tensors")
    assert words([r for r in results if r.gate is Gate.STRUCTURE]) == [
        (True, "a description of a CSM network", f"a network of {count} tensors"),
        of_weights,
        of_weights,
    ]


def damage_header(folder: Path) -> None:
    flip(folder / "model.safetensors", 20)


def damage_directory(folder: Path) -> None:
    path = folder / "ckpt.pt"
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "name"), [(damage_header, "model.safetensors"), (damage_directory, "ckpt.pt")]
)
def test_a_broken_structure_is_told_though_the_digest_is_pinned(
    copy: Path, damage: object, name: str
) -> None:
    """A file whose digest is right but which is no such file fails the structure gate."""
    assert callable(damage)
    damage(copy)
    results = check(network(copy), rehash=True, on_progress=ignore)
    assert structure(results) == {**dict.fromkeys(NAMES, True), name: False}
    assert set(kinds(results, Gate.STRUCTURE)) == {Kind.MALFORMED}


def test_weights_of_another_network_are_reported(copy: Path) -> None:
    """A config.json of another size does not fit the tensors, in either format."""
    text = RECIPE.config.replace('"text_vocab_size": 512', '"text_vocab_size": 513')
    (copy / "config.json").write_text(text)
    results = check(network(copy), rehash=True, on_progress=ignore)
    assert structure(results) == {
        "config.json": True,
        "model.safetensors": False,
        "ckpt.pt": False,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_the_layout_of_transformers_pass(copy: Path, dtype: torch.dtype) -> None:
    """A fine-tune pinned as transformers saved it is checked, under the names of its file."""
    state = load_file(copy / "model.safetensors")
    transformers_model(TINY, state).to(dtype).save_pretrained(copy)
    names = ("config.json", "model.safetensors")
    assert structure(check(network(copy, *names), rehash=False, on_progress=ignore)) == {
        "config.json": True,
        "model.safetensors": True,
    }
    state = load_file(copy / "model.safetensors")
    del state["backbone_model.layers.1.mlp.up_proj.weight"]
    save_file(state, copy / "model.safetensors")
    results = check(network(copy, *names), rehash=False, on_progress=ignore)
    findings = [finding for result in results for finding in result.findings]
    assert [finding.where.rpartition(": ")[2] for finding in findings] == [
        "backbone_model.layers.1.mlp.up_proj.weight"
    ]


@pytest.mark.parametrize("text", ["{}", "null", "Access to model sesame/csm-1b is restricted."])
def test_weights_are_not_judged_by_a_broken_config(copy: Path, text: str) -> None:
    """When config.json cannot be used, the weights' structure is not run, and not OK."""
    (copy / "config.json").write_text(text)
    results = check(network(copy), rehash=True, on_progress=ignore)
    assert structure(results) == {
        "config.json": False,
        "model.safetensors": None,
        "ckpt.pt": None,
    }


def test_weights_of_a_model_without_a_config_must_be_well_formed(copy: Path) -> None:
    """Where the manifest has no config.json, weights are still read, if not held against it."""
    subjects = network(copy, "model.safetensors")
    assert structure(check(subjects, rehash=False, on_progress=ignore)) == {
        "model.safetensors": True
    }
    flip(copy / "model.safetensors", 0)
    assert structure(check(subjects, rehash=False, on_progress=ignore)) == {
        "model.safetensors": False
    }


def test_weights_that_are_not_read_are_neither_right_nor_wrong(copy: Path) -> None:
    """Where the reader is narrower than the format, the digest decides."""
    header = b'{"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}}'
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    for names, expected in (
        (("model.safetensors",), "a well-formed file"),
        (("config.json", "model.safetensors"), "the tensors that config.json implies"),
    ):
        results = check(network(copy, *names), rehash=True, on_progress=ignore)
        found = "not read: expected a known dtype, found F9"
        structures = [r for r in results if r.gate is Gate.STRUCTURE]
        assert words(structures)[-1] == (None, expected, found)
        assert results[-1].ok is True


def test_missing_weights_are_not_run(copy: Path) -> None:
    """What they would have been held against is said."""
    subjects = network(copy, "config.json", "model.safetensors")
    (copy / "model.safetensors").unlink()
    subjects[1] = subject(subjects[1].artifact, copy / "model.safetensors")
    results = check(subjects, rehash=True, on_progress=ignore)
    why = "not run: the file is not present"
    structures = [r for r in results if r.gate is Gate.STRUCTURE]
    assert words(structures)[-1] == (None, "the tensors that config.json implies", why)


def test_a_missing_config_is_not_run(copy: Path) -> None:
    """Without config.json no structure is judged, and present says why."""
    subjects = network(copy)
    (copy / "config.json").unlink()
    subjects[-1] = subject(subjects[-1].artifact, copy / "config.json")
    results = check(subjects, rehash=True, on_progress=ignore)
    assert set(structure(results).values()) == {None}
    assert kinds(results, Gate.PRESENT) == [Kind.MISSING]


def test_a_config_that_may_not_be_read_is_not_run(copy: Path) -> None:
    """Nothing is known of it, which is no pass; the weights are not judged by it either."""
    subjects = network(copy)
    (copy / "config.json").chmod(0)
    with unprivileged():
        results = check(subjects, rehash=True, on_progress=ignore)
    assert structure(results) == dict.fromkeys(NAMES)
    found = {r.path: r.found for r in results if r.gate is Gate.STRUCTURE}
    assert found["config.json"] == "not run: Permission denied"
    assert found["ckpt.pt"] == "not run: config.json cannot be used"


def test_chunk_files_are_told_apart(plain: Plain, tmp_path: Path) -> None:
    """One finding each for a wrong one and one that is gone; a right one has none."""
    parts = [(piece, tmp_path / piece.part) for piece in plain.artifact.pieces]
    assert len(parts) > 2 and check_chunk_files(parts, ignore) == []
    flip(parts[0][1])
    parts[1][1].unlink()
    wrong, gone = check_chunk_files(parts, ignore)
    assert (wrong.kind, wrong.where) == (Kind.WRONG_DIGEST, parts[0][0].part)
    assert wrong.expected == f"sha256 {parts[0][0].sha256}"
    assert str(parts[1][1]) in gone.where and gone.kind in (Kind.UNREADABLE, Kind.MISSING)


def test_a_config_is_read_before_the_weights_whatever_the_order(tiny: Path) -> None:
    """The manifest may list config.json last."""
    subjects = network(tiny, "config.json", "model.safetensors")
    for order in (subjects, subjects[::-1]):
        assert set(structure(check(order, rehash=True, on_progress=ignore)).values()) == {True}


# ---- SHA256SUMS


def test_a_line_of_sums_that_fits_passes(plain: Plain) -> None:
    """A file with the listed digest passes, hashed here or just before."""
    folder, digest = plain.path.parent, sha256(plain.path)
    assert check_sum(folder, "model.bin", digest, None).ok is True
    assert check_sum(folder, "model.bin", digest, digest).ok is True


def test_a_line_of_sums_that_differs_is_reported(plain: Plain) -> None:
    """A file with another digest than the listed one fails the gate, with both digests."""
    result = check_sum(plain.path.parent, "model.bin", "0" * 64, None)
    assert (result.ok, result.expected) == (False, f"sha256 {'0' * 64}")
    assert result.found == f"sha256 {sha256(plain.path)}"
    assert [f.kind for f in result.findings] == [Kind.WRONG_DIGEST]


@pytest.mark.parametrize(
    ("name", "found"), [("gone", "No such file or directory"), ("chunks", "a folder")]
)
def test_a_line_of_sums_without_its_file_is_reported(plain: Plain, name: str, found: str) -> None:
    """A listed file that is not there, or is a folder, is not passed over."""
    result = check_sum(plain.path.parent, name, "0" * 64, None)
    expected = f"sha256 {'0' * 64}"
    finding = Finding(Kind.MISSING, str(plain.path.parent / name), expected, found)
    assert result == GateResult(Gate.DIGEST, name, False, expected, found, (finding,))


# ---- receipts and the whole digest


@pytest.fixture
def receipt(plain: Plain) -> Receipt:
    """The receipt of the plain file."""
    found = trusted(plain.subject()).receipt
    assert found is not None
    return found


def test_a_receipt_covers_what_the_manifest_pins(plain: Plain, receipt: Receipt) -> None:
    """By the whole digest, by blob id and pieces, or by pieces alone."""
    by_blob_id = replace(plain.artifact, sha256=None)
    by_pieces = replace(by_blob_id, blob_id=None)
    assert [receipt.fits(a) for a in (plain.artifact, by_blob_id, by_pieces)] == [True] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "0" * 64},
        {"sha256": None, "blob_id": "0" * 40},
        {"blob_id": "0" * 40},
        {"size": 1},
        {"sha256": None, "pieces": ()},
        {"sha256": None, "pieces": (Piece("x", 0, 4 * PIECE - 99, "0" * 64),)},
    ],
)
def test_a_receipt_does_not_cover_another_manifest(
    plain: Plain, receipt: Receipt, changes: dict[str, object]
) -> None:
    """When the manifest pins anything else, the receipt counts for nothing."""
    assert not receipt.fits(replace(plain.artifact, **changes))  # type: ignore[arg-type]


def test_a_receipt_of_another_edition_covers_it(plain: Plain, receipt: Receipt) -> None:
    """A receipt is held against the edition of its size; blob ids are the pinned one's."""
    other = edition(OTHER)
    artifact = replace(plain.artifact, alternatives=(other,))
    assert receipt.fits(artifact)
    assert replace(receipt, size=other.size, sha256=str(other.sha256)).fits(artifact)
    assert not replace(receipt, size=other.size).fits(artifact)
    assert blob_id(receipt.sha256, receipt.size) == plain.artifact.blob_id

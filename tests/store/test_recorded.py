"""Records that an earlier version wrote are understood: `recorded/` has those of commit 06bb24c."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from csm_weights import hashing
from csm_weights.files import Fingerprint
from csm_weights.manifest.parse import load
from csm_weights.model.smoke_report import read_report, report_path
from csm_weights.pipeline import apply
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request
from csm_weights.store.inspect import FileState, Paths, State, inspect
from csm_weights.store.journal import journal_path, partial_path
from csm_weights.store.receipts import load_receipt, receipt_path
from tests.support.clone import REPOSITORY

RECORDED = Path(__file__).parent / "recorded"
WEIGHTS = "model.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the chunk files of csm-tiny."""
    shutil.copytree(REPOSITORY / "chunks" / "csm-tiny", tmp_path / "chunks" / "csm-tiny")
    (tmp_path / "manifests").mkdir()
    for path in (REPOSITORY / "manifests").glob("csm-tiny.*"):
        shutil.copy(path, tmp_path / "manifests")
    return tmp_path


def content(root: Path, name: str) -> bytes:
    """The right bytes of a file of csm-tiny."""
    manifest = load(root / "manifests" / "csm-tiny.toml")
    artifact = next(a for a in manifest.artifacts if a.path == name)
    if artifact.text is not None:
        return artifact.text.encode()
    return b"".join((root / piece.part).read_bytes() for piece in artifact.pieces)


def seen(root: Path) -> State:
    manifest = load(root / "manifests" / "csm-tiny.toml")
    return inspect(manifest, manifest.artifacts, Paths.of(manifest, root), {})


@pytest.fixture
def installed(root: Path) -> Path:
    """A checkout in which the earlier version has installed and tested csm-tiny.

    Only the inode and the times in its receipts are those of the copies here.
    """
    folder = root / "models" / "csm-tiny"
    report_path(folder).parent.mkdir(parents=True)
    shutil.copy(RECORDED / "smoke-report", report_path(folder))
    for name in (WEIGHTS, "ckpt.pt", "config.json"):
        (folder / name).write_bytes(content(root, name))
        record = json.loads((RECORDED / f"{name}.json").read_text())
        status = (folder / name).stat()
        record["fingerprint"] |= {
            "inode": status.st_ino,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
        }
        receipt_path(folder, name).write_text(json.dumps(record, sort_keys=True) + "\n")
    return root


def no_hashing(*_: object) -> None:
    raise AssertionError("a file was hashed")


def test_files_with_receipts_of_an_earlier_version_need_no_hashing(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was verified stays verified, and a second run has nothing to do."""
    monkeypatch.setattr(hashing, "feed", no_hashing)
    states = {item.artifact.path: item.installed.state for item in seen(installed).artifacts}
    recorded = (WEIGHTS, "ckpt.pt", "config.json")
    assert {name: states[name] for name in recorded} == dict.fromkeys(recorded, FileState.VERIFIED)
    outcome = apply.apply(Request(installed, "csm-tiny", recorded), Target.BOTH)
    assert (outcome.actions, outcome.error) == ((), None)


def test_a_receipt_of_an_earlier_version_has_all_its_facts(installed: Path) -> None:
    """The time, the pieces and the digests are those that were written."""
    text = receipt_path(installed / "models" / "csm-tiny", WEIGHTS).read_text()
    receipt, written = load_receipt(text), json.loads(text)
    assert receipt is not None
    assert receipt.verified_at == written["proven_at"]
    assert [piece.source for piece in receipt.pieces] == [p["source"] for p in written["pieces"]]
    assert receipt.fingerprint == Fingerprint(**written["fingerprint"])


def test_a_smoke_report_of_an_earlier_version_still_counts(installed: Path) -> None:
    """Its checks, and what it holds for, are read as they were written."""
    report = read_report(report_path(installed / "models" / "csm-tiny"))
    assert report is not None
    assert (report.ok, report.device, len(report.checks)) == (True, "cpu", 7)
    assert dict(report.bound_to)[WEIGHTS].startswith("07f61e8f0ac85bbd")


def test_a_journal_of_an_earlier_version_is_continued(root: Path) -> None:
    """The pieces that it names are hashed where they lie, and only the others are copied."""
    staged = root / "output" / "csm-tiny" / WEIGHTS
    staged.parent.mkdir(parents=True)
    whole = content(root, WEIGHTS)
    partial_path(staged).write_bytes(whole)
    shutil.copy(RECORDED / "model.safetensors.partial.journal", journal_path(staged))
    item = next(i for i in seen(root).artifacts if i.artifact.path == WEIGHTS)
    pieces = item.artifact.pieces
    assert [record.offset for record in item.journal.pieces] == [
        piece.offset for piece in pieces if piece.offset != 614_400
    ]
    assert [(a.offset, a.size) for a in item.journal.arrived] == [(614_400, 65_536)]
    for piece in pieces:
        if piece.offset != 614_400:
            (root / piece.part).unlink()
    apply.apply(Request(root, "csm-tiny", (WEIGHTS,), source="chunks"), Target.STAGED)
    assert staged.read_bytes() == whole

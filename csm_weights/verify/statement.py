"""Statements of provenance: what is true of the installed files, and what they were made from.

A statement is an in-toto Statement v1 with a SLSA provenance v1 predicate: its
subjects are the files by sha256, its resolved dependencies their materials.

Sources: in-toto.io/Statement/v1, slsa.dev/provenance/v1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.store.receipts import VerifiedFile

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"

#: Who made the files, as a package URL.
BUILDER = "pkg:generic/csm-weights"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """All that a statement says: the files, the manifest, the tool, the time.

    `files` are artifacts and what hashing them found just now; their pieces
    are empty where no receipt fits. `version` is that of this package, `at`
    the time in ISO 8601, UTC.
    """

    manifest: Manifest
    manifest_name: str
    manifest_sha256: str
    files: tuple[tuple[Artifact, VerifiedFile], ...]
    version: str
    at: str


def statement(facts: Facts) -> dict[str, Any]:
    """Return the statement as JSON data; but for the time, the same facts give the same data."""
    names = [artifact.path for artifact, _ in facts.files]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": a.path, "digest": {"sha256": f.sha256}} for a, f in facts.files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILDER}#assemble",
                "externalParameters": {"model": facts.manifest.name, "files": names},
                "resolvedDependencies": dependencies(facts),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"csm-weights": facts.version}},
                "metadata": {"finishedOn": facts.at},
            },
        },
    }


def payload(data: Mapping[str, Any]) -> bytes:
    """Return a statement as the bytes that are signed: the keys sorted, in ASCII."""
    return json.dumps(data, sort_keys=True, indent=1).encode() + b"\n"


def dependencies(facts: Facts) -> list[Descriptor]:
    """Return the materials: the manifest, the Hub's commit and blobs, chunk files."""
    manifest = facts.manifest
    found: list[Descriptor] = [
        {"name": facts.manifest_name, "digest": {"sha256": facts.manifest_sha256}}
    ]
    files = [d for artifact, file in facts.files for d in _materials(manifest, artifact, file)]
    if manifest.revision and any("uri" in descriptor for descriptor in files):
        page = f"https://huggingface.co/{manifest.repo}"  # whichever copy of the Hub was asked
        found.append({"uri": page, "digest": {"gitCommit": manifest.revision}})
    return found + files


def _materials(manifest: Manifest, artifact: Artifact, file: VerifiedFile) -> list[Descriptor]:
    """Return the materials of one file: the Hub's blob if it came from there, else its pieces."""
    blob = None
    if manifest.repo and manifest.revision and file.size == artifact.size:
        blob = artifact.blob_id or artifact.git_sha1
    local = [
        piece
        for piece in file.pieces
        if not (manifest.repo and "://" in piece.source and f"/{manifest.repo}/" in piece.source)
    ]
    materials: list[Descriptor] = []
    if len(local) < len(file.pieces) or (not file.pieces and blob):
        page = f"https://huggingface.co/{manifest.repo}/resolve/{manifest.revision}/{artifact.path}"
        digest = {"sha256": file.sha256} | ({"gitBlob": blob} if blob else {})
        materials.append({"name": artifact.path, "uri": page, "digest": digest})
        if not file.pieces:  # verified as a whole: no record of its way here
            materials[0]["annotations"] = {"from": "identified by its ids; its way is unknown"}
    chunk_files = {piece.offset: piece.part for piece in artifact.pieces}
    for piece in local:
        # Without the names of this machine's folders, and without what a URL may hide.
        is_path = piece.source.startswith(("/", "~"))
        source = piece.source.partition("?")[0] if "://" in piece.source else piece.source
        notes = {"file": artifact.path, "offset": piece.offset, "size": piece.size}
        notes["from"] = "a file on this machine" if is_path else source
        name = chunk_files.get(piece.offset, artifact.path)
        digest = {"sha256": piece.sha256}
        materials.append({"name": name, "digest": digest, "annotations": notes})
    if not materials:
        is_text = any(e.text is not None and e.size == file.size for e in artifact.editions)
        notes = {"from": "the manifest" if is_text else "not recorded"}
        digest = {"sha256": file.sha256}
        materials.append({"name": artifact.path, "digest": digest, "annotations": notes})
    return materials

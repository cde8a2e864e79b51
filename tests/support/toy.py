"""A small repository for tests: real chunk files and a real manifest, made by `inv split`."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.commands.split import split_file, write_chunk_list
from csm_weights.manifest import parse, render
from csm_weights.manifest.types import Artifact, Edition, Manifest
from csm_weights.pipeline.request import Request

#: Bytes of a chunk file: not a multiple of a block, so that pieces end within one.
PIECE_SIZE = 70_001

NOTE = "a note\n"


def content(name: str, size: int) -> bytes:
    """Return bytes that depend only on the name."""
    return random.Random(name).randbytes(size)


@dataclass
class Toy:
    """A repository with one model, `toy`: a.bin (5 pieces), b.bin (3 pieces), note.txt (text).

    The manifest has a whole-file sha256 of a.bin, and only a blob id of b.bin, as for ckpt.pt
    of CSM-1B. note.txt has a second edition whose text is known.
    """

    root: Path
    manifest: Manifest

    @classmethod
    def make(cls, root: Path) -> Toy:
        a, b = (_split(root, name, count) for name, count in (("a.bin", 5), ("b.bin", 3)))
        b = replace(b, sha256=None)
        for artifact in (a, b):
            write_chunk_list(root, artifact)
        manifest = Manifest("toy", "output/toy", "models/toy", (a, b, _note()))
        toy = cls(root, manifest)
        toy.write_manifest(manifest)
        return toy

    def write_manifest(self, manifest: Manifest) -> None:
        """Write and use another manifest for the model."""
        path = self.root / "manifests" / "toy.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(render.render(manifest))
        self.manifest = parse.load(path)

    def request(self, *only: str, dest: str | None = None) -> Request:
        """Return a request for the toy model."""
        return Request(self.root, "toy", only, dest)

    def artifact(self, path: str) -> Artifact:
        """Return the manifest's artifact of that path."""
        return next(a for a in self.manifest.artifacts if a.path == path)

    def chunk_file(self, path: str, index: int) -> Path:
        """Return the chunk file of piece `index` of an artifact."""
        return self.root / self.artifact(path).pieces[index].part

    def staged(self, path: str) -> Path:
        """Return the path at which an artifact is staged."""
        return self.root / "output" / "toy" / path

    def installed(self, path: str) -> Path:
        """Return the path at which an artifact is installed."""
        return self.root / "models" / "toy" / path

    def good(self, path: str) -> bytes:
        """Return the right content of an artifact."""
        return NOTE.encode() if path == "note.txt" else content(path, self.artifact(path).size)


def _split(root: Path, name: str, count: int) -> Artifact:
    file = root / name
    file.write_bytes(content(name, PIECE_SIZE * count - 12_345))
    artifact = split_file(file, root, f"chunks/toy/{name}", PIECE_SIZE, lambda _: None)
    file.unlink()
    return artifact


def _note() -> Artifact:
    pinned = hashlib.sha256(b"another edition").hexdigest()
    own = hashlib.sha256(NOTE.encode()).hexdigest()
    edition = Edition(len(NOTE), own, NOTE)
    return Artifact("note.txt", "note", "opaque", 15, pinned, alternatives=(edition,))


def flip(path: Path, offset: int = 1000) -> None:
    """Invert the bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)

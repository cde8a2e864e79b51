"""The tiny model as one that a Hub gives only to those who show a token."""

from __future__ import annotations

import tomllib

from tests.support.clone import EMBEDDED, REPOSITORY

REPO = "sesame/gated"
WEIGHTS = "model.safetensors"

_TINY = (REPOSITORY / "manifests" / "csm-tiny.toml").read_text()


def _joined(name: str) -> bytes:
    parts = sorted((REPOSITORY / EMBEDDED).rglob(f"{name}.part-*"))
    return b"".join(part.read_bytes() for part in parts)


_ARTIFACTS = tomllib.loads(_TINY)["artifact"]

#: The digests of the manifest, and the files, by their paths.
PINNED = {a["path"]: a["sha256"] for a in _ARTIFACTS if "sha256" in a}
FILES = {
    WEIGHTS: _joined(WEIGHTS),
    "ckpt.pt": _joined("ckpt.pt"),
    "config.json": next(
        a["text"] for a in tomllib.loads(_TINY)["artifact"] if "text" in a
    ).encode(),
}


def manifest(commit: str) -> str:
    """Return a manifest called gated, whose chunk files are nowhere."""
    text = _TINY.replace("chunks/csm-tiny/", "chunks/gated/").replace('"csm-tiny"', '"gated"')
    hub = f'[hub]\nrepo = "{REPO}"\nrevision = "{commit}"\ngated = true\n'
    return text.replace('[smoke]\ngolden = "csm-tiny.golden.json"\n', hub)

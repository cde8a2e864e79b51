"""Write a manifest, durably and only if it can be read back."""

from pathlib import Path

from csm_weights.manifest.parse import parse
from csm_weights.manifest.render import render
from csm_weights.manifest.types import Manifest
from csm_weights.store.atomic import write_whole


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the canonical text of a manifest; raises ManifestInvalid for one that breaks a rule."""
    text = render(manifest)
    parse(text.encode(), str(path))
    write_whole(path, text)

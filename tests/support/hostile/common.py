"""The shape of a collection, and a file on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Bad = Mapping[str, tuple[bytes, str]]


def written(folder: Path, content: bytes, name: str = "weights") -> Path:
    """Write content to a file in the folder, and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path

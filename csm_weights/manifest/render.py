"""Write a manifest as canonical TOML: one key a line, one piece a line."""

import json
from collections.abc import Mapping

from csm_weights.manifest.types import SCHEMA, Artifact, Edition, Manifest


def render(manifest: Manifest) -> str:
    """Return the canonical TOML text of a manifest; `parse` reads it back equal."""
    lines = [f"schema = {SCHEMA}", f"name = {_quote(manifest.name)}"]
    if manifest.description:
        lines.append(f"description = {_quote(manifest.description)}")
    if manifest.default:
        lines.append(f"default = [{', '.join(map(_quote, manifest.default))}]")
    lines += ["", "[layout]", f"staging = {_quote(manifest.staging)}"]
    lines.append(f"destination = {_quote(manifest.destination)}")
    if manifest.repo and manifest.revision:
        lines += ["", "[hub]", f"repo = {_quote(manifest.repo)}"]
        lines.append(f"revision = {_quote(manifest.revision)}")
        lines += ["gated = true"] if manifest.gated else []
    if manifest.golden:
        lines += ["", "[smoke]", f"golden = {_quote(manifest.golden)}"]
    if manifest.codec:
        lines += ["", "[speech]", f"codec = {_quote(manifest.codec)}"]
    for artifact in manifest.artifacts:
        lines += ["", "[[artifact]]", *render_artifact(artifact)]
    return "\n".join(lines) + "\n"


def render_artifact(artifact: Artifact) -> list[str]:
    """Return the lines below `[[artifact]]` in the canonical text."""
    lines = [f"{name} = {_quote(getattr(artifact, name))}" for name in ("path", "group", "format")]
    ids = {"blob_id": artifact.blob_id, "git_sha1": artifact.git_sha1}
    lines += _render_edition(artifact.editions[0], ids)
    if artifact.pieces:
        lines.append("pieces = [")
        lines += [
            f"  {{ part = {_quote(p.part)}, offset = {p.offset}, size = {p.size},"
            f' sha256 = "{p.sha256}" }},'
            for p in artifact.pieces
        ]
        lines.append("]")
    for edition in artifact.alternatives:
        lines += ["", "[[artifact.alternative]]", *_render_edition(edition, {})]
    return lines


def _render_edition(edition: Edition, ids: Mapping[str, str | None]) -> list[str]:
    lines = [f"size = {edition.size}"]
    if edition.sha256:
        lines.append(f'sha256 = "{edition.sha256}"')
    lines += [f'{name} = "{value}"' for name, value in ids.items() if value]
    if edition.evidence:
        marks = ", ".join(f'{name} = "{mark}"' for name, mark in edition.evidence.items())
        lines.append(f"evidence = {{ {marks} }}")
    if edition.note:
        lines.append(f"note = {_quote(edition.note)}")
    if edition.text is not None:
        lines.append(f"text = {_quote(edition.text)}")
    return lines


def _quote(text: str) -> str:
    """Return a TOML basic string: JSON's escapes are all TOML's too, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")

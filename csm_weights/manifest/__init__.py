"""Manifests: what the files of a model must be, and where they may go.

Promises: a manifest is read whole or refused with every broken rule, within
limits of time and memory; `render` and `parse` are inverse. Never: asks a
server, or opens any other file than the manifest.

    from pathlib import Path
    from csm_weights.manifest.parse import load

    manifest = load(Path("manifests/csm-1b.toml"))
    for artifact in manifest.select(["safetensors", "config"]):
        print(artifact.path, artifact.size, artifact.sha256)
"""

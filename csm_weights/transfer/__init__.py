"""Bytes in: sources of pieces, the one order of asking them, and assembling with resume.

Promises: every byte is hashed as it is written; what was verified is kept, and
a later run does only the rest; wrong bytes of one source are replaced by
another's. Never: gives a file its final name, trusts a source or a journal, or
frees a byte of a chunk file that is not durable elsewhere.

    from pathlib import Path
    from csm_weights.manifest.parse import load
    from csm_weights.transfer.assemble import Assembly, assemble
    from csm_weights.transfer.local import ChunkFiles

    (artifact,) = load(Path("manifests/csm-1b.toml")).select(["model.safetensors"])
    job = Assembly(artifact, Path("output/model.safetensors"), ChunkFiles(Path.cwd()))
    (verified,) = assemble([job], on_progress=lambda count: None)
    print(verified.path, verified.size, verified.sha256)
"""

"""Bytes in: sources of pieces, the one order of asking them, and assembling with resume.

Promises: every byte is hashed as it is written; what was verified is kept, and
a later run does only the rest; wrong bytes of one source are replaced by
another's. Never: gives a file its final name, trusts a source or a journal, or
frees a byte of a chunk file that is not durable elsewhere.

    job = Assembly(artifact, Path("output/csm-1b/model.safetensors"), ChunkFiles(root))
    (verified,) = assemble([job], on_progress=print)
    install(verified.path, folder, receipt)
"""

"""Is it right: gates, checksum files, statements of provenance, seals.

Promised: the gates run over every file and yield every finding, cheap gates
first, and a gate that could not run is not a pass. Every byte that counts was
hashed against a digest of the manifest. What others signed or wrote is read
with bounds, as data.

Never: a gate repairs, moves or deletes nothing, and believes no receipt whose
fingerprint is not the file's. ::

    from csm_weights.verify import gates
    subjects = [gates.Subject(item.artifact, item.installed) for item in state.artifacts]
    results = gates.check(subjects, rehash=True, on_progress=lambda count: None)
    for result in results:
        print(result.gate, result.path, result.ok, result.found)
"""

"""Is it right: gates, checksum files, statements of provenance, seals.

Promises: the gates run over every file and yield every finding, cheap gates
first, and a gate that could not run is not a pass. Every byte that counts was
hashed against a digest of the manifest. What others signed or wrote is read
with bounds, as data.

Never: a gate repairs, moves or deletes nothing, and believes no receipt whose
fingerprint is not the file's.

    from pathlib import Path
    from csm_weights.manifest.parse import load
    from csm_weights.store.inspect import Paths, inspect
    from csm_weights.verify import gates

    manifest = load(Path("manifests/csm-1b.toml"))
    state = inspect(manifest, manifest.artifacts, Paths.of(manifest, Path.cwd()), known_bad={})
    subjects = [gates.Subject(item.artifact, item.installed) for item in state.artifacts]
    for result in gates.check(subjects, rehash=True, on_progress=lambda count: None):
        print(result.gate, result.path, result.ok, result.found)
"""

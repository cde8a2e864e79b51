"""The disk: inspect what is on it, and change it safely.

Promises: a file gets its final name only in `install.install`, in one rename,
after its bytes were verified and made durable, and its receipt comes last. A
receipt or journal is a hint that saves work; it never makes a wrong byte count.
Every write is durable before the next one depends on it, and none goes through
a link out of its folder.

Never: inspecting hashes nothing, writes nothing, and asks no server.

    from pathlib import Path
    from csm_weights.manifest.parse import load
    from csm_weights.store.inspect import Paths, inspect

    manifest = load(Path("manifests/csm-1b.toml"))
    state = inspect(manifest, manifest.artifacts, Paths.of(manifest, Path.cwd()), known_bad={})
    for item in state.artifacts:
        print(item.artifact.path, item.installed.state, item.installed.size)
"""

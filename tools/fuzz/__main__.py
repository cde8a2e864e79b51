"""One coverage-guided run: `python -m tools.fuzz TARGET FOLDER [libFuzzer's own options]`.

FOLDER keeps the corpus between runs. A crash, a hang of ten seconds or a
gigabyte of memory ends the run with a file that has the bytes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["csm_weights", "tomllib", "pickletools"]):
    from tools.fuzz.targets import TARGETS, seeds

#: Largest input, bytes: beyond what any rule but the ceilings looks at.
LARGEST = 1 << 14


def main() -> None:
    """Runs the target that the command line names."""
    name, folder, *options = sys.argv[1:]
    corpus = Path(folder) / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds(name):
        if len(seed) <= LARGEST:
            (corpus / hashlib.sha256(seed).hexdigest()).write_bytes(seed)
    limits = ["-timeout=10", "-rss_limit_mb=1024", f"-max_len={LARGEST}"]
    prefix = f"-artifact_prefix={folder}/{name}-"
    atheris.Setup([sys.argv[0], *limits, prefix, *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

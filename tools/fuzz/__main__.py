"""Run one fuzzer: `python -m tools.fuzz TARGET FOLDER [libFuzzer's own options]`.

FOLDER keeps the corpus between runs. A crash, a hang of ten seconds or a gigabyte of memory
ends the run, and the input is written to FOLDER.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

try:
    import atheris
except ModuleNotFoundError:
    sys.exit(
        "atheris is not installed, and is for Linux only."
        " Run `make fuzz`, or: pip install -c constraints.txt -e '.[fuzz]'"
    )

with atheris.instrument_imports(include=["csm_weights", "tomllib", "pickletools"]):
    from tools.fuzz.targets import TARGETS, seeds

#: Largest input in bytes: more than any rule needs, apart from the limits on size.
LARGEST = 1 << 14


def main() -> None:
    """Fuzz the target that the command line names."""
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

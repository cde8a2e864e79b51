"""The tasks as `python -m csm_weights`, which imports nothing else from the current folder."""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()]

from csm_weights.commands.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

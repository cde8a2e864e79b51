"""The tasks as `csm-weights`, which imports nothing from the current folder."""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()]

from csm_weights.commands.console import exit_on_interrupt  # noqa: E402

exit_on_interrupt()  # also while the other modules are imported

from csm_weights.commands.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

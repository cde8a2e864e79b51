"""An unfinished file that is written to, with its journal; `store.install` gives it its name."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from csm_weights.store.atomic import create, unlink_shared, write_all, writing
from csm_weights.store.block_io import OutputFile
from csm_weights.store.journal import Record, journal_path, partial_path
from csm_weights.untrusted import dump_record


class PartialFile:
    """The unfinished form of a file, open to go on with it; one is made where there is none.

    `target` is what its bytes are written to, `size` of them in the end. Raises NoSpace, and
    WrongContent where something is in the way.
    """

    def __init__(self, file: Path, size: int) -> None:
        self.path = partial_path(file)
        self._writing = threading.Lock()
        unlink_shared(self.path)
        # A journal whose partial has got its name says nothing of the next one.
        is_new = not self.path.exists()
        self.journal_fd = create(journal_path(file), os.O_APPEND | (os.O_TRUNC * is_new))
        self.target = OutputFile(self.path)
        with writing(self.path):
            os.ftruncate(self.target.fd, size)

    def close(self) -> None:
        """Close the file and its journal."""
        self.target.close()
        os.close(self.journal_fd)

    def journal(self, record: Record) -> None:
        """Write a line of the journal, from any thread."""
        with self._writing:
            # A line may follow one that a crash has torn, so it brings its own start.
            write_all(self.journal_fd, f"\n{dump_record(record)}\n".encode(), self.path)

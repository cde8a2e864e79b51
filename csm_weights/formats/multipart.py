"""One file, or the chunk files of one in order, read as one."""

from __future__ import annotations

import bisect
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from csm_weights.errors import Finding, WrongContent
from csm_weights.files import Fingerprint, NotRegular, open_regular
from csm_weights.untrusted import Malformed

#: What follows a file's name in the names of its chunk files, as `split` gives them.
_PART = re.compile(r"\.part-[a-z]{2,}")


def find_chunk_files(folder: Path, name: str) -> list[Path]:
    """Find the chunk files of the file called `name` in a folder, in order; empty without any."""
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.startswith(name) and _PART.fullmatch(path.name, len(name))
    ]
    return sorted(found, key=lambda path: (len(path.name), path.name))


class MultipartFile:
    """The content of one file, or of several in a row, open for reading.

    Reads are by position and may come from many threads. Raises OSError where
    a file cannot be opened, Malformed where one is not a regular file. A
    missing chunk file shows only in the structure of the content.
    """

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = tuple(map(Path, paths))
        self._fds: list[int] = []
        self.fingerprints: list[Fingerprint] = []
        self._starts = [0]
        try:
            for path in self.paths:
                self._fds.append(open_regular(path))
                status = os.fstat(self._fds[-1])
                self.fingerprints.append(Fingerprint.of(status))
                self._starts.append(self._starts[-1] + status.st_size)
        except NotRegular as error:
            self.close()
            raise Malformed("a regular file", str(error.strerror), str(error.filename)) from None
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of all files together, when they were opened."""
        return self._starts[-1]

    @property
    def where(self) -> str:
        """The file, or the first chunk file and how many more there are, for messages."""
        more = f" and {len(self.paths) - 1} more chunk files" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` from byte `offset` on; raises WrongContent where the bytes end."""
        title = "the weights ended early"
        done = 0
        while done < len(buffer):
            index = bisect.bisect_right(self._starts, offset + done) - 1
            if index >= len(self._fds):
                found = f"its end before byte {offset + len(buffer):,}"
                raise WrongContent(title, [Finding.changed(self.where, found)])
            within = offset + done - self._starts[index]
            room = min(len(buffer) - done, self._starts[index + 1] - offset - done)
            try:
                with buffer[done : done + room] as part:
                    count = os.preadv(self._fds[index], [part], within)
            except OSError as error:  # the system does not say of which file
                raise OSError(error.errno, error.strerror, str(self.paths[index])) from None
            if count == 0:
                raise WrongContent(title, [Finding.changed(self.paths[index], "a shorter one")])
            done += count

    def read(self, offset: int, size: int) -> bytes:
        """Read the half-open range `[offset, offset + size)`, shorter where the bytes end."""
        content = bytearray(max(0, min(size, self.size - offset)))
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def map(self) -> mmap.mmap | None:
        """Map a single file that holds anything privately; None for several.

        What is written there does not reach the file; what others write to the
        file while it is mapped may show.
        """
        if len(self._fds) != 1 or not self.size:
            return None
        return mmap.mmap(self._fds[0], self.size, access=mmap.ACCESS_COPY)

    def changes(self) -> list[Finding]:
        """Return a finding for each file that was written to since it was opened."""
        return [
            Finding.changed(path)
            for path, fd, before in zip(self.paths, self._fds, self.fingerprints, strict=True)
            if Fingerprint.of(os.fstat(fd)) != before
        ]

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_at(file: MultipartFile, offset: int, size: int) -> bytes:
    """Read exactly `size` bytes from byte `offset`; raises Malformed when the file is shorter."""
    content = file.read(offset, size)
    if len(content) != size:
        raise Malformed(f"{size} bytes at byte {offset}", f"{len(content)}")
    return content

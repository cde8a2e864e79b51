"""The page that a task writes of its result, for --report FILE; and a report by itself."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from csm_weights import progress
from csm_weights.errors import CsmWeightsError, UsageError
from csm_weights.hashing import sha256_of
from csm_weights.pipeline import apply, smoke_test
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Outcome, begin, gate_error, now
from csm_weights.progress import Event, Happening, Progress
from csm_weights.store.atomic import require_writable, write_whole


def report(request: Request) -> Outcome:
    """Run the gates over what is installed; a digest that a receipt has is not taken again.

    The smoke test is that of an earlier run of these files, if there was one. No server is asked.
    """
    session = begin(request)
    state = session.inspect()
    results = session.gate(state, rehash=False)
    smoke = smoke_test.known_report(state, require_gpu=False)
    is_known, error = smoke is not None, gate_error(results)
    return Outcome(state, results=results, smoke=smoke, smoke_is_known=is_known, error=error)


class Page:
    """The page of one run of a task: begin it before the work, write it in the end.

    It names this machine only with `names_host`.
    """

    def __init__(self, path: Path, option: str, command: str, names_host: bool) -> None:
        self._path, self._option, self._command = path, option, command
        self._host = platform.node() if names_host else ""
        self._request: Request | None = None
        self._events: list[Event] = []
        self._started = time.monotonic()

    def begin(self, request: Request) -> None:
        """Check that the page can be written, and listen to the progress of the work.

        Raises UsageError for another ending than .html, NoSpace.
        """
        if self._path.suffix not in (".html", ".htm"):
            raise UsageError(f"{self._option} {self._path}: the name of a page ends in .html")
        require_writable(self._path, self._option)
        self._request = request
        progress.listeners.append(self._events.append)

    def write(self, result: object, as_typed: Callable[[str], str]) -> CsmWeightsError | None:
        """Write the page of a result or an error; return why it cannot be written, if so.

        It shows what is on disk by then, and the commands in a text as `as_typed` gives
        them. Nothing is written where the page was not begun.
        """
        if self._request is None:
            return None
        progress.listeners.remove(self._events.append)
        from csm_weights.commands.render import html

        status, digest = None, ""
        with contextlib.suppress(CsmWeightsError, OSError):
            if self._command != "fleet":  # whose files are on its nodes
                status = apply.status(replace(self._request, consume=False))
                digest = sha256_of(Path(status.state.manifest.where))
        run = html.Run(
            command=self._command,
            made_at=now(),
            seconds=time.monotonic() - self._started,
            tool=f"csm-weights {version('csm-weights')}",
            manifest_sha256=digest,
            host=self._host,
            events=tuple(e for e in self._events if e.total and e.what != Happening.LOG),
            as_typed=as_typed,
        )
        try:
            write_whole(self._path, html.render(result, status, run))
        except CsmWeightsError as error:
            return error
        Progress("page").log(str(self._path))
        return None

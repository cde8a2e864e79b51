"""Write the result of a task for others than the person who typed it: files, GitHub Actions."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from csm_weights.config import user_path
from csm_weights.errors import CsmWeightsError, NoSpace
from csm_weights.files import read_bounded
from csm_weights.progress import taken
from csm_weights.store.atomic import write_whole

if TYPE_CHECKING:
    from csm_weights.commands.page import Page
    from csm_weights.commands.render.verdict import Ended


def write(
    result: object,
    command: str,
    model: tuple[Path, str],
    seconds: float,
    files: Mapping[str, str],
    as_typed: Callable[[str], str],
    page: Page | None = None,
) -> CsmWeightsError | None:
    """Write a result to files, and on GitHub as annotations and a summary.

    `model` is the root and the name of the model, or its manifest's path. `files`
    are paths by the form of their content: junit, verdict or metrics. `as_typed`
    makes the commands in a text those that a person types. Return the error
    of the first file that cannot be written.
    """
    files = {form: path for form, path in files.items() if path}
    on_github = os.environ.get("GITHUB_ACTIONS") == "true"
    summary = os.environ.get("GITHUB_STEP_SUMMARY", "")
    problems = [page.write(result, as_typed)] if page else []
    if not files and not on_github and not summary:
        return next(filter(None, problems), None)
    from csm_weights.commands.render import github, junit, verdict
    from csm_weights.pipeline.request import known_name

    ended = verdict.Ended(command, known_name(*model) or model[1], result, seconds)
    if on_github:
        workspace = os.environ.get("GITHUB_WORKSPACE")
        for line in github.annotate(ended, Path(workspace) if workspace else None):
            print(as_typed(line), file=sys.stderr, flush=True)  # noqa: T201
    if summary:
        with contextlib.suppress(OSError):
            append(Path(summary), as_typed(github.summary(ended)))
    forms = {"junit": junit.render, "verdict": verdict.render}
    for form, path in files.items():
        try:
            if form == "metrics":
                _write_metrics(user_path(path), ended)
                continue
            # In place: in a pod the file is a mount, and its folder may only be read.
            user_path(path).write_text(as_typed(forms[form](ended)) + "\n", encoding="utf-8")
        except OSError as error:
            problems.append(NoSpace(f"--{form} {path} cannot be written: {error.strerror}"))
        except CsmWeightsError as error:
            found = "".join(finding.found for finding in error.findings[:1])
            problems.append(NoSpace(f"--{form} {path} cannot be written: {found}"))
    return next(filter(None, problems), None)


def _write_metrics(path: Path, ended: Ended) -> None:
    """Write the figures of a task in one rename; an earlier success stays in the file."""
    before = ""
    with contextlib.suppress(OSError):
        before = read_bounded(path, 64 << 10).decode(errors="replace")
    from csm_weights.commands.render import metrics

    write_whole(path.absolute(), metrics.render(ended, dict(taken), before, time.time()))


def append(path: Path, text: str) -> None:
    """Add a text to a file that GitHub reads after a step; raises OSError."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)

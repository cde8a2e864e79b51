"""Make a task of a function: its options, help, exit code and rendering."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task

from csm_weights.errors import NoSpace, UsageError, did_you_mean

if TYPE_CHECKING:
    from csm_weights.commands.page import Page
    from csm_weights.pipeline.request import Request

#: The default of an option that has to be given.
REQUIRED = inspect.Parameter.empty

#: Options that several tasks have: the default (None: it may be repeated), and the help.
OPTIONS: dict[str, tuple[str | bool | None, str]] = {
    "model": ("csm-1b", "name in manifests/, or path of a manifest (default: csm-1b)"),
    "only": ("", "formats, groups or files: safetensors, ckpt, prompts, all, ...; comma-separated"),
    "dest": ("", "folder of the installed files, anywhere (default: the manifest's)"),
    "staging": ("", "folder of unfinished files, anywhere (default: the manifest's)"),
    "source": (
        "auto",
        "where to get pieces: chunks, hf, mirror, or auto for any of them (default)",
    ),
    "url": (
        None,
        "https:// or file:/// URL of a folder with files or chunk files; may be repeated",
    ),
    "cache": (None, "shared folder laid out as HF_HUB_CACHE, only read; may be repeated"),
    "revision": ("", "another commit, branch or tag of the repository; the digests stay the same"),
    "consume": (
        False,
        "remove the chunk files while their file grows, for a disk without room for both",
    ),
    "patience": ("", "seconds to keep trying a server that sends nothing (default: 60)"),
    "limit_rate": ("", "bytes a second of all downloads together: 500K, 20M, 1G (K is 1024)"),
    "block_digests": (
        False,
        "also keep the sha256 of each 8 MiB block in the receipts: later loads with verify=True"
        " then hash on all cores",
    ),
    "seal": (False, "make the installed files read-only, with fs-verity where it is supported"),
    "dry": (False, "show what would be done, and do nothing"),
    "require_gpu": (False, "exit with 77 unless the smoke test runs on a GPU"),
    "require_fast": (False, "fail unless every fast path of the GPU gives the reference's frames"),
    "json": (False, "print the result as JSON on stdout, and errors too"),
    "progress": ("auto", "auto, or json: what is done, one JSON object a line on stderr"),
    "junit": ("", "file to write the result to as JUnit XML, for CI systems"),
    "verdict": ("", "file to write the verdict to, in one line: /dev/termination-log in a pod"),
    "with_": ("", "also get what goes with the model: speak, for its tokenizer and codec"),
    "metrics": ("", "file to write the run's figures to, in OpenMetrics' text format: FILE.prom"),
    "report": ("", "also write the result, or the error, as a page for a browser: FILE.html"),
    "host": (False, "name this machine on the page"),
}

#: Options of every task about files that are here, and of those that fetch them.
FILES = ("model", "only", "dest", "junit", "verdict", "metrics")
SOURCES = (*FILES, "staging", "source", "url", "cache", "revision")

#: Options of every task that fetches files.
FETCHING = ("consume", "patience", "limit_rate", "block_digests")

#: Options of every task whose result can be a page.
PAGE = ("report", "host")

#: Options that name files or folders and whose `~` is replaced here; of others it is where
#: they are read.
PATHS = (
    *("model", "path", "also", "file", "out", "manifest", "context", "tokenizer", "codec"),
    *("key", "new_key", "attestation", "sums", "report", "html"),
)

#: Options that name a file for the result, in the form of that name; see `console`.
WRITTEN = ("junit", "verdict", "metrics")

#: The words that --progress takes: for a person, and for a program.
PROGRESS = ("auto", "json")

#: Options that go into the request of a task.
REQUEST = (*("model", "only", "dest", "staging", "source", "url", "cache", "revision"), *FETCHING)


class _Task(Task[Any]):
    """A task that Invoke does not copy when it loads a collection, which takes milliseconds."""

    def __deepcopy__(self, memo: object) -> Self:
        return self


class _Function(Protocol):
    __name__: str

    def __call__(self, *args: Any, **options: Any) -> object: ...


def task(*names: str, **own: tuple[Any, str]) -> Callable[[_Function], Task[Any]]:
    """Make a task of a function that returns what is to be shown.

    Its options are those of `OPTIONS` with these `names`, its `own`: their default and
    help, `--progress` and `--json`. The function's first argument is called `request`, and
    made of the options in `REQUEST`; or `root`, the folder with manifests/. It
    gets all other options by their names. The result is printed as text or
    JSON, and written to the files that options of `WRITTEN` and `PAGE` name; the error that
    it carries, or that is raised, ends the process with its exit code.
    """
    options = own | {name: OPTIONS[name] for name in (*names, "progress", "json")}

    def make(function: _Function) -> Task[Any]:
        name, takes = function.__name__.replace("_", "-"), inspect.signature(function).parameters

        def body(context: Context, /, **given: Any) -> None:
            as_json, root = given.pop("json"), Path(context.config.csm_weights.root)
            given |= {key: _at_home(given[key]) for key in PATHS if key in given}
            files = {key: given.pop(key) for key in WRITTEN if key in given}
            empty = [key for key in required if not given[key]]
            page, progress = _page(given, name), given.pop("progress")

            def call() -> object:
                try:
                    return act()
                except NoSpace as error:
                    if not any("--" in finding.help for finding in error.findings):
                        error.advice = error.advice or folders
                    raise

            def act() -> object:
                _refuse_core_options(context, name)
                if progress not in PROGRESS:
                    hint = did_you_mean(progress, PROGRESS) or "; there are auto and json"
                    raise UsageError(f"no progress called {progress!r}{hint}")
                if empty:
                    raise UsageError(needs(name, empty))
                if "root" in takes:
                    return function(root, **given)
                asked = {key: given.pop(key) for key in REQUEST if key in given}
                request = make_request(root, **asked)
                if page:
                    page.begin(request)
                return function(request, **given)

            from csm_weights.commands import console

            # Two files that are named are of no model that is known.
            model = "" if given.get("file") else given.get("model", "")
            if code := console.run(call, as_json, name, (root, model), files, page, progress):
                raise Exit(code=code)

        required = [key for key, (default, _) in options.items() if default is REQUIRED]
        folders = "" if "staging" not in options else "--staging and --dest name other folders"
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        defaults = {"_context": REQUIRED} | {key: default for key, (default, _) in options.items()}
        parameters = [inspect.Parameter(key, kind, default=defaults[key]) for key in defaults]
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        body.__name__, body.__doc__ = function.__name__, function.__doc__
        helps = {key: text for key, (_, text) in options.items()}
        iterable = [key for key, default in defaults.items() if default is None]
        return _Task(body, name, iterable=iterable, help=helps, auto_shortflags=False)

    return make


def _at_home(value: str | list[str]) -> str | list[str]:
    """Return paths with the folder that `~` names; a shell leaves it in --option=~/file."""
    if isinstance(value, list):
        return [*map(os.path.expanduser, value)]
    return os.path.expanduser(value)  # noqa: PTH111 # pathlib's raises for an unknown user


def _page(given: dict[str, Any], name: str) -> Page | None:
    """Return the page that options ask for, and take these options out."""
    host, paths = given.pop("host", False), {key: given.pop(key, "") for key in ("report", "html")}
    option, path = next((item for item in paths.items() if item[1]), ("", ""))
    if not path:
        return None
    from csm_weights.commands.page import Page

    return Page(Path(path), f"--{option}", name, host)


def needs(task: str, names: Sequence[str]) -> str:
    """Return what to say of options that have to be given."""
    options = ", ".join(f"--{name}" for name in names)
    return f"{task} needs {options}; see inv --help {task}"


def make_request(root: Path, **options: Any) -> Request:
    """Return the request that options of the command line make."""
    from csm_weights.config import parse_patience, parse_rate
    from csm_weights.pipeline.request import Request

    only, url, patience = (options.pop(name, "") for name in ("only", "url", "patience"))
    return Request(
        root,
        only=tuple(stripped for word in only.split(",") if (stripped := word.strip())),
        dest=options.pop("dest", "") or None,
        staging=options.pop("staging", "") or None,
        urls=tuple(url or ()),
        caches=tuple(options.pop("cache", None) or ()),
        revision=options.pop("revision", "") or None,
        patience=parse_patience(patience),
        limit_rate=parse_rate(options.pop("limit_rate", "")),
        **options,
    )


def _refuse_core_options(context: Context, name: str) -> None:
    """Raise UsageError where Invoke takes an option for its own and the task would ignore it."""
    after = sys.argv[sys.argv.index(name) + 1 :] if name in sys.argv else []
    if context.config.run.dry and "--dry" in after:
        raise UsageError(f"{name} has no --dry; see inv --help {name}")
    if context.config.run.dry:
        raise UsageError(
            "--dry before a task is Invoke's own option, and files would be written all the same;"
            f" put it after the task: inv {name} --dry"
        )
    if letters := [word for word in after if re.fullmatch(r"-[A-Za-z]\w*", word)]:
        raise UsageError(f"{name} has no {letters[0]}, only long options; see inv --help {name}")

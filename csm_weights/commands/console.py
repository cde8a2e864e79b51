"""How a task meets a person: streams, signals, colours, and commands as they are typed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO

from csm_weights import errors
from csm_weights.errors import CsmWeightsError, NoSpace

if TYPE_CHECKING:
    from csm_weights.commands.page import Page
    from csm_weights.progress import JsonLines

#: The program that a person typed where it is not inv, such as "make": messages name its commands.
TYPED = "CSM_WEIGHTS_TYPED"

#: What a person writes after make for an option of a task.
MAKE = {
    **{f"--{name}": name.upper() for name in ("model", "only", "dest", "staging", "source", "url")},
    **{f"--{name}": name.upper() for name in ("cache", "revision", "patience", "file", "key")},
    **{f"--{name}": name.upper() for name in ("out", "seed", "with", "report")},
    "--limit-rate": "LIMIT_RATE",
    "--path": "FILE",
    "--html": "OUT",
    "--text": "TEXT",
    "--to": "TO",
    "--consume": "CONSUME=1",
    "--seal": "SEAL=1",
    "--no-smoke": "SMOKE=no",
}


def run(
    call: Callable[[], object],
    as_json: bool = False,
    command: str = "",
    model: tuple[Path, str] = (Path(), ""),
    files: Mapping[str, str] | None = None,
    page: Page | None = None,
    progress: str = "auto",
) -> int:
    """Show what a call of the task `command` returns or raises; return the exit code.

    `model` is the root and the model that it is about, which an error as JSON names.
    `files` are paths to write the result to, by their form, and `page` its page; see `reports`.
    With the `progress` json there is nothing but JSON on stderr.
    Until it ends, an interrupt and a termination signal raise KeyboardInterrupt.
    """
    _open_streams()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    at_interrupt = signal.getsignal(signal.SIGINT)
    try:
        if at_interrupt is _exit:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.ExitStack() as listening:
            lines: JsonLines | None = None
            if progress == "json":
                from csm_weights.progress import JsonLines

                lines = listening.enter_context(JsonLines(command))
            start = time.monotonic()
            result = _result_of(call, command)
            problem = None
            if command:
                from csm_weights.commands import reports

                took = time.monotonic() - start
                problem = reports.write(result, command, model, took, files or {}, _as_typed, page)
            return _show(result, as_json, command, model, problem, lines)
    except KeyboardInterrupt:
        # During an import, or while the result was printed.
        return errors.Interrupted.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
        if at_interrupt is _exit:
            signal.signal(signal.SIGINT, _exit)


def exit_unprinted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End the program where a list or help of Invoke's cannot be printed, as where a result cannot.

    It is Python's `excepthook`: anything else is a bug, and is shown as one.
    """
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
        return sys.__excepthook__(kind, error, trace)
    if isinstance(error, BrokenPipeError):
        os._exit(0)
    with contextlib.suppress(OSError):
        print(f"error: the result cannot be printed: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(NoSpace.exit_code)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the program without a word as long as no task runs, as during imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(*_: object) -> NoReturn:
    sys.exit(errors.Interrupted.exit_code)


def _result_of(call: Callable[[], object], command: str) -> object:
    """Return what a call returns, or the error of this package for what it raises."""
    try:
        if not command:
            return call()
        from csm_weights.progress import Progress, taken

        taken.clear()
        with Progress(command):
            return call()
    except CsmWeightsError as error:
        return error
    except OSError as error:
        return errors.from_os_error(error)
    except KeyboardInterrupt:
        message = "interrupted; what was verified is kept, run the same command again"
        return errors.Interrupted(message)
    except UnicodeEncodeError as error:
        return errors.UsageError(
            f"the name {ascii(str(error.object))[:200]} cannot be written in {error.encoding}, the"
            " encoding of this locale; set PYTHONUTF8=1, or a UTF-8 locale"
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "start new thread" not in str(error):
            raise
        return CsmWeightsError("out of memory: free some, or raise the limit (ulimit -v)")


def _show(
    result: object,
    as_json: bool,
    command: str,
    model: tuple[Path, str],
    problem: CsmWeightsError | None = None,
    lines: JsonLines | None = None,
) -> int:
    """Print a result on stdout and its error, or else a `problem`, on stderr; return the code.

    Where stderr has `lines` of JSON, the error is one of them.
    """
    own = result if isinstance(result, CsmWeightsError) else getattr(result, "error", None)
    error: CsmWeightsError | None = own or problem
    try:
        if as_json:
            from csm_weights.commands.render import json
            from csm_weights.pipeline.request import known_name

            known = known_name(*model) if result is own else None
            _print(json.render(result, command, known), sys.stdout)
        elif result is not own:
            from csm_weights.commands.render import text

            shown = text.render(result) + ("\n" if error else "")
            _print(_coloured(_as_typed(shown), sys.stdout), sys.stdout)
    except OSError as failed:
        error = NoSpace(f"the result cannot be printed: {failed.strerror}")
    if lines:
        lines.end(error)
    elif error:
        from csm_weights.commands.render import blocks

        with contextlib.suppress(OSError):
            _print(_coloured(blocks.error(_error_as_typed(error)), sys.stderr), sys.stderr)
    return error.exit_code if error else 0


def _print(text: str, stream: TextIO | None) -> None:
    """Print a text; that nobody reads it any more is no error."""
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What is left in the stream's buffer would fail again when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _as_typed(text: str) -> str:
    """Return a text with the commands that a person types; what is quoted, or in a path, stays."""
    if not (typed := os.environ.get(TYPED)):
        return text
    from csm_weights.commands.render.blocks import COMMAND

    if typed == "make":
        option = r"(?<![^\s(])--[a-z-]+(?=[=\s]|[,;:.)]+(?:\s|$)|$)"
        text = re.sub(r"(?<![\w./-])hf auth login", ".venv/bin/hf auth login", text)
        return re.sub(rf"(?<![\w./-]){COMMAND.pattern}|{option}", _make_words, text)
    return COMMAND.sub(lambda command: typed + command[0].removeprefix("inv"), text)


def _error_as_typed(error: CsmWeightsError) -> CsmWeightsError:
    """Return an error with the commands that a person types; paths and what was found stay."""
    if TYPED not in os.environ:
        return error
    findings = [replace(f, help=_as_typed(f.help)) for f in error.findings]
    return type(error)(_as_typed(error.message), findings, _as_typed(error.advice))


def _coloured(text: str, stream: TextIO | None) -> str:
    """Return a text in colour, for a terminal that has it."""
    has_colour = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    if not has_colour or os.environ.get("NO_COLOR"):
        return text
    text = re.sub(r"^OK\b", "\x1b[32m\\g<0>\x1b[0m", text, flags=re.MULTILINE)
    return re.sub(r"^(NOT OK|error)\b", "\x1b[31m\\g<0>\x1b[0m", text, flags=re.MULTILINE)


def _make_words(found: re.Match[str]) -> str:
    """Return a command or an option of inv as one of make, or as it is where make has none."""
    words = found[0]
    if not words.startswith("inv "):
        return MAKE.get(words, words)
    options = re.findall(r" (--[a-z-]+)(?:[= ]([^\s-]\S*))?", words)
    if not all(name in MAKE for name, _ in options):
        return f".venv/bin/{words}"
    given = [f"{MAKE[name]}={value}" if value else MAKE[name] for name, value in options]
    return " ".join(["make", words.split(" ")[1], *given])


def _open_streams() -> None:
    """Make file descriptors 0 to 2 somebody's, and the streams print any name.

    A file that is opened while one of them is closed would get its number, and
    with it what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")

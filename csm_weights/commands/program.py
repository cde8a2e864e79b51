"""Start the program: Ctrl-C, an empty command line, and words that no task knows."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from invoke.collection import Collection
from invoke.exceptions import ParseError
from invoke.parser import Parser
from invoke.program import Program

from csm_weights.commands.task import needs
from csm_weights.errors import UsageError, did_you_mean, printable


def start(tasks: Collection) -> None:
    """Let Ctrl-C end the program from here on, and end it for what its own parser would refuse.

    And where there are no words at all: then the tasks are shown.
    """
    from csm_weights.commands import console

    console.exit_on_interrupt()
    sys.excepthook = console.exit_unprinted
    if not (words := sys.argv[1:]):
        sys.exit(console.run(lambda: _overview(tasks)))
    if code := console.run(lambda: refuse_typos(tasks, words)):
        sys.exit(code)


def refuse_typos(tasks: Collection, words: Sequence[str]) -> None:
    """Raise UsageError with a suggestion where Invoke's own parser would refuse a command line."""
    helps = {name: tasks[name].help.copy() for name in tasks.task_names}
    core = Parser(initial=Program().initial_context, ignore_unknown=True)
    try:
        parsed = core.parse_argv(list(words))
        if parsed.unparsed:
            Parser(tasks.to_contexts(), Program().initial_context).parse_argv(parsed.unparsed)
        if isinstance(asked := parsed[0].args.help.value, str) and asked not in helps:
            raise ParseError(f"No idea what {asked!r} is!")
    except (ParseError, ValueError) as error:
        raise UsageError(printable(_explained(error, tasks))) from None
    finally:  # to_contexts takes the help out of the tasks
        for name, texts in helps.items():
            tasks[name].help = texts


def _overview(tasks: Collection) -> str:
    from csm_weights.commands.render.blocks import table

    rows = [(name, (tasks[name].__doc__ or "").rstrip(".")) for name in sorted(tasks.task_names)]
    return (
        "inv TASK [--option ...] gets a model onto this machine and verifies every byte.\n\n"
        f"{table(('task', 'what it does'), rows)}\n\n"
        "Begin with inv doctor, then inv weights. inv --help TASK explains its options."
    )


def _explained(error: ParseError | ValueError, tasks: Collection) -> str:
    """Return what Invoke's parser found, and what was most likely meant."""
    from csm_weights.pipeline.request import manifests

    if isinstance(error, ValueError):
        return f"{str(error).rpartition(': ')[2]} is not a number"
    if valueless := re.match("Flag <Argument: ([a-z-]+)", str(error)):
        return f"--{valueless[1]} needs a value"
    if lacking := re.match("'(.*)' did not receive required positional arg.*?: (.*)", str(error)):
        names = re.findall("'(.*?)'", lacking[2])
        positional = error.context.positional_args if error.context else []
        if len(names) == len(positional) == 1:
            return f"{lacking[1]} needs {names[0].upper()}: inv {lacking[1]} {names[0].upper()}"
        return needs(lacking[1], names)
    unknown = re.match("No idea what '(.*)' is!", str(error), re.DOTALL)
    if not unknown:
        return str(error)
    word, task = unknown[1], error.context
    root = Path(tasks.configuration()["csm_weights"]["root"])
    models = [path.stem for path in manifests(root)]
    if task and task.name and word in models:
        return f"{task.name} takes a model as an option: inv {task.name} --model {word}"
    hint = did_you_mean(word, [*tasks.task_names, *(task.flags if task else [])])
    if task and "--model" in task.flags and not hint:
        hint = did_you_mean(word, models).replace("did you mean", "did you mean --model")
    see = f"inv --help {task.name}" if task and task.name else "inv --list"
    return f"there is no task or option {word!r}{hint or f'; see {see}'}"

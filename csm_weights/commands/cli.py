"""The tasks: their options, help, exit codes and rendering, each written once.

`collection(root)` makes Invoke's collection of them, for tasks.py or for a
console program (`invoke.Program(namespace=collection(root)).run()`).
Listing the tasks imports nothing of the package but this and its errors.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit, ParseError
from invoke.parser import Parser
from invoke.program import Program
from invoke.tasks import Task

from csm_weights.errors import UsageError, did_you_mean, printable

if TYPE_CHECKING:
    from csm_weights.pipeline.plan import Target
    from csm_weights.pipeline.request import Request
    from csm_weights.pipeline.session import Outcome


#: Options that several tasks have: the default (None: it may be repeated), and the help.
OPTIONS: dict[str, tuple[str | bool | None, str]] = {
    "model": ("csm-1b", "a name in manifests/, or the path of a manifest (default csm-1b)"),
    "only": ("", "formats, groups or files: safetensors, ckpt, prompts, all, ...; with commas"),
    "dest": ("", "the folder for the files, instead of the manifest's; below the repository"),
    "source": ("auto", "where pieces come from: auto (any of them), chunks, mirror or hf"),
    "url": (None, "a mirror: the URL of a folder with the files or chunk files; may be repeated"),
    "revision": ("", "another commit, branch or tag of the repository; the same digests decide"),
    "consume": (False, "free the chunk files as their file grows, on a disk without room for both"),
    "patience": ("", "seconds that a server may give nothing before the run gives up (default 60)"),
    "seal": (False, "make the installed files read-only, and turn on fs-verity where there is"),
    "dry": (False, "show what would be done, and do nothing"),
    "require_gpu": (False, "exit 77 unless the smoke test runs on a GPU"),
    "json": (False, "print the result as JSON on stdout, also when it fails"),
}

#: Options of every task about files that are here, and of those that fetch them.
FILES = ("model", "only", "dest", "json")
SOURCES = (*FILES, "source", "url", "revision")


class _Function(Protocol):
    __name__: str

    def __call__(self, *args: Any, **options: Any) -> object: ...


def task(*names: str, **helps: str) -> Callable[[_Function], Task[Any]]:
    """Make a task of a function that returns what is to be shown.

    Args:
        names: Shared options of the task. Those that the function has no
            parameter for go into the `Request` that it gets first.
        helps: Help for the function's own options, or in place of the shared one.

    The function's first parameter is `request`, or else `root`, the folder
    with manifests/. Its other parameters are options, named and defaulted as
    they are there. The result is printed as text or JSON; the error that it
    carries, or that is raised, ends the process with its exit code.
    """

    def make(function: _Function) -> Task[Any]:
        first, *own = inspect.signature(function).parameters.values()
        name = function.__name__.replace("_", "-")

        def body(context: Context, **options: Any) -> None:
            as_json = options.pop("json", False)
            given = {parameter.name: options.pop(parameter.name) for parameter in own}

            def call() -> object:
                _refuse_core_options(context, name)
                root = Path(context.config.csm_weights.root)
                target = root if first.name == "root" else make_request(root, **options)
                return function(target, **given)

            from csm_weights.commands import console

            if code := console.run(call, as_json, name):
                raise Exit(code=code)

        shared = [n for n in names if n not in {parameter.name for parameter in own}]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, kind, default=OPTIONS[n][0]) for n in shared]
        parameters = [inspect.Parameter("context", kind), *own, *parameters]
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        body.__name__, body.__doc__ = function.__name__, function.__doc__
        known = {n: OPTIONS[n][1] for n in [*shared, *(p.name for p in own)] if n in OPTIONS}
        iterable = [parameter.name for parameter in parameters if parameter.default is None]
        return Task(body, name, iterable=iterable, help=known | helps, auto_shortflags=False)

    return make


def collection(root: Path, *more: Task[Any]) -> Collection:
    """Return the tasks below, and `more` of them, for the checkout at `root`."""
    made = Collection(*(one for one in globals().values() if isinstance(one, Task)), *more)
    made.configure({"csm_weights": {"root": str(root)}})
    return made


def refuse_typos(tasks: Collection, words: Sequence[str]) -> None:
    """Raise Exit with a suggestion where Invoke's own parser would refuse a command line."""
    helps = {name: tasks[name].help.copy() for name in tasks.task_names}
    core = Parser(initial=Program().initial_context, ignore_unknown=True)
    try:
        parsed = core.parse_argv(list(words))
        if parsed.unparsed:
            Parser(tasks.to_contexts(), Program().initial_context).parse_argv(parsed.unparsed)
        if isinstance(asked := parsed[0].args.help.value, str) and asked not in helps:
            raise ParseError(f"No idea what {asked!r} is!")
    except (ParseError, ValueError) as error:
        message = printable(f"error: {_explained(error, tasks)}")
        raise Exit(message, code=UsageError.exit_code) from None
    finally:  # to_contexts takes the help out of the tasks
        for name, texts in helps.items():
            tasks[name].help = texts


def _explained(error: ParseError | ValueError, tasks: Collection) -> str:
    """Return what Invoke's parser found, and what was most likely meant."""
    if isinstance(error, ValueError):
        return f"{str(error).rpartition(': ')[2]} is not a number"
    if valueless := re.match("Flag <Argument: ([a-z-]+)", str(error)):
        return f"--{valueless[1]} needs a value"
    unknown = re.match("No idea what '(.*)' is!", str(error), re.DOTALL)
    if not unknown:
        return str(error)
    word, task = unknown[1], error.context
    manifests = Path(tasks.configuration()["csm_weights"]["root"], "manifests")
    if task and task.name and (manifests / f"{word}.toml").is_file():
        return f"{task.name} takes a model as an option: inv {task.name} --model {word}"
    known = [*tasks.task_names, *(task.flags if task else [])]
    return f"there is no task or option {word!r}{did_you_mean(word, known)}"


def make_request(root: Path, **options: Any) -> Request:
    """Return the request that options of the command line make."""
    from csm_weights.config import parse_patience
    from csm_weights.pipeline.request import Request

    only, url, patience = (options.pop(name, "") for name in ("only", "url", "patience"))
    return Request(
        root,
        only=tuple(stripped for word in only.split(",") if (stripped := word.strip())),
        dest=options.pop("dest", "") or None,
        urls=tuple(url or ()),
        revision=options.pop("revision", "") or None,
        patience=parse_patience(patience),
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


# ---- the tasks


@task(
    *(*SOURCES, "consume", "patience", "seal", "dry", "require_gpu"),
    smoke="--no-smoke leaves the smoke test out, and needs no torch",
)
def weights(
    request: Request,
    smoke: bool = True,
    require_gpu: bool = False,
    seal: bool = False,
    dry: bool = False,
) -> object:
    """Join or download, verify, install and smoke-test a model."""
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.plan import Target

    if dry:
        return apply.plan(request, Target.BOTH)
    return _sealed(request, apply.weights(request, smoke, require_gpu), seal)


@task(*SOURCES, "consume", check="exit 3 or 4 unless every file is installed and verified")
def status(request: Request, check: bool = False) -> object:
    """Show what is here, what is missing, and what would be done."""
    from csm_weights.pipeline import apply

    return apply.status(request, check=check)


@task(*SOURCES, "consume", "patience", "seal", "dry")
def fetch(request: Request, seal: bool = False, dry: bool = False) -> object:
    """Join or download the files into output/, or into --dest, and verify them."""
    from csm_weights.pipeline.plan import Target

    if seal and not request.dest:
        raise UsageError("--seal makes installed files read-only; fetch installs only with --dest")
    return _act(request, Target.BOTH if request.dest else Target.STAGED, seal, dry)


@task(*FILES, "seal", "dry")
def place(request: Request, seal: bool = False, dry: bool = False) -> object:
    """Install verified files: move them from output/ to the destination."""
    from csm_weights.pipeline.plan import Target

    return _act(request, Target.PLACED, seal, dry)


def _act(request: Request, target: Target, seal: bool, dry: bool) -> object:
    from csm_weights.pipeline import apply

    if dry:
        return apply.plan(request, target)
    return _sealed(request, apply.apply(request, target), seal)


def _sealed(request: Request, done: Outcome, seal: bool) -> Outcome:
    if not seal:
        return done
    from csm_weights.commands.seal import seal_placed

    return seal_placed(request, done)


@task(
    *FILES,
    sums="also check the files against this SHA256SUMS file",
    write_sums="write SHA256SUMS beside the files, once they are verified",
    attestation="a file of `inv attest`: check the installed files against it",
    key="the public key (PEM) that must have signed the attestation",
)
def verify(
    request: Request,
    sums: str = "",
    write_sums: bool = False,
    attestation: str = "",
    key: str = "",
) -> object:
    """Hash the installed files again and run all gates; asks no server."""
    from csm_weights.commands import attest, verify

    if attestation:
        return attest.verify(request, attestation, key, sums or None, write_sums)
    if key:
        raise UsageError(
            "--key goes with --attestation FILE: it is the public key that must have signed it"
        )
    return verify.verify(request, sums or None, write_sums)


@task(
    *FILES,
    out="the file to write (default NAME.intoto.json beside the files)",
    key="sign with this private key, in PEM; a passphrase is read from CSM_KEY_PASSPHRASE",
    new_key="sign with a new Ed25519 key, kept in this file and, the public one, in FILE.pub",
)
def attest(request: Request, out: str = "", key: str = "", new_key: str = "") -> object:
    """Hash the installed files and write where they come from, as an in-toto statement."""
    from csm_weights.commands import attest

    return attest.attest_files(request, out, key, new_key)


@task(
    *(*FILES, "require_gpu"),
    device="a device of torch: cpu, cuda, cuda:1; default a GPU if there is one",
    frames="how many frames of 80 ms to make (default 8)",
    dtype="float32, bfloat16 or float16; default bfloat16 on a GPU, float32 on the CPU",
    max_rtf="fail where a second of audio takes more seconds than this (default: no limit)",
    record="record golden frames in manifests/ instead (CPU)",
)
def smoke(
    request: Request,
    device: str = "",
    require_gpu: bool = False,
    frames: int = 8,
    dtype: str = "",
    max_rtf: float = 0.0,
    record: bool = False,
) -> object:
    """Load the installed model, generate some frames, and check them."""
    from csm_weights.commands import smoke

    if record:
        return str(smoke.record_golden(request, frames))
    return smoke.smoke(request, device or None, require_gpu, frames, dtype or None, max_rtf or None)


@task(
    *(*SOURCES, "consume"),
    smoke="--no-smoke leaves out what the smoke test needs, as with weights",
    offline="check instead which repositories that CSM needs to speak offline are in the cache",
)
def doctor(request: Request, smoke: bool = True, offline: bool = False) -> object:
    """Find out what stands in the way of weights, before anything is downloaded."""
    from csm_weights.commands import doctor

    return doctor.closure(request) if offline else doctor.examine(request, smoke)


@task(
    *(*FILES, "dry"),
    move_main="make main this commit, even where it is another one",
)
def seed_cache(request: Request, move_main: bool = False, dry: bool = False) -> object:
    """Link the installed files into the Hub's cache, for other programs."""
    from csm_weights.commands import seed_cache

    return seed_cache.seed_cache(request, move_main, dry)


@task(
    *("model", "dest", "json"),
    file="a file of weights, its chunk files, shards, or a folder; may be given twice (default: "
    "the model's two formats, or with one file what is here of the model)",
)
def compare(request: Request, file: Sequence[str] | None = None) -> object:
    """Check that two files of weights hold equal tensors; name the first that differs."""
    from csm_weights.commands import compare

    return compare.compare(request, *map(Path, file or ()))


@task(
    "json",
    path="a file of weights, one of its chunk files or shards, or a folder of them",
    also="another one; may be repeated",
)
def identify(root: Path, path: str, also: Sequence[str] | None = None) -> object:
    """Tell what weights are: network, layout, dtype, and which known release they equal."""
    from csm_weights.commands import identify

    return identify.identify_paths(root, [Path(one) for one in (path, *(also or ()))])


@task(
    file="the file to split",
    chunks="the folder for the chunk files, below chunks/",
    size="bytes of a chunk file: 1073741824, 1GiB, 500MB, ...",
    manifest="the manifest to write the entry to (made if new); else it is printed",
)
def split(
    root: Path,
    file: str,
    chunks: str = "",
    size: str = "1GiB",
    manifest: str = "",
    dry: bool = False,
) -> object:
    """Split a file into chunk files, with SHA256SUMS and a manifest entry."""
    from csm_weights.commands import split

    return split.split(root, Path(file), chunks, size, manifest, dry)


@task(
    model="a name in manifests/, or a manifest's path (default csm-1b, or the name in --repo)",
    repo="ORG/NAME: write the manifest of that repository, from the Hub's own metadata",
    revision="with --repo: a commit, branch or tag (default main)",
    only="formats, groups or files, comma-separated; with --repo globs: '*.safetensors,*.json'",
    size="bytes of the pieces that larger files without pieces get (default 64MiB)",
    dry="show the difference, and write nothing",
)
def lock(
    root: Path,
    model: str = "",
    repo: str = "",
    revision: str = "",
    only: str = "",
    dest: str = "",
    size: str = "",
    patience: str = "",
    dry: bool = False,
) -> object:
    """Write digests to a manifest: of verified local files, or as the Hub reports them."""
    from csm_weights.commands import lock
    from csm_weights.config import parse_patience

    if repo and (dest or size):
        raise UsageError(
            "--dest and --size are about installed files, and --repo only asks the Hub"
        )
    if (revision or patience) and not repo:
        raise UsageError("--revision and --patience go with --repo")
    if repo:
        seconds = parse_patience(patience)
        return lock.lock_repo(root, repo, revision, only, model, dry, seconds)
    return lock.lock(make_request(root, only=only, dest=dest, model=model or "csm-1b"), dry, size)


@task("model", "dest")
def clean(request: Request, dry: bool = False) -> object:
    """Remove unfinished files; verified files stay, in output/ and installed."""
    from csm_weights.commands import clean as cleaning

    return cleaning.clean(replace(request, only=("all",)), dry)

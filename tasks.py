"""The tasks of csm-weights: `inv --list` shows them, `inv --help TASK` explains one."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

if TYPE_CHECKING:
    from csm_weights.errors import CsmWeightsError
    from csm_weights.pipeline.outcome import Outcome, StatusReport
    from csm_weights.pipeline.plan import Target
    from csm_weights.pipeline.request import Request

ROOT = Path(__file__).resolve().parent

HELP = {
    "model": "a name in manifests/, or the path of a manifest (default csm-1b)",
    "only": "formats, groups or files, comma-separated: safetensors, ckpt, prompts, all, ...",
    "dest": "the folder for the files, instead of the manifest's; relative to the repository",
    "source": "where pieces come from: auto (parts, mirrors, the Hub), chunks, hf or mirror",
    "url": "a mirror: the URL of a folder with the files, or the parts; may be repeated",
    "revision": "another commit, branch or tag of the Hub's repository; the digests still decide",
    "consume": "remove the parts as their file grows, on a disk without room for both",
    "seal": "make the files read-only once they are placed, and turn on fs-verity where there is",
    "json": "the result as JSON on stdout, also when it fails",
    "dry": "show what would be done, and do nothing",
    "require-gpu": "exit 77 unless the smoke test runs on a GPU",
}


def _help(*names: str, **own: str) -> dict[str, str]:
    return {name: HELP[name] for name in names} | own


@contextlib.contextmanager
def _exit_codes(json: bool = False) -> Iterator[None]:
    """Turns the package's errors, Ctrl-C and SIGTERM into messages and exit codes."""
    import signal

    from csm_weights.errors import CsmWeightsError, Interrupted, from_os_error

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except CsmWeightsError as error:
        _fail(error, json)
    except OSError as error:
        _fail(from_os_error(error), json)
    except KeyboardInterrupt:
        _fail(Interrupted("interrupted; what was proven is kept, run the same command again"), json)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(error: CsmWeightsError, json: bool) -> NoReturn:
    from csm_weights.commands.render import report

    if json:
        _print(report.error_json(error))
    raise Exit(str(error), code=error.exit_code)


def _print(text: str) -> None:
    """Prints a result; that a pager or `head` wants no more of it changes no exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _request(
    model: str,
    only: str,
    dest: str,
    source: str = "auto",
    url: Sequence[str] | None = None,
    revision: str = "",
    consume: bool = False,
) -> Request:
    from csm_weights.pipeline.request import Request

    words = tuple(word.strip() for word in only.split(",") if word.strip())
    urls = tuple(url or ())
    return Request(ROOT, model, words, dest or None, source, urls, revision or None, consume)


def _show_outcome(outcome: Outcome, json: bool) -> None:
    from csm_weights.commands.render import report

    _print(report.outcome_json(outcome) if json else report.outcome_text(outcome))
    _exit_with(outcome.error)


def _show_survey(survey: StatusReport, json: bool) -> None:
    from csm_weights.commands.render import report

    _print(report.survey_json(survey) if json else report.survey_text(survey))
    _exit_with(survey.error)


def _exit_with(error: CsmWeightsError | None) -> None:
    """Ends with an error's code; what it has to say is in the result already."""
    if error:
        from csm_weights.errors import printable

        raise Exit(printable(error.message), code=error.exit_code)


@task(
    iterable=["url"],
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "dry",
        "source",
        "url",
        "revision",
        "consume",
        "seal",
        "require-gpu",
        smoke="--no-smoke leaves the smoke test out, and needs no torch",
    ),
)
def weights(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    source: str = "auto",
    url: Sequence[str] | None = None,
    revision: str = "",
    consume: bool = False,
    smoke: bool = True,
    require_gpu: bool = False,
    seal: bool = False,
    dry: bool = False,
    json: bool = False,
) -> None:
    """Assemble, place, gate and smoke-test a model: the whole line."""
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.plan import Target

    with _exit_codes(json):
        request = _request(model, only, dest, source, url, revision, consume)
        if dry:
            _show_survey(apply.plan(request, Target.BOTH), json)
        else:
            done = apply.weights(request, smoke, require_gpu)
            _show_outcome(_sealed(request, done) if seal else done, json)


def _sealed(request: Request, done: Outcome) -> Outcome:
    from csm_weights.commands import seal

    return seal.seal_placed(request, done)


@task(
    iterable=["url"],
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "source",
        "url",
        "revision",
        "consume",
        check="exit 3 or 4 unless everything is in place and proven",
    ),
)
def status(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    source: str = "auto",
    url: Sequence[str] | None = None,
    revision: str = "",
    consume: bool = False,
    check: bool = False,
    json: bool = False,
) -> None:
    """Show what is here, what is missing, and what would be done."""
    from csm_weights.pipeline import apply

    with _exit_codes(json):
        request = _request(model, only, dest, source, url, revision, consume)
        _show_survey(apply.status(request, check=check), json)


@task(
    iterable=["url"],
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "dry",
        "source",
        "url",
        "revision",
        "consume",
        "seal",
    ),
)
def fetch(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    source: str = "auto",
    url: Sequence[str] | None = None,
    revision: str = "",
    consume: bool = False,
    seal: bool = False,
    dry: bool = False,
    json: bool = False,
) -> None:
    """Bring the files into the staging folder (output/), or into --dest, proven."""
    from csm_weights.errors import UsageError
    from csm_weights.pipeline.plan import Target

    with _exit_codes(json):
        if seal and not dest:
            raise UsageError("--seal is about files in place; with fetch it goes with --dest")
        goal = Target.BOTH if dest else Target.STAGED
        _act(_request(model, only, dest, source, url, revision, consume), goal, dry, json, seal)


@task(help=_help("model", "only", "dest", "json", "dry", "seal"))
def place(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    seal: bool = False,
    dry: bool = False,
    json: bool = False,
) -> None:
    """Move proven files from the staging folder to the destination."""
    from csm_weights.pipeline.plan import Target

    with _exit_codes(json):
        _act(_request(model, only, dest), Target.PLACED, dry, json, seal)


def _act(request: Request, goal: Target, dry: bool, json: bool, seal: bool) -> None:
    from csm_weights.pipeline import apply

    if dry:
        _show_survey(apply.plan(request, goal), json)
    else:
        done = apply.apply(request, goal)
        _show_outcome(_sealed(request, done) if seal else done, json)


@task(
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        sums="also hold the files against this SHA256SUMS file",
        write_sums="write SHA256SUMS beside the files, once they are proven",
        attestation="a file of `inv attest`: check that it is true of the files in place",
        key="the public key (PEM) that must have signed the attestation",
    )
)
def verify(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    sums: str = "",
    write_sums: bool = False,
    attestation: str = "",
    key: str = "",
    json: bool = False,
) -> None:
    """Hash every file in place again and run all gates; offline."""
    from csm_weights.commands import attest, verify
    from csm_weights.errors import UsageError

    with _exit_codes(json):
        request = _request(model, only, dest)
        if attestation:
            checked = attest.verify(request, attestation, key, sums or None, write_sums)
        elif key:
            raise UsageError("--key is whose signature --attestation FILE must have")
        else:
            checked = verify.verify(request, sums or None, write_sums)
        _show_outcome(checked, json)


@task(
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        out="the file to write (default NAME.intoto.json beside the files)",
        key="sign with this private key, in PEM; a passphrase is read from CSM_KEY_PASSPHRASE",
        new_key="sign with a new Ed25519 key, kept in this file and, the public one, in FILE.pub",
    )
)
def attest(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    out: str = "",
    key: str = "",
    new_key: str = "",
    json: bool = False,
) -> None:
    """Hash the files in place and write where they come from, as an in-toto statement."""
    from csm_weights.commands import attest
    from csm_weights.commands.render import report_attest

    with _exit_codes(json):
        done = attest.attest_files(_request(model, only, dest), out, key, new_key)
        _print(report_attest.attesting_json(done) if json else report_attest.attesting_text(done))


@task(
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "require-gpu",
        device="torch's word: cpu, cuda, cuda:1; default a GPU if there is one",
        frames="how many frames of 80 ms to make (default 8)",
        dtype="float32, bfloat16 or float16; default bfloat16 on a GPU, float32 on the CPU",
        record="record golden frames in manifests/ instead (CPU)",
    )
)
def smoke(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    device: str = "",
    require_gpu: bool = False,
    frames: int = 8,
    dtype: str = "",
    record: bool = False,
    json: bool = False,
) -> None:
    """Load the model that is in place, let it speak, and check it."""
    from csm_weights.commands import smoke

    with _exit_codes(json):
        request = _request(model, only, dest)
        if record:
            _print(str(smoke.record_golden(request, frames)))
        else:
            spoken = smoke.smoke(request, device or None, require_gpu, frames, dtype or None)
            _show_outcome(spoken, json)


@task(
    iterable=["url"],
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "source",
        "url",
        "revision",
        smoke="--no-smoke asks for no torch, as that of weights",
        offline="look instead for the repositories that CSM needs to speak offline",
    ),
)
def doctor(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    source: str = "auto",
    url: Sequence[str] | None = None,
    revision: str = "",
    smoke: bool = True,
    offline: bool = False,
    json: bool = False,
) -> None:
    """Find out what stands in the way of weights, before anything is fetched."""
    from csm_weights.commands import doctor
    from csm_weights.commands.render import report_hub

    with _exit_codes(json):
        request = _request(model, only, dest, source, url, revision)
        found = doctor.closure(request) if offline else doctor.examine(request, smoke)
        _print(report_hub.diagnosis_json(found) if json else report_hub.diagnosis_text(found))
        _exit_with(found.error)


@task(
    help=_help(
        "model",
        "only",
        "dest",
        "json",
        "dry",
        move_main="let main stand for these files, even where it stands for another commit",
    )
)
def seed_cache(
    c: Context,
    model: str = "csm-1b",
    only: str = "",
    dest: str = "",
    move_main: bool = False,
    dry: bool = False,
    json: bool = False,
) -> None:
    """Give the files in place to the Hub's cache, for other programs."""
    from csm_weights.commands import seed_cache
    from csm_weights.commands.render import report_hub

    with _exit_codes(json):
        act = seed_cache.rehearse if dry else seed_cache.seed_cache
        done = act(_request(model, only, dest), move_main)
        _print(report_hub.seeding_json(done) if json else report_hub.seeding_text(done))


@task(
    iterable=["file"],
    help=_help(
        "model",
        "dest",
        "json",
        file="a file of weights, its parts, shards, or a folder; may be given twice (default: "
        "the model's two formats, or with one file what is here of the model)",
    ),
)
def compare(
    c: Context,
    file: Sequence[str] | None = None,
    model: str = "csm-1b",
    dest: str = "",
    json: bool = False,
) -> None:
    """Show that two files of weights hold equal tensors, or which differs first and where."""
    from csm_weights.commands import compare
    from csm_weights.commands.render import report_compare
    from csm_weights.errors import UsageError

    with _exit_codes(json):
        paths = [Path(name) for name in file or ()]
        if len(paths) > 2:
            raise UsageError("compare holds two files against each other; --file at most twice")
        found = compare.compare(_request(model, "", dest), *paths)
        _print(
            report_compare.comparison_json(found) if json else report_compare.comparison_text(found)
        )
        _exit_with(found.error)


@task(
    positional=["file"],
    help={
        "file": "the file to cut into parts",
        "chunks": "the folder for the parts, below the repository root",
        "size": "bytes of a part: 1073741824, 1GiB, 500MB, ...",
        "manifest": "the manifest to write the entry to (made if new); else it is printed",
        "dry": HELP["dry"],
    },
)
def split(
    c: Context,
    file: str,
    chunks: str = "",
    size: str = "1GiB",
    manifest: str = "",
    dry: bool = False,
) -> None:
    """Cut any file into parts, with SHA256SUMS and a manifest entry."""
    from csm_weights.commands import split

    with _exit_codes():
        _print(split.split(ROOT, Path(file), chunks, size, manifest, dry))


@task(
    help=_help(
        "dest",
        model="a name in manifests/, or a manifest's path (default csm-1b, or the name in --repo)",
        repo="ORG/NAME: write the manifest of that repository, from the Hub's own metadata",
        revision="with --repo: a commit, branch or tag (default main)",
        only="formats, groups or files, comma-separated; with --repo globs: '*.safetensors,*.json'",
        size="bytes of the pieces that larger files without pieces get (default 64MiB)",
        dry="show the difference, and write nothing",
    )
)
def lock(
    c: Context,
    model: str = "",
    repo: str = "",
    revision: str = "",
    only: str = "",
    dest: str = "",
    size: str = "",
    dry: bool = False,
) -> None:
    """Write the digests to a manifest that proven local files show, or those the Hub tells."""
    from csm_weights.commands import lock
    from csm_weights.errors import UsageError

    with _exit_codes():
        if repo and (dest or size):
            raise UsageError("--dest and --size are about files in place; --repo asks the Hub only")
        if revision and not repo:
            raise UsageError("--revision goes with --repo")
        if repo:
            _print(lock.lock_repo(ROOT, repo, revision, only, model, dry))
        else:
            _print(lock.lock(_request(model or "csm-1b", only, dest), dry, size))


@task(help={"name": "which stand-in: csm-1b-standin (12.4 GB) or csm-tiny", "dry": HELP["dry"]})
def standin(c: Context, name: str = "csm-1b-standin", dry: bool = False) -> None:
    """Write a stand-in of CSM-1B with random weights, its parts and manifest."""
    from tools.standin import recipes

    with _exit_codes():
        _print(recipes.standin(ROOT, name, dry))


@task(help=_help("model", "dest", "dry"))
def clean(c: Context, model: str = "csm-1b", dest: str = "", dry: bool = False) -> None:
    """Remove unfinished files; what is proven, staged or placed stays."""
    from csm_weights.pipeline import apply

    with _exit_codes():
        _print(apply.clean(_request(model, "all", dest), dry))

"""The tasks: each a function, with its options and their help.

`collection(root)` makes Invoke's collection of them, for tasks.py or for a
console program (`invoke.Program(namespace=collection(root)).run()`).
Listing the tasks imports nothing of the package but `task`, `program` and errors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.program import Program
from invoke.tasks import Task

from csm_weights.commands.program import start
from csm_weights.commands.task import FETCHING, FILES, PAGE, REQUIRED, SOURCES, make_request, task
from csm_weights.errors import UsageError

if TYPE_CHECKING:
    from csm_weights.pipeline.plan import Target
    from csm_weights.pipeline.request import Request
    from csm_weights.pipeline.session import Outcome

#: The program's name where the package is installed.
NAME = "csm-weights"


def collection(root: Path, *more: Task[Any]) -> Collection:
    """Return the tasks below, and `more` of them, for the checkout at `root`."""
    made = Collection(*(one for one in globals().values() if isinstance(one, Task)), *more)
    made.configure({"csm_weights": {"root": str(root)}})
    return made


def main() -> None:
    """Run the tasks as the program `csm-weights`, for files below the current folder."""
    from csm_weights.commands import console

    os.environ[console.TYPED] = NAME
    tasks = collection(Path.cwd())
    start(tasks)
    Program(name=NAME, binary=NAME, version=version(NAME), namespace=tasks).run()


@task(
    *(*SOURCES, *FETCHING, *PAGE, "with_", "seal", "dry", "require_gpu", "require_fast"),
    smoke=(True, "--no-smoke skips the smoke test, and needs no torch"),
)
def weights(
    request: Request, smoke: bool, with_: str, seal: bool, dry: bool, **required: bool
) -> object:
    """Join or download, verify, install and smoke-test a model."""
    from csm_weights.commands import speech
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.plan import Target

    more = speech.requests(request, with_)
    if dry:
        plan, *others = [apply.plan(one, Target.BOTH) for one in (request, *more)]
        return replace(plan, also=tuple(others))
    done = speech.bring(apply.weights(request, smoke, **required), more)
    also = tuple(_sealed(*pair, seal) for pair in zip(more, done.also, strict=False))
    return replace(_sealed(request, done, seal), also=also)


@task(
    *(*SOURCES, "consume"),
    check=(False, "exit with 3 or 4 unless every file is installed and verified"),
)
def status(request: Request, check: bool) -> object:
    """Show what is here, what is missing, and what would be done."""
    from csm_weights.pipeline import apply

    return apply.status(request, check=check)


@task(*SOURCES, *FETCHING, "seal", "dry")
def fetch(request: Request, seal: bool, dry: bool) -> object:
    """Join or download the files into output/, or into --dest, and verify them."""
    from csm_weights.pipeline.plan import Target

    if seal and not request.dest:
        raise UsageError("--seal makes installed files read-only; fetch installs only with --dest")
    return _act(request, Target.BOTH if request.dest else Target.STAGED, seal, dry)


@task(*FILES, "staging", "block_digests", "seal", "dry")
def place(request: Request, seal: bool, dry: bool) -> object:
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
    *(*FILES, *PAGE),
    sums=("", "also check the files against this SHA256SUMS file"),
    write_sums=(False, "write SHA256SUMS next to the files, once they are verified"),
    attestation=("", "also check the files against this attestation, made by `inv attest`"),
    key=("", "public key (PEM) that must have signed the attestation"),
)
def verify(request: Request, sums: str, write_sums: bool, attestation: str, key: str) -> object:
    """Hash the installed files again and run all gates; asks no server."""
    from csm_weights.commands import attest, verify

    if attestation:
        return attest.verify(request, attestation, key, sums or None, write_sums)
    if key:
        raise UsageError(
            "--key needs --attestation FILE: it names the key that must have signed it"
        )
    return verify.verify(request, sums or None, write_sums)


@task(
    *FILES,
    out=("", "file to write (default: NAME.intoto.json next to the files)"),
    key=("", "private key (PEM) to sign with; its passphrase is taken from CSM_KEY_PASSPHRASE"),
    new_key=("", "make an Ed25519 key in this new file (and FILE.pub), and sign with it"),
)
def attest(request: Request, out: str, key: str, new_key: str) -> object:
    """Hash the installed files and write where they come from, as an in-toto statement."""
    from csm_weights.commands import attest

    return attest.attest_files(request, out, key, new_key)


@task(
    *(*FILES, *PAGE, "require_gpu", "require_fast"),
    device=("", "torch device: cpu, cuda, cuda:1 (default: a GPU if there is one)"),
    frames=(8, "number of frames to generate, of 80 ms each (default: 8)"),
    dtype=("", "float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on the CPU)"),
    max_rtf=(0.0, "fail if a second of audio takes more seconds than this (default: no limit)"),
    record=(False, "record the frames of this model in manifests/ as golden frames (on the CPU)"),
)
def smoke(request: Request, record: bool, frames: int, **options: Any) -> object:
    """Load the installed model, generate some frames, and check them."""
    from csm_weights.commands import smoke

    if record:
        return smoke.record_golden(request, frames)
    return smoke.smoke(request, frames=frames, **options)


@task(*(*FILES, "host"), html=(REQUIRED, "page to write, for a browser: FILE.html"))
def report(request: Request) -> object:
    """Write a page about the installed files: gates, pieces, smoke test; asks no server."""
    from csm_weights.commands import page

    return page.report(request)


@task(
    *(*SOURCES, "consume"),
    smoke=(True, "--no-smoke leaves out what only the smoke test needs"),
    offline=(False, "check only that the Hub's cache has what CSM needs to speak offline"),
)
def doctor(request: Request, smoke: bool, offline: bool) -> object:
    """Find out what stands in the way of weights, before anything is downloaded."""
    from csm_weights.pipeline import doctor

    return doctor.closure(request) if offline else doctor.examine(request, smoke)


@task(
    *("model", "only", "source", "url", "revision", "patience", "json", "require_gpu", *PAGE),
    address=("auto", "address of the cluster, or local for this machine alone (default: auto)"),
    dir=("", "folder on each node, with its own ~ and $VARIABLES (default: this machine's)"),
    nodes=(0, "nodes that are expected at least (default: those that are there)"),
    smoke=(False, "run the smoke test on each node as well"),
)
def fleet(request: Request, **options: Any) -> object:
    """Bring a model to every node of a Ray cluster, with one download, and verify it there."""
    from csm_weights.commands import fleet

    return fleet.fleet(request, **options)


@task(*(*FILES, "dry"), move_main=(False, "point main at this commit even if it is at another one"))
def seed_cache(request: Request, move_main: bool, dry: bool) -> object:
    """Link the installed files into the Hub's cache, for other programs."""
    from csm_weights.commands import seed_cache

    return seed_cache.seed_cache(request, move_main, dry)


@task(
    *("model", "dest", "staging"),
    file=(
        None,
        "a file of weights, its chunk files, shards, or a folder; give it twice, or once to"
        " compare with the model's other file (default: the model's two formats)",
    ),
)
def compare(request: Request, file: Sequence[str]) -> object:
    """Check that two files of weights hold equal tensors; name the first that differs."""
    from csm_weights.commands import compare

    return compare.compare(request, *map(Path, file))


@task(
    path=(REQUIRED, "file of weights, one of its chunk files or shards, or a folder of them"),
    also=(None, "another one; may be repeated"),
)
def identify(root: Path, path: str, also: Sequence[str]) -> object:
    """Tell what weights are: network, layout, dtype, and which known release they equal."""
    from csm_weights.commands import identify

    return identify.identify_paths(root, [Path(one) for one in (path, *also)])


@task(
    path=(REQUIRED, "weights to convert: a file, one of its chunk files or shards, or a folder"),
    to=(REQUIRED, "layout to write: original or transformers"),
    out=(REQUIRED, "folder for the new files"),
    format=("safetensors", "safetensors or ckpt (default: safetensors)"),
    dtype=("", "float32, bfloat16 or float16 (default: as the weights have it)"),
    shard_size=("", "size of a shard of safetensors at most: 5GB, ... (default: one file)"),
    codec=("", "file or folder with Mimi's tensors, kyutai/mimi, for --to transformers"),
    manifest=("", "name of a manifest of the new files to write (default: none)"),
)
def convert(root: Path, path: str, out: str, shard_size: str, codec: str, **words: str) -> object:
    """Convert weights between the original layout and transformers', and between dtypes."""
    from csm_weights.manifest.pin import parse_size
    from csm_weights.pipeline.convert import Conversion, convert

    size, mimi = parse_size(shard_size) if shard_size else 0, Path(codec) if codec else None
    wanted = Conversion(Path(path), out=Path(out), shard_size=size, codec=mimi, **words)
    return convert(root, wanted)


@task(
    *("model", "dest", "staging"),
    text=(REQUIRED, "text to speak"),
    out=(REQUIRED, "WAV file to write: 24 kHz, mono, 16 bits"),
    speaker=(0, "number of the speaker (default: 0)"),
    context=(None, "WAV file of the speaker, whose voice is taken up; may be repeated"),
    context_text=(None, "words that are said in it; as often as --context"),
    max_seconds=(10.0, "seconds of audio at most (default: 10)"),
    seed=(0, "number that decides what is drawn: same seed, same file (default: 0)"),
    tokenizer=("", "tokenizer.json (default: beside the weights, or in the Hub's cache)"),
    codec=("", "folder with Mimi, kyutai/mimi (default: in the Hub's cache)"),
)
def speak(request: Request, out: str, **options: Any) -> object:
    """Speak a text to a WAV file, with what is on this machine; asks no server."""
    from csm_weights.commands import speak

    return speak.speak(request, out=Path(out), **options)


@task(
    "dry",
    file=(REQUIRED, "file to split: inv split FILE"),
    chunks=("", "folder for the chunk files, below chunks/ (default: chunks/NAME)"),
    size=("1GiB", "size of a chunk file: 500MB, 1GiB, ... or a number of bytes (default: 1GiB)"),
    manifest=("", "manifest to add the entry to, made if it is new (default: print the entry)"),
)
def split(root: Path, file: str, chunks: str, size: str, manifest: str, dry: bool) -> object:
    """Split a file into chunk files, with SHA256SUMS and a manifest entry."""
    from csm_weights.commands import split

    return split.split(root, Path(file), chunks, size, manifest, dry)


@task(
    *("dest", "patience"),
    model=("", "name or path of the manifest (default: csm-1b, or the repository's name)"),
    repo=("", "ORG/NAME: write a manifest of this repository, from what the Hub reports"),
    revision=("", "with --repo: a commit, branch or tag (default: main)"),
    only=("", "formats, groups or files, comma-separated; with --repo globs: '*.json,*.txt'"),
    size=("", "size of the pieces that large files without pieces get (default: 64MiB)"),
    dry=(False, "show the difference, and write nothing"),
)
def lock(root: Path, model: str, repo: str, only: str, dry: bool, **options: str) -> object:
    """Write digests to a manifest: of verified local files, or as the Hub reports them."""
    from csm_weights.commands import lock
    from csm_weights.config import parse_patience

    dest, size = options["dest"], options["size"]
    revision, patience = options["revision"], options["patience"]
    if repo and (dest or size):
        raise UsageError("--dest and --size are about installed files: leave them out with --repo")
    if (revision or patience) and not repo:
        raise UsageError("--revision and --patience need --repo")
    if repo:
        seconds = parse_patience(patience)
        return lock.lock_repo(root, repo, revision, only, model, dry, seconds)
    return lock.lock(make_request(root, only=only, dest=dest, model=model or "csm-1b"), dry, size)


@task("model", "dest", "staging", "dry")
def clean(request: Request, dry: bool) -> object:
    """Remove unfinished files; verified files stay, in output/ and installed."""
    from csm_weights.commands import clean as cleaning

    return cleaning.clean(replace(request, only=("all",)), dry)

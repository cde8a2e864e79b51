"""Link the installed files into the Hub's standard cache, for other programs."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from csm_weights.config import HubEnvironment
from csm_weights.errors import (
    CsmWeightsError,
    Finding,
    NoSpace,
    UsageError,
    WrongContent,
    error_for,
)
from csm_weights.hashing import SHA1_HEX, HashJob, measure
from csm_weights.manifest.paths import RECEIPTS
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline.request import Request
from csm_weights.pipeline.session import Session, begin, gate_error
from csm_weights.progress import Progress
from csm_weights.store import hub_cache, install
from csm_weights.store.hub_cache import Seed, Seeded
from csm_weights.store.inspect import FileState, State
from csm_weights.store.lock import NAME as LOCK
from csm_weights.store.lock import lock
from csm_weights.store.receipts import Receipt

#: From this many bytes on the Hub keeps a file of any kind outside of git, by its sha256.
LARGE = 10_000_000


@dataclass(frozen=True)
class Seeding:
    """The files that were added to the cache, and how each came.

    `main` is the commit that main stands for now. `notes` are what a person
    should know of it; of a dry run they are what would be done.
    """

    manifest: Manifest
    cache: Path
    files: tuple[Seeded, ...]
    main: str | None
    notes: tuple[str, ...] = ()


def seed_cache(request: Request, move_main: bool = False, dry: bool = False) -> Seeding:
    """Link the chosen files into the Hub's cache, once all of them are verified.

    Files without a valid receipt are hashed first. `move_main` lets main
    stand for the manifest's revision even where it stands for another commit.
    A `dry` run hashes and writes nothing. Raises UsageError without a Hub
    repository in the manifest, MissingInput or WrongContent unless every file
    is installed and right: then nothing is done.
    """
    run = begin(request)
    manifest, folder = run.manifest, run.paths.destination
    repo, revision = manifest.repo, manifest.revision
    if repo is None or revision is None:
        raise UsageError(
            f"the manifest of {manifest.name} names no repository of the Hub: it has no [hub]"
        )
    if not SHA1_HEX.fullmatch(revision):
        raise UsageError(f"the Hub's cache keeps files by commit, and {revision!r} is not one")
    cache, seeded, unrecorded = HubEnvironment.read().cache.absolute(), [], []
    with ExitStack() as stack:
        if dry:
            notes = _planned(run, hub_cache.repository(cache, repo) / "snapshots" / revision)
        else:
            # A link changes a file's change time, and with it what a receipt is known by.
            with suppress(NoSpace):
                if folder.is_dir():
                    stack.enter_context(lock(folder, f"{RECEIPTS}/{LOCK}"))
            state = _verified(run)
            seeds, notes = _seeds(state, cache, repo, revision)
            total = sum(seed.size for seed in seeds)
            try:
                with Progress("linking into the Hub's cache", total) as progress:
                    seeded = hub_cache.seed(
                        cache, repo, revision, seeds, move_main, progress.advance
                    )
            finally:
                unrecorded = _record_again(state)
            with suppress(NoSpace):
                run.remove_leftovers(run.inspect(), is_staged=True)
    if any(file.how is hub_cache.How.LINKED for file in seeded):
        notes.append("a linked file is one file, here and in the cache, and read-only in both")
    main = hub_cache.main_of(hub_cache.repository(cache, repo))
    is_moved = dry and (move_main or main is None)
    if main != revision and not is_moved:
        notes.append(
            f"main is commit {main} in the cache: programs that name no revision do not get these"
            f" files; inv seed-cache --model {manifest.name} --move-main makes main this commit"
        )
    return Seeding(manifest, cache, tuple(seeded), main, (*notes, *unrecorded))


def _planned(run: Session, home: Path) -> list[str]:
    """Return what would be linked into the snapshot `home`; raise where a file is not installed."""
    state = run.inspect()
    subjects = [run.subject(i.artifact, i.installed) for i in state.artifacts]
    if findings := [s.finding for s in subjects if s.finding]:
        raise error_for("not every file is installed", findings)
    return [
        f"{item.artifact.path}: {item.installed.size:,} bytes, {item.installed.state},"
        f" would be {home / item.artifact.path}"
        for item in state.artifacts
    ]


def _verified(run: Session) -> State:
    """Return the state once each chosen file has a receipt; raise what the gates find."""
    items = [i for i in run.inspect().artifacts if i.installed.state is FileState.UNVERIFIED]
    found = run.verify([(item.artifact, item.installed) for item in items])
    for item, verified in zip(items, found, strict=True):
        if verified:
            install.record(run.paths.destination, run.receipt(item.artifact, verified))
    state = run.inspect()
    if error := gate_error(run.gate(state, rehash=False)):
        raise error
    return state


def _seeds(state: State, cache: Path, repo: str, revision: str) -> tuple[list[Seed], list[str]]:
    seeds, notes = [], []
    for item in state.artifacts:
        artifact, receipt = item.artifact, item.installed.receipt
        assert receipt, "a verified file has a receipt"
        if receipt.size != artifact.size:
            known = hub_cache.snapshot_file(cache, repo, revision, artifact.path)
            if known and known.stat().st_size != receipt.size:
                notes.append(f"{artifact.path}: left as it is in the cache, from the Hub")
                continue
            words = f"not the edition of commit {revision}; `hf cache verify` will report it"
            notes.append(f"{artifact.path}: {words}")
        blob = _blob(artifact, receipt, item.installed.path)
        seeds.append(Seed(artifact.path, item.installed.path, receipt.size, blob))
    return seeds, notes


def _blob(artifact: Artifact, receipt: Receipt, file: Path) -> str:
    """Return the name of a blob: the sha256 of what the Hub keeps outside of git, else git's."""
    is_pinned = receipt.size == artifact.size
    if is_pinned and artifact.git_sha1:
        return artifact.git_sha1
    if artifact.is_weights or (is_pinned and artifact.blob_id) or receipt.size >= LARGE:
        return receipt.sha256
    found = measure([HashJob(file, receipt.size, whole=True, git=True)], lambda _: None)[0]
    if found.whole != receipt.sha256 or not found.git_sha1:
        finding = Finding.edited(file, f"sha256 {found.whole}")
        raise WrongContent("a file was changed since it was verified", [finding])
    return found.git_sha1


def _record_again(state: State) -> list[str]:
    """Renew receipts of files whose change time a link has set; return which failed, and why.

    Raises WrongContent where more has changed than that.
    """
    notes = []
    for item in state.artifacts:
        receipt = item.installed.receipt
        if not receipt or receipt.is_current(item.installed.path.stat()):
            continue
        try:
            install.record(state.paths.destination, receipt)
        except WrongContent:
            raise
        except CsmWeightsError as error:
            # The next run hashes once more; the files are good all the same.
            notes += [finding.line() for finding in error.findings]
    return notes

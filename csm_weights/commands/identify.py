"""Tell what files of weights are: network, layout, dtype, and the known release they equal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.commands.compare import here_of_model
from csm_weights.errors import CsmWeightsError, MissingInput, WrongContent
from csm_weights.formats.compare import open_pair, tied_findings
from csm_weights.formats.identify import Identity, identify
from csm_weights.formats.transformers_layout import name_tensors, read_configs
from csm_weights.formats.weights_file import find, open_weights
from csm_weights.hashing import HashJob, measure
from csm_weights.manifest.parse import load
from csm_weights.manifest.types import Artifact
from csm_weights.pipeline.locate import network_in
from csm_weights.pipeline.request import Request, manifests
from csm_weights.progress import Progress
from csm_weights.store.hub_cache import snapshots_of
from csm_weights.store.receipts import read_receipt


@dataclass(frozen=True)
class Identified:
    """What the files at `path` are, and how they relate to a release that a manifest pins.

    `release` is the manifest's name, or empty. `file` is the pinned file whose
    digest they have, or empty. Else `differ` are the tensors that are not
    those of the release on this machine, None where there is none to compare
    with.
    """

    path: str
    identity: Identity
    release: str = ""
    file: str = ""
    differ: tuple[str, ...] | None = None

    @property
    def verdict(self) -> str:
        """The relation to a release, in words."""
        if self.file:
            return f"{self.file} of {self.release}, by its digest"
        if self.differ is None:
            known = f"; to tell which release it is, get one: inv fetch --model {self.release}"
            return f"not compared with a release{known if self.release else ''}"
        total = len(self.identity.network.tensor_shapes()) if self.identity.network else 0
        count = f"{len(self.differ):,} of {total:,} tensors differ"
        if self.identity.wrong_count:
            return f"damaged, or not whole: {count} from those of {self.release}"
        if not self.differ:
            return f"the tensors of {self.release}, every one equal"
        if len(self.differ) >= total:
            other = f"another model of the dimensions of {self.release}, or all of it trained"
            return f"{other}: {count}"
        return f"a fine-tune of {self.release}: {count}"


@dataclass(frozen=True)
class Identification:
    """What each of some paths is."""

    files: tuple[Identified, ...]


def identify_paths(root: Path, paths: Sequence[Path]) -> Identification:
    """Tell what is at each path; see `weights_file.find` for what a path may be.

    The folder of a repository in the Hub's cache is its main snapshot. Raises
    MissingInput, WrongContent where a file cannot be read, and UsageError.
    """
    return Identification(tuple(_identified(root, path) for path in paths))


def _identified(root: Path, path: Path) -> Identified:
    if (path / "snapshots").is_dir():
        path = next(iter(snapshots_of(path)), path / "snapshots")
    files = find(path)
    folder = files[0][0].parent
    configs = []
    with contextlib.suppress(WrongContent):  # of another kind of model
        configs = read_configs([folder])
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(parts)) for parts in files]
        tensors = name_tensors(opened, [folder])
        identity = identify(tensors, configs)
        if identity.network and (odd := tied_findings(tensors)):
            wrong = (*identity.wrong, *odd)
            identity = replace(identity, wrong=wrong, wrong_count=identity.wrong_count + len(odd))
    found = Identified(str(path), identity)
    if identity.network is None:
        return found
    known = []
    for file in manifests(root):
        with contextlib.suppress(CsmWeightsError, OSError):  # one that cannot be read names nothing
            if network_in(manifest := load(file)) == identity.network:
                known.append(manifest)
    hashed = functools.cache(lambda ranges: _hashed(files[0], ranges))
    for manifest in known:
        for artifact in manifest.artifacts:
            if artifact.is_weights and len(files) == 1 and _is(files[0], artifact, hashed):
                return replace(found, release=manifest.name, file=artifact.path)
    for manifest in known:
        with contextlib.suppress(MissingInput):
            other, *_ = here_of_model(Request(root, manifest.name), [files])
            with (
                open_pair(files, other, rounded=True) as pair,
                Progress(f"comparing with {manifest.name}", pair.nbytes) as progress,
            ):
                differences = pair.compare(progress.advance).differences
            differ = tuple(difference.name for difference in differences)
            return replace(found, release=manifest.name, differ=differ)
    return replace(found, release=known[0].name if known else "")


def _is(parts: Sequence[Path], artifact: Artifact, hashed: Callable[..., Sequence[str]]) -> bool:
    """Check by digest whether a file, or its chunk files, is a pinned one.

    A receipt says so without reading them.
    """
    if sum(part.stat().st_size for part in parts) != artifact.size:
        return False
    receipt = read_receipt(parts[0].parent, parts[0].name) if len(parts) == 1 else None
    if receipt and receipt.is_current(parts[0].stat()):
        return receipt.fits(artifact)
    tiles = artifact.tiles
    ranges = tuple((piece.offset, piece.size) for piece in tiles)
    return [piece.sha256 for piece in tiles] == hashed(ranges)


def _hashed(parts: Sequence[Path], ranges: Sequence[tuple[int, int]]) -> list[str]:
    """Return the sha256 of each range of a file; none where its chunk files are other ranges."""
    jobs = [HashJob(parts[0], parts[0].stat().st_size, tuple(ranges))]
    if len(parts) > 1:
        jobs = [HashJob(part, part.stat().st_size, ((0, part.stat().st_size),)) for part in parts]
        if [job.size for job in jobs] != [size for _, size in ranges]:
            return []
    with Progress(f"hashing {parts[0].name}", sum(job.size for job in jobs)) as progress:
        return [digest for found in measure(jobs, progress.advance) for digest in found.ranges]

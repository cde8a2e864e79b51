"""Locate weights for a program that loads them: on this machine, or by fetching them.

What is not verified yet comes with the digests that it must have, so that it is
verified while it is loaded. Nothing is written but by `apply`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from csm_weights.byte_ranges import ByteRange
from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, MissingInput
from csm_weights.files import read_bounded
from csm_weights.formats.architecture import MAX_CONFIG, CsmConfig, parse_config
from csm_weights.formats.weights_file import WEIGHT_FILES
from csm_weights.hashing import git_sha1
from csm_weights.manifest.parse import load
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply, repo_manifest
from csm_weights.pipeline.actions import known_text
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request, manifests
from csm_weights.pipeline.session import begin
from csm_weights.progress import Progress
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus
from csm_weights.store.manifest_file import write_manifest
from csm_weights.store.receipts import Receipt, read_receipt

#: The file that describes a network.
CONFIG = "config.json"


def checkout() -> Path:
    """Return the folder that files go below: this package's checkout, else the current one."""
    above = Path(__file__).resolve().parents[2]
    return above if (above / "manifests").is_dir() else Path.cwd()


def of_repo(root: Path, repo: str, revision: str | None) -> Request:
    """Return the request for a repository of the Hub, at a commit, branch or tag.

    A manifest below `root` that names it is used: its digests then decide. Any
    other gets a manifest from the Hub's metadata beside the Hub's cache, once: a
    branch stays at the commit that it named then. Raises UsageError,
    AccessRefused, NetworkFailed, MissingInput or WrongContent.
    """
    for path in manifests(root):
        if load(path).repo == repo:
            return Request(root, path.stem, revision=revision)
    above = HubEnvironment.read().cache.parent / "csm-weights"
    folder = quote(repo, safe="").replace("%2F", "--")
    home = above / folder / quote(revision or "main", safe="")
    if not (known := sorted(home.glob("manifests/*.toml"))):
        path = repo_manifest.path_of(home, repo, revision or "")
        wanted = ("config.json", "model.safetensors", "ckpt.pt", "tokenizer.json")
        write_manifest(path, repo_manifest.from_hub(path, repo, revision or "", wanted))
        known = [path]
    return Request(home, known[0].stem)


@dataclass(frozen=True)
class LocalWeights:
    """Weights on this machine: a file, or its chunk files in order.

    `folder` is where the model's other files are, or would be. `config` is
    None where only the config.json beside the weights has it. `digests` are
    ranges that tile the weights, to be verified while they are read; empty for
    what is verified already.
    """

    paths: tuple[Path, ...]
    folder: Path
    config: CsmConfig | None
    digests: tuple[ByteRange, ...] = ()


class Weights:
    """The weights of one model, of which one format is to be loaded: a session and what it found.

    Raises MissingInput for a model without weights that can be loaded, and as
    `session.begin`.
    """

    def __init__(self, request: Request) -> None:
        self._session = begin(request, _loadable)
        self._state = self._session.inspect()
        order = {path: number for number, path in enumerate(WEIGHT_FILES)}
        items = [i for i in self._state.artifacts if i.artifact.path != CONFIG]
        self._items = sorted(items, key=lambda item: order.get(item.artifact.path, 0))

    def candidates(self) -> Iterator[LocalWeights]:
        """Yield the weights on this machine, the surest first; nothing is hashed.

        First what is verified, installed or staged. Then, to be verified while
        it is read, what the Hub's cache has, chunk files, and other installed
        and staged files. Of two formats each time safetensors first.
        """
        items = self._items
        files = [(i, i.installed) for i in items] + [(i, i.staged) for i in items]
        for _, file in files:
            if file.state is FileState.VERIFIED:
                yield self._found((file.path,))
        unverified: list[tuple[ArtifactState, Sequence[FileStatus]]] = [
            *((item, [item.cached]) for item in items if item.cached),
            *((item, item.chunks) for item in items if item.chunks),
            *((item, [file]) for item, file in files),
        ]
        for item, parts in unverified:
            size, digests = sum(part.size or 0 for part in parts), _digests(item.artifact)
            is_whole = all(part.state is FileState.UNVERIFIED for part in parts)
            if is_whole and size == item.artifact.size and digests:
                yield self._found(tuple(part.path for part in parts), digests)

    def _found(self, paths: tuple[Path, ...], digests: tuple[ByteRange, ...] = ()) -> LocalWeights:
        config = network_in(self._session.manifest) or self._read_config()
        return LocalWeights(paths, self._session.paths.destination, config, digests)

    def _read_config(self) -> CsmConfig | None:
        """Return the network of a config.json that is here, if the manifest accepts its bytes."""
        for item in self._state.artifacts:
            sizes = {edition.size for edition in item.artifact.editions}
            known = {edition.sha256 for edition in item.artifact.editions}
            for file in (item.installed, item.staged, item.cached):
                if item.artifact.path != CONFIG or file is None or file.size not in sizes:
                    continue
                try:
                    text = read_bounded(file.path, MAX_CONFIG)
                except OSError:
                    continue
                git = git_sha1(len(text), text).hexdigest()
                if hashlib.sha256(text).hexdigest() in known or git == item.artifact.git_sha1:
                    return parse_config(text, str(file.path))
        return None

    def fetch(self) -> LocalWeights:
        """Fetch and install the weights, verified, from wherever `inv weights` would.

        One format: that of which anything is here, safetensors where that is
        both or neither. Raises the error of what stands in the way.
        """
        session = self._session
        wanted = next((item for item in self._items if item.is_here), self._items[0]).artifact
        name = session.manifest.name
        Progress("loading").log(f"{wanted.path} of {name} is not here and verified: getting it")
        session.chosen = tuple(a for a in session.chosen if a.path in (wanted.path, CONFIG))
        self._state = apply.run(session, Target.BOTH).state
        return self._found((session.paths.destination / wanted.path,))


def _loadable(manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the artifacts that hold a whole model, and its config.json.

    By their names, or where none has one of these, by their formats.
    """
    weights = [a for a in manifest.artifacts if a.path in WEIGHT_FILES]
    weights = weights or [a for a in manifest.artifacts if a.is_weights]
    if not weights:
        expected = " or ".join(WEIGHT_FILES)
        finding = Finding(Kind.NOT_THERE, manifest.repo or manifest.where, expected, "none of them")
        raise MissingInput(f"{manifest.name} has no weights that can be loaded", [finding])
    return (*weights, *(a for a in manifest.artifacts if a.path == CONFIG))


# ---- what manifests say of a file that someone names


@dataclass(frozen=True)
class Pinned:
    """What a manifest pins of a file of weights: its ranges, and the network where it is known."""

    model: str
    artifact: Artifact
    digests: tuple[ByteRange, ...]
    config: CsmConfig | None


def pinned(folder: Path, size: int, name: str = "") -> Pinned | None:
    """Return what a manifest pins of weights of so many bytes, and of that name where given.

    Manifests are those of the checkout that `folder` is in, which has tasks.py,
    or else of the package's own. One whose files go into `folder` comes first:
    a fine-tune has the size and name of what it was made from.
    """
    above = (folder.absolute(), *folder.absolute().parents)
    for root in [f for f in above if (f / "tasks.py").is_file()][:1] or [checkout()]:
        known = [load(path) for path in manifests(root)]
        home = folder.resolve()
        known.sort(key=lambda manifest: (root / manifest.destination).resolve() != home)
        for manifest in known:
            for artifact in manifest.artifacts:
                is_it = artifact.is_weights and artifact.size == size
                if is_it and name in ("", Path(artifact.path).name) and (d := _digests(artifact)):
                    return Pinned(manifest.name, artifact, d, network_in(manifest))
    return None


def valid_receipt(file: Path, known: Pinned | None) -> Receipt | None:
    """Return the receipt beside a file that says that it was verified, where its stat still fits.

    That of another model than the pinned one counts too: it is that model.
    """
    receipt = read_receipt(file.parent, file.name)
    if receipt is None or not receipt.is_current(file.stat()):
        return None
    is_it = known is None or receipt.model != known.model or receipt.fits(known.artifact)
    return receipt if is_it else None


def _digests(artifact: Artifact) -> tuple[ByteRange, ...]:
    """Return ranges that tile a file; none where the manifest has no sha256 for one of them."""
    ranges = tuple(ByteRange(p.offset, p.size, p.sha256) for p in artifact.tiles)
    return ranges if all(one.sha256 for one in ranges) else ()


def network_in(manifest: Manifest) -> CsmConfig | None:
    """Return the network of the edition of config.json whose text is in the manifest."""
    for artifact in manifest.artifacts:
        if artifact.path == CONFIG and (text := known_text(artifact)) is not None:
            return parse_config(text.encode(), f"{artifact.path} in the manifest")
    return None

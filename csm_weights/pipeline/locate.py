"""Where a model's weights are on this machine, or how they come to it: for those who load them.

What is not proven yet is told with the digests that it must have, so that it
can be proven while it is loaded. Nothing is written but by the line itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from csm_weights.byte_ranges import ByteRange
from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent
from csm_weights.formats.architecture import CsmConfig, parse_config
from csm_weights.formats.weights_file import WEIGHT_FILES
from csm_weights.hashing import git_sha1, sha256
from csm_weights.manifest.parse import load
from csm_weights.manifest.types import Artifact, Manifest
from csm_weights.pipeline import apply, repo_manifest
from csm_weights.pipeline.plan import Target
from csm_weights.pipeline.request import Request, find_manifest
from csm_weights.pipeline.session import begin
from csm_weights.progress import Progress
from csm_weights.store import atomic
from csm_weights.store.inspect import ArtifactState, FileState, FileStatus, State

#: The published model, as a manifest and as a repository of the Hub.
MODEL, REPO = "csm-1b", "sesame/csm-1b"

#: What is asked of a repository that no manifest here names.
WANTED = ("config.json", "model.safetensors", "ckpt.pt", "tokenizer.json")

#: The file that describes a network.
CONFIG = "config.json"


@dataclass(frozen=True)
class LocalWeights:
    """Weights on this machine: a file, or its parts in order.

    `folder` is where the model's other files are, or would be. `config`
    is None where only the config.json beside the weights can tell it.
    `digests` are spans that tile the weights, to be proven while they are
    read; empty for what is proven already.
    """

    paths: tuple[Path, ...]
    folder: Path
    config: CsmConfig | None
    digests: tuple[ByteRange, ...] = ()

    @property
    def is_proven(self) -> bool:
        """Whether the bytes are known to be right."""
        return not self.digests


def checkout() -> Path:
    """The folder with manifests/: that of this package's checkout, else the current one."""
    above = Path(__file__).resolve().parents[2]
    return above if (above / "manifests").is_dir() else Path.cwd()


# ---- what is asked for


def published(root: Path) -> Request:
    """The request for CSM-1B: by the manifest below `root`, or else by the Hub's word."""
    if (root / "manifests" / f"{MODEL}.toml").is_file():
        return Request(root, MODEL)
    return of_repo(root, REPO, None)


def of_repo(root: Path, repo: str, revision: str | None) -> Request:
    """The request for a repository of the Hub, at a commit, branch or tag.

    By a manifest below `root` that names it: its digests then decide. Any
    other gets a manifest by the Hub's word beside the Hub's cache, once: a
    branch stays at the commit that it named then. Raises UsageError,
    AccessRefused, NetworkFailed, MissingInput or WrongContent.
    """
    for path in sorted((root / "manifests").glob("*.toml")):
        if load(path).repo == repo:
            return Request(root, path.stem, revision=revision)
    home = _home(repo, revision)
    if not (known := _manifests(home)):
        path = repo_manifest.path_of(home, repo, revision or "")
        manifest = repo_manifest.from_hub(path, repo, revision or "", WANTED)
        atomic.write_manifest(path, manifest)
        known = _manifests(home)
    return Request(home, known[0].stem)


def _home(repo: str, revision: str | None) -> Path:
    """The root for a repository without a manifest of ours, at a revision."""
    above = HubEnvironment.read().cache.parent / "csm-weights"
    return above / quote(repo, safe="").replace("%2F", "--") / quote(revision or "main", safe="")


def _manifests(root: Path) -> list[Path]:
    return sorted((root / "manifests").glob("*.toml"))


# ---- where it is


def here(request: Request) -> Iterator[LocalWeights]:
    """The weights of a model on this machine, the surest first; nothing is hashed.

    Proven in place, then in staging; then, to be proven while it is read, what
    the Hub's cache has, then parts, then files in place and in staging. Of two
    formats each time safetensors first.
    """
    state = _look(request)
    items = _weights(state)
    files = [(item, item.installed) for item in items] + [(item, item.staged) for item in items]
    for _, look in files:
        if look.state is FileState.VERIFIED:
            yield _obtained(state, (look.path,), ())
    for item in items:
        yield from _unproven(state, item, [item.cached] if item.cached else [])
    for item in items:
        yield from _unproven(state, item, item.parts)
    for item, look in files:
        yield from _unproven(state, item, [look])


def _unproven(
    state: State, item: ArtifactState, looks: Sequence[FileStatus]
) -> Iterator[LocalWeights]:
    """A file or parts of the right sizes, where there are digests to prove them by."""
    spans = tuple(ByteRange(p.offset, p.size, p.sha256) for p in item.artifact.tiles)
    size = sum(look.size or 0 for look in looks)
    is_whole = bool(looks) and all(look.state is FileState.UNVERIFIED for look in looks)
    if is_whole and size == item.artifact.size and all(span.sha256 for span in spans):
        yield _obtained(state, tuple(look.path for look in looks), spans)


def _obtained(state: State, paths: tuple[Path, ...], spans: tuple[ByteRange, ...]) -> LocalWeights:
    return LocalWeights(paths, state.paths.destination, _read_config(state), spans)


def pass_over(found: LocalWeights, error: WrongContent) -> None:
    """Says on stderr that weights are not right, and that others are taken."""
    with Progress("loading", 0) as progress:
        progress.log(f"{found.paths[0]} is left alone: {error}")


def fetch(request: Request) -> LocalWeights:
    """Brings the weights here, from wherever the line gets them; proven and in place.

    One format: that of which anything is here, safetensors where that is both or neither.
    Raises whatever stands in the way, with what helps.
    """
    state = _look(request)
    items = _weights(state)
    wanted = next((item for item in items if item.is_here), items[0]).artifact.path
    with Progress("loading", 0) as progress:
        progress.log(f"{wanted} of {state.manifest.name} is not here, proven: getting it")
    configs = [a.path for a in state.manifest.artifacts if a.path == CONFIG]
    state = apply.apply(_asking(request, (wanted, *configs)), Target.BOTH).state
    file = next(item.installed for item in state.artifacts if item.artifact.path == wanted)
    return _obtained(state, (file.path,), ())


def _look(request: Request) -> State:
    """What is here of a model's weights, in every format, and of its config.json."""
    manifest = find_manifest(request.root, request.model)
    chosen = [a for a in manifest.artifacts if _is_weights(manifest, a)]
    if not chosen:
        expected = " or ".join(WEIGHT_FILES)
        finding = Finding(Kind.NOT_THERE, manifest.repo or manifest.where, expected, "neither")
        raise MissingInput(f"{manifest.name} has no weights that can be loaded", [finding])
    chosen += [a for a in manifest.artifacts if a.path == CONFIG]
    return begin(_asking(request, tuple(a.path for a in chosen))).inspect()


def _asking(request: Request, paths: tuple[str, ...]) -> Request:
    return Request(request.root, request.model, paths, revision=request.revision)


def _weights(state: State) -> list[ArtifactState]:
    """The weights of a look, in the order in which formats are preferred."""
    order = list(WEIGHT_FILES)
    items = [i for i in state.artifacts if _is_weights(state.manifest, i.artifact)]
    return sorted(
        items, key=lambda i: order.index(i.artifact.path) if i.artifact.path in order else 0
    )


def _is_weights(manifest: Manifest, artifact: Artifact) -> bool:
    """Whether a file holds a whole model: by its name, or where none has one, by its format."""
    if any(a.path in WEIGHT_FILES for a in manifest.artifacts):
        return artifact.path in WEIGHT_FILES
    return artifact.is_weights


# ---- what it is


def pinned(root: Path, size: int) -> LocalWeights | None:
    """What the manifests below `root` say of weights of so many bytes, if anything.

    Without paths: the architecture, and the digests of all bytes.
    """
    for path in _manifests(root):
        manifest = load(path)
        for artifact in manifest.artifacts:
            spans = tuple(ByteRange(p.offset, p.size, p.sha256) for p in artifact.tiles)
            if artifact.is_weights and artifact.size == size and all(s.sha256 for s in spans):
                return LocalWeights((), root, _written(manifest.artifacts), spans)
    return None


def require_pinned(root: Path, where: Path, size: int) -> LocalWeights:
    """The same; raises UsageError where nothing is pinned for the weights at `where`."""
    if found := pinned(root, size):
        return found
    raise UsageError(
        f"nothing is pinned for {where}: no manifest in {root / 'manifests'} has weights of"
        f" {size:,} bytes; inv lock makes one, or leave verify out"
    )


def _read_config(state: State) -> CsmConfig | None:
    """The network that a model's manifest, or else a proven config.json of it, describes."""
    if written := _written(state.manifest.artifacts):
        return written
    for item in state.artifacts:
        if item.artifact.path == CONFIG:
            for look in (item.installed, item.staged, item.cached):
                if look and (text := _proven_text(item.artifact, look.path)):
                    return parse_config(text, str(look.path))
    return None


def _written(artifacts: Sequence[Artifact]) -> CsmConfig | None:
    """The network that an edition of config.json describes whose text is in the manifest."""
    for artifact in artifacts:
        for edition in artifact.editions if artifact.path == CONFIG else ():
            if edition.text is not None:
                return parse_config(edition.text.encode(), f"{artifact.path} in the manifest")
    return None


def _proven_text(artifact: Artifact, path: Path) -> bytes | None:
    """The content of a small file, if it is an edition that the manifest accepts."""
    try:
        if path.stat().st_size not in [edition.size for edition in artifact.editions]:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    whole, git = sha256(), git_sha1(len(content))
    for sink in (whole, git):
        sink.update(memoryview(content))
    known = {edition.sha256 for edition in artifact.editions}
    is_right = whole.hexdigest() in known or git.hexdigest() == artifact.git_sha1
    return content if is_right else None

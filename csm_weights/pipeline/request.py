"""The values that a command is asked for."""

import contextlib
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.config import check_mirror
from csm_weights.errors import CsmWeightsError, UsageError, did_you_mean
from csm_weights.manifest.parse import load
from csm_weights.manifest.paths import path_problem
from csm_weights.manifest.types import Manifest
from csm_weights.transfer.policy import HUB, REMOTE

#: The model of a request that names none.
DEFAULT_MODEL = "csm-1b"

#: The manifests that come with the package: those of its checkout, or of its wheel.
SHIPPED = Path(__file__).parents[1] / "shipped"

#: Words for where pieces may come from; auto is every source there is.
SOURCES = ("auto", "chunks", "hf", "mirror")

#: What people call some of them.
_OTHER_WORDS = {"huggingface": "hf", "hub": "hf", "parts": "chunks", "url": "mirror", "all": "auto"}

#: A commit, or the name of a branch or tag.
REVISION = re.compile(r"[\w][\w./-]{0,200}", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What is asked for: a model, by name or manifest path, below a repository root.

    `only` are words that `Manifest.select` knows; none means the default
    selection. `dest` overrides the manifest's destination, `staging` its staging
    folder, `revision` its commit of the Hub's repository. `source` is a word of `SOURCES`, `urls`
    are mirrors, `caches` folders laid out as the Hub's cache, only read. `consume` lets chunk
    files go as their file grows. `patience` is how many seconds a server may give nothing.
    `limit_rate` is how many bytes a second all of them may give together.
    `block_digests` asks for the digests of blocks in the receipts.
    """

    root: Path
    model: str = DEFAULT_MODEL
    only: tuple[str, ...] = ()
    dest: str | None = None
    staging: str | None = None
    source: str = "auto"
    urls: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    revision: str | None = None
    consume: bool = False
    patience: float | None = None
    limit_rate: float | None = None
    block_digests: bool = False

    def __post_init__(self) -> None:
        source = self.source
        if source not in SOURCES:
            near = _OTHER_WORDS.get(source.lower()) or source
            hint = did_you_mean(near, SOURCES)
            known = ", ".join(SOURCES)
            raise UsageError(f"no source called {source!r}; there are {known}{hint}")
        for url in self.urls:
            check_mirror(url, REMOTE.keys() - {HUB})
        for option, given, others in (
            ("--url", self.urls, ("chunks", "hf")),
            ("--cache", self.caches, ("chunks",)),
        ):
            if given and source in others:
                way = f"leave {option} out, or use --source=auto"
                raise UsageError(f"--source={source} does not use {option}; {way}")
        if source == "mirror" and not self.urls:
            raise UsageError("--source=mirror needs --url=https://... or --url=file:///...")
        if self.consume and source not in ("auto", "chunks"):
            raise UsageError(f"--consume needs chunk files, which --source={source} does not use")
        if self.revision and not REVISION.fullmatch(self.revision):
            raise UsageError(f"--revision {self.revision!r} is not a commit, branch or tag")

    @property
    def options(self) -> tuple[str, ...]:
        """The options of a command line that name the same model, files and folders."""
        model = self.model if self.model != DEFAULT_MODEL else ""
        words = {"model": model, "only": ",".join(self.only)}
        words |= {"dest": self.dest or "", "staging": self.staging or ""}
        return tuple(f"--{name} {shlex.quote(word)}" for name, word in words.items() if word)


def manifests(root: Path) -> list[Path]:
    """Return the manifests below a root, then those of the package with other names."""
    own = sorted((root / "manifests").glob("*.toml"))
    names = {path.name for path in own}
    return own + [path for path in sorted(SHIPPED.glob("*.toml")) if path.name not in names]


def find_manifest(root: Path, model: str) -> Manifest:
    """Return the manifest called `model`, in manifests/ or of the package, or at that path.

    Raises UsageError when there is none, naming those there are, and for one that
    bears the name of another: a model's files are known by its name.
    """
    by_path = model.endswith(".toml") or "/" in model
    if not by_path and path_problem(model):
        raise UsageError(f"{model!r} is not a valid model name")
    path = Path(model) if by_path else _named(root, model)
    if not (path.is_file() if by_path else os.path.lexists(path)):
        known = [path.stem for path in manifests(root)]
        hint = did_you_mean(model, known) or ", or give the path of a manifest (.toml)"
        raise UsageError(f"no model called {model!r}; there are {', '.join(known)}{hint}")
    manifest = load(path)
    own = _named(root, manifest.name)
    is_other = own.is_file() and not own.samefile(path)
    if is_other and replace(load(own), where=manifest.where) != manifest:
        raise UsageError(
            f"{path} has the name of another manifest, {own}: {manifest.name!r}. It could replace"
            f" that model's files; give it a name of its own, or review it and put it at {own}"
        )
    return manifest


def _named(root: Path, name: str) -> Path:
    """Return the path of the manifest of that name, which may not exist."""
    own = root / "manifests" / f"{name}.toml"
    return own if os.path.lexists(own) else SHIPPED / own.name


def known_name(root: Path, model: str) -> str | None:
    """Return the name of a model whose manifest is there and holds, or None."""
    with contextlib.suppress(CsmWeightsError, OSError):
        return find_manifest(root, model).name if model else None
    return None

"""What CSM needs to speak without a network: tokenizer, codec, and the Hub's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from csm_weights.config import HubEnvironment, pip_command
from csm_weights.errors import Finding, Kind, MissingInput
from csm_weights.store.hub_cache import main_of, repository, snapshot_file, snapshots_of

#: The repository that the model's own files can be seeded into.
CSM = "sesame/csm-1b"

#: The file that holds a tokenizer, and the repositories that have it, in this order.
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_REPOS = (CSM, "meta-llama/Llama-3.2-1B")

#: The repository of Mimi for transformers, and the files it consists of.
CODEC_REPO = "kyutai/mimi"
CODEC_FILES = ("config.json", "model.safetensors")

#: The command that brings a tokenizer and a codec, verified, with a model.
BRING = "inv weights --with speak"


@dataclass(frozen=True)
class Asset:
    """A repository that is needed for `purpose`, with the sizes of its files in bytes, if known.

    A name may be a folder's. `gated`: only to those who accepted its terms.
    `missing` are those of the files that an offline client does not find;
    `command` downloads them.
    """

    repo: str
    purpose: str
    files: Mapping[str, int | None]
    gated: bool = False
    missing: tuple[str, ...] = ()
    command: str = ""


#: What Sesame's generator asks the Hub for, and then its libraries moshi and silentcipher.
ASSETS = (
    Asset(
        CSM,
        "the model, as other programs find it",
        {"config.json": None, "model.safetensors": 6_211_186_784},
        gated=True,
    ),
    Asset(
        "meta-llama/Llama-3.2-1B",
        "the text tokenizer of Sesame's own generator; others take that of sesame/csm-1b",
        dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
        gated=True,
    ),
    Asset(
        "kyutai/moshiko-pytorch-bf16",
        "Mimi, the audio codec of Sesame's own generator",
        {"tokenizer-e351c8d8-checkpoint125.safetensors": 384_644_900},
    ),
    Asset(
        "sony/silentcipher",
        "the watermark of Sesame's own generator",
        {"44_1_khz/73999_iteration": None},
        command="hf download sony/silentcipher",
    ),
)


def find_assets(cache: Path) -> list[Asset]:
    """Return the repositories that Sesame's generator asks for, with what is missing of each.

    Judged by presence and, where it is known, by size: nothing is hashed.
    """
    found = []
    for asset in ASSETS:
        command = asset.command or " ".join(["hf download", asset.repo, *asset.files])
        if asset.repo == CSM:
            command = "inv weights --only safetensors && inv seed-cache --only safetensors"
        named = asset.files.items()
        missing = tuple(n for n, size in named if not _is_found(cache, asset.repo, n, size))
        found.append(replace(asset, missing=missing, command=command))
    return found


def _is_found(cache: Path, repo: str, name: str, size: int | None) -> bool:
    """Check that an offline client that asks for main finds a file, or a folder with one."""
    commit = main_of(repository(cache, repo))
    if commit is None:
        return False
    folder = repository(cache, repo) / "snapshots" / commit / name
    if folder.is_dir():
        names = [f"{name}/{path.name}" for path in folder.iterdir()]
        return any(snapshot_file(cache, repo, commit, inside) for inside in names)
    file = snapshot_file(cache, repo, commit, name)
    return file is not None and size in (None, file.stat().st_size)


def snapshots(repo: str, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield the snapshots of a repository in the cache that have all these files, main's first."""
    cache = HubEnvironment.read().cache
    for snapshot in snapshots_of(repository(cache, repo)):
        if all(snapshot_file(cache, repo, snapshot.name, name) for name in names):
            yield snapshot


def tokenizer_file(*folders: Path | None) -> Path | None:
    """Return the tokenizer in the first of these folders that has one, or in the Hub's cache."""
    here = [folder / TOKENIZER_FILE for folder in folders if folder]
    cached = (s for repo in TOKENIZER_REPOS for s in snapshots(repo, (TOKENIZER_FILE,)))
    found = next((file for file in here if file.is_file()), None)
    return found or next((snapshot / TOKENIZER_FILE for snapshot in cached), None)


def codec_folder(folder: Path | None) -> Path | None:
    """Return the folder with Mimi: `folder`, if there is one, or a snapshot in the Hub's cache."""
    return folder or next(snapshots(CODEC_REPO, CODEC_FILES), None)


def not_installed(package: str, purpose: str) -> MissingInput:
    """Return the error for a package that is needed to speak and is not installed."""
    words = (f"the package, which {purpose}", "not installed", pip_command("speak"))
    finding = Finding(Kind.NOT_INSTALLED, package, *words)
    return MissingInput(f"{package} is not installed", [finding])

"""The repositories that CSM needs to speak without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csm_weights.store.hub_cache import _resolved, main_of, repository

#: The repository that files in place can be given to the cache of.
CSM = "sesame/csm-1b"


@dataclass(frozen=True)
class Needed:
    """A repository that CSM needs to speak offline, for `purpose`.

    `missing` are those of its `files` that an offline client does not find;
    `command` brings them. `gated`: only to those who accepted its terms.
    `optional`: Sesame's own generator does without.
    """

    repo: str
    purpose: str
    files: tuple[str, ...]
    here: bool
    missing: tuple[str, ...]
    command: str
    gated: bool
    optional: bool = False


@dataclass(frozen=True)
class _Wanted:
    """A repository with the files (or folders) that are asked of its main; sizes in bytes."""

    repo: str
    purpose: str
    files: Mapping[str, int | None]
    gated: bool = False
    whole: bool = False
    optional: bool = False


#: What Sesame's generator asks the Hub for, and then its libraries moshi and silentcipher.
_WANTED = (
    _Wanted(
        CSM,
        "the model",
        {"config.json": None, "model.safetensors": 6_211_186_784},
        gated=True,
    ),
    _Wanted(
        "meta-llama/Llama-3.2-1B",
        "the text tokenizer of Sesame's own generator; today's sesame/csm-1b carries one itself,"
        " and transformers needs no other",
        dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
        gated=True,
    ),
    _Wanted(
        "kyutai/moshiko-pytorch-bf16",
        "Mimi, the audio codec of Sesame's own generator",
        {"tokenizer-e351c8d8-checkpoint125.safetensors": 384_644_900},
    ),
    _Wanted(
        "sony/silentcipher",
        "the watermark of Sesame's own generator",
        {"44_1_khz/73999_iteration": None},
        whole=True,
    ),
    _Wanted(
        "kyutai/mimi",
        "Mimi again, as the Generator of this package takes it, by transformers",
        dict.fromkeys(("config.json", "model.safetensors")),
        optional=True,
    ),
)


def closure(cache: Path, in_place: bool = False) -> list[Needed]:
    """The repositories that CSM needs to speak offline, and which of them are here.

    `in_place` says that the model's own files are in place and proven. Judged
    by presence and, where it is known, by size: nothing is hashed.
    """
    return [_needed(cache, wanted, in_place) for wanted in _WANTED]


def _needed(cache: Path, wanted: _Wanted, in_place: bool) -> Needed:
    repo, names = wanted.repo, tuple(wanted.files)
    missing = tuple(n for n in names if not _is_found(cache, repo, n, wanted.files[n]))
    command = " ".join(["hf download", repo, *(() if wanted.whole else names)])
    if repo == CSM:
        command = "inv seed-cache --only safetensors"
        command = command if in_place else f"inv weights --only safetensors && {command}"
    return Needed(
        repo,
        wanted.purpose,
        names,
        not missing,
        missing,
        command,
        wanted.gated,
        wanted.optional,
    )


def _is_found(cache: Path, repo: str, path: str, size: int | None) -> bool:
    """Whether an offline client that asks for main finds a file, or a folder with one."""
    commit = main_of(cache, repo)
    if commit is None:
        return False
    folder = repository(cache, repo) / "snapshots" / commit / path
    if folder.is_dir():
        return any(_resolved(p, cache) for p in folder.iterdir())
    file = _resolved(folder, cache)
    return file is not None and size in (None, file.stat().st_size)

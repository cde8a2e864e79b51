"""Text to tokens, and audio to codes and back: from files that are on this machine alone.

The tokenizer is Llama 3.2's, which today's sesame/csm-1b carries too; the codec
is Mimi, as kyutai/mimi has it for transformers. Nothing here asks a server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from csm_weights.config import HubEnvironment
from csm_weights.errors import Finding, Kind, MissingInput, UsageError, WrongContent
from csm_weights.store import hub_cache

if TYPE_CHECKING:
    import tokenizers

#: The file that holds a tokenizer, and the repositories that have it, in this order.
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_REPOS = ("sesame/csm-1b", "meta-llama/Llama-3.2-1B")

#: Where Mimi is, and the files it consists of.
CODEC_REPO = "kyutai/mimi"
CODEC_FILES = ("config.json", "model.safetensors")

#: What stands before and after every text.
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

_INSTALL = "pip install -c constraints.txt -e '.[speak]'"


class Tokenizer(Protocol):
    """Turns text into tokens."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with BOS before them and EOS after."""


class Codec(Protocol):
    """Turns audio into codes and back; `sample_rate` in Hz, `codebooks` K."""

    sample_rate: int
    codebooks: int

    def encode(self, audio: Tensor) -> Tensor:
        """Codes (K, T) of mono audio (samples,)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Mono audio (samples,) of codes (K, T)."""


class TextTokenizer:
    """A tokenizer of the tokenizers library, with BOS and EOS around every text.

    Raises WrongContent where it has no such tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, where: str = "the tokenizer") -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos = (_special(tokenizer, token, where) for token in (BOS, EOS))

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Reads a tokenizer.json; raises MissingInput without the library, WrongContent."""
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise _not_installed("tokenizers", "turns text into tokens") from None
        try:
            tokenizer = Fast.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            words = ("a tokenizer of the tokenizers library", str(error)[:200])
            finding = Finding(Kind.MALFORMED, str(path), *words)
            raise WrongContent("the tokenizer cannot be used", [finding]) from None
        return cls(tokenizer, str(path))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with BOS before them and EOS after."""
        # What a file's own post-processor adds differs from repository to repository.
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._bos, *ids, self._eos]


def _special(tokenizer: tokenizers.Tokenizer, token: str, where: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        finding = Finding(Kind.MALFORMED, where, f"the token {token} of Llama 3", "no such token")
        raise WrongContent("the tokenizer is not CSM's", [finding])
    return int(number)


class Mimi:
    """transformers' Mimi, for one piece of mono audio at a time, in float32.

    `model` is a MimiModel; `codebooks` is how many of its codebooks are used.
    Raises WrongContent where it has fewer.
    """

    def __init__(self, model: Any, codebooks: int = 32, device: str | torch.device = "cpu") -> None:
        config = model.config
        self.sample_rate = int(config.sampling_rate)
        self.codebooks = codebooks
        self._size = int(config.codebook_size)
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        if config.num_quantizers < codebooks:
            words = (f"{codebooks} codebooks, as the model has", f"{config.num_quantizers}")
            finding = Finding(Kind.MALFORMED, "the codec", *words)
            raise WrongContent("the codec does not fit the model", [finding])

    @classmethod
    def from_local(
        cls, folder: Path | str, codebooks: int = 32, device: str | torch.device = "cpu"
    ) -> Mimi:
        """Reads config.json and model.safetensors of a folder; no tensor may be missing.

        Raises MissingInput without transformers, WrongContent.
        """
        try:
            from safetensors import SafetensorError
            from transformers import MimiModel
        except ImportError:
            raise _not_installed("transformers", "runs the audio codec") from None
        try:
            model, report = MimiModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _bad_codec(folder, str(error)[:300]) from None
        # transformers fills what a file lacks with random numbers.
        for key in ("missing_keys", "mismatched_keys"):
            if report.get(key):
                names = ", ".join(sorted(map(str, report[key]))[:3])
                raise _bad_codec(folder, f"{key.replace('_', ' ')}: {names}")
        return cls(model, codebooks, device)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Codes (K, T) of mono audio (samples,)."""
        if audio.ndim != 1 or not audio.numel():
            raise UsageError(f"audio is (samples,), mono; this is {tuple(audio.shape)}")
        batch = audio.to(self._model.device, torch.float32)[None, None]
        codes: Tensor = self._model.encode(batch, num_quantizers=self.codebooks).audio_codes
        return codes[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Mono audio (samples,) of codes (K, T); raises UsageError for codes it does not have."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self._size:
            low, high = int(codes.min()), int(codes.max())
            raise UsageError(f"codes {low} to {high}; the codec has 0 to {self._size - 1}")
        audio: Tensor = self._model.decode(codes[None].to(self._model.device)).audio_values
        return audio[0, 0]


def _bad_codec(folder: Path | str, found: str) -> WrongContent:
    words = ("Mimi for transformers, whole", found, f"hf download {CODEC_REPO} --force-download")
    finding = Finding(Kind.MALFORMED, str(folder), *words)
    return WrongContent("the codec cannot be used", [finding])


def as_tokenizer(given: Tokenizer | tokenizers.Tokenizer) -> Tokenizer:
    """A tokenizer as it was given, or one of the tokenizers library in our clothes."""
    is_fast = hasattr(given, "token_to_id") and hasattr(given, "to_str")
    return TextTokenizer(cast("tokenizers.Tokenizer", given)) if is_fast else cast(Tokenizer, given)


def as_codec(given: Any, codebooks: int, device: torch.device) -> Codec:
    """A codec as it was given, or transformers' MimiModel in our clothes."""
    if hasattr(given, "sample_rate"):
        return cast(Codec, given)
    return Mimi(given, codebooks, device)


def find_tokenizer(folder: Path | None) -> TextTokenizer:
    """The tokenizer beside the model's files in `folder`, or else in the Hub's cache.

    Raises MissingInput, with the command, where there is none.
    """
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        return TextTokenizer.from_file(folder / TOKENIZER_FILE)
    for repo in TOKENIZER_REPOS:
        for found in _snapshots(repo, (TOKENIZER_FILE,)):
            return TextTokenizer.from_file(found / TOKENIZER_FILE)
    where = f"{folder / TOKENIZER_FILE if folder else TOKENIZER_FILE}, and the Hub's cache"
    command = f"hf download {TOKENIZER_REPOS[0]} {TOKENIZER_FILE}"
    finding = Finding.missing(where, "the tokenizer", command)
    advice = (
        "In a checkout, proven and beside the model: inv weights --only tokenizer\n"
        "Without it, give the text as token ids."
    )
    raise MissingInput("text needs a tokenizer, and none is here", [finding], advice)


def find_codec(codebooks: int, device: torch.device) -> Mimi:
    """Mimi from the Hub's cache; raises MissingInput, with the command, where it is not there."""
    for found in _snapshots(CODEC_REPO, CODEC_FILES):
        return Mimi.from_local(found, codebooks, device)
    where = f"{CODEC_REPO} in {HubEnvironment.read().cache}"
    words = (" and ".join(CODEC_FILES), "not both", f"hf download {CODEC_REPO}")
    finding = Finding(Kind.MISSING, where, *words)
    advice = (
        f"In a checkout, and proven: inv lock --repo {CODEC_REPO} && inv weights --model mimi"
        " && inv seed-cache --model mimi\n"
        "Without it, generate_frames gives the codes."
    )
    raise MissingInput("audio needs the codec Mimi, and it is not here", [finding], advice)


def _snapshots(repo: str, names: tuple[str, ...]) -> Iterator[Path]:
    """The snapshots of a repository in the cache that have all these files, main's first."""
    cache = HubEnvironment.read().cache
    folder = hub_cache.repository(cache, repo) / "snapshots"
    others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    for commit in dict.fromkeys([hub_cache.main_of(cache, repo), *others]):
        if commit and all(hub_cache.snapshot_file(cache, repo, commit, name) for name in names):
            yield folder / commit


def _not_installed(package: str, purpose: str) -> MissingInput:
    words = (f"the package, which {purpose}", "not installed", _INSTALL)
    finding = Finding(Kind.NOT_INSTALLED, package, *words)
    return MissingInput(f"{package} is not installed", [finding])

"""Text to tokens, with a tokenizer from files on this machine; nothing here asks a server.

The tokenizer is Llama 3.2's, which today's sesame/csm-1b carries too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from csm_weights.errors import Finding, Kind, MissingInput, WrongContent
from csm_weights.files import read_file
from csm_weights.model.offline_assets import (
    BRING,
    TOKENIZER_FILE,
    TOKENIZER_REPOS,
    not_installed,
    tokenizer_file,
)

if TYPE_CHECKING:
    import tokenizers

#: Most bytes read of it: Llama 3.2's has 17 MB.
MAX_TOKENIZER = 256 << 20

#: The tokens before and after every text.
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


class Tokenizer(Protocol):
    """Turns text into tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS before them and EOS after."""


class TextTokenizer:
    """A tokenizer of the tokenizers library, with BOS and EOS around every text.

    Raises WrongContent where it has no such tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, where: str = "the tokenizer") -> None:
        self._tokenizer = tokenizer
        self._around: list[int] = []
        for token in (BOS, EOS):
            number = tokenizer.token_to_id(token)
            if number is None:
                words = (f"the token {token} of Llama 3", "no such token")
                finding = Finding(Kind.MALFORMED, where, *words)
                raise WrongContent("the tokenizer is not CSM's", [finding])
            self._around.append(number)

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Read a tokenizer.json; raises MissingInput without it or the library, WrongContent."""
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise not_installed("tokenizers", "turns text into tokens") from None
        data = read_file(path, MAX_TOKENIZER, "a tokenizer.json")
        try:
            tokenizer = Fast.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            words = ("a tokenizer of the tokenizers library", str(error)[:200])
            finding = Finding(Kind.MALFORMED, str(path), *words)
            raise WrongContent("the tokenizer cannot be used", [finding]) from None
        return cls(tokenizer, str(path))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS before them and EOS after."""
        # a file's own post-processor adds other tokens from repository to repository
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        bos, eos = self._around
        return [bos, *ids, eos]


def find_tokenizer(
    folder: Path | None, codec: Path | None = None, command: str = BRING
) -> TextTokenizer:
    """Find the tokenizer beside the model's files in `folder`, or the codec's, or in the cache.

    Raises MissingInput, with the command that brings it verified, where there is none.
    """
    if file := tokenizer_file(folder, codec):
        return TextTokenizer.from_file(file)
    where = f"{folder / TOKENIZER_FILE if folder else TOKENIZER_FILE}, and the Hub's cache"
    finding = Finding.missing(where, "the tokenizer", command)
    advice = (
        f"Or: hf download {TOKENIZER_REPOS[0]} {TOKENIZER_FILE}\n"
        "inv speak takes one by --tokenizer FILE; a program may give the text as token ids."
    )
    raise MissingInput("text needs a tokenizer, and none is on this machine", [finding], advice)

"""Speech from text and context, as Sesame's own generator makes it.

A prompt is a row of frames, each with a column a codebook and one for text. A
segment of the context is its text, then its audio, then a frame of zeros; the
text to be spoken comes last. Letters in shapes: S frames of a prompt, T frames
of audio (80 ms each), K codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from csm_weights.errors import UsageError
from csm_weights.model import watermark
from csm_weights.model.codec import Codec, Mimi, find_codec, require_below
from csm_weights.model.csm import FRAME_MS, Model
from csm_weights.model.decoders import DecodingPath, FrameDecoder, choose_path, open_decoder
from csm_weights.model.tokenizer import TextTokenizer, Tokenizer, find_tokenizer
from csm_weights.progress import Progress

#: Hz of the audio that CSM speaks and hears.
SAMPLE_RATE = 24_000

#: Text, or the ids of its tokens as they are, with BOS and EOS.
Text = str | Sequence[int]

#: Tokens (S, K + 1), integers, and their mask (S, K + 1), booleans.
Frames = tuple[Tensor, Tensor]


class InputsTooLong(UsageError, ValueError):
    """The prompt and the longest audio asked for do not fit into the model's positions."""


@dataclass(frozen=True, eq=False)
class Segment:
    """An utterance: its speaker, its text, and its sound.

    The sound is `audio`, 24 kHz mono (samples,), or its `codes` (K, T), which
    need no codec.
    """

    speaker: int
    text: Text
    audio: Tensor | None = None
    codes: Tensor | None = None


class Generator:
    """Speaks one text at a time with a model.

    `tokenizer` is a `tokenizer.Tokenizer` or one of the tokenizers library,
    `codec` a `codec.Codec` or transformers' MimiModel; where None they are
    found, when first needed, on this machine alone. `watermarked` is True
    where the audio made last carries Sesame's watermark. `fast` is a path of
    `decoders.names_of` to decode by; where None `decoders.choose_path` takes one.
    """

    def __init__(
        self, model: Model, tokenizer: Any = None, codec: Any = None, fast: str | None = None
    ) -> None:
        self._model = model
        self._given = (tokenizer, codec)
        self._fast = fast
        self.watermarked = False

    @property
    def device(self) -> torch.device:
        """The device of the model, which audio and codes are made on."""
        return self._model.projection.weight.device

    @property
    def sample_rate(self) -> int:
        """Samples a second of the audio, in Hz."""
        given = self._given[1]
        return SAMPLE_RATE if given is None else self._codec.sample_rate

    def generate(
        self,
        text: Text,
        speaker: int,
        context: Sequence[Segment],
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
    ) -> Tensor:
        """Return audio (samples,), float32, of `speaker` saying `text` after `context`.

        With silentcipher installed it carries Sesame's watermark; its attribute
        `watermarked`, as the generator's, is True where it does. Otherwise as
        `generate_frames`; also raises MissingInput without the codec.
        """
        codec, watermarker = self._codec, self._watermarker  # found before the work begins
        prompt = (text, speaker, context, max_audio_length_ms)
        codes = self.generate_frames(*prompt, temperature, topk)
        audio, self.watermarked = torch.zeros(0, device=self.device), False
        if len(codes):
            audio = codec.decode(codes.T)
        if watermarker is not None:
            audio, self.watermarked = watermark.mark(watermarker, audio, codec.sample_rate)
        audio.watermarked = self.watermarked  # type: ignore[attr-defined]
        return audio

    def generate_frames(
        self,
        text: Text,
        speaker: int,
        context: Sequence[Segment],
        max_audio_length_ms: float = 10_000,
        temperature: float = 0.9,
        topk: int = 50,
    ) -> Tensor:
        """Return the codes (T, K) of `iter_frames`; a bar on a terminal shows progress."""
        prompt = (text, speaker, context, max_audio_length_ms)
        limit = int(max_audio_length_ms / FRAME_MS)
        made = self.iter_frames(*prompt, temperature, topk)
        hidden = Progress.is_quiet or None  # None: no bar where stderr is no terminal
        words = ("generating", limit, False)
        bar = tqdm(made, *words, unit=" frames", disable=hidden)
        frames = list(bar)
        none = torch.zeros(0, self._model.config.codebooks, dtype=torch.long, device=self.device)
        return torch.stack(frames) if frames else none

    def iter_frames(
        self,
        text: Text,
        speaker: int,
        context: Sequence[Segment],
        max_audio_length_ms: float = 10_000,
        temperature: float = 0.9,
        topk: int = 50,
    ) -> Iterator[Tensor]:
        """Yield codes (K,), as they are made, of `speaker` saying `text` after `context`.

        At most `max_audio_length_ms`, in frames of 80 ms; a frame of zeros ends
        it before, and is not among them. The caller may stop at any frame. Text
        as token ids needs no tokenizer, and context as codes no codec.
        Temperature 0 or topk 1 is greedy.

        Raises InputsTooLong, a ValueError, where prompt and audio together do
        not stay below the model's positions; MissingInput without a tokenizer
        or codec that is needed; UsageError for tokens or codes that the model
        does not have.
        """
        limit = int(max_audio_length_ms / FRAME_MS)
        rows: list[Frames] = []
        for segment in context:
            rows += [self._text_frames(segment.text, segment.speaker), self._audio_frames(segment)]
        rows.append(self._text_frames(text, speaker))
        tokens, tokens_mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
        most = self._model.config.max_positions
        if len(tokens) + limit >= most:
            raise InputsTooLong(
                f"Inputs too long: a prompt of {len(tokens)} frames and up to {limit} frames of"
                f" audio; together they must stay below the model's {most} positions"
            )
        for number in range(limit):
            if number:
                codes = self._decoder.step()
            else:
                codes = self._decoder.start(tokens[None], tokens_mask[None], temperature, topk)
            if not codes.any():
                return
            yield codes[0]

    def _text_frames(self, text: Text, speaker: int) -> Frames:
        c = self._model.config
        ids = self._tokenizer.encode(f"[{speaker}]{text}") if isinstance(text, str) else text
        column = torch.tensor(list(ids), dtype=torch.long, device=self.device)[:, None]
        require_below(column, c.text_vocab, "text tokens", "the model")
        tokens = F.pad(column, (c.codebooks, 0))
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, -1] = True
        return tokens, mask

    def _audio_frames(self, segment: Segment) -> Frames:
        """Return the frames of a segment's sound, and the frame of zeros that ends it."""
        c, codes = self._model.config, segment.codes
        if (segment.audio is None) == (codes is None):
            raise UsageError("a segment of the context has either audio or codes")
        if segment.audio is not None:
            codes = self._codec.encode(segment.audio.to(self.device))
        assert codes is not None
        if codes.ndim != 2 or len(codes) != c.codebooks or codes.is_floating_point():
            shape = f"{tuple(codes.shape)}, {codes.dtype}"
            raise UsageError(f"codes are ({c.codebooks}, T), whole numbers; these are {shape}")
        require_below(codes, c.audio_vocab, "audio codes", "the model")
        tokens = F.pad(codes.T.to(self.device, torch.long), (0, 1, 0, 1))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, -1] = False
        return tokens, mask

    @cached_property
    def path(self) -> DecodingPath:
        """The path that frames are decoded by, and why it is this one."""
        return choose_path(self._model, self._fast)

    @cached_property
    def _decoder(self) -> FrameDecoder:
        return open_decoder(self._model, self.path.name)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        given = self._given[0]
        if given is None:
            return find_tokenizer(self._model.folder)
        # the tokenizers library's own, or anything that encodes
        is_fast = hasattr(given, "token_to_id") and hasattr(given, "to_str")
        return TextTokenizer(given) if is_fast else given

    @cached_property
    def _codec(self) -> Codec:
        codebooks, given = self._model.config.codebooks, self._given[1]
        if given is None:
            return find_codec(codebooks, self.device)
        is_codec = hasattr(given, "sample_rate")  # otherwise transformers' MimiModel
        return given if is_codec else Mimi(given, codebooks, self.device)

    @cached_property
    def _watermarker(self) -> Any:
        return watermark.find_watermarker(self.device)

"""CSM in plain PyTorch, under the tensor names of the published files.

Two Llama stacks make one frame, 80 ms of audio. The backbone reads a sequence
of frames: at each position the embeddings of its audio codes (one a codebook)
and of its text token are summed. Its last hidden state gives the code of
codebook 0. The depth decoder then starts from that hidden state and gives the
codes of the other codebooks, one after the other.

Letters in shapes: B batch, S sequence, K codebooks, V audio vocabulary, D the
backbone's features. Columns of tokens and masks: K audio codes, then the text.

This is the reference: it is written to be read and checked, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import UsageError, WrongContent
from csm_weights.formats.architecture import CsmConfig, TransformerConfig, parse_config
from csm_weights.formats.tensor_index import check_against
from csm_weights.formats.weights_file import locate, missing, open_weights
from csm_weights.model.load import load_tensors

#: Picks one code a row from logits (B, V): codes (B,).
Sampler = Callable[[Tensor], Tensor]

#: Cosines and sines of the RoPE angles, each (B, 1, S, head_dim / 2).
Rotation = tuple[Tensor, Tensor]


def rope_frequencies(config: CsmConfig, head_dim: int) -> Tensor:
    """Radians a position for each feature pair of a head: float32 (head_dim / 2,).

    Llama 3's scaling: pairs that turn once in fewer than old_context / high
    positions keep their frequency, those slower than old_context / low are
    slowed by `rope_factor`, and those between are blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / config.rope_base**exponents
    turns = config.rope_old_context * plain / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / config.rope_factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of neighbouring features of x (B, heads, S, head_dim), in float32."""
    cos, sin = rotation
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Linear(nn.Linear):
    """torch's, but on the meta device nothing is drawn: torch would import 800 modules for it."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """torch's, but on the meta device nothing is drawn, as of `Linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class KeyValueCache:
    """Keys and values of one attention layer at the positions `[0, length)`."""

    def __init__(self, stack: TransformerConfig, batch: int, positions: int, like: Tensor) -> None:
        shape = (batch, stack.kv_heads, positions, stack.head_dim)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores S more positions, and returns the keys and values of all so far."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input is."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.scale.shape, self.scale.float(), self.eps)
        return normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE on interleaved pairs."""

    def __init__(self, stack: TransformerConfig) -> None:
        super().__init__()
        kv_dim = stack.kv_heads * stack.head_dim
        self.head_dim = stack.head_dim
        self.q_proj = Linear(stack.dim, stack.dim, bias=False)
        self.k_proj = Linear(stack.dim, kv_dim, bias=False)
        self.v_proj = Linear(stack.dim, kv_dim, bias=False)
        self.output_proj = Linear(stack.dim, stack.dim, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, visible: Tensor, cache: KeyValueCache | None
    ) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return self.output_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """The gated feed-forward block of Llama."""

    def __init__(self, stack: TransformerConfig) -> None:
        super().__init__()
        self.w1 = Linear(stack.dim, stack.ffn, bias=False)
        self.w2 = Linear(stack.ffn, stack.dim, bias=False)
        self.w3 = Linear(stack.dim, stack.ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each normed before and added after."""

    def __init__(self, stack: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.attn = Attention(stack)
        self.mlp = FeedForward(stack)
        self.sa_norm = RMSNorm(stack.dim, eps)
        self.mlp_norm = RMSNorm(stack.dim, eps)

    def forward(
        self, x: Tensor, rotation: Rotation, visible: Tensor, cache: KeyValueCache | None
    ) -> Tensor:
        x = x + self.attn(self.sa_norm(x), rotation, visible, cache)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A Llama without embeddings and head: features in, normed hidden states out."""

    def __init__(self, stack: TransformerConfig, config: CsmConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(stack, config.norm_eps) for _ in range(stack.layers))
        self.norm = RMSNorm(stack.dim, config.norm_eps)
        # A plain attribute, not a buffer: a model in bfloat16 keeps float32 angles.
        self.frequencies = rope_frequencies(config, stack.head_dim)

    def forward(
        self, x: Tensor, positions: Tensor, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Hidden states of x (B, S, features) at positions (B, S), each seeing those before it.

        With `caches` (one a layer) the positions stored there are seen too.
        """
        seen = caches[0].length if caches else 0
        size = x.shape[1]
        visible = torch.ones(size, seen + size, dtype=torch.bool, device=x.device).tril(seen)
        angles = positions[:, None, :, None] * self.frequencies.to(x.device)
        rotation = (angles.cos(), angles.sin())
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, visible, caches[index] if caches else None)
        return self.norm(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """A CSM network; the state dict's names are `CsmConfig.tensor_shapes()`'s.

    `Model(config)` has random weights; `Model.from_local` reads a file's.
    """

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        a = self.config = config
        self.backbone = Transformer(a.backbone, a)
        self.decoder = Transformer(a.decoder, a)
        self.text_embeddings = Embedding(a.text_vocab, a.backbone.dim)
        self.audio_embeddings = Embedding(a.audio_vocab * a.codebooks, a.backbone.dim)
        self.projection = Linear(a.backbone.dim, a.decoder.dim, bias=False)
        self.codebook0_head = Linear(a.backbone.dim, a.audio_vocab, bias=False)
        self.audio_head = nn.Parameter(torch.empty(a.codebooks - 1, a.decoder.dim, a.audio_vocab))
        if not self.audio_head.is_meta:
            nn.init.normal_(self.audio_head, std=a.decoder.dim**-0.5)
        self._caches: list[KeyValueCache] | None = None

    @classmethod
    def from_local(
        cls,
        path: str | Path | Sequence[Path],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        config: CsmConfig | None = None,
        digests: Sequence[ByteRange] = (),
    ) -> Self:
        """Reads config.json and the weights, and checks every name, dtype and shape.

        `path` is a folder with config.json and model.safetensors or ckpt.pt
        (the first is taken where both are), or their parts, or one of these
        weight files with config.json beside it, or parts in order. `config` takes the place
        of config.json. `dtype` None keeps the file's. `digests` are spans that
        tile the file, and are proven as the bytes pass. Without conversion on
        the CPU a file is mapped, not copied; else there is no second copy either.

        Raises MissingInput when a file is not there, WrongContent, with a
        finding a tensor, when the weights are not exactly the network that
        config.json describes. No pickle is run.
        """
        weights, folder = locate(path)
        config = config or _read_config(folder, weights[0].parent)
        with open_weights(weights) as checkpoint:
            where = checkpoint.source.where
            if findings := check_against(checkpoint.index, config, where):
                name = weights[0].name
                raise WrongContent(f"{name} is not the network of its config.json", findings)
            tensors = load_tensors(
                checkpoint,
                torch.device(device),
                dtype,
                together=config.fused_tensors(),
                digests=digests,
            )
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)

    def setup_caches(self, batch: int) -> None:
        """Starts a new sequence of `batch` rows; `generate_frame` needs it once before."""
        a = self.config
        self._caches = self.new_caches(a.backbone, batch, a.max_positions)

    def backbone_hidden(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (B, S, D) of a whole sequence in one pass, without cache.

        tokens and mask are (B, S, K + 1), integers and booleans; positions (B, S).
        """
        self.check_inputs(tokens, mask, positions)
        hidden: Tensor = self.backbone(self.embed_frames(tokens, mask), positions)
        return hidden

    def codebook_logits(self, last_hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits (B, K, V) of every codebook in one pass, given the codes (B, K) before each.

        last_hidden (B, D) is the backbone's at the position before the frame.
        The code of the last codebook has no influence.
        """
        before = torch.cat((last_hidden[:, None], self.embed_audio(codes[:, :-1])), dim=1)
        inputs = self.projection(before)
        hidden = self.decoder(inputs, _positions_like(inputs, 0))
        others = torch.einsum("bkd,kdv->bkv", hidden[:, 1:], self.audio_head)
        return torch.cat((self.codebook0_head(last_hidden)[:, None], others), dim=1)

    @torch.no_grad()
    def generate_frame(
        self,
        tokens: Tensor,
        mask: Tensor,
        positions: Tensor,
        temperature: float = 0.9,
        topk: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The codes (B, K) of the frame after the given ones.

        tokens and mask are (B, S, K + 1), integers and booleans; positions
        (B, S) go on where the last call ended. Temperature 0 or topk 1 is
        greedy; otherwise codes are drawn with `generator` (torch's global one
        when None). An all-zero frame is the end of the audio.

        Raises UsageError when the positions do not fit ("Inputs too long").
        """
        codes, _ = self.generate_logits(
            tokens, mask, positions, chooser(temperature, topk, generator)
        )
        return codes

    @torch.no_grad()
    def generate_logits(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, choose: Sampler
    ) -> tuple[Tensor, Tensor]:
        """As `generate_frame`, with any way to choose: codes (B, K) and logits (B, K, V)."""
        self.check_inputs(tokens, mask, positions)
        caches = self._continued(positions)
        last = self.backbone(self.embed_frames(tokens, mask), positions, caches)[:, -1]
        logits = [self.codebook0_head(last)]
        codes = [choose(logits[0])]
        a = self.config
        caches = self.new_caches(a.decoder, last.shape[0], a.codebooks)
        inputs = torch.stack((last, self.embed_audio(codes[0][:, None])[:, 0]), dim=1)
        for book in range(1, a.codebooks):
            positions = _positions_like(inputs, caches[0].length)
            hidden = self.decoder(self.projection(inputs), positions, caches)[:, -1]
            logits.append(hidden @ self.audio_head[book - 1])
            codes.append(choose(logits[-1]))
            inputs = self.embed_audio(codes[-1][:, None], first_book=book)
        return torch.stack(codes, dim=1), torch.stack(logits, dim=1)

    def embed_audio(self, codes: Tensor, first_book: int = 0) -> Tensor:
        """Embeddings (..., N, D) of codes (..., N) of the codebooks from `first_book` on."""
        books = torch.arange(first_book, first_book + codes.shape[-1], device=codes.device)
        embedded: Tensor = self.audio_embeddings(codes + books * self.config.audio_vocab)
        return embedded

    def embed_frames(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The backbone's inputs (B, S, D) for tokens and mask (B, S, K + 1)."""
        text = self.text_embeddings(tokens[..., -1:])
        columns = torch.cat((self.embed_audio(tokens[..., :-1]), text), dim=-2)
        return (columns * mask[..., None]).sum(dim=-2)

    def new_caches(
        self, stack: TransformerConfig, batch: int, positions: int
    ) -> list[KeyValueCache]:
        """Empty caches, one a layer, of the weights' dtype and device."""
        like = self.projection.weight
        return [KeyValueCache(stack, batch, positions, like) for _ in range(stack.layers)]

    def _continued(self, positions: Tensor) -> list[KeyValueCache]:
        if self._caches is None or self._caches[0].keys.shape[0] != positions.shape[0]:
            raise UsageError(f"no caches for a batch of {positions.shape[0]}: call setup_caches")
        start = self._caches[0].length
        if not torch.equal(positions, _positions_like(positions, start)):
            raise UsageError(
                f"positions must go on at {start}, where the caches end; "
                "setup_caches starts a new sequence"
            )
        return self._caches

    def check_inputs(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Raises UsageError where shapes do not fit each other, or positions the model."""
        shape = (*positions.shape, self.config.codebooks + 1)
        if not (positions.ndim == 2 and tokens.shape == mask.shape == shape and tokens.numel()):
            raise UsageError(
                f"tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)} and positions "
                f"{tuple(positions.shape)} are not (B, S, {shape[-1]}), the same, and (B, S)"
            )
        self.check_position(int(positions.max()))

    def check_position(self, position: int) -> None:
        """Raises UsageError where the model has no such position."""
        if position >= self.config.max_positions:
            raise UsageError(
                f"Inputs too long: position {position}, "
                f"while the model has {self.config.max_positions}, from 0 on"
            )


def chooser(temperature: float, topk: int, generator: torch.Generator | None = None) -> Sampler:
    """How to pick a code: the best (temperature 0), or one drawn from the topk best."""
    if temperature < 0 or topk < 1:
        raise UsageError(f"temperature {temperature} is below 0, or topk {topk} below 1")
    if temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    return lambda logits: draw(logits, temperature, topk, generator)


def draw(
    logits: Tensor, temperature: float | Tensor, topk: int, generator: torch.Generator | None = None
) -> Tensor:
    """One code a row (B,), drawn from the topk best of logits (B, V); asks no host."""
    best, codes = logits.float().topk(min(topk, logits.shape[-1]))
    likely = (best / temperature).softmax(dim=-1)
    # The first of racing exponential clocks is a draw; multinomial would wait for the host.
    race = likely / torch.empty_like(likely).exponential_(1.0, generator=generator)
    return codes.gather(-1, race.argmax(dim=-1, keepdim=True))[:, 0]


def _positions_like(x: Tensor, start: int) -> Tensor:
    """Positions (B, S) from `start` on for x (B, S, ...)."""
    return torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[:2])


def _read_config(*folders: Path) -> CsmConfig:
    """The architecture that config.json in the first of some folders describes."""
    for config in (folder / "config.json" for folder in folders):
        if config.is_file():
            return parse_config(config.read_bytes(), str(config))
    raise missing(folders[0] / "config.json", "a file", "no such file")

"""CSM in plain PyTorch, under the tensor names of the published files.

Two Llama stacks make one frame, 80 ms of audio. The backbone reads a sequence
of frames: at each position the embeddings of its audio codes (one a codebook)
and of its text token are summed. Its last hidden state gives the code of
codebook 0. The depth decoder then starts from that hidden state and gives the
codes of the other codebooks, one after the other.

Letters in shapes: B batch, S sequence, K codebooks, V audio vocabulary, C
features of a stack, H heads, D features of a head. Columns of tokens and their
mask: K audio codes, then the text.

This is the reference: it is written to be read and checked, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from csm_weights.byte_ranges import ByteRange
from csm_weights.errors import UsageError, WrongContent
from csm_weights.formats.architecture import CsmConfig, TransformerConfig, read_config
from csm_weights.formats.compare import WeightsPair
from csm_weights.formats.identify import check_network, identify
from csm_weights.formats.transformers_layout import AUDIO, NamedTensors, name_tensors
from csm_weights.formats.weights_file import locate, missing, open_weights
from csm_weights.model.load import load_tensors

#: Milliseconds of audio in one frame: CSM has 12.5 frames a second.
FRAME_MS = 80

#: A dtype to load weights in: None is the file's, "fast" the faster one, which is bfloat16 on a
#: GPU and float32 on the CPU.
DType = torch.dtype | Literal["fast"] | None

#: Picks one code a row from logits (B, V): codes (B,).
Sampler = Callable[[Tensor], Tensor]

#: Decorator: attention runs in the first of these kernels that can. cuDNN's is none of them: it
#: builds a plan, which takes 20 ms and more, for each length that it has not met before.
chosen_attention = sdpa_kernel(
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
)


def rope_freqs(config: CsmConfig, head_dim: int) -> Tensor:
    """Return the radians a position of each feature pair of a head: float32 (D / 2,).

    Llama 3's scaling: pairs that turn once in fewer than old_context / high
    positions keep their frequency, those slower than old_context / low are
    slowed by `rope_factor`, and those between are blended.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    freqs = 1.0 / config.rope_base**exponents
    turns = config.rope_old_context * freqs / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / config.rope_factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of neighbouring features of x (B, H, S, D), in float32."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class _Undrawn:
    """A module that draws nothing on the meta device: torch would import 800 modules for it."""

    weight: Tensor

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()  # type: ignore[misc]


class Linear(_Undrawn, nn.Linear):
    """torch's linear layer."""


class Embedding(_Undrawn, nn.Embedding):
    """torch's embedding."""


class KVCache:
    """Keys and values of one attention layer at the positions `[0, length)`."""

    def __init__(self, stack: TransformerConfig, batch: int, positions: int, like: Tensor) -> None:
        shape = (batch, stack.kv_heads, positions, stack.head_dim)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.length = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store S more positions; return the keys and values of all so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input is."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm x (..., C)."""
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), self.eps).to(x.dtype)


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
        self, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Attend from x (B, S, C) to the positions that attn_mask (S, P) allows, or all before."""
        B, S, C = x.shape
        # (B, S, C) -> (B, H, S, D); k and v have fewer heads
        q = self.q_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, kv heads, P, D)
        is_causal = attn_mask is None and S > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=True
        )
        return self.output_proj(y.transpose(1, 2).reshape(B, S, C))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """The gated feed-forward block of Llama."""

    def __init__(self, stack: TransformerConfig) -> None:
        super().__init__()
        self.w1 = Linear(stack.dim, stack.ffn, bias=False)
        self.w2 = Linear(stack.ffn, stack.dim, bias=False)
        self.w3 = Linear(stack.dim, stack.ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of x (B, S, C)."""
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
        self, x: Tensor, cos: Tensor, sin: Tensor, attn_mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Run one layer on x (B, S, C)."""
        x = x + self.attn(self.sa_norm(x), cos, sin, attn_mask, cache)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A Llama without embeddings and head: features in, normed hidden states out."""

    def __init__(self, stack: TransformerConfig, config: CsmConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(stack, config.norm_eps) for _ in range(stack.layers))
        self.norm = RMSNorm(stack.dim, config.norm_eps)
        # a plain attribute, not a buffer: a model in bfloat16 keeps float32 angles
        self.freqs = rope_freqs(config, stack.head_dim)

    def forward(self, x: Tensor, input_pos: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Return hidden states of x (B, S, C) at input_pos (B, S), each seeing those before it.

        With `caches` (one a layer) the positions stored there are seen too.
        """
        S, seen = x.shape[1], caches[0].length if caches else 0
        # flash attention takes no mask; a whole sequence is causal, a single position sees all
        attn_mask = None
        if seen and S > 1:
            attn_mask = torch.ones(S, seen + S, dtype=torch.bool, device=x.device).tril(seen)
        angles = input_pos[:, None, :, None] * self.freqs.to(x.device)  # (B, 1, S, D / 2)
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attn_mask, caches[i] if caches else None)
        return self.norm(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """A CSM network; the state dict's names are `CsmConfig.tensor_shapes()`'s.

    `Model(config)` has random weights; `Model.from_local` reads a file's.
    `folder` is where the model's other files are, such as what its smoke test found.
    """

    folder: Path | None = None

    def __init__(self, config: CsmConfig) -> None:
        super().__init__()
        c = self.config = config
        self.backbone = Transformer(c.backbone, c)
        self.decoder = Transformer(c.decoder, c)
        self.text_embeddings = Embedding(c.text_vocab, c.backbone.dim)
        self.audio_embeddings = Embedding(c.audio_vocab * c.codebooks, c.backbone.dim)
        self.projection = Linear(c.backbone.dim, c.decoder.dim, bias=False)
        self.codebook0_head = Linear(c.backbone.dim, c.audio_vocab, bias=False)
        self.audio_head = nn.Parameter(torch.empty(c.codebooks - 1, c.decoder.dim, c.audio_vocab))
        if not self.audio_head.is_meta:
            nn.init.normal_(self.audio_head, std=c.decoder.dim**-0.5)
        self._caches: list[KVCache] | None = None

    @classmethod
    def from_local(
        cls,
        path: str | Path | Sequence[Path],
        device: str | torch.device = "cpu",
        dtype: DType = "fast",
        *,
        config: CsmConfig | None = None,
        digests: Sequence[ByteRange] = (),
    ) -> Self:
        """Read config.json and the weights; check every name, dtype and shape.

        `path` is a folder with config.json and weights, or one of its weight
        files: model.safetensors or ckpt.pt (the first is taken where both are),
        their chunk files, or shards with or without their index. Or it is the
        chunk files of one file in order, or the shards of one model. Weights
        are float32, bfloat16 or float16 throughout, and have the names of the
        original or of transformers, also as a training loop wraps them.

        `config` takes the place of config.json. `dtype` is as in DType.
        `digests` are byte ranges that tile the file; each is verified as its
        bytes pass. On the CPU a file that needs no conversion is mapped, not
        copied; otherwise there is no second copy either.

        Raises MissingInput when a file is not there, WrongContent, with a
        finding a tensor, called as in the file, when the weights are not exactly
        the network that config.json describes. No pickle is run.
        """
        files, folder = locate(path)
        device = torch.device(device)
        if dtype == "fast":
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if config is None:
            known = [p for p in (folder, files[0][0].parent) if (p / "config.json").is_file()]
            if not known:
                raise missing(folder / "config.json", "a file", "no such file")
            config = read_config(known[0] / "config.json")
        with ExitStack() as stack:
            opened = [stack.enter_context(open_weights(paths)) for paths in files]
            named = name_tensors(opened, (), config)
            _require_network(named, config)
            together = config.fused_tensors()
            tensors = load_tensors(named.tensors, device, dtype, together=together, digests=digests)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
        model.folder = folder
        return model.eval().requires_grad_(False)

    def setup_caches(self, max_batch_size: int) -> None:
        """Start a new sequence of so many rows; `generate_frame` needs it once before."""
        self._caches = self.new_caches(
            self.config.backbone, max_batch_size, self.config.max_positions
        )

    @chosen_attention
    def backbone_hidden(self, tokens: Tensor, tokens_mask: Tensor, input_pos: Tensor) -> Tensor:
        """Return hidden states (B, S, C) of a whole sequence in one pass, without cache.

        tokens and tokens_mask are (B, S, K + 1), integers and booleans; input_pos (B, S).
        """
        self.check_inputs(tokens, tokens_mask, input_pos)
        self.check_position(int(input_pos.max()))
        return self.backbone(self.embed_tokens(tokens, tokens_mask), input_pos)  # type: ignore[no-any-return]

    @chosen_attention
    def codebook_logits(self, last_h: Tensor, codes: Tensor) -> Tensor:
        """Return logits (B, K, V) of every codebook in one pass, each given the codes before it.

        last_h (B, C) is the backbone's hidden state at the position before the
        frame of codes (B, K). The code of the last codebook has no influence.
        """
        # the depth decoder reads the hidden state, then the codes of codebooks 0 to K - 2
        x = torch.cat((last_h[:, None], self.embed_audio(codes[:, :-1])), dim=1)
        x = self.projection(x)
        h = self.decoder(x, _positions_like(x, 0))
        # each codebook from 1 on has a head of its own
        others = torch.einsum("bkd,kdv->bkv", h[:, 1:], self.audio_head)
        return torch.cat((self.codebook0_head(last_h)[:, None], others), dim=1)

    @torch.no_grad()
    def generate_frame(
        self,
        tokens: Tensor,
        tokens_mask: Tensor,
        input_pos: Tensor,
        temperature: float = 0.9,
        topk: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the codes (B, K) of the frame after the given ones.

        tokens and tokens_mask are (B, S, K + 1), integers and booleans;
        input_pos (B, S) goes on where the last call ended. Temperature 0 or
        topk 1 is greedy; otherwise codes are drawn with `generator` (torch's
        global one when None). An all-zero frame is the end of the audio.

        Raises UsageError when the positions do not fit ("Inputs too long").
        """
        sampler = make_sampler(temperature, topk, generator)
        codes, _ = self.generate_logits(tokens, tokens_mask, input_pos, sampler)
        return codes

    @torch.no_grad()
    @chosen_attention
    def generate_logits(
        self, tokens: Tensor, tokens_mask: Tensor, input_pos: Tensor, sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        """Generate a frame with any sampler; return codes (B, K) and logits (B, K, V)."""
        self.check_inputs(tokens, tokens_mask, input_pos)
        self.check_position(int(input_pos.max()))
        if self._caches is None or self._caches[0].k.shape[0] != input_pos.shape[0]:
            raise UsageError(f"no caches for a batch of {input_pos.shape[0]}: call setup_caches")
        start = self._caches[0].length
        if not torch.equal(input_pos, _positions_like(input_pos, start)):
            raise UsageError(
                f"positions must continue at {start}, where the caches end; "
                "setup_caches starts a new sequence"
            )
        c = self.config
        # the backbone gives the hidden state (B, C) from which codebook 0 is drawn
        x = self.embed_tokens(tokens, tokens_mask)
        last_h = self.backbone(x, input_pos, self._caches)[:, -1]
        logits = [self.codebook0_head(last_h)]
        codes = [sampler(logits[0])]
        # the depth decoder gives the others, one after the other, with a cache for this frame
        caches = self.new_caches(c.decoder, last_h.shape[0], c.codebooks)
        x = torch.stack((last_h, self.embed_audio(codes[0][:, None])[:, 0]), dim=1)
        for i in range(1, c.codebooks):
            h = self.decoder(self.projection(x), _positions_like(x, caches[0].length), caches)
            logits.append(h[:, -1] @ self.audio_head[i - 1])
            codes.append(sampler(logits[i]))
            x = self.embed_audio(codes[i][:, None], first_codebook=i)
        return torch.stack(codes, dim=1), torch.stack(logits, dim=1)

    def embed_audio(self, codes: Tensor, first_codebook: int = 0) -> Tensor:
        """Embed codes (..., N) of the codebooks from `first_codebook` on: (..., N, C)."""
        codebooks = torch.arange(codes.shape[-1], device=codes.device) + first_codebook
        embedded: Tensor = self.audio_embeddings(codes + codebooks * self.config.audio_vocab)
        return embedded

    def embed_tokens(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
        """Return the backbone's inputs (B, S, C) for tokens and their mask (B, S, K + 1)."""
        text = self.text_embeddings(tokens[..., -1:])
        columns = torch.cat((self.embed_audio(tokens[..., :-1]), text), dim=-2)
        return (columns * tokens_mask[..., None]).sum(dim=-2)

    def new_caches(self, stack: TransformerConfig, batch: int, positions: int) -> list[KVCache]:
        """Return empty caches, one a layer, of the weights' dtype and device."""
        like = self.projection.weight
        return [KVCache(stack, batch, positions, like) for _ in range(stack.layers)]

    def check_inputs(self, tokens: Tensor, tokens_mask: Tensor, input_pos: Tensor) -> None:
        """Raise UsageError where shapes do not fit each other or the model."""
        expected = (*input_pos.shape, self.config.codebooks + 1)
        shapes = [tuple(x.shape) for x in (tokens, tokens_mask, input_pos)]
        if not (input_pos.ndim == 2 and shapes[0] == shapes[1] == expected and tokens.numel()):
            raise UsageError(
                "tokens {}, tokens_mask {} and input_pos {} are not ".format(*shapes)
                + f"(B, S, {expected[-1]}), the same, and (B, S)"
            )

    def check_position(self, position: int) -> None:
        """Raise UsageError where the model has no such position."""
        if position >= self.config.max_positions:
            raise UsageError(
                f"Inputs too long: position {position}, "
                f"while the model has {self.config.max_positions}, from 0 on"
            )


def make_sampler(
    temperature: float,
    topk: int,
    generator: torch.Generator | None = None,
    divisor: Tensor | None = None,
) -> Sampler:
    """Return a sampler: the best code at temperature 0, else one drawn from the topk best.

    `divisor` is a tensor that will hold the temperature; without it one is made each time.
    """
    if temperature < 0 or topk < 1:
        raise UsageError(f"temperature {temperature} is below 0, or topk {topk} below 1")
    if temperature == 0:
        return lambda logits: logits.argmax(dim=-1)

    def sampler(logits: Tensor) -> Tensor:
        # a tensor divides; on a GPU a number would be multiplied with, as its reciprocal
        held = torch.full((), temperature, device=logits.device) if divisor is None else divisor
        return sample_topk(logits, topk, held, generator)

    return sampler


def sample_topk(
    logits: Tensor, topk: int, temperature: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one code a row (B,) from the topk best of logits (B, V), without a host sync.

    `temperature` is a tensor of one number on the same device.
    """
    best, codes = logits.float().topk(min(topk, logits.shape[-1]))
    probs = (best / temperature).softmax(dim=-1)
    # the first of racing exponential clocks is a draw; multinomial would wait for the host
    race = probs / torch.empty_like(probs).exponential_(1.0, generator=generator)
    return codes.gather(-1, race.argmax(dim=-1, keepdim=True))[:, 0]


def _positions_like(x: Tensor, start: int) -> Tensor:
    """Return positions (B, S) from `start` on for x (B, S, ...)."""
    return torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[:2])


def _require_network(named: NamedTensors, config: CsmConfig) -> None:
    """Raise WrongContent unless the tensors are exactly the network's."""
    if findings := check_network(named, config).listed():
        name, is_what = Path(named.summary.where).name, f"These weights are {identify(named)}."
        raise WrongContent(f"{name} is not the network of its config.json", findings, is_what)
    # transformers may save the audio embeddings twice
    audio, tied = named.tensors[AUDIO], named.tied
    if tied and (tied.source, tied.info.offset) != (audio.source, audio.info.offset):
        first, second = (
            replace(named, tensors={tied.name: one}, tied=None) for one in (audio, tied)
        )
        sources = [audio.source, tied.source]
        compared = WeightsPair(first, second, sources).compare(lambda _: None)
        if compared.error:
            raise compared.error

"""Frames of one voice, fast: caches of fixed shape, fused products, CUDA graphs.

`Model.generate_frame` is the readable reference; this does the same in two
steps whose shapes never change. The backbone reads the last frame, then the
depth decoder gives the codes of the next, all its K - 1 passes in one. On a
GPU each step is one CUDA graph, and the host waits only for the whole frame.
On the CPU the same steps run as they are.

Letters in shapes as in `csm`; P positions of a cache, S of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.model.csm import (
    Layer,
    Model,
    RMSNorm,
    Sampler,
    Transformer,
    chosen_attention,
    make_sampler,
)

#: Runs of a step before it is captured: libraries set themselves up in them.
WARM_UPS = 2


def weights_per_frame(config: CsmConfig) -> int:
    """Return how many weights one frame has to read at least: those of every product."""
    sizes = {name: torch.Size(shape).numel() for name, shape in config.tensor_shapes().items()}

    def count(*prefixes: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    once = count("backbone.", "codebook0_head.", "audio_head")
    return once + (config.codebooks - 1) * count("decoder.", "projection.")


class Decoder:
    """Generates sequences of frames, one after the other, with a model that does not change.

    On a GPU a sequence must stay on the stream that was current when it was started.
    """

    def __init__(self, model: Model) -> None:
        c = model.config
        like = model.projection.weight
        self._model = model
        self._caches = model.new_caches(c.backbone, 1, c.max_positions)
        self._depth_caches = model.new_caches(c.decoder, 1, c.codebooks)
        self._positions = torch.arange(c.max_positions, device=like.device)
        # the state that the graphs read and write
        self._input_pos = self._positions.new_zeros(1)
        self._last_h = like.new_zeros(1, c.backbone.dim)
        self._codes = self._positions.new_zeros(1, c.codebooks)
        self._temperature = torch.ones((), device=like.device)
        self._logits = like.new_zeros(1, c.codebooks, c.audio_vocab)
        self._length = 0
        self._prepare(model)
        self._backbone_step = _captured(self._run_backbone, like.device)
        # topk (0 is greedy) and the step with it; graphs hold memory, so only the last is kept
        self._depth_step: tuple[int, Callable[[], None]] | None = None

    @property
    def logits(self) -> Tensor:
        """The logits (1, K, V) of the last frame."""
        return self._logits.clone()

    @torch.no_grad()
    @chosen_attention
    def start(
        self, tokens: Tensor, tokens_mask: Tensor, temperature: float = 0.9, topk: int = 50
    ) -> Tensor:
        """Begin a new sequence; return the codes (1, K) of the first frame after a prompt.

        tokens and tokens_mask are (1, S, K + 1), integers and booleans.
        Temperature 0 is greedy; otherwise codes are drawn with torch's
        generator of the device. Raises UsageError where the prompt does not
        fit ("Inputs too long").
        """
        sampler = make_sampler(temperature, topk, divisor=self._temperature)
        S = tokens.shape[1]
        self._model.check_position(S - 1)
        self._model.check_inputs(tokens, tokens_mask, self._positions[None, :S])
        for cache in self._caches:
            cache.length = 0
        x = self._model.embed_tokens(tokens, tokens_mask)
        h = self._model.backbone(x, self._positions[None, :S], self._caches)
        self._last_h.copy_(h[:, -1])
        self._input_pos.fill_(S)
        self._length = S
        self._temperature.fill_(temperature)
        topk = topk if temperature else 0
        if self._depth_step is None or self._depth_step[0] != topk:
            step = _captured(lambda: self._run_depth(sampler, topk), self._last_h.device)
            self._depth_step = topk, step
        self._depth_step[1]()
        return self._codes.clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Return the codes (1, K) of the next frame.

        Raises UsageError before `start`, and where the model has no position left.
        """
        if self._depth_step is None:
            raise UsageError("there is no sequence to go on with: start one with a prompt")
        self._model.check_position(self._length)
        self._length += 1
        self._backbone_step()
        self._depth_step[1]()
        return self._codes.clone()

    def _prepare(self, model: Model) -> None:
        c = model.config
        self._backbone = _FusedTransformer(model.backbone, c.backbone, c.max_positions)
        self._decoder = _FusedTransformer(model.decoder, c.decoder, c.codebooks)

    def _run_backbone(self) -> None:
        """Read the last frame's codes; write the hidden state after them."""
        x = self._model.embed_audio(self._codes).sum(dim=1, keepdim=True)
        attn_mask = self._positions <= self._input_pos
        caches = [(cache.k, cache.v) for cache in self._caches]
        self._last_h.copy_(self._backbone(x, self._input_pos, caches, attn_mask)[:, -1])
        self._input_pos.add_(1)

    def _run_depth(self, sampler: Sampler, topk: int) -> None:  # noqa: ARG002
        """Read the hidden state; write the codes of all codebooks."""
        model, last_h, V = self._model, self._last_h, self._model.config.audio_vocab
        logits, codes = [model.codebook0_head(last_h)], []
        x = last_h[:, None]
        for i in range(model.config.codebooks):
            if i:
                # the first pass has two positions, each later one only its own
                input_pos = self._positions[0 if i == 1 else i : i + 1]
                caches = [(c.k[:, :, : i + 1], c.v[:, :, : i + 1]) for c in self._depth_caches]
                attn_mask = self._positions[: i + 1] <= input_pos[:, None] if i == 1 else None
                h = self._decoder(model.projection(x), input_pos, caches, attn_mask)
                logits.append(h[:, -1] @ model.audio_head[i - 1])
            codes.append(sampler(logits[i]))
            rows = model.audio_embeddings.weight[i * V : (i + 1) * V]
            embedded = F.embedding(codes[i], rows)[:, None]  # (1, 1, C)
            x = embedded if i else torch.cat((x, embedded), dim=1)
        torch.stack(codes, dim=1, out=self._codes)
        torch.stack(logits, dim=1, out=self._logits)


class _FusedTransformer:
    """A stack that reads a few positions at a time into caches whose shape stays."""

    def __init__(self, stack: Transformer, config: TransformerConfig, positions: int) -> None:
        self._freqs_cis = rotations(stack, positions)
        self._layers = [_FusedLayer(cast(Layer, layer), config) for layer in stack.layers]
        self._norm = stack.norm

    def __call__(
        self,
        x: Tensor,
        input_pos: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Return hidden states of x (1, S, C) at input_pos (S,), and store them in the caches.

        Caches are k and v (1, kv heads, P, D) of each layer; attn_mask (S, P),
        or (P,), says which of them each position sees, None all.
        """
        freqs_cis = self._freqs_cis[input_pos][:, None]
        for layer, (k_cache, v_cache) in zip(self._layers, caches, strict=True):
            x = layer(x, freqs_cis, input_pos, k_cache, v_cache, attn_mask)
        return _rms_norm(x, self._norm)


def rotations(stack: Transformer, positions: int) -> Tensor:
    """Return how each pair of features turns at each position: complex (positions, D / 2)."""
    angles = torch.outer(torch.arange(positions, device="cpu"), stack.freqs)
    return torch.polar(torch.ones_like(angles), angles).to(stack.norm.scale.device)


class _FusedLayer:
    """One layer with q, k and v in one product, and w1 and w3 in another; no weight is copied."""

    def __init__(self, layer: Layer, config: TransformerConfig) -> None:
        attn, mlp = layer.attn, layer.mlp
        self.layer, self.config = layer, config
        self.qkv = fused((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight))
        self.w13 = fused((mlp.w1.weight, mlp.w3.weight))

    def __call__(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        input_pos: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        attn_mask: Tensor | None,
    ) -> Tensor:
        layer, H, KV, D = self.layer, self.config.heads, self.config.kv_heads, self.config.head_dim
        S = x.shape[1]
        # one product for q, k and v: (1, S, H + 2 KV, D)
        qkv = _product(_rms_norm(x, layer.sa_norm), self.qkv).view(1, S, -1, D)
        qk = _apply_rope(qkv[:, :, : H + KV], freqs_cis).transpose(1, 2)
        k_cache.index_copy_(2, input_pos, qk[:, H:])
        v_cache.index_copy_(2, input_pos, qkv[:, :, H + KV :].transpose(1, 2))
        # heads that share keys become rows of one: no kernel then needs to repeat keys
        q = qk[:, :H].reshape(1, KV, H // KV * S, D)
        mask = None if attn_mask is None else attn_mask.expand(S, -1).repeat(H // KV, 1)
        y = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask)
        # kernels differ in how their output lies in memory
        y = y.reshape(1, H, S, D).transpose(1, 2).reshape(1, S, H * D)
        x = x + layer.attn.output_proj(y)
        # one product for w1 and w3
        gate, up = _product(_rms_norm(x, layer.mlp_norm), self.w13).chunk(2, dim=-1)
        return x + layer.mlp.w2(F.silu(gate) * up)  # type: ignore[no-any-return]


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    normed: Tensor = F.rms_norm(x, norm.scale.shape, norm.scale, norm.eps)
    return normed


def _apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate pairs as `csm.apply_rope`, each pair of x (1, S, heads, D) as one complex number."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


def _product(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """Multiply x with all weights, side by side."""
    parts = [F.linear(x, weight) for weight in weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def fused(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return one weight for several that lie one after the other in memory, else the same ones."""
    first = weights[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        is_next = weight.data_ptr() == end and weight.untyped_storage().data_ptr() == storage
        if not (is_next and weight.is_contiguous()):
            return weights
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return (first.detach().as_strided((rows, first.shape[1]), first.stride()),)


@chosen_attention
def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture the step as a CUDA graph, which draws anew at each replay; on the CPU return it."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.device(device):
        state = torch.cuda.get_rng_state()
        # a stream of this device: torch's own for captures may be another's
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            # work space of its own for the graph's products: that of a first graph goes with it
            torch._C._cuda_clearCublasWorkspaces()
            # other threads may allocate meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
            # neither the runs before nor the capture may change what a seed gives
            torch.cuda.set_rng_state(state)
    return graph.replay

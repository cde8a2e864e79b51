"""Frames of one voice by fused kernels: a decoder layer is four or five launches.

The steps of `fast_decoder.Decoder`, each product in one kernel with all that is
done before and after it: 661 launches a frame of CSM-1B, which otherwise has
2,786. The kernels are in `kernels`, in Triton, which comes with torch where
that is built for CUDA; they are compiled at their first use and cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.model.csm import KVCache, Layer, Model, RMSNorm, Sampler, Transformer
from csm_weights.model.fast_decoder import Decoder, fused, rotations

try:
    from csm_weights.model import kernels
except ImportError as error:
    raise UsageError(f"the fused path needs Triton ({error}); torch for CUDA brings it") from None

#: Rows of a weight that a program multiplies, and columns that `down` takes at a time.
ROWS, COLUMNS = 8, 1024

#: Features that a program of `embed_frame` sums.
FEATURES = 128


class FusedDecoder(Decoder):
    """A `Decoder` whose steps are fused kernels; draws differ from the other paths'.

    Raises UsageError for a network whose sizes the kernels do not take.
    """

    def _prepare(self, model: Model) -> None:
        c, like = model.config, self._last_h
        _require_sizes(c)
        self._pdl = like.is_cuda and torch.cuda.get_device_capability(like.device) >= (9, 0)
        self._stacks = [
            _KernelStack(model.backbone, c.backbone, self._caches, self._pdl),
            _KernelStack(model.decoder, c.decoder, self._depth_caches, self._pdl),
        ]
        # a row a code, as all other weights have it: (K - 1, V, C)
        self._heads = model.audio_head.detach().transpose(1, 2).contiguous()
        self._noise = like.new_ones((c.codebooks, c.audio_vocab), dtype=torch.float32)

    def _run_backbone(self) -> None:
        model, c, stack = self._model, self._model.config, self._stacks[0]
        C, V, K, last = c.backbone.dim, c.audio_vocab, c.codebooks, model.backbone.norm
        tensors, B = (self._codes, model.audio_embeddings.weight, stack.x), min(FEATURES, C)
        self._launch(kernels.embed_frame, C // B, *tensors, V, K, _power(K), C, B)
        stack.run(self._input_pos)
        self._launch(kernels.norm, 1, stack.x, last.scale, self._last_h, last.eps, C)
        self._input_pos.add_(1)

    def _run_depth(self, sampler: Sampler, topk: int) -> None:  # noqa: ARG002
        model, c, stack, logits = self._model, self._model.config, self._stacks[1], self._logits[0]
        C, V, K, B, last = c.backbone.dim, c.audio_vocab, c.codebooks, ROWS, model.decoder.norm
        tables, w = model.audio_embeddings.weight.view(K, V, C), model.projection.weight
        if topk:
            self._noise.exponential_()
        self._project(self._last_h, model.codebook0_head.weight, logits[0])
        # position 0 has the hidden state, each later one a code
        self._project(self._last_h, w, stack.x)
        for i in range(K):
            stack.run(self._positions[i : i + 1])
            if i:
                self._project(stack.x, self._heads[i - 1], logits[i], last)
            has_next = i < K - 1
            tensors = (logits[i], self._noise[i], self._temperature, self._codes[0, i:])
            product = (min(topk, V), tables[i], w, stack.x, V, _power(V), C, B)
            programs = c.decoder.dim // B if has_next else 1
            self._launch(kernels.sample_project, programs, *tensors, *product, not topk, has_next)

    def _project(self, x: Tensor, w: Tensor, y: Tensor, norm: RMSNorm | None = None) -> None:
        """Launch y = w x, with x normed before where there is a norm."""
        N, C = w.shape
        scale, eps = (norm.scale, norm.eps) if norm else (x, 0.0)
        sizes = N, C, norm is not None, ROWS
        self._launch(kernels.project, -(-N // ROWS), x, scale, w, y, eps, *sizes)

    def _launch(self, kernel: Any, programs: int, *arguments: Any) -> None:
        launch(kernel, programs, *arguments, pdl=self._pdl)


class _KernelStack:
    """A stack that reads one position at a time: its input, and after `run` its output, is `x`."""

    def __init__(
        self, stack: Transformer, config: TransformerConfig, caches: Sequence[KVCache], pdl: bool
    ) -> None:
        like, positions = stack.norm.scale, caches[0].k.shape[2]
        self._config, self._positions, self._pdl = config, positions, pdl
        self._eps = stack.norm.eps
        self._turns = torch.view_as_real(rotations(stack, positions)).contiguous()
        self._layers = [
            _LayerWeights(cast(Layer, layer), cache)
            for layer, cache in zip(stack.layers, caches, strict=True)
        ]
        self.x, self._y, self._q = (like.new_zeros(config.dim) for _ in range(3))
        self._h = like.new_zeros(config.ffn)
        # a short cache is read by every program of the output product
        self._is_short = positions <= kernels.PAGE.value
        self._pages = -(-positions // kernels.PAGE.value)
        shape = (self._pages, config.heads, config.head_dim + 2)
        self._parts = like.new_zeros(shape, dtype=torch.float32)

    def run(self, pos: Tensor) -> None:
        """Read x (C,) at position pos (1,), with those before it in the caches."""
        c, x, y, q, h, P = self._config, self.x, self._y, self._q, self._h, self._positions
        C, H, KV, D, F, B = c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn, ROWS
        parts, go, eps = self._parts, partial(launch, pdl=self._pdl), self._eps
        for one in self._layers:
            k, v, heads = *one.caches, H + 2 * KV
            tensors = (x, one.sa_scale, one.qkv, self._turns, q, k, v, pos)
            go(kernels.norm_qkv_rope, heads * D // B, *tensors, eps, C, H, KV, D, P, B)
            if self._is_short:
                go(kernels.attend_short, C // B, q, k, v, one.out, x, y, pos, H, KV, D, P, B)
            else:
                go(kernels.attend, (KV, self._pages), q, k, v, parts, pos, H, KV, D, P)
                go(kernels.join_output, C // B, parts, one.out, x, y, pos, H, D, B)
            go(kernels.norm_gate_up, F // B, y, one.mlp_scale, one.w13, h, eps, C, F, B)
            go(kernels.down, C // B, h, one.w2, y, x, F, B, min(COLUMNS, _power(F)))


class _LayerWeights:
    """The weights of a layer as the kernels take them; q, k, v and w1, w3 are one each."""

    def __init__(self, layer: Layer, cache: KVCache) -> None:
        attn, mlp = layer.attn, layer.mlp
        qkv = fused((attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight))
        w13 = fused((mlp.w1.weight, mlp.w3.weight))
        # what does not lie side by side, as in a mapped file, is copied
        self.qkv, self.w13 = (one[0] if len(one) == 1 else torch.cat(one) for one in (qkv, w13))
        self.out, self.w2 = attn.output_proj.weight, mlp.w2.weight
        self.sa_scale, self.mlp_scale = layer.sa_norm.scale, layer.mlp_norm.scale
        self.caches = cache.k, cache.v


def launch(kernel: Any, programs: int | tuple[int, int], *arguments: Any, pdl: bool) -> None:
    """Launch a kernel with its tensors and sizes, and PDL last, on the current stream."""
    options: dict[str, Any] = {"num_warps": 8}
    if pdl:
        options["launch_pdl"] = True
    grid = (programs,) if isinstance(programs, int) else programs
    kernel[grid](*arguments, pdl, **options)


def _power(size: int) -> int:
    """Return the least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _require_sizes(config: CsmConfig) -> None:
    """Raise UsageError for a network whose sizes the kernels do not take."""
    powers, rows = [config.codebooks], list[int]()
    for c in (config.backbone, config.decoder):
        powers += [c.dim, c.heads, c.kv_heads]
        rows += [c.dim, c.ffn, (c.heads + 2 * c.kv_heads) * c.head_dim]
    if any(size != _power(size) for size in powers) or any(size % ROWS for size in rows):
        raise UsageError(
            f"the fused path needs sizes that are powers of two, and {ROWS} as a divisor of all"
            f" rows; this network has {config}"
        )

"""Frames of one voice, fast: caches that stay where they are, fused products, CUDA graphs.

What `Model.generate_frame` does readably, this does in two steps whose shapes
never change: the backbone reads the last frame, then the depth decoder gives
the codes of the next, all its 31 passes in one. On a GPU each step is one CUDA
graph, and the host is not asked before the frame is done. On the CPU the same
steps run as they are.

Letters in shapes as in `model`; R rows of queries that share keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.model.csm import Layer, Model, RMSNorm, Transformer, chooser, draw

#: Runs of a step before it is captured: libraries set themselves up in them.
WARM_UPS = 2


def weights_per_frame(config: CsmConfig) -> int:
    """How many weights one frame has to read at least: those of every product, each time."""
    a = config
    shapes = a.tensor_shapes()

    def count(prefix: str) -> int:
        sizes = (torch.Size(s).numel() for n, s in shapes.items() if n.startswith(prefix))
        return sum(sizes)

    depth = count("decoder.") + count("projection.")
    once = count("backbone.") + count("codebook0_head.") + count("audio_head")
    return once + (a.codebooks - 1) * depth


class Decoder:
    """Makes the frames of one sequence after the other with a model that stays as it is.

    With `keep_logits` the logits of the last frame are kept.
    """

    def __init__(self, model: Model, keep_logits: bool = False) -> None:
        a = model.config
        like = model.projection.weight
        self._model = model
        self._backbone = _Steps(model.backbone, a.backbone, a.max_positions)
        self._depth = _Steps(model.decoder, a.decoder, a.codebooks)
        self._caches = model.new_caches(a.backbone, 1, a.max_positions)
        self._depth_caches = model.new_caches(a.decoder, 1, a.codebooks)
        self._places = torch.arange(a.max_positions, device=like.device)
        self._position = self._places.new_zeros(1)
        self._last = like.new_zeros(1, a.backbone.dim)
        self._codes = self._places.new_zeros(1, a.codebooks)
        self._temperature = torch.ones((), device=like.device)
        self._logits = like.new_zeros(1, a.codebooks, a.audio_vocab) if keep_logits else None
        self._length = 0
        self._ways: dict[int, Callable[[], None]] = {}
        self._read = _captured(self._read_frame, like.device)
        self._make: Callable[[], None] | None = None

    @property
    def logits(self) -> Tensor:
        """The logits (1, K, V) of the last frame; only with `keep_logits`."""
        if self._logits is None:
            raise UsageError("the logits were not kept: Decoder(model, keep_logits=True)")
        return self._logits.clone()

    @torch.no_grad()
    def start(
        self, tokens: Tensor, mask: Tensor, temperature: float = 0.9, topk: int = 50
    ) -> Tensor:
        """Begins a new sequence; the codes (1, K) of the first frame after a prompt.

        tokens and mask are (1, S, K + 1), integers and booleans. Temperature 0
        is greedy; otherwise codes are drawn with torch's generator of the
        device. Raises UsageError where the prompt does not fit ("Inputs too long").
        """
        chooser(temperature, topk)
        size = tokens.shape[1]
        positions = self._places[None, :size]
        self._model.check_position(size - 1)
        self._model.check_inputs(tokens, mask, positions)
        for cache in self._caches:
            cache.length = 0
        inputs = self._model.embed_frames(tokens, mask)
        self._last.copy_(self._model.backbone(inputs, positions, self._caches)[:, -1])
        self._position.fill_(size)
        self._length = size
        self._temperature.fill_(temperature)
        self._make = self._way(topk if temperature else 0)
        self._make()
        return self._codes.clone()

    @torch.no_grad()
    def step(self) -> Tensor:
        """The codes (1, K) of the next frame.

        Raises UsageError before `start`, and where the model has no position left.
        """
        if self._make is None:
            raise UsageError("there is no sequence to go on with: start one with a prompt")
        self._model.check_position(self._length)
        self._length += 1
        self._read()
        self._make()
        return self._codes.clone()

    def _way(self, topk: int) -> Callable[[], None]:
        """How the depth decoder makes a frame from the topk best codes; 0 is greedy."""
        if topk not in self._ways:

            def choose(logits: Tensor) -> Tensor:
                if not topk:
                    return logits.argmax(dim=-1)
                return draw(logits, self._temperature, topk)

            make = _captured(lambda: self._make_frame(choose), self._last.device)
            # graphs hold memory: those of one way are enough for one voice
            self._ways = {topk: make}
        return self._ways[topk]

    def _read_frame(self) -> None:
        """The backbone's step: the last frame's codes to the hidden state behind them."""
        x = self._model.embed_audio(self._codes).sum(dim=1, keepdim=True)
        visible = self._places <= self._position
        caches = [(cache.keys, cache.values) for cache in self._caches]
        self._last.copy_(self._backbone.run(x, self._position, caches, visible)[:, -1])
        self._position.add_(1)

    def _make_frame(self, choose: Callable[[Tensor], Tensor]) -> None:
        """The depth decoder's passes: the hidden state to the codes of all codebooks."""
        model, last = self._model, self._last
        codes = [self._chosen(0, model.codebook0_head(last), choose)]
        inputs = torch.stack((last, self._embedding(0, codes[0])), dim=1)
        for book in range(1, model.config.codebooks):
            start = 0 if book == 1 else book
            positions = self._places[start : book + 1]
            caches = [
                (c.keys[:, :, : book + 1], c.values[:, :, : book + 1]) for c in self._depth_caches
            ]
            visible = self._places[: book + 1] <= positions[:, None] if book == 1 else None
            x = self._depth.run(model.projection(inputs), positions, caches, visible)
            codes.append(self._chosen(book, x[:, -1] @ model.audio_head[book - 1], choose))
            inputs = self._embedding(book, codes[-1])[:, None]
        torch.stack(codes, dim=1, out=self._codes)

    def _chosen(self, book: int, logits: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        if self._logits is not None:
            self._logits[:, book] = logits
        return choose(logits)

    def _embedding(self, book: int, code: Tensor) -> Tensor:
        """The embeddings (1, D) of a code (1,) of a codebook."""
        vocab = self._model.config.audio_vocab
        of_book = self._model.audio_embeddings.weight[book * vocab : (book + 1) * vocab]
        return F.embedding(code, of_book)


class _Steps:
    """A stack that reads a few positions at a time into caches whose shape stays."""

    def __init__(self, stack: Transformer, figures: TransformerConfig, positions: int) -> None:
        device = stack.norm.scale.device
        angles = torch.outer(torch.arange(positions), stack.frequencies)
        self._turns = torch.polar(torch.ones_like(angles), angles).to(device)
        self._layers = [_FusedLayer.of(cast(Layer, layer), figures) for layer in stack.layers]
        self._norm = stack.norm

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        visible: Tensor | None,
    ) -> Tensor:
        """Hidden states of x (1, S, features) at positions (S,), which are stored in the caches.

        caches are keys and values (1, kv heads, P, head_dim) of each layer; visible
        (S, P), or (P,), says which of them each position sees, None all.
        """
        turns = self._turns[positions][:, None]
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            x = layer(x, turns, positions, keys, values, visible)
        return _normed(x, self._norm)


@dataclass(frozen=True)
class _FusedLayer:
    """One layer with q, k and v in one product, and w1 and w3 in another."""

    layer: Layer
    figures: TransformerConfig
    qkv: tuple[Tensor, ...]
    w13: tuple[Tensor, ...]

    @classmethod
    def of(cls, layer: Layer, figures: TransformerConfig) -> _FusedLayer:
        """A view of a layer: no weight is copied."""
        qkv = (layer.attn.q_proj.weight, layer.attn.k_proj.weight, layer.attn.v_proj.weight)
        w13 = (layer.mlp.w1.weight, layer.mlp.w3.weight)
        return cls(layer, figures, _fused(qkv), _fused(w13))

    def __call__(
        self,
        x: Tensor,
        turns: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
    ) -> Tensor:
        layer, f = self.layer, self.figures
        size = x.shape[1]
        heads = _product(_normed(x, layer.sa_norm), self.qkv).view(1, size, -1, f.head_dim)
        turned = _turned(heads[:, :, : f.heads + f.kv_heads], turns).transpose(1, 2)
        keys.index_copy_(2, positions, turned[:, f.heads :])
        values.index_copy_(2, positions, heads[:, :, f.heads + f.kv_heads :].transpose(1, 2))
        # Heads that share keys become rows of one: no kernel then needs to repeat keys.
        group = f.heads // f.kv_heads
        queries = turned[:, : f.heads].reshape(1, f.kv_heads, group * size, f.head_dim)
        mask = None if visible is None else visible.expand(size, -1).repeat(group, 1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        mixed = mixed.view(1, f.heads, size, f.head_dim).transpose(1, 2).reshape(1, size, f.dim)
        x = x + layer.attn.output_proj(mixed)
        gate, up = _product(_normed(x, layer.mlp_norm), self.w13).chunk(2, dim=-1)
        return x + layer.mlp.w2(F.silu(gate) * up)  # type: ignore[no-any-return]


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    normed: Tensor = F.rms_norm(x, norm.scale.shape, norm.scale, norm.eps)
    return normed


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """As `model.rotate`, with each pair of x (1, S, heads, head_dim) as one complex number."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def _product(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """x times all weights, side by side."""
    parts = [F.linear(x, weight) for weight in weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _fused(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One weight for several that lie one after the other in memory, else the same ones."""
    first = weights[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        is_next = weight.data_ptr() == end and weight.untyped_storage().data_ptr() == storage
        if not (is_next and weight.is_contiguous()):
            return weights
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return (first.detach().as_strided((rows, first.shape[1]), first.stride()),)


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph, which draws other codes at each replay; on the CPU itself."""
    if device.type != "cuda":
        return step
    with torch.no_grad(), torch.cuda.device(device):
        state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        # neither the runs before nor the capture may change what a seed gives
        torch.cuda.set_rng_state(state)
    return graph.replay

"""The fused kernels against the reference, in Triton's interpreter; `make test-kernels` runs them.

Elsewhere they are skipped: without Triton, and where it would compile for a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed: make test-kernels installs it")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter: make test-kernels", allow_module_level=True)

from csm_weights.errors import UsageError
from csm_weights.formats.architecture import CsmConfig, TransformerConfig
from csm_weights.model import kernels
from csm_weights.model.csm import apply_rope
from csm_weights.model.decoders import EagerDecoder
from csm_weights.model.fused_decoder import FusedDecoder, launch
from csm_weights.model.smoke import CACHE_LIMITS
from tests.model.compiled_kernels import Launches
from tests.model.test_fast_decoder import generated
from tests.support.networks import random_model

pytestmark = pytest.mark.usefixtures("no_gradients")

#: By dtype, the largest difference as a share of the largest output.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: CACHE_LIMITS["bfloat16"]}

EPS, B = 1e-5, 8

dtypes = pytest.mark.parametrize("dtype", list(LIMITS))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers whose products are of the order of one."""
    return (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).to(dtype)


def run(kernel: Any, programs: int | tuple[int, int], *arguments: Any) -> None:
    launch(kernel, programs, *arguments, pdl=False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    difference = float((found.float() - expected.float()).abs().max())
    assert difference <= LIMITS[found.dtype] * float(expected.abs().max())


def norm(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x.float(), scale.shape, scale.float(), EPS).to(x.dtype)


# ---- each kernel


@dtypes
@pytest.mark.parametrize("pos", [0, 1, 127, 128, 199])
@pytest.mark.parametrize(("H", "KV", "D"), [(4, 2, 16), (4, 1, 8), (2, 2, 32)])
def test_norm_qkv_rope(dtype: torch.dtype, pos: int, H: int, KV: int, D: int) -> None:
    """q, and k and v at their position alone, also past the first page of a cache."""
    C, P = H * D, 200
    x, scale, w = (drawn(*s, dtype=dtype) for s in ((C,), (C,), ((H + 2 * KV) * D, C)))
    angles = torch.rand(P, D // 2) * 6
    turns = torch.stack((angles.cos(), angles.sin()), -1)
    k_cache, v_cache = (drawn(KV, P, D, dtype=dtype) for _ in range(2))
    before, q = (k_cache.clone(), v_cache.clone()), torch.empty(H * D, dtype=dtype)
    tensors = (x, scale, w, turns, q, k_cache, v_cache, torch.tensor([pos]), EPS)
    run(kernels.norm_qkv_rope, (H + 2 * KV) * D // B, *tensors, C, H, KV, D, P, B)

    heads = F.linear(norm(x, scale), w).view(1, H + 2 * KV, 1, D)
    rotated = apply_rope(heads, angles[pos].cos(), angles[pos].sin())
    assert_close(q, rotated[0, :H].flatten())
    expected = rotated[0, H : H + KV], heads[0, H + KV :]
    for cache, old, new in zip((k_cache, v_cache), before, expected, strict=True):
        assert_close(cache[:, pos], new[:, 0])
        old[:, pos] = cache[:, pos]
        assert torch.equal(cache, old)


def attended(q: Tensor, k: Tensor, v: Tensor, w: Tensor, x: Tensor, pos: int) -> Tensor:
    """The reference: attention of one position, the output product, the residual."""
    keys, values = (one[None, :, : pos + 1] for one in (k, v))
    y = F.scaled_dot_product_attention(q[None, :, None], keys, values, enable_gqa=True)
    return x + F.linear(y.flatten(), w)


@dtypes
@pytest.mark.parametrize("pos", [0, 1, 7, 31])
@pytest.mark.parametrize(("H", "KV", "D"), [(4, 2, 16), (4, 1, 8), (2, 2, 32)])
def test_attend_short(dtype: torch.dtype, pos: int, H: int, KV: int, D: int) -> None:
    """Attention over a short cache, output and residual; positions to come have no influence."""
    C, P = H * D, 32
    q, w, x = drawn(H, D, dtype=dtype), drawn(C, C, dtype=dtype), drawn(C, dtype=dtype)
    k, v = (torch.randn(KV, P, D).to(dtype) for _ in range(2))
    y = torch.empty_like(x)
    sizes = (H, KV, D, P, B)
    run(kernels.attend_short, C // B, q, k, v, w, x, y, torch.tensor([pos]), *sizes)

    assert_close(y, attended(q, k, v, w, x, pos))


@dtypes
@pytest.mark.parametrize("pos", [0, 126, 127, 128, 255, 256, 299])
@pytest.mark.parametrize(("H", "KV", "D"), [(4, 2, 16), (4, 1, 8)])
def test_attend_and_join_output(dtype: torch.dtype, pos: int, H: int, KV: int, D: int) -> None:
    """Attention page by page, at the edges of pages too; parts of an earlier position are stale."""
    C, P = H * D, 300
    q, w, x = drawn(H, D, dtype=dtype), drawn(C, C, dtype=dtype), drawn(C, dtype=dtype)
    k, v = (torch.randn(KV, P, D).to(dtype) for _ in range(2))
    pages, y, at = -(-P // kernels.PAGE.value), torch.empty_like(x), torch.tensor([pos])
    parts = torch.full((pages, H, D + 2), float("nan"))
    run(kernels.attend, (KV, pages), q, k, v, parts, at, H, KV, D, P)
    run(kernels.join_output, C // B, parts, w, x, y, at, H, D, B)

    assert_close(y, attended(q, k, v, w, x, pos))


@dtypes
@pytest.mark.parametrize("F_", [8, 16, 96])
def test_norm_gate_up(dtype: torch.dtype, F_: int) -> None:
    """The gated block before its last product."""
    x, scale, w = drawn(64, dtype=dtype), drawn(64, dtype=dtype), drawn(2 * F_, 64, dtype=dtype)
    h = torch.empty(F_, dtype=dtype)
    run(kernels.norm_gate_up, F_ // B, x, scale, w, h, EPS, 64, F_, B)

    gate, up = F.linear(norm(x, scale), w).chunk(2)
    assert_close(h, F.silu(gate) * up)


@dtypes
@pytest.mark.parametrize("F_", [8, 63, 64, 65, 160])
def test_down(dtype: torch.dtype, F_: int) -> None:
    """The last product of a layer, below, at and above the columns taken at a time."""
    h, w, x = drawn(F_, dtype=dtype), drawn(32, F_, dtype=dtype), drawn(32, dtype=dtype)
    y = torch.empty_like(x)
    run(kernels.down, 32 // B, h, w, x, y, F_, B, 64)

    assert_close(y, x + F.linear(h, w))


@dtypes
@pytest.mark.parametrize("N", [1, 7, 8, 9, 35])
@pytest.mark.parametrize("has_norm", [True, False])
def test_project(dtype: torch.dtype, N: int, has_norm: bool) -> None:
    """A head, whose rows are any number, or a plain product; nothing is written past the rows."""
    x, scale, w = drawn(32, dtype=dtype), drawn(32, dtype=dtype), drawn(N, 32, dtype=dtype)
    y = torch.full((N + 8,), 7.0, dtype=dtype)
    run(kernels.project, -(-N // B), x, scale, w, y, EPS, N, 32, has_norm, B)

    assert_close(y[:N], F.linear(norm(x, scale) if has_norm else x, w))
    assert torch.equal(y[N:], torch.full((8,), 7.0, dtype=dtype))


def sampled(logits: Tensor, noise: Tensor, temperature: float, topk: int, V: int) -> int:
    """Run the kernel for the code alone; topk 0 is greedy."""
    code, table = torch.tensor([-1]), torch.zeros(V, 16, dtype=logits.dtype)
    tensors = (logits, noise, torch.tensor(temperature), code, topk, table, table, table)
    power = 1 << (V - 1).bit_length()
    run(kernels.sample_project, 1, *tensors, V, power, 16, B, not topk, False)
    return int(code)


@dtypes
@pytest.mark.parametrize("V", [1, 35, 64, 2051])
@pytest.mark.parametrize("topk", [0, 1, 2, 50, 5000])
def test_draws_are_the_races_of_the_best(dtype: torch.dtype, V: int, topk: int) -> None:
    """The code is the reference's with the same clocks, greedy or of the topk best."""
    for temperature in (0.3, 0.9, 2.0):
        logits = (torch.randn(V) * 3).to(dtype)
        noise = torch.empty(V).exponential_(1.0)
        found = sampled(logits, noise, temperature, min(topk, V), V)
        values = logits.float()
        if not topk:
            assert found == int(values.argmax())
            continue
        least = values.topk(min(topk, V)).values[-1]
        probs = (values / temperature).softmax(-1).where(values >= least, 0.0)
        assert found == int((probs / noise).argmax())


@pytest.mark.parametrize("logits", [[-1.0, -3.0, -2.0], [0.0, -1.0, 5.0], [-5.0, 3.0, 3.0]])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_order_of_logits_holds_for_every_sign(logits: list[float], topk: int) -> None:
    """Negative, zero and equal logits: what is drawn is one of the best, and each can be."""
    values, V = torch.tensor(logits), len(logits)
    least = values.topk(topk).values[-1]
    for code in range(V):
        noise = torch.full((V,), 1e9)
        noise[code] = 1e-9
        found = sampled(values, noise, 1.0, topk, V)
        assert bool(values[found] >= least)
        assert (found == code) == bool(values[code] >= least)


@dtypes
def test_sample_project(dtype: torch.dtype) -> None:
    """The row of the code that was drawn is projected."""
    V, C, N = 35, 64, 32
    logits, table, w = drawn(V, dtype=dtype), drawn(V, C, dtype=dtype), drawn(N, C, dtype=dtype)
    code, y = torch.tensor([-1, 9]), torch.empty(N, dtype=dtype)
    noise, temperature = torch.empty(V).exponential_(1.0), torch.tensor(0.9)
    tensors = (logits, noise, temperature, code, 10, table, w, y)
    run(kernels.sample_project, N // B, *tensors, V, 64, C, B, False, True)

    assert code[1] == 9
    assert_close(y, F.linear(table[code[0]], w))


@dtypes
@pytest.mark.parametrize("K", [1, 3, 4, 32])
def test_embed_frame(dtype: torch.dtype, K: int) -> None:
    """The sum of a frame's embeddings, each of its own codebook."""
    V, C = 35, 64
    table, x = drawn(K * V, C, dtype=dtype), torch.empty(C, dtype=dtype)
    codes = torch.randint(V, (K,))
    power = 1 << (K - 1).bit_length()
    run(kernels.embed_frame, C // 16, codes, table, x, V, K, power, C, 16)

    assert_close(x, table.view(K, V, C)[torch.arange(K), codes].sum(0))


# ---- whole frames

BACKBONE = TransformerConfig(layers=2, dim=32, heads=4, kv_heads=2, ffn=24)
DEPTH = TransformerConfig(layers=1, dim=16, heads=2, kv_heads=1, ffn=40)
SMALL = CsmConfig(BACKBONE, DEPTH, 64, 11, 4, max_positions=140)


def prompt(length: int) -> tuple[Tensor, Tensor]:
    """Text tokens and their mask."""
    tokens = torch.zeros(1, length, SMALL.codebooks + 1, dtype=torch.long)
    tokens[0, :, -1] = torch.randint(64, (length,))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[..., -1] = True
    return tokens, mask


@pytest.mark.parametrize("length", [3, 126])
def test_frames_are_those_of_the_reference(length: int) -> None:
    """In float32 greedy frames and their logits, across the edge of a page of the cache."""
    model, sequence = random_model(SMALL), prompt(length)
    expected = generated(EagerDecoder(model), 4, *sequence, temperature=0)
    found = generated(FusedDecoder(model), 4, *sequence, temperature=0)

    for (codes, logits), (other_codes, other_logits) in zip(found, expected, strict=True):
        assert torch.equal(codes, other_codes)
        assert_close(logits, other_logits)


def test_bfloat16_stays_within_rounding() -> None:
    """In bfloat16 the logits of a drawn frame are those of a parallel pass over its codes."""
    model, sequence = random_model(SMALL).to(torch.bfloat16), prompt(5)
    torch.manual_seed(3)
    (codes, logits), *_ = generated(FusedDecoder(model), 1, *sequence, topk=5)
    hidden = model.backbone_hidden(*sequence, torch.arange(5)[None])[:, -1]
    expected = model.codebook_logits(hidden, codes)

    assert_close(logits, expected)
    assert bool((logits.gather(-1, codes[..., None]) >= logits.topk(5).values[..., -1:]).all())


def test_a_seed_gives_the_same_frames_again() -> None:
    """Codes drawn follow the seed, in the first sequence of a decoder as in later ones."""
    decoder, found, sequence = FusedDecoder(random_model(SMALL)), [], prompt(4)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append([codes.tolist() for codes, _ in generated(decoder, 2, *sequence)])

    assert found[0] == found[1] != found[2]


def test_sizes_that_the_kernels_do_not_take_are_refused() -> None:
    """A network whose features are no power of two has no fused path."""
    odd = replace(SMALL, backbone=replace(BACKBONE, dim=96, heads=6))
    with pytest.raises(UsageError, match="powers of two"):
        FusedDecoder(random_model(odd))


def test_launches_of_a_frame_of_csm_1b() -> None:
    """A drawn frame of CSM-1B takes 661 launches: those of the kernels, and two of torch's."""
    launches = Launches()
    made = Counter(kernel.__name__ for kernel, _ in launches.made[launches.before_step :])
    assert made == {
        "embed_frame": 1,
        "norm_qkv_rope": 16 + 32 * 4,
        "attend": 16,
        "join_output": 16,
        "attend_short": 32 * 4,
        "norm_gate_up": 16 + 32 * 4,
        "down": 16 + 32 * 4,
        "norm": 1,
        "project": 2 + 31,
        "sample_project": 32,
    }
    operations: list[str] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not func.is_view:
                operations.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    decoder = FusedDecoder(random_model(SMALL))
    decoder.start(*prompt(2))
    assert decoder._depth_step is not None
    with pytest.MonkeyPatch.context() as patch, Watch():  # type: ignore[no-untyped-call]
        patch.setattr("csm_weights.model.fused_decoder.launch", lambda *_, **__: None)
        decoder._backbone_step()
        decoder._depth_step[1]()
    assert operations == ["add_", "exponential_"]
    assert sum(made.values()) + len(operations) == 661


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_compile_without_spills(tmp_path: Path, capability: int) -> None:
    """For A100, H100 and RTX 5090 at CSM-1B's sizes: no stack, no local memory, 16-byte loads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.compiled_kernels", str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len({one["kernel"] for one in found}) == 10
    assert [one for one in found if one["stack"] or one["local"]] == []
    assert all(one["registers"] <= 128 for one in found)
    wide = {one["kernel"] for one in found if one["wide_loads"]}
    assert wide >= {"norm_qkv_rope", "join_output", "norm_gate_up", "project", "sample_project"}

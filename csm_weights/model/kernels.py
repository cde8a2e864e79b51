"""Kernels of one position of one voice, in Triton: `fused_decoder` launches them.

A frame reads each weight of a product once, so every kernel is bound by the
memory's rate, and its bytes are the bound that its docstring gives (for
CSM-1B in bfloat16, backbone / depth decoder). What lies between two products is
computed again by each program rather than launched by itself: it is a vector
of a few kilobytes, which the caches hold.

Letters in shapes: N rows of a product, B of them a program; C features in, F of
the feed-forward block; H heads of D features, KV of them with keys; P positions
of a cache; V audio vocabulary, K codebooks. C, D, H and B are powers of two, and B
divides N where nothing else is said. Products are summed in float32 and rounded
to the dtype of x where the reference rounds.

With PDL a kernel is launched while the one before it still runs: it reads its
weights, which nobody writes, and waits only then.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Keys that one program of `attend` reads.
PAGE = tl.constexpr(128)


@triton.jit
def _wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait for what the one before has written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _rms_norm(x, scale, eps, C: tl.constexpr):
    """Return x (C,) normed, rounded to its dtype, in float32."""
    c = tl.arange(0, C)
    v = tl.load(x + c).to(tl.float32)
    normed = v * tl.rsqrt(tl.sum(v * v) / C + eps) * tl.load(scale + c).to(tl.float32)
    return normed.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _rows(w, n, C: tl.constexpr):
    """Return the rows n (B,) of a weight (N, C), as they are."""
    return tl.load(w + n[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def _dot(w, v):
    """Return the products of the rows of w (B, C) with v (C,), in float32."""
    return tl.sum(w.to(tl.float32) * v[None, :], 1)


@triton.jit(do_not_specialize_on_alignment=["pos"])
def norm_qkv_rope(
    x, scale, w, turns, q, k_cache, v_cache, pos, eps,
    C: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm x (C,), multiply with w ((H + 2 KV) D, C), rotate q and k, and store k and v.

    turns (P, D / 2, 2) are float32: cosine and sine. q is (H, D), the caches
    (KV, P, D), pos (1,). Bound: w, 12.6 / 3.1 MB.
    """
    n = tl.program_id(0) * B + tl.arange(0, B)
    rows = _rows(w, n, C)
    _wait(PDL)
    T: tl.constexpr = x.dtype.element_ty
    y = _dot(rows, _rms_norm(x, scale, eps, C)).to(T).to(tl.float32)
    even, odd = tl.split(tl.reshape(y, (B // 2, 2)))
    # pairs of neighbouring features, of heads in the order q, k, v
    pair = tl.program_id(0) * (B // 2) + tl.arange(0, B // 2)
    head, d, p = pair // (D // 2), pair % (D // 2), tl.load(pos)
    is_k, is_v = (head >= H) & (head < H + KV), head >= H + KV
    cos = tl.where(is_v, 1.0, tl.load(turns + (p * (D // 2) + d) * 2))
    sin = tl.where(is_v, 0.0, tl.load(turns + (p * (D // 2) + d) * 2 + 1))
    a, b = (even * cos - odd * sin).to(T), (odd * cos + even * sin).to(T)
    to_q = q + head * D + 2 * d
    tl.store(to_q, a, mask=head < H)
    tl.store(to_q + 1, b, mask=head < H)
    to_k = k_cache + ((head - H) * P + p) * D + 2 * d
    tl.store(to_k, a, mask=is_k)
    tl.store(to_k + 1, b, mask=is_k)
    to_v = v_cache + ((head - H - KV) * P + p) * D + 2 * d
    tl.store(to_v, a, mask=is_v)
    tl.store(to_v + 1, b, mask=is_v)


@triton.jit(do_not_specialize_on_alignment=["pos"])
def attend_short(
    q, k_cache, v_cache, w, x, y, pos,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from q (H, D) to positions up to pos, multiply with w (N, H D), add x (N,): y (N,).

    For short caches (KV, P, D), P a power of two: each program attends by itself.
    Bound: w, 2.1 MB for the depth decoder.
    """
    n = tl.program_id(0) * B + tl.arange(0, B)
    T: tl.constexpr = x.dtype.element_ty
    d, at = tl.arange(0, D), tl.arange(0, P)
    _wait(PDL)
    p = tl.load(pos)
    sums = tl.zeros((B, D), tl.float32)
    for kv in tl.static_range(KV):
        tile = (kv * P + at)[:, None] * D + d[None, :]
        k = tl.load(k_cache + tile).to(tl.float32)
        v = tl.load(v_cache + tile).to(tl.float32)
        for g in tl.static_range(H // KV):
            head = kv * (H // KV) + g
            s = tl.sum(k * tl.load(q + head * D + d).to(tl.float32)[None, :], 1) * (D**-0.5)
            s = tl.where(at <= p, s, float("-inf"))
            e = tl.exp(s - tl.max(s))
            o = (tl.sum(v * e[:, None], 0) / tl.sum(e)).to(T).to(tl.float32)
            part = tl.load(w + n[:, None] * (H * D) + head * D + d[None, :]).to(tl.float32)
            sums += part * o[None, :]
    out = tl.sum(sums, 1).to(T).to(tl.float32)
    tl.store(y + n, (tl.load(x + n).to(tl.float32) + out).to(T))


@triton.jit(do_not_specialize_on_alignment=["pos"])
def attend(
    q, k_cache, v_cache, parts, pos,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend from q (H, D) to one page of the positions up to pos, for the heads of one key.

    Programs are (KV, P / PAGE), those past pos do nothing. parts (P / PAGE, H, D + 2) are
    float32: for each head the weighted values, the largest score, the sum of
    weights. Bound: the keys and values up to pos, 4.2 MB at the last.
    """
    kv, page = tl.program_id(0), tl.program_id(1)
    _wait(PDL)
    p = tl.load(pos)
    if page * PAGE <= p:
        d, at = tl.arange(0, D), page * PAGE + tl.arange(0, PAGE)
        tile = (kv * P + at)[:, None] * D + d[None, :]
        is_seen = (at <= p) & (at < P)
        k = tl.load(k_cache + tile, mask=is_seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_cache + tile, mask=is_seen[:, None], other=0.0).to(tl.float32)
        for g in tl.static_range(H // KV):
            head = kv * (H // KV) + g
            s = tl.sum(k * tl.load(q + head * D + d).to(tl.float32)[None, :], 1) * (D**-0.5)
            s = tl.where(is_seen, s, float("-inf"))
            most = tl.max(s)
            e = tl.exp(s - most)
            to = parts + (page * H + head) * (D + 2)
            tl.store(to + d, tl.sum(v * e[:, None], 0))
            tl.store(to + D, most)
            tl.store(to + D + 1, tl.sum(e))


@triton.jit(do_not_specialize_on_alignment=["pos"])
def join_output(
    parts, w, x, y, pos,
    H: tl.constexpr, D: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the parts that `attend` left, multiply with w (N, H D), add x (N,): y (N,).

    Bound: w, 8.4 MB for the backbone.
    """
    n = tl.program_id(0) * B + tl.arange(0, B)
    T: tl.constexpr = x.dtype.element_ty
    rows = _rows(w, n, H * D)
    h, d = tl.arange(0, H), tl.arange(0, D)
    most = tl.full((H,), float("-inf"), tl.float32)
    total = tl.zeros((H,), tl.float32)
    o = tl.zeros((H, D), tl.float32)
    _wait(PDL)
    for page in tl.range(0, tl.load(pos) // PAGE + 1):
        part = parts + (page * H + h) * (D + 2)
        now = tl.load(part + D)
        top = tl.maximum(most, now)
        old, new = tl.exp(most - top), tl.exp(now - top)
        o = o * old[:, None] + tl.load(part[:, None] + d[None, :]) * new[:, None]
        total, most = total * old + tl.load(part + D + 1) * new, top
    o = (o / total[:, None]).to(T).to(tl.float32)
    out = _dot(rows, tl.reshape(o, (H * D,))).to(T).to(tl.float32)
    tl.store(y + n, (tl.load(x + n).to(tl.float32) + out).to(T))


@triton.jit
def norm_gate_up(
    x, scale, w, h, eps,
    C: tl.constexpr, F: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm x (C,), multiply with w (2 F, C), which is w1 above w3: h (F,) = silu(w1 x) * w3 x.

    Bound: w, 67 / 34 MB.
    """
    n = tl.program_id(0) * B + tl.arange(0, B)
    T: tl.constexpr = x.dtype.element_ty
    w1, w3 = _rows(w, n, C), _rows(w, F + n, C)
    _wait(PDL)
    v = _rms_norm(x, scale, eps, C)
    gate = _dot(w1, v).to(T).to(tl.float32)
    up = _dot(w3, v).to(T).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(T).to(tl.float32)
    tl.store(h + n, (silu * up).to(T))


@triton.jit
def down(
    h, w, x, y,
    F: tl.constexpr, B: tl.constexpr, BF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply h (F,) with w (N, F), BF columns at a time, add x (N,): y (N,). F is any number.

    Bound: w, 34 / 17 MB.
    """
    n = tl.program_id(0) * B + tl.arange(0, B)
    T: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros((B, BF), tl.float32)
    _wait(PDL)
    for start in tl.range(0, F, BF, num_stages=3):
        f = start + tl.arange(0, BF)
        part = tl.load(w + n[:, None] * F + f[None, :], mask=f[None, :] < F, other=0.0)
        sums += part.to(tl.float32) * tl.load(h + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    out = tl.sum(sums, 1).to(T).to(tl.float32)
    tl.store(y + n, (tl.load(x + n).to(tl.float32) + out).to(T))


@triton.jit(do_not_specialize_on_alignment=["y"])
def project(
    x, scale, w, y, eps,
    N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm x (C,) with NORM, and multiply with w (N, C): y (N,). N is any number.

    Bound: w, for a head 8.4 / 4.2 MB.
    """
    n, c = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, C)
    rows = tl.load(w + n[:, None] * C + c[None, :], mask=n[:, None] < N, other=0.0)
    _wait(PDL)
    v = _rms_norm(x, scale, eps, C) if NORM else tl.load(x + c).to(tl.float32)
    tl.store(y + n, _dot(rows, v).to(y.dtype.element_ty), mask=n < N)


@triton.jit(
    do_not_specialize=["topk"],
    do_not_specialize_on_alignment=["logits", "noise", "code"],
)
def sample_project(
    logits, noise, temperature, code, topk, table, w, y,
    V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
    GREEDY: tl.constexpr, PROJECT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw a code (1,) from logits (V,), and project its row of table (V, C) by w (N, C): y (N,).

    noise (V,), float32, is drawn from the exponential distribution: the code with
    the largest ratio of probability to noise is a draw from the topk best, and from
    those that equal the last of them. VP is the power of two from V on. Each program
    draws the same. Without PROJECT there is one program and no y. Bound: w, 4.2 MB.
    """
    n, i = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, VP)
    if PROJECT:
        rows = _rows(w, n, C)
    _wait(PDL)
    all_logits = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32)
    if GREEDY:
        best = tl.argmax(all_logits, 0)
    else:
        # floats as integers of the same order; bit by bit, the largest that topk of them reach
        bits = all_logits.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        least = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= topk, 0, -2147483648)
        # a bfloat16 has nothing in the lower half
        LOWEST: tl.constexpr = 16 if logits.dtype.element_ty == tl.bfloat16 else 0
        for bit in tl.static_range(31 - LOWEST):
            higher = least + (1 << (30 - bit))
            least = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= topk, higher, least)
        scaled = all_logits / tl.load(temperature)
        race = tl.exp(scaled - tl.max(scaled)) / tl.load(noise + i, mask=i < V, other=1.0)
        best = tl.argmax(tl.where(keys >= least, race, -1.0), 0)
    if tl.program_id(0) == 0:
        tl.store(code, best.to(tl.int64))
    if PROJECT:
        embedded = tl.load(table + best * C + tl.arange(0, C)).to(tl.float32)
        tl.store(y + n, _dot(rows, embedded).to(y.dtype.element_ty))


@triton.jit
def norm(x, scale, y, eps, C: tl.constexpr, PDL: tl.constexpr):
    """Norm x (C,) to y (C,), in one program."""
    _wait(PDL)
    tl.store(y + tl.arange(0, C), _rms_norm(x, scale, eps, C).to(y.dtype.element_ty))


@triton.jit
def embed_frame(
    codes, table, x,
    V: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum the embeddings of a frame's codes (K,), in table (K V, C): x (C,), B features a program.

    KP is the power of two from K on. Bound: K rows, 131 KB.
    """
    c, i = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, KP)
    _wait(PDL)
    row = i * V + tl.load(codes + i, mask=i < K, other=0)
    rows = tl.load(table + row[:, None] * C + c[None, :], mask=i[:, None] < K, other=0.0)
    tl.store(x + c, tl.sum(rows.to(tl.float32), 0).to(x.dtype.element_ty))

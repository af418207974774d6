"""Softmax attention with normal noise on its scores: ``softmax(scale·QKᵀ + σ·ε)·V``, one launch.

ε never lies in memory. Four keys of a query share a call of Philox4x32-10 (Salmon et al., SC 2011)
with the counter (key div 4, query, head, 4096·clock + layer) and the seed as its key, and
Box–Muller makes two pairs of normal numbers of its words: the same wherever a key's block begins,
in every row of a batch, on every chip, and in PyTorch (``pag_fast.ops.reference.score_noise``).

Floor, for B rows, M queries, N keys, H heads, D channels, s bytes an element:

    bytes  s·B·H·D·(2·M + 2·N)    q, k, v and the output
    FLOPs  4·B·M·N·H·D            QKᵀ and PV, two a multiply-add

Noise adds about 20 integer multiplications and 10 transcendental operations for every four scores,
which at D = 64 is more than the products cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, laid_out, stride_unit
from .launch import Config, default_config, dot_precision, generation, split_head_dim
from .online_softmax import LOG2E, load_tile, store_tile


@triton.jit
def _box_muller(u, v):
    """Two standard normal numbers of two uniform ones.

    As ``tl.pair_uniform_to_normal``, whose cosine spills: it can reduce any angle, and this one is
    less than a turn. Polynomials of Cephes (``sinf``, ``cosf``) for an eighth of it.
    """
    quarter = tl.floor(4.0 * v + 0.5)
    x = 6.283185307179586 * (v - 0.25 * quarter)
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cosine = cosine * z * z - 0.5 * z + 1.0
    turns = quarter.to(tl.int32)
    odd = (turns & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((turns + 1) & 2) == 2, -first, first)
    second = tl.where((turns & 2) == 2, -second, second)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(1.0e-7, u)))
    return radius * first, radius * second


@triton.jit
def score_noise(seed, keys, queries, head, time, BLOCK: tl.constexpr):
    """[BLOCK_M, BLOCK] standard normal numbers for queries [BLOCK_M] and BLOCK keys from ``keys``
    on, a multiple of 4."""
    # [BLOCK_M, BLOCK / 4]
    four = (keys // 4 + tl.arange(0, BLOCK // 4))[None, :] + queries[:, None] * 0
    query = queries[:, None] + four * 0
    zero = four * 0
    a, b, c, d = tl.philox(seed, four, query, zero + head, zero + time)
    u1 = tl.uint_to_uniform_float(a)
    u2 = tl.uint_to_uniform_float(b)
    u3 = tl.uint_to_uniform_float(c)
    u4 = tl.uint_to_uniform_float(d)
    n1, n2 = _box_muller(u1, u2)
    n3, n4 = _box_muller(u3, u4)
    return tl.interleave(tl.interleave(n1, n3), tl.interleave(n2, n4))


@triton.jit
def _step(
    acc_a, acc_b, m, l, q_a, q_b, k_base, v_base, start, queries, num_keys, stride_kn, stride_vn,
    dims_a, dims_b, head_dim, qk_scale, noise_scale, seed, head, time,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, WIDE_A: tl.constexpr, WIDE_B: tl.constexpr,
    HAS_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys, in units of log2."""
    keys = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N, D]
    k_a = load_tile(k_base, keys, stride_kn, dims_a, num_keys, head_dim, EVEN, WIDE_A)
    scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    if HAS_B:
        k_b = load_tile(k_base, keys, stride_kn, dims_b, num_keys, head_dim, EVEN, WIDE_B)
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
    # [BLOCK_M, BLOCK_N]
    noise = score_noise(seed, start, queries, head, time, BLOCK_N)
    scores = scores * qk_scale + noise * noise_scale
    if not EVEN:
        scores = tl.where((keys < num_keys)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    v_a = load_tile(v_base, keys, stride_vn, dims_a, num_keys, head_dim, EVEN, WIDE_A)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * alpha[:, None], input_precision=PRECISION)
    if HAS_B:
        v_b = load_tile(v_base, keys, stride_vn, dims_b, num_keys, head_dim, EVEN, WIDE_B)
        acc_b = tl.dot(p, v_b, acc_b * alpha[:, None], input_precision=PRECISION)
    return acc_a, acc_b, m_new, l


_INTEGERS = (
    *("stride_qb", "stride_qn", "stride_qh", "stride_kb", "stride_kn", "stride_kh"),
    *("stride_vb", "stride_vn", "stride_vh", "stride_ob", "stride_on", "stride_oh"),
    *("heads", "num_queries", "num_keys", "layer", "seed_low", "seed_high", "first_head"),
)


@triton.jit(do_not_specialize=_INTEGERS)
def _noisy_attention_fwd_kernel(
    q_ptr,  # [rows, M, H, D], any strides but a unit last one
    k_ptr,  # [rows, N, H, D]
    v_ptr,
    out_ptr,  # [rows, M, H, D]
    clock_ptr,  # one int64
    qk_scale,  # softmax scale × log2(e)
    noise_scale,  # σ × log2(e)
    stride_qb,  # these in units of UNIT elements
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_on,
    stride_oh,
    heads,
    num_queries,
    num_keys,
    layer,
    seed_low,  # halves of the seed, as signed 32-bit numbers
    seed_high,
    first_head,  # which of the layer's heads is number 0 here
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HAS_B: tl.constexpr = DIM_B > 0
    WIDE_A: tl.constexpr = HEAD_DIM >= DIM_A
    WIDE_B: tl.constexpr = HEAD_DIM >= DIM_A + DIM_B
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_queries, BLOCK_M)
    block = pid % blocks
    lane = pid // blocks
    # the noise counts heads, never rows: a picture does not depend on its neighbours
    number = lane % heads
    head = number.to(tl.int64)
    number += first_head
    row = (lane // heads).to(tl.int64)
    low = seed_low.to(tl.int64) & 0xFFFFFFFF
    seed = (seed_high.to(tl.int64) << 32) | low
    time = (tl.load(clock_ptr) * 4096 + layer).to(tl.int32)

    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims_a = tl.arange(0, DIM_A)
    dims_b = DIM_A + tl.arange(0, DIM_B if HAS_B else 1)
    q_base = q_ptr + (row * stride_qb + head * stride_qh) * UNIT
    k_base = k_ptr + (row * stride_kb + head * stride_kh) * UNIT
    v_base = v_ptr + (row * stride_vb + head * stride_vh) * UNIT
    out_base = out_ptr + (row * stride_ob + head * stride_oh) * UNIT
    stride_qn *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_on *= UNIT
    # [BLOCK_M, D]
    q_a = load_tile(q_base, queries, stride_qn, dims_a, num_queries, HEAD_DIM, False, WIDE_A)
    q_b = q_a
    acc_a = tl.zeros((BLOCK_M, DIM_A), tl.float32)
    acc_b = acc_a
    if HAS_B:
        q_b = load_tile(q_base, queries, stride_qn, dims_b, num_queries, HEAD_DIM, False, WIDE_B)
        acc_b = tl.zeros((BLOCK_M, DIM_B), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        acc_a, acc_b, m, l = _step(
            acc_a, acc_b, m, l, q_a, q_b, k_base, v_base, start, queries, num_keys,
            stride_kn, stride_vn, dims_a, dims_b, HEAD_DIM, qk_scale, noise_scale,
            seed, number, time, BLOCK_N, True, WIDE_A, WIDE_B, HAS_B, PRECISION,
        )  # fmt: skip
    if whole < num_keys:
        acc_a, acc_b, m, l = _step(
            acc_a, acc_b, m, l, q_a, q_b, k_base, v_base, whole, queries, num_keys,
            stride_kn, stride_vn, dims_a, dims_b, HEAD_DIM, qk_scale, noise_scale,
            seed, number, time, BLOCK_N, False, WIDE_A, WIDE_B, HAS_B, PRECISION,
        )  # fmt: skip
    inverse = (1.0 / l)[:, None]
    store_tile(out_base, queries, stride_on, dims_a, num_queries, HEAD_DIM, acc_a * inverse)
    if HAS_B:
        store_tile(out_base, queries, stride_on, dims_b, num_queries, HEAD_DIM, acc_b * inverse)


def tile(generation: str, dtype: torch.dtype, head_dim: int, tokens: int) -> Config:
    """Block sizes: those of plain attention, narrower, as the noise needs registers of its own."""
    config = default_config(generation, dtype, head_dim, tokens)
    if generation == "cpu":
        return config
    if dtype == torch.float32:
        return Config(16, 16, 4, 1)
    narrow = 32 if generation == "wmma" else 64
    warps = 8 if generation in ("mma", "mma120") and head_dim > 64 else config.warps
    return Config(min(config.block_m, narrow), min(config.block_n, 32), warps, 1)


_launch = Launcher(_noisy_attention_fwd_kernel)


def noisy_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    clock: torch.Tensor,
    layer: int = 0,
    seed: int = 0,
    sigma: float = 1.0,
    scale: float,
    first_head: int = 0,
    config: Config | None = None,
) -> torch.Tensor:
    """Fill ``out`` [rows, M, H, D] from q [rows, M, H, D] and k, v [rows, N, H, D]; return it.

    Operands whose last stride is not 1 are copied. fp16, bf16 or fp32, all alike;
    sums and noise in fp32.

    Args:
        clock: number of the step, one int64 on the same device.
        layer: number of the layer, below 4096.
        seed: from 0 to 2⁶³ − 1.
        sigma: standard deviation of the noise, in units of scores.
        scale: score scale, usually D ** -0.5.
        first_head: which of the layer's heads the first of the H is.
    """
    q, k, v = laid_out(q, k, v)
    rows, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]
    starts_aligned = aligned(q, k, v, out)
    low, high = seed & 0xFFFFFFFF, seed >> 32

    def prepare() -> Prepared:
        dim_a, dim_b = split_head_dim(head_dim)
        chip = generation(v.device.type, v.device.index)
        tiles = config or tile(chip, v.dtype, head_dim, keys)
        unit = stride_unit(v, strides, starts_aligned)
        # halves of the seed always as 32 bits: another seed must not be another kernel
        seeds = low - (low >> 31 << 32), high
        integers = *(x // unit for x in strides), heads, queries, keys, layer, *seeds, first_head
        constants = {
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "DIM_A": dim_a,
            "DIM_B": dim_b,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "PRECISION": dot_precision(chip, v.dtype),
        }
        grid = (triton.cdiv(queries, tiles.block_m) * heads * rows,)
        return grid, integers, constants, {"num_warps": tiles.warps, "num_stages": tiles.stages}

    pointers = q, k, v, out, clock
    key = None
    if starts_aligned and aligned(clock):
        key = v.device.index, q.shape, keys, strides, layer, seed, first_head, config
    _launch(key, pointers, (scale * LOG2E.value, sigma * LOG2E.value), prepare)
    return out

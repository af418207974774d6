"""Device functions of the attention kernels: tiles, one step of the online softmax, a mean query.

A head dimension is two powers of two side by side, A and B (B may be absent), because a dot takes
nothing else: see :func:`pag_fast_kernels.launch.split_head_dim`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, tokens, stride, dims, stop, head_dim, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """[tokens, dims]; EVEN: every token is before ``stop``; WIDE: every channel exists."""
    pointers = base + tokens[:, None] * stride + dims[None, :]
    if EVEN and WIDE:
        return tl.load(pointers)
    if EVEN:
        return tl.load(pointers, mask=(dims < head_dim)[None, :], other=0.0)
    if WIDE:
        return tl.load(pointers, mask=(tokens < stop)[:, None], other=0.0)
    mask = (tokens < stop)[:, None] & (dims < head_dim)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def reload_tile(base, tokens, stride, dims, stop, head_dim):
    """:func:`load_tile` that stays inside a loop, whose registers are worth more."""
    mask = (tokens < stop)[:, None] & (dims < head_dim)[None, :]
    return tl.load(
        base + tokens[:, None] * stride + dims[None, :], mask=mask, other=0.0, volatile=True
    )


@triton.jit
def store_tile(base, tokens, stride, dims, stop, head_dim, value):
    mask = (tokens < stop)[:, None] & (dims < head_dim)[None, :]
    pointers = base + tokens[:, None] * stride + dims[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(base, keys, stop, EVEN: tl.constexpr):
    """Additive bias of the keys, in units of log2."""
    if EVEN:
        return tl.load(base + keys).to(tl.float32) * LOG2E
    return tl.load(base + keys, mask=keys < stop, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def inverse_of(l, KEY_BIAS: tl.constexpr):
    """1 / l; where a bias has hidden every key, the output is 0 as in PyTorch."""
    if KEY_BIAS:
        l = tl.where(l == 0.0, 1.0, l)
    return 1.0 / l


@triton.jit
def blend(out_base, tokens, stride, dims, stop, v_base, stride_vn, strength, head_dim, value,
          BLEND: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Store ``value``, mixed with the tokens' own values ``v`` if BLEND."""
    if BLEND:
        own = load_tile(v_base, tokens, stride_vn, dims, stop, head_dim, False, WIDE)
        # exact for λ = 0 and λ = 1
        value = (1.0 - strength) * value + strength * own.to(tl.float32)
    store_tile(out_base, tokens, stride, dims, stop, head_dim, value)


@triton.jit
def attend_block(
    acc_a,
    acc_b,
    m,
    l,
    q_a,
    q_b,
    k_base,
    v_base,
    bias_base,
    keys,
    stop,
    stride_kn,
    stride_vn,
    dims_a,
    dims_b,
    head_dim,
    qk_scale,
    EVEN: tl.constexpr,
    WIDE_A: tl.constexpr,
    WIDE_B: tl.constexpr,
    HAS_B: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax (Milakov & Gimelshein, arXiv 1805.02867) over a block of keys.

    ``acc`` [BLOCK_M, D], ``m`` (largest score so far) and ``l`` (sum of weights) [BLOCK_M], fp32;
    scores are in units of log2. ``qk_scale`` is positive.
    """
    # [BLOCK_N, D]
    k_a = load_tile(k_base, keys, stride_kn, dims_a, stop, head_dim, EVEN, WIDE_A)
    scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
    if HAS_B:
        k_b = load_tile(k_base, keys, stride_kn, dims_b, stop, head_dim, EVEN, WIDE_B)
        scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
    # [BLOCK_M, BLOCK_N]
    if KEY_BIAS:
        scores = scores * qk_scale + load_bias(bias_base, keys, stop, EVEN)[None, :]
    if not EVEN:
        scores = tl.where((keys < stop)[None, :], scores, float("-inf"))
    shift = m
    if KEY_BIAS:
        m_new = tl.maximum(m, tl.max(scores, 1))
        # a bias of -inf can hide every key so far
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - shift[:, None])
    else:
        # the largest before scaling: what is left to do for a score is one multiply-add
        m_new = tl.maximum(m, tl.max(scores, 1) * qk_scale)
        shift = m_new
        p = tl.exp2(scores * qk_scale - shift[:, None])
    # m is -inf only where l and acc are still 0
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v_a = load_tile(v_base, keys, stride_vn, dims_a, stop, head_dim, EVEN, WIDE_A)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * alpha[:, None], input_precision=PRECISION)
    if HAS_B:
        v_b = load_tile(v_base, keys, stride_vn, dims_b, stop, head_dim, EVEN, WIDE_B)
        acc_b = tl.dot(p, v_b, acc_b * alpha[:, None], input_precision=PRECISION)
    return acc_a, acc_b, m_new, l


@triton.jit
def mean_query_row(
    q_base,
    k_base,
    v_base,
    bias_base,
    out_base,
    stride_qn,
    stride_kn,
    stride_vn,
    stride_on,
    num_image,
    num_tokens,
    dims_a,
    dims_b,
    head_dim,
    qk_scale,
    BLOCK: tl.constexpr,
    WIDE_A: tl.constexpr,
    WIDE_B: tl.constexpr,
    HAS_B: tl.constexpr,
    KEY_BIAS: tl.constexpr,
):
    """Every image token of a head gets the attention output of the mean image query: O(N)."""
    tokens = tl.arange(0, BLOCK)
    # [D], fp32
    q_a = tl.sum(tl.zeros((BLOCK, dims_a.shape[0]), tl.float32), 0)
    acc_a = q_a
    q_b = tl.sum(tl.zeros((BLOCK, dims_b.shape[0]), tl.float32), 0)
    acc_b = q_b
    for start in range(0, num_image, BLOCK):
        some = start + tokens
        q = load_tile(q_base, some, stride_qn, dims_a, num_image, head_dim, False, WIDE_A)
        q_a += tl.sum(q.to(tl.float32), 0)
        if HAS_B:
            q = load_tile(q_base, some, stride_qn, dims_b, num_image, head_dim, False, WIDE_B)
            q_b += tl.sum(q.to(tl.float32), 0)
    m = tl.max(tl.full((BLOCK,), float("-inf"), tl.float32), 0)
    l = tl.sum(tl.zeros((BLOCK,), tl.float32), 0)
    for start in range(0, num_tokens, BLOCK):
        keys = start + tokens
        k = load_tile(k_base, keys, stride_kn, dims_a, num_tokens, head_dim, False, WIDE_A)
        # [BLOCK]
        scores = tl.sum(k.to(tl.float32) * q_a[None, :], 1)
        if HAS_B:
            k = load_tile(k_base, keys, stride_kn, dims_b, num_tokens, head_dim, False, WIDE_B)
            scores += tl.sum(k.to(tl.float32) * q_b[None, :], 1)
        scores = scores / num_image * qk_scale
        if KEY_BIAS:
            scores += load_bias(bias_base, keys, num_tokens, False)
        scores = tl.where(keys < num_tokens, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 0))
        shift = m_new
        if KEY_BIAS:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - shift)
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 0)
        m = m_new
        v = load_tile(v_base, keys, stride_vn, dims_a, num_tokens, head_dim, False, WIDE_A)
        acc_a = acc_a * alpha + tl.sum(v.to(tl.float32) * p[:, None], 0)
        if HAS_B:
            v = load_tile(v_base, keys, stride_vn, dims_b, num_tokens, head_dim, False, WIDE_B)
            acc_b = acc_b * alpha + tl.sum(v.to(tl.float32) * p[:, None], 0)
    zeros = tl.zeros((BLOCK, 1), tl.float32)
    inverse = inverse_of(l, KEY_BIAS)
    # [BLOCK, D]
    acc_a = (acc_a * inverse)[None, :] + zeros
    acc_b = (acc_b * inverse)[None, :] + zeros
    for start in range(0, num_image, BLOCK):
        some = start + tokens
        store_tile(out_base, some, stride_on, dims_a, num_image, head_dim, acc_a)
        if HAS_B:
            store_tile(out_base, some, stride_on, dims_b, num_image, head_dim, acc_b)

"""How much attention every token receives: column sums of softmax(QKᵀ), averaged over heads.

    receivedₖ = (1/H) Σₕ Σ_q exp(s_qk − L_q)     L_q = log Σₖ exp(s_qk),  s = scale · q·k

Self-Attention Guidance (Hong et al., arXiv 2210.00939) compares it with 1. The map is never
written. The first launch finds L, one number a query and head; the second recomputes the scores
tile by tile and adds up columns. Where all keys fit into one tile, the second finds L by itself and
is the only one: the middle of Stable Diffusion's UNet has 64 tokens at 512 pixels.

A program of the second launch owns its keys and goes over all heads and queries, so that sums are
taken in one order in every run. Without that, tokens near the threshold could flip, and pictures
with them.

The layer's output comes from PyTorch's fused attention: nothing of it but L could be used here,
and not every one of its backends returns L.

Floor, for A rows, N tokens, H heads, D channels, s bytes an element:

    bytes  2·s·A·N·H·D + 4·A·N     in two launches 4·s·A·N·H·D + 4·A·N·(2·H + 1)
    FLOPs  2·A·N²·H·D              in two launches 4·A·N²·H·D
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, laid_out, stride_unit
from .launch import Config, dot_precision, generation, split_head_dim
from .online_softmax import LOG2E, load_tile


@triton.jit
def _scores(
    own_a, own_b, base, tokens, stride, dims_a, dims_b, stop, head_dim, qk_scale,
    HAS_B: tl.constexpr, WIDE_A: tl.constexpr, WIDE_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[own, others] in units of log2: the tokens a program has, [own, D], by those it goes over."""
    other = load_tile(base, tokens, stride, dims_a, stop, head_dim, False, WIDE_A)
    scores = tl.dot(own_a, tl.trans(other), input_precision=PRECISION)
    if HAS_B:
        other = load_tile(base, tokens, stride, dims_b, stop, head_dim, False, WIDE_B)
        scores = tl.dot(own_b, tl.trans(other), scores, input_precision=PRECISION)
    return scores * qk_scale


_INTEGERS = (
    *("stride_qb", "stride_qn", "stride_qh", "stride_kb", "stride_kn", "stride_kh"),
    *("heads", "num_tokens"),
)


@triton.jit(do_not_specialize=_INTEGERS)
def _attention_lse_kernel(
    q_ptr,  # [rows, N, H, D], any strides but a unit last one
    k_ptr,
    lse_ptr,  # [rows, H, N] fp32, in units of log2
    qk_scale,  # softmax scale × log2(e)
    stride_qb,  # these in units of UNIT elements
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    heads,
    num_tokens,
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
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims_a = tl.arange(0, DIM_A)
    dims_b = DIM_A + tl.arange(0, DIM_B if HAS_B else 1)
    q_base = q_ptr + (row * stride_qb + head * stride_qh) * UNIT
    k_base = k_ptr + (row * stride_kb + head * stride_kh) * UNIT
    stride_qn *= UNIT
    stride_kn *= UNIT
    q_a = load_tile(q_base, queries, stride_qn, dims_a, num_tokens, HEAD_DIM, False, WIDE_A)
    q_b = q_a
    if HAS_B:
        q_b = load_tile(q_base, queries, stride_qn, dims_b, num_tokens, HEAD_DIM, False, WIDE_B)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        # [BLOCK_M, BLOCK_N]
        scores = _scores(
            q_a, q_b, k_base, keys, stride_kn, dims_a, dims_b, num_tokens, HEAD_DIM, qk_scale,
            HAS_B, WIDE_A, WIDE_B, PRECISION,
        )  # fmt: skip
        scores = tl.where((keys < num_tokens)[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(scores - m_new[:, None]), 1)
        m = m_new
    base = lse_ptr + (row * heads + head) * num_tokens
    tl.store(base + queries, m + tl.log2(l), mask=queries < num_tokens)


@triton.jit(do_not_specialize=_INTEGERS)
def _received_attention_kernel(
    q_ptr,  # [rows, N, H, D], any strides but a unit last one
    k_ptr,
    lse_ptr,  # [rows, H, N] fp32, in units of log2
    out_ptr,  # [rows, N] fp32
    qk_scale,
    stride_qb,  # these in units of UNIT elements
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    heads,
    num_tokens,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    HAS_B: tl.constexpr = DIM_B > 0
    WIDE_A: tl.constexpr = HEAD_DIM >= DIM_A
    WIDE_B: tl.constexpr = HEAD_DIM >= DIM_A + DIM_B
    row = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims_a = tl.arange(0, DIM_A)
    dims_b = DIM_A + tl.arange(0, DIM_B if HAS_B else 1)
    q_base = q_ptr + row * stride_qb * UNIT
    k_base = k_ptr + row * stride_kb * UNIT
    stride_qn *= UNIT
    stride_kn *= UNIT
    stride_qh *= UNIT
    stride_kh *= UNIT
    lse_base = lse_ptr + row * heads * num_tokens
    received = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(heads):
        k_a = load_tile(k_base, keys, stride_kn, dims_a, num_tokens, HEAD_DIM, False, WIDE_A)
        k_b = k_a
        if HAS_B:
            k_b = load_tile(k_base, keys, stride_kn, dims_b, num_tokens, HEAD_DIM, False, WIDE_B)
        for start in range(0, num_tokens, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            # [BLOCK_N, BLOCK_M]: sums over queries stay within a row
            scores = _scores(
                k_a, k_b, q_base, queries, stride_qn, dims_a, dims_b, num_tokens, HEAD_DIM,
                qk_scale, HAS_B, WIDE_A, WIDE_B, PRECISION,
            )  # fmt: skip
            if IS_WHOLE:
                scores = tl.where((keys < num_tokens)[:, None], scores, float("-inf"))
                p = tl.exp2(scores - tl.max(scores, 0)[None, :])
                p = tl.where((queries < num_tokens)[None, :], p / tl.sum(p, 0)[None, :], 0.0)
            else:
                lse = tl.load(lse_base + queries, mask=queries < num_tokens, other=float("inf"))
                p = tl.exp2(scores - lse[None, :])
            received += tl.sum(p, 1)
        q_base += stride_qh
        k_base += stride_kh
        lse_base += num_tokens
    tl.store(out_ptr + row * num_tokens + keys, received / heads, mask=keys < num_tokens)


def tile(chip: str, dtype: torch.dtype, head_dim: int) -> Config:
    """A tile that spills on no chip of its generation, as pipelined loads would; unmeasured."""
    dim_a, dim_b = split_head_dim(head_dim)
    wide = dim_a + dim_b
    if chip == "cpu":
        return Config(64, 64, 4, 1)
    if dtype == torch.float32:
        return Config(16 if chip == "wmma" else 32, 16, 8, 1)
    if chip == "wmma":
        return Config(64, 32, 4, 1) if wide <= 96 else Config(32, 32, 4, 1)
    if chip in ("mma", "mma120") and wide <= 128:
        if dim_b == 0:
            return Config(64 if chip == "mma120" and wide == 128 else 32, 64, 8, 1)
        if wide < 64:
            return Config(64, 64, 8, 1)
        return Config(64, 64, 4, 1) if wide == 80 else Config(64, 32, 4, 1)
    return Config(64, 64, 4, 1)


_launch_lse = Launcher(_attention_lse_kernel)
_launch = Launcher(_received_attention_kernel)


def received_attention(q: torch.Tensor, k: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attention that each token receives, [rows, N] fp32, from q and k [rows, N, H, D].

    Operands whose last stride is not 1 are copied. fp16, bf16 or fp32, both alike;
    sums in fp32. ``scale`` is the score scale, usually D ** -0.5.
    """
    q, k = laid_out(q, k)
    rows, tokens, heads, head_dim = q.shape
    chip = generation(q.device.type, q.device.index)
    config = tile(chip, q.dtype, head_dim)
    whole = tokens <= config.block_n
    out = torch.empty((rows, tokens), dtype=torch.float32, device=q.device)
    lse = out
    if not whole:
        lse = torch.empty((rows, heads, tokens), dtype=torch.float32, device=q.device)
    strides = *q.stride()[:3], *k.stride()[:3]
    starts_aligned = aligned(q, k)

    def prepare(grid: tuple[int, int], **flags: bool) -> Prepared:
        dim_a, dim_b = split_head_dim(head_dim)
        unit = stride_unit(q, strides, starts_aligned)
        constants = {
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "DIM_A": dim_a,
            "DIM_B": dim_b,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PRECISION": dot_precision(chip, q.dtype),
            **flags,
        }
        integers = *(x // unit for x in strides), heads, tokens
        return grid, integers, constants, {"num_warps": config.warps, "num_stages": config.stages}

    key = None
    if starts_aligned and aligned(lse, out):
        key = q.device.index, q.shape, strides
    numbers = (scale * LOG2E.value,)
    if not whole:
        grid = triton.cdiv(tokens, config.block_m), rows * heads
        _launch_lse(key, (q, k, lse), numbers, lambda: prepare(grid))
    columns = triton.cdiv(tokens, config.block_n), rows
    _launch(key, (q, k, lse, out), numbers, lambda: prepare(columns, IS_WHOLE=whole))
    return out

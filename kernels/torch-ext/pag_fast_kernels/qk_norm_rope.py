"""HunyuanDiT's per-head LayerNorm and 2-D rotary embedding of queries and keys, in one launch.

    x ← LayerNorm(x) over the D channels of a head
    x[2i], x[2i+1] ← x[2i]·cos[2i] − x[2i+1]·sin[2i],  x[2i+1]·cos[2i+1] + x[2i]·sin[2i+1]

In place: a program reads a tile, and writes that tile. Everything in between is fp32, where stock
rounds to the model's dtype after the norm.

Floor, for A rows, N tokens, H heads, D channels, s bytes an element:

    bytes  4·s·A·N·H·D + 8·N·D     q and k read and written, cos and sin (fp32) read
    FLOPs  ≈ 24·A·N·H·D
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device

BLOCK = 32  # tokens


@triton.jit(do_not_specialize=["num_tokens"])
def _qk_norm_rope_kernel(
    q_ptr,  # [rows, N, H, D], any strides but a unit last one
    k_ptr,
    q_weight_ptr,  # [D]
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,  # [N, D], contiguous
    sin_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    heads,
    num_tokens,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    ROPE: tl.constexpr,
):
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    even = 2 * tl.arange(0, BLOCK_PAIRS)
    wide = even < HEAD_DIM
    mask = (tokens < num_tokens)[:, None] & wide[None, :]
    base = q_ptr + row * stride_qb + head * stride_qh + tokens[:, None] * stride_qn
    weight_ptr = q_weight_ptr
    bias_ptr = q_bias_ptr
    if tl.program_id(2) == 1:
        base = k_ptr + row * stride_kb + head * stride_kh + tokens[:, None] * stride_kn
        weight_ptr = k_weight_ptr
        bias_ptr = k_bias_ptr
    # [BLOCK_N, D / 2] each
    a = tl.load(base + even[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + even[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(a, 1) + tl.sum(b, 1)) / HEAD_DIM
        a = tl.where(mask, a - mean[:, None], 0.0)
        b = tl.where(mask, b - mean[:, None], 0.0)
        variance = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM
        scale = 1.0 / tl.sqrt(variance + eps)
        a *= scale[:, None]
        b *= scale[:, None]
        if AFFINE:
            a = a * tl.load(weight_ptr + even, mask=wide, other=0.0).to(tl.float32)[None, :]
            b = b * tl.load(weight_ptr + even + 1, mask=wide, other=0.0).to(tl.float32)[None, :]
            a += tl.load(bias_ptr + even, mask=wide, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + even + 1, mask=wide, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        angle = tokens[:, None] * HEAD_DIM + even[None, :]
        cos_a = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + angle + 1, mask=mask, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + angle + 1, mask=mask, other=0.0).to(tl.float32)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(base + even[None, :], a.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(base + even[None, :] + 1, b.to(q_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_affine: tuple[torch.Tensor, torch.Tensor] | None,
    k_affine: tuple[torch.Tensor, torch.Tensor] | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    eps: float,
    norm: bool = True,
) -> None:
    """Normalise and rotate q and k [rows, N, H, D] in place.

    ``q_affine``, ``k_affine``: weight and bias [D] of the norms, or neither. ``rotary``: cos and
    sin [N, D]. D is even.
    """
    rows, tokens, heads, head_dim = q.shape
    # absent ones need some pointer: it is never read
    q_weight, q_bias = q_affine or (q, q)
    k_weight, k_bias = k_affine or (k, k)
    cos, sin = (q, q)
    if rotary is not None:
        cos, sin = (table.expand(tokens, head_dim).contiguous() for table in rotary)
    with on_device(q):
        _qk_norm_rope_kernel[(triton.cdiv(tokens, BLOCK), rows * heads, 2)](
            q,
            k,
            q_weight,
            q_bias,
            k_weight,
            k_bias,
            cos,
            sin,
            *q.stride()[:3],
            *k.stride()[:3],
            heads,
            tokens,
            eps,
            HEAD_DIM=head_dim,
            BLOCK_PAIRS=triton.next_power_of_2(head_dim // 2),
            BLOCK_N=BLOCK,
            NORM=norm,
            AFFINE=q_affine is not None,
            ROPE=rotary is not None,
        )

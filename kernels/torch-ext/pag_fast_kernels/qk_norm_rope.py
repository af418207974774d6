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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, laid_out, stride_unit

BLOCK = 32  # tokens

# weight and bias of a norm
Affine = tuple[torch.Tensor | None, torch.Tensor | None]


_INTEGERS = (
    *("stride_qb", "stride_qn", "stride_qh", "stride_kb", "stride_kn", "stride_kh"),
    *("heads", "num_tokens"),
)


@triton.jit
def _pairs(tile, BLOCK_N: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """[BLOCK_N, 2 · BLOCK_PAIRS] as its even and its odd columns, fp32."""
    return tl.split(tl.reshape(tile.to(tl.float32), (BLOCK_N, BLOCK_PAIRS, 2)))


@triton.jit(do_not_specialize=_INTEGERS)
def _qk_norm_rope_kernel(
    q_ptr,  # [rows, N, H, D], any strides but a unit last one
    k_ptr,
    q_weight_ptr,  # [D]
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,  # [N, D], contiguous
    sin_ptr,
    eps,
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
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    ROPE: tl.constexpr,
):
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # whole rows: loads of every other channel would be of single elements
    dims = tl.arange(0, 2 * BLOCK_PAIRS)
    wide = dims < HEAD_DIM
    mask = (tokens < num_tokens)[:, None] & wide[None, :]
    base = q_ptr + (row * stride_qb + head * stride_qh) * UNIT
    base += tokens[:, None] * (stride_qn * UNIT)
    weight_ptr = q_weight_ptr
    bias_ptr = q_bias_ptr
    if tl.program_id(2) == 1:
        base = k_ptr + (row * stride_kb + head * stride_kh) * UNIT
        base += tokens[:, None] * (stride_kn * UNIT)
        weight_ptr = k_weight_ptr
        bias_ptr = k_bias_ptr
    base += dims[None, :]
    # [BLOCK_N, D]
    x = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x, 1) / HEAD_DIM
        x = tl.where(mask, x - mean[:, None], 0.0)
        variance = tl.sum(x * x, 1) / HEAD_DIM
        x *= (1.0 / tl.sqrt(variance + eps))[:, None]
        if AFFINE:
            x = x * tl.load(weight_ptr + dims, mask=wide, other=0.0).to(tl.float32)[None, :]
            x += tl.load(bias_ptr + dims, mask=wide, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        angle = tokens[:, None] * HEAD_DIM + dims[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        # the partner of every channel: −x[2i+1], x[2i]
        a, b = _pairs(x, BLOCK_N, BLOCK_PAIRS)
        partner = tl.reshape(tl.join(-b, a), (BLOCK_N, 2 * BLOCK_PAIRS))
        x = x * cos + partner * sin
    tl.store(base, x.to(q_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(_qk_norm_rope_kernel)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_affine: Affine | None,
    k_affine: Affine | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    eps: float,
    norm: bool = True,
) -> None:
    """Normalise and rotate q and k [rows, N, H, D] in place.

    ``q_affine``, ``k_affine``: weight and bias [D] of the norms; any may be left out. ``rotary``:
    cos and sin [N, D]. D is even.
    """
    laid_q, laid_k = laid_out(q, k)
    if laid_q is not q or laid_k is not k:
        qk_norm_rope(laid_q, laid_k, q_affine, k_affine, rotary, eps=eps, norm=norm)
        q.copy_(laid_q)
        k.copy_(laid_k)
        return
    rows, tokens, heads, head_dim = q.shape
    affine = *(q_affine or (None, None)), *(k_affine or (None, None))
    has_affine = norm and any(x is not None for x in affine)
    q_weight, q_bias, k_weight, k_bias = _vectors(q, affine) if has_affine else (q,) * 4
    # absent ones need some pointer: it is never read
    cos, sin = (q, q)
    if rotary is not None:
        cos, sin = (table.expand(tokens, head_dim).contiguous() for table in rotary)
    strides = *q.stride()[:3], *k.stride()[:3]
    starts_aligned = aligned(q, k)
    pointers = q, k, q_weight, q_bias, k_weight, k_bias, cos, sin

    def prepare() -> Prepared:
        unit = stride_unit(q, strides, starts_aligned)
        constants = {
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "BLOCK_PAIRS": triton.next_power_of_2(head_dim // 2),
            "BLOCK_N": BLOCK,
            "NORM": norm,
            "AFFINE": has_affine,
            "ROPE": rotary is not None,
        }
        grid = triton.cdiv(tokens, BLOCK), rows * heads, 2
        return grid, (*(x // unit for x in strides), heads, tokens), constants, {}

    key = None
    if starts_aligned and aligned(*pointers[2:]):
        key = q.device.index, q.shape, strides, norm, has_affine, rotary is not None
    _launch(key, pointers, (float(eps),), prepare)


def _vectors(q: torch.Tensor, affine: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Weights and biases, [D] each; the one kernel of all norms multiplies by 1 and adds 0."""
    return [
        torch.full(q.shape[-1:], 1.0 - i % 2, device=q.device) if x is None else x.contiguous()
        for i, x in enumerate(affine)
    ]

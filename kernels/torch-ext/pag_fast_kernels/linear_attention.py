"""ReLU linear attention (Sana, arXiv 2410.10629) for the attending rows, identity for the others.

    S = Σₙ vₙ ⊗ relu(kₙ)   z = Σₙ relu(kₙ)   outₙ = S·relu(qₙ) / (z·relu(qₙ) + ε)

The first launch adds up S and z over slices of the tokens, in fp32; the second adds the slices, in
a fixed order, and applies them. Perturbed rows are copied by the second.

Floor, for B rows of which A attend, N tokens, H heads, D channels, s bytes an element:

    bytes  s·N·H·D·(3·A + B − A + B)     the state, 4·A·H·D·(D + 1), is small beside it
    FLOPs  4·A·N·H·D·(D + 1)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, laid_out, stride_unit
from .launch import dot_precision, generation

EPS = 1e-15
BLOCK = 64  # tokens, at most
SLICES = 16  # partial states a head, at most


@triton.jit
def _rows(base, tokens, stride, dims, num_tokens, HEAD_DIM: tl.constexpr):
    mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base + tokens[:, None] * stride + dims[None, :], mask=mask, other=0.0)


_INPUTS = ("stride_vb", "stride_vn", "stride_vh", "heads", "num_tokens")
_STATE = ("stride_kb", "stride_kn", "stride_kh", *_INPUTS, "slice_tokens")
_APPLY = (
    *("stride_qb", "stride_qn", "stride_qh", "stride_ob", "stride_on", "stride_oh"),
    *(*_INPUTS, "slices", "num_attend", "num_forked"),
)


@triton.jit(do_not_specialize=_STATE)
def _linear_attention_state_kernel(
    k_ptr,  # [num_attend, N, H, D]
    v_ptr,
    state_ptr,  # [num_attend, H, slices, D + 1, D] fp32: S by rows of v's channels, then z
    stride_kb,  # these in units of UNIT elements
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    heads,
    num_tokens,
    slice_tokens,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + (row * stride_kb + head * stride_kh) * UNIT
    v_base = v_ptr + (row * stride_vb + head * stride_vh) * UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    # [D of v, D of k]
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    stop = tl.minimum((part + 1) * slice_tokens, num_tokens)
    for start in range(part * slice_tokens, stop, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        k = _rows(k_base, tokens, stride_kn, dims, stop, HEAD_DIM)
        # older versions of Triton promote to the type of the constant
        k = tl.maximum(k, 0.0).to(k.dtype)
        v = _rows(v_base, tokens, stride_vn, dims, stop, HEAD_DIM)
        state = tl.dot(tl.trans(v), k, state, input_precision=PRECISION)
        z += tl.sum(k.to(tl.float32), 0)
    index = (row * heads + head) * tl.num_programs(0) + part
    base = state_ptr + index * (HEAD_DIM + 1) * HEAD_DIM
    wide = dims < HEAD_DIM
    tl.store(
        base + dims[:, None] * HEAD_DIM + dims[None, :], state, mask=wide[:, None] & wide[None, :]
    )
    tl.store(base + HEAD_DIM * HEAD_DIM + dims, z, mask=wide)


@triton.jit(do_not_specialize=_APPLY)
def _linear_attention_apply_kernel(
    q_ptr,  # [num_attend, N, H, D]
    v_ptr,  # [rows, N, H, D]
    state_ptr,
    out_ptr,  # [rows + num_forked, N, H, D]
    eps,
    stride_qb,  # these in units of UNIT elements
    stride_qn,
    stride_qh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_on,
    stride_oh,
    heads,
    num_tokens,
    slices,
    num_attend,
    num_forked,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    wide = dims < HEAD_DIM
    mask = (tokens < num_tokens)[:, None] & wide[None, :]
    out = out_ptr + (row * stride_ob + head * stride_oh) * UNIT
    out += tokens[:, None] * (stride_on * UNIT) + dims[None, :]
    if row >= num_attend:
        source = row - num_forked
        v_base = v_ptr + (source * stride_vb + head * stride_vh) * UNIT
        own = _rows(v_base, tokens, stride_vn * UNIT, dims, num_tokens, HEAD_DIM)
        tl.store(out, own, mask=mask)
        return
    q_base = q_ptr + (row * stride_qb + head * stride_qh) * UNIT
    q = tl.maximum(_rows(q_base, tokens, stride_qn * UNIT, dims, num_tokens, HEAD_DIM), 0.0)
    q = q.to(tl.float32)
    state = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    size = (HEAD_DIM + 1) * HEAD_DIM
    base = state_ptr + (row * heads + head) * slices * size
    for _ in range(slices):
        state += tl.load(
            base + dims[:, None] * HEAD_DIM + dims[None, :],
            mask=wide[:, None] & wide[None, :],
            other=0.0,
        )
        z += tl.load(base + HEAD_DIM * HEAD_DIM + dims, mask=wide, other=0.0)
        base += size
    # [tokens, D]
    numerator = tl.dot(q, tl.trans(state), input_precision=PRECISION)
    denominator = tl.sum(q * z[None, :], 1) + eps
    value = numerator / denominator[:, None]
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=mask)


def tile(chip: str, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a block, and warps. gfx1100 has no matrix instruction for fp32."""
    return (BLOCK // 2, 8) if dtype == torch.float32 and chip == "wmma" else (BLOCK, 4)


_launch_state = Launcher(_linear_attention_state_kernel)
_launch = Launcher(_linear_attention_apply_kernel)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    num_attend: int,
    num_forked: int,
) -> torch.Tensor:
    """Fill ``out`` [rows + num_forked, N, H, D] from q, k [num_attend, …] and v [rows, …].

    Operands whose last stride is not 1 are copied. fp16, bf16 or fp32, all alike; sums in fp32.
    """
    q, k, v = laid_out(q, k, v)
    _, tokens, heads, head_dim = v.shape
    slice_tokens = triton.cdiv(triton.cdiv(tokens, SLICES), BLOCK) * BLOCK
    slices = triton.cdiv(tokens, slice_tokens)
    shape = (num_attend, heads, slices, head_dim + 1, head_dim)
    state = torch.empty(shape, dtype=torch.float32, device=v.device)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]
    starts_aligned = aligned(q, k, v, out)
    unit = stride_unit(v, strides, starts_aligned)
    of_q, of_k, of_v, of_out = (
        tuple(stride // unit for stride in strides[i : i + 3]) for i in range(0, 12, 3)
    )

    def prepare(first: int, rows: int, integers: tuple[int, ...]) -> Prepared:
        chip = generation(v.device.type, v.device.index)
        block, warps = tile(chip, v.dtype)
        constants = {
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_N": block,
            "PRECISION": dot_precision(chip, torch.float32),
        }
        grid = (first or triton.cdiv(tokens, block), rows * heads)
        return grid, integers, constants, {"num_warps": warps}

    key = None
    if starts_aligned and aligned(state):
        key = v.device.index, v.shape, strides, num_attend, num_forked
    more = heads, tokens, slice_tokens
    _launch_state(
        key, (k, v, state), (), lambda: prepare(slices, num_attend, (*of_k, *of_v, *more))
    )
    rest = *of_q, *of_v, *of_out, heads, tokens, slices, num_attend, num_forked
    _launch(key, (q, v, state, out), (EPS,), lambda: prepare(0, out.shape[0], rest))
    return out

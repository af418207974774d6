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

from .launch import dot_precision, generation, on_device

EPS = 1e-15
BLOCK = 64  # tokens, at most
SLICES = 16  # partial states a head, at most


@triton.jit
def _rows(base, tokens, stride, dims, num_tokens, HEAD_DIM: tl.constexpr):
    mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base + tokens[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "slice_tokens"])
def _linear_attention_state_kernel(
    k_ptr,  # [num_attend, N, H, D]
    v_ptr,
    state_ptr,  # [num_attend, H, slices, D + 1, D] fp32: S by rows of v's channels, then z
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    heads,
    num_tokens,
    slice_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = (tl.program_id(1) // heads).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + row * stride_kb + head * stride_kh
    v_base = v_ptr + row * stride_vb + head * stride_vh
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


@triton.jit(do_not_specialize=["num_tokens", "slices", "num_attend", "num_forked"])
def _linear_attention_apply_kernel(
    q_ptr,  # [num_attend, N, H, D]
    v_ptr,  # [rows, N, H, D]
    state_ptr,
    out_ptr,  # [rows + num_forked, N, H, D]
    stride_qb,
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
    eps,
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
    out = out_ptr + row * stride_ob + head * stride_oh
    out += tokens[:, None] * stride_on + dims[None, :]
    if row >= num_attend:
        source = row - num_forked
        v_base = v_ptr + source * stride_vb + head * stride_vh
        own = _rows(v_base, tokens, stride_vn, dims, num_tokens, HEAD_DIM)
        tl.store(out, own, mask=mask)
        return
    q_base = q_ptr + row * stride_qb + head * stride_qh
    q = tl.maximum(_rows(q_base, tokens, stride_qn, dims, num_tokens, HEAD_DIM), 0.0)
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

    The last stride of each is 1. fp16, bf16 or fp32, all alike; sums in fp32.
    """
    _, tokens, heads, head_dim = v.shape
    slice_tokens = triton.cdiv(triton.cdiv(tokens, SLICES), BLOCK) * BLOCK
    slices = triton.cdiv(tokens, slice_tokens)
    shape = (num_attend, heads, slices, head_dim + 1, head_dim)
    state = torch.empty(shape, dtype=torch.float32, device=v.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    chip = generation(v.device.type, v.device.index)
    precision = dot_precision(chip, torch.float32)
    block, warps = tile(chip, v.dtype)
    tiles = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_N": block, "PRECISION": precision}
    with on_device(v):
        # an empty grid is an error of CUDA
        if num_attend:
            _linear_attention_state_kernel[(slices, num_attend * heads)](
                k,
                v,
                state,
                *k.stride()[:3],
                *v.stride()[:3],
                heads,
                tokens,
                slice_tokens,
                **tiles,
                num_warps=warps,
            )
        _linear_attention_apply_kernel[(triton.cdiv(tokens, block), out.shape[0] * heads)](
            q,
            v,
            state,
            out,
            *q.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            heads,
            tokens,
            slices,
            num_attend,
            num_forked,
            EPS,
            **tiles,
            num_warps=warps,
        )
    return out

"""Softmax attention for the uncond and cond rows, perturbed attention for the others: one launch.

A row ``r`` of the output belongs to a source row of q, k and v:

    r < num_attend     softmax over all tokens
    r ≥ num_attend     perturbed: what its image queries get depends on the perturbation

    identity  the query's own value. With text tokens: softmax over itself and the text keys
              (Perturbed-Attention Guidance, Ahn et al., arXiv 2403.17377)
    soft      (1 − λ)·softmax(QKᵀ)V + λ·V with λ per head (SoftPAG, arXiv 2506.10978)
    blur      attention of the mean image query, the same for all (the limit σ → ∞ of Smoothed
              Energy Guidance, Hong, arXiv 2408.00760)

Text queries are not perturbed. The online softmax of an identity query starts with the query's own
key (m = qᵢ·kᵢ, l = 1, acc = vᵢ) and goes on over the text keys. Which of these a launch can do is
decided when it is compiled: what is off costs nothing.

Floor, for B rows of which A attend, N tokens, H heads, D channels, s bytes an element, identity:

    bytes  s·N·H·D·(3·A + B − A + B)    q, k, v of attending rows, v of the others, the output
    FLOPs  4·A·N²·H·D                   QKᵀ and PV, two a multiply-add

With T text tokens also 4·(B − A)·(N − T)·T·H·D + 4·(B − A)·T·N·H·D FLOPs, and q and k of all rows.
Blur adds 4·(B − A)·N·H·D FLOPs; soft makes A = B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .bound import Launcher, Prepared, aligned, laid_out, stride_unit
from .launch import (
    Config,
    default_config,
    dot_precision,
    generation,
    measured_tile,
    split_head_dim,
)
from .online_softmax import (
    LOG2E,
    attend_block,
    blend,
    inverse_of,
    load_bias,
    load_tile,
    mean_query_row,
    reload_tile,
    store_tile,
)
from .specialised_attention import by_specialised_warps

PERTURBATIONS = {"identity": 0, "soft": 1, "blur": 2}
_IDENTITY: tl.constexpr = tl.constexpr(0)
_SOFT: tl.constexpr = tl.constexpr(1)
_BLUR: tl.constexpr = tl.constexpr(2)


_INTEGERS = (
    *("stride_qb", "stride_qn", "stride_qh", "stride_kb", "stride_kn", "stride_kh"),
    *("stride_vb", "stride_vn", "stride_vh", "stride_ob", "stride_on", "stride_oh"),
    *("stride_bias_b", "stride_bias_h"),
    *("heads", "num_image", "num_context", "num_attend", "num_forked"),
)


@triton.jit(do_not_specialize=_INTEGERS)
def _perturbed_attention_fwd_kernel(
    q_ptr,  # [num_attend or rows, N, H, D], any strides but a unit last one
    k_ptr,
    v_ptr,  # [rows, N, H, D]
    out_ptr,  # [rows + num_forked, N, H, D]
    bias_ptr,  # [rows of q, H, N], unit last stride
    strength_ptr,  # [H] fp32
    qk_scale,  # softmax scale × log2(e)
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
    stride_bias_b,  # these in units of BIAS_UNIT
    stride_bias_h,
    heads,
    num_image,
    num_context,
    num_attend,
    num_forked,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    JOINT: tl.constexpr,
    PERTURBATION: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    RELOAD_Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    HAS_B: tl.constexpr = DIM_B > 0
    WIDE_A: tl.constexpr = HEAD_DIM >= DIM_A
    WIDE_B: tl.constexpr = HEAD_DIM >= DIM_A + DIM_B
    SOFT: tl.constexpr = PERTURBATION == _SOFT
    # rows are the slowest index: those that attend, and take long, are scheduled first
    pid = tl.program_id(0)
    image_blocks = tl.cdiv(num_image, BLOCK_M)
    blocks = image_blocks + tl.cdiv(num_context, BLOCK_M)
    block = pid % blocks
    head = (pid // blocks % heads).to(tl.int64)
    row = (pid // blocks // heads).to(tl.int64)
    attends = row < num_attend
    is_text = block >= image_blocks
    forked = (row >= num_attend) & (num_forked > 0)
    source = tl.where(forked, row - num_forked, row)
    # written by the row they are equal to, or made of
    if JOINT:
        if forked & is_text:
            return
    if SOFT:
        if forked:
            return
    num_tokens = num_image + num_context
    first = tl.where(is_text, num_image + (block - image_blocks) * BLOCK_M, block * BLOCK_M)
    stop = tl.where(is_text, num_tokens, num_image)
    tokens = first + tl.arange(0, BLOCK_M)
    dims_a = tl.arange(0, DIM_A)
    dims_b = DIM_A + tl.arange(0, DIM_B if HAS_B else 1)
    q_base = q_ptr + (source * stride_qb + head * stride_qh) * UNIT
    k_base = k_ptr + (source * stride_kb + head * stride_kh) * UNIT
    v_base = v_ptr + (source * stride_vb + head * stride_vh) * UNIT
    out_base = out_ptr + (row * stride_ob + head * stride_oh) * UNIT
    # multiples of a constant: the compiler sees that every row begins on 16 bytes
    stride_qn *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    stride_on *= UNIT
    bias_base = bias_ptr + (source * stride_bias_b + head * stride_bias_h) * BIAS_UNIT

    if PERTURBATION == _IDENTITY and not JOINT:
        if not attends:
            own = load_tile(v_base, tokens, stride_vn, dims_a, stop, HEAD_DIM, False, WIDE_A)
            store_tile(out_base, tokens, stride_on, dims_a, stop, HEAD_DIM, own)
            if HAS_B:
                own = load_tile(v_base, tokens, stride_vn, dims_b, stop, HEAD_DIM, False, WIDE_B)
                store_tile(out_base, tokens, stride_on, dims_b, stop, HEAD_DIM, own)
            return
    if PERTURBATION == _BLUR:
        if (not attends) & (not is_text):
            if block == 0:
                mean_query_row(
                    q_base, k_base, v_base, bias_base, out_base, stride_qn, stride_kn, stride_vn,
                    stride_on, num_image, num_tokens, dims_a, dims_b, HEAD_DIM, qk_scale,
                    BLOCK_N, WIDE_A, WIDE_B, HAS_B, KEY_BIAS,
                )  # fmt: skip
            return

    # [BLOCK_M, D]
    q_a = load_tile(q_base, tokens, stride_qn, dims_a, stop, HEAD_DIM, False, WIDE_A)
    q_b = q_a
    acc_a = tl.zeros((BLOCK_M, DIM_A), tl.float32)
    acc_b = acc_a
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_B:
        q_b = load_tile(q_base, tokens, stride_qn, dims_b, stop, HEAD_DIM, False, WIDE_B)
        acc_b = tl.zeros((BLOCK_M, DIM_B), tl.float32)
    begin = 0
    if PERTURBATION == _IDENTITY and JOINT:
        if (not attends) & (not is_text):
            begin = num_image
            own = load_tile(k_base, tokens, stride_kn, dims_a, stop, HEAD_DIM, False, WIDE_A)
            m = tl.sum(q_a.to(tl.float32) * own.to(tl.float32), 1)
            own = load_tile(v_base, tokens, stride_vn, dims_a, stop, HEAD_DIM, False, WIDE_A)
            acc_a = own.to(tl.float32)
            if HAS_B:
                own = load_tile(k_base, tokens, stride_kn, dims_b, stop, HEAD_DIM, False, WIDE_B)
                m += tl.sum(q_b.to(tl.float32) * own.to(tl.float32), 1)
                own = load_tile(v_base, tokens, stride_vn, dims_b, stop, HEAD_DIM, False, WIDE_B)
                acc_b = own.to(tl.float32)
            m *= qk_scale
            if KEY_BIAS:
                m += load_bias(bias_base, tokens, stop, False)
            l += 1.0
    whole = begin + (num_tokens - begin) // BLOCK_N * BLOCK_N
    for start in tl.range(begin, whole, BLOCK_N, num_stages=STAGES):
        if RELOAD_Q:
            q_a = reload_tile(q_base, tokens, stride_qn, dims_a, stop, HEAD_DIM)
            if HAS_B:
                q_b = reload_tile(q_base, tokens, stride_qn, dims_b, stop, HEAD_DIM)
        acc_a, acc_b, m, l = attend_block(
            acc_a, acc_b, m, l, q_a, q_b, k_base, v_base, bias_base,
            start + tl.arange(0, BLOCK_N), num_tokens,
            stride_kn, stride_vn, dims_a, dims_b, HEAD_DIM, qk_scale,
            True, WIDE_A, WIDE_B, HAS_B, KEY_BIAS, PRECISION,
        )  # fmt: skip
    if whole < num_tokens:
        acc_a, acc_b, m, l = attend_block(
            acc_a, acc_b, m, l, q_a, q_b, k_base, v_base, bias_base,
            whole + tl.arange(0, BLOCK_N), num_tokens,
            stride_kn, stride_vn, dims_a, dims_b, HEAD_DIM, qk_scale,
            False, WIDE_A, WIDE_B, HAS_B, KEY_BIAS, PRECISION,
        )  # fmt: skip
    inverse = inverse_of(l, KEY_BIAS)[:, None]
    acc_a *= inverse
    strength = 0.0
    if SOFT:
        own_share = tl.load(strength_ptr + head)
        strength = tl.where(is_text, 0.0, own_share)
    here = tl.where(attends, 0.0, strength)
    blend(out_base, tokens, stride_on, dims_a, stop, v_base, stride_vn, here, HEAD_DIM, acc_a,
          SOFT, WIDE_A)  # fmt: skip
    if HAS_B:
        acc_b *= inverse
        blend(out_base, tokens, stride_on, dims_b, stop, v_base, stride_vn, here, HEAD_DIM, acc_b,
              SOFT, WIDE_B)  # fmt: skip
    if JOINT or SOFT:
        has_fork = (num_forked > 0) & (row >= num_attend - num_forked) & attends
        if not SOFT:
            has_fork = has_fork & is_text
        if has_fork:
            twin = out_base + num_forked.to(tl.int64) * stride_ob * UNIT
            blend(twin, tokens, stride_on, dims_a, stop, v_base, stride_vn, strength, HEAD_DIM,
                  acc_a, SOFT, WIDE_A)  # fmt: skip
            if HAS_B:
                blend(twin, tokens, stride_on, dims_b, stop, v_base, stride_vn, strength, HEAD_DIM,
                      acc_b, SOFT, WIDE_B)  # fmt: skip


_launch = Launcher(_perturbed_attention_fwd_kernel)


def perturbed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    num_attend: int,
    num_context: int = 0,
    num_forked: int = 0,
    scale: float,
    perturbation: str = "identity",
    strength: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Fill ``out`` [rows + num_forked, N, H, D] from v [rows, N, H, D], and return it.

    q and k have the rows of v, or only the attending ones where the perturbed rows need none
    (identity without text tokens). Operands whose last stride is not 1 are copied. fp16,
    bf16 or fp32, all alike; sums in fp32. ``out`` must not share memory with ``v``: programs read
    tokens that others have written by then.

    Args:
        scale: score scale, usually D ** -0.5.
        perturbation: "identity", "soft" or "blur", see the top of this file.
        strength: λ of "soft", [H] fp32.
        key_bias: added to the scores of every key, [rows of q, H, N]; strides of 0 broadcast.
        config: block sizes; if omitted, those measured on this chip, or a conservative choice.
    """
    q, k, v = laid_out(q, k, v)
    # the kernel adds a key's or a head's number to these addresses
    if key_bias is not None and key_bias.stride(-1) != 1:
        key_bias = key_bias.contiguous()
    if strength is not None:
        strength = strength.contiguous()
    if scale <= 0.0:
        # the kernel takes the largest score before it scales; 0 times a hidden score is NaN
        q, scale = -q, max(-scale, 1e-30)
    plain = perturbation == "identity" and not num_context and key_bias is None
    if plain and by_specialised_warps(q, k, v, out, num_attend, num_forked, scale, config):
        return out
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]
    bias_strides = (0, 0) if key_bias is None else key_bias.stride()[:2]
    starts_aligned = aligned(q, k, v, out)
    call = (num_attend, num_context, num_forked, perturbation, config)

    def prepare() -> Prepared:
        units = (
            stride_unit(v, strides, starts_aligned),
            1 if key_bias is None else stride_unit(key_bias, bias_strides, aligned(key_bias)),
        )
        integers = *(x // units[0] for x in strides), *(x // units[1] for x in bias_strides)
        return _prepared(v, len(out), integers, units, key_bias is not None, *call)

    # absent ones need some pointer: it is never read
    pointers = (
        *(q, k, v, out),
        q if key_bias is None else key_bias,
        q if strength is None else strength,
    )
    key = None
    if starts_aligned and aligned(*pointers[4:]):
        key = v.device.index, v.shape, strides, bias_strides, key_bias is None, call
    _launch(key, pointers, (scale * LOG2E.value,), prepare)
    return out


def _prepared(
    v: torch.Tensor,
    out_rows: int,
    strides: tuple[int, ...],
    units: tuple[int, int],
    has_bias: bool,
    num_attend: int,
    num_context: int,
    num_forked: int,
    perturbation: str,
    config: Config | None,
) -> Prepared:
    """Grid, integers, constants and options of a launch; ``strides`` in units."""
    rows, tokens, heads, head_dim = v.shape
    dim_a, dim_b = split_head_dim(head_dim)
    chip = generation(v.device.type, v.device.index)
    if config is None:
        config = measured_tile(v, num_attend, num_context)
    if config is None or config.specialised:
        config = default_config(chip, v.dtype, head_dim, tokens)
    blocks = triton.cdiv(tokens - num_context, config.block_m)
    blocks += triton.cdiv(num_context, config.block_m)
    integers = (*strides, heads, tokens - num_context, num_context, num_attend, num_forked)
    constants = {
        "UNIT": units[0],
        "BIAS_UNIT": units[1],
        "HEAD_DIM": head_dim,
        "DIM_A": dim_a,
        "DIM_B": dim_b,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "JOINT": num_context > 0,
        "PERTURBATION": PERTURBATIONS[perturbation],
        "KEY_BIAS": has_bias,
        "PRECISION": dot_precision(chip, v.dtype),
        "RELOAD_Q": v.dtype == torch.float32,
        "STAGES": config.stages,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return (blocks * heads * out_rows,), integers, constants, options

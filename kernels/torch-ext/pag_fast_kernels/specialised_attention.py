"""The attending rows of :func:`perturbed_attention` by specialised warps, on sm_90 and sm_100.

One group of warps copies tiles of keys and values by the tensor memory accelerator (TMA), others
multiply, others hold the running maximum and sum: copies and softmax are hidden behind the tensor
cores, as in FlashAttention-3 (Shah et al., arXiv 2407.08608). Triton makes the groups of the loop
below. It does so only if nothing in the kernel branches around that loop, which is why this is a
kernel of its own: rows that are equal to their values are copied beside it, by a launch more.

Floor, for A rows, N tokens, H heads, D channels, s bytes an element:

    bytes  4·s·A·N·H·D    q, k, v and the output
    FLOPs  4·A·N²·H·D     QKᵀ and PV, two a multiply-add

It takes tokens in whole tiles, so that no copy reaches into the next picture, and head dimensions
that are powers of two. Nothing chooses it but a table that ``benchmarks/tune.py`` has measured.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .bound import ALIGNMENT, aligned, stride_unit
from .launch import INTERPRETED, Config, measured_tile, on_device
from .online_softmax import LOG2E

HEAD_DIMS = (64, 128)
_UNIT = ALIGNMENT // 2  # elements of half precision
_INTEGERS = ("stride_ob", "stride_on", "stride_oh", "heads", "num_tokens")


@triton.jit(do_not_specialize=_INTEGERS)
def _specialised_attention_fwd_kernel(
    q_desc,  # [rows · N, H · D] each, in tiles of [BLOCK_M, D] and [BLOCK_N, D]
    k_desc,
    v_desc,
    out_ptr,  # [rows, N, H, D]
    qk_scale,  # softmax scale × log2(e), positive
    stride_ob,  # these in units of UNIT elements
    stride_on,
    stride_oh,
    heads,
    num_tokens,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = num_tokens // BLOCK_M
    block = pid % blocks
    head = pid // blocks % heads
    row = pid // blocks // heads
    first = row * num_tokens
    channel = head * HEAD_DIM
    q = q_desc.load([first + block * BLOCK_M, channel])
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, num_tokens, BLOCK_N, num_stages=STAGES, warp_specialize=True):
        k = k_desc.load([first + start, channel])
        scores = tl.dot(q, k.T)
        largest = tl.maximum(m, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - largest[:, None])
        shrink = tl.exp2(m - largest)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = v_desc.load([first + start, channel])
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = largest
    tokens = block * BLOCK_M + tl.arange(0, BLOCK_M)
    base = out_ptr + (row.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh) * UNIT
    pointers = base + tokens[:, None] * (stride_on * UNIT) + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, (acc / l[:, None]).to(out_ptr.dtype.element_ty))


def takes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, tile: Config
) -> bool:
    """Whether the kernel can run with that tile on q, k, v ``[rows, N, H, D]``.

    Descriptors see rows and tokens as one dimension, heads and channels as another.
    """
    _, tokens, _, head_dim = q.shape
    strides = *(x.stride(1) for x in (q, k, v)), *out.stride()[:3]
    return (
        head_dim in HEAD_DIMS
        and v.element_size() == 2
        and tokens % tile.block_m == 0
        and tokens % tile.block_n == 0
        and (tile.block_m <= 64 or _divides_queries(q.device.index))
        and stride_unit(v, strides, aligned(q, k, v, out)) == _UNIT
        and all(map(_is_flat, (q, k, v)))
    )


@functools.cache
def _divides_queries(index: int | None) -> bool:
    """Whether two groups of warps can share a tile of more than 64 queries.

    For sm_90 Triton 3.7.1 halves the tile but not its descriptor, and refuses the kernel.
    """
    if INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return True
    return torch.cuda.get_device_capability(index)[0] != 9


def _is_flat(x: torch.Tensor) -> bool:
    row, token, head, _ = x.stride()
    whole_rows = len(x) == 1 or row == x.shape[1] * token
    return whole_rows and head == x.shape[3]


def _descriptor(x: torch.Tensor, block: int) -> TensorDescriptor:
    rows, tokens, heads, head_dim = x.shape
    shape, strides = [rows * tokens, heads * head_dim], [x.stride(1), 1]
    return TensorDescriptor(x, shape, strides, [block, head_dim])


def specialised_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    tile: Config,
) -> torch.Tensor:
    """Softmax attention of all rows, as the tile of :func:`takes` allows.

    Args:
        q, k, v: ``[rows, N, H, D]`` in fp16 or bf16, on sm_90 or sm_100.
        out: ``[rows, N, H, D]``, written.
        scale: of the softmax, positive.
        tile: block sizes, warps and stages.
    """
    rows, tokens, heads, head_dim = q.shape
    grid = (rows * heads * (tokens // tile.block_m),)
    with on_device(q):
        _specialised_attention_fwd_kernel[grid](
            _descriptor(q, tile.block_m),
            _descriptor(k, tile.block_n),
            _descriptor(v, tile.block_n),
            out,
            scale * LOG2E.value,
            *(stride // _UNIT for stride in out.stride()[:3]),
            heads,
            tokens,
            UNIT=_UNIT,
            HEAD_DIM=head_dim,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def by_specialised_warps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    num_attend: int,
    num_forked: int,
    scale: float,
    config: Config | None,
) -> bool:
    """Whether attending rows were computed that way, and the others copied."""
    if config is None:
        config = measured_tile(v, num_attend, 0)
    if config is None or not config.specialised or not num_attend:
        return False
    attending = q[:num_attend], k[:num_attend], v[:num_attend], out[:num_attend]
    if not takes(*attending, config):
        return False
    specialised_attention(*attending, scale=scale, tile=config)
    perturbed, first = out[num_attend:], num_attend - num_forked
    if len(perturbed):
        perturbed.copy_(v[first : first + len(perturbed)])
    return True

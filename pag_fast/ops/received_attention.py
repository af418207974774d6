"""How much attention every token receives (Self-Attention Guidance), without the attention map."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .autocast import lower_all, without_autocast
from .backend import (
    check_backend,
    define,
    is_differentiated,
    is_unwatched,
    resolve_backend,
    too_wide,
)

# queries whose scores PyTorch holds at a time, at least: fewer are not worth the launches
_QUERIES = 32


def received_attention(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Column sums of softmax(QKᵀ), averaged over heads: ``[rows, N]`` fp32, fp64 for fp64.

    Arguments: :func:`pag_fast.ops.reference.received_attention`; any strides. The N × N map is
    never held as a whole: the PyTorch backend has the scores of a head dimension of queries at a
    time, as much as the queries themselves, the Triton backend none.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    q, k = lower_all((q, k))
    if q.ndim != 4 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            "received_attention takes q and k of one shape [rows, tokens, heads, head_dim] and one "
            f"dtype; got {tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}."
        )
    if not q.dtype.is_floating_point or 0 in q.shape[1:]:
        raise ValueError(
            "received_attention takes floating-point q and k of at least one token, head and "
            f"channel; got {tuple(q.shape)} in {q.dtype}."
        )
    derived = q.requires_grad or k.requires_grad or forward_ad._current_level >= 0
    if derived and is_differentiated(q, k):
        check_backend(backend)
        with without_autocast(q.device.type):
            return torch_received_attention(q, k, scale)
    # gfx1100 has no matrix instruction for fp32, and runs out of registers
    widest = 96 if torch.version.hip and q.dtype == torch.float32 else 256
    # fp32 takes three passes of the tensor cores: no match for PyTorch
    default = "torch" if q.dtype == torch.float32 else "triton"
    backend = resolve_backend(backend, q, unfit=lambda q: too_wide(q, widest), default=default)
    op = torch.ops.pag_fast.received_attention.default
    run = _received_attention if is_unwatched(q) else op
    with without_autocast(q.device.type):
        return run(q, k, scale, backend)


def torch_received_attention(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The PyTorch backend of :func:`received_attention`: a product, a softmax and a sum a block."""
    _, tokens, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    query, key = (q * scale).transpose(1, 2), k.permute(0, 2, 3, 1)
    step = max(head_dim, _QUERIES)
    received = _block(query[:, :, :step], key)
    for start in range(step, tokens, step):
        received += _block(query[:, :, start : start + step], key)
    return received / heads


def _block(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(query @ key, -1, dtype=wide).sum((1, 2))


def _received_attention(
    q: torch.Tensor, k: torch.Tensor, scale: float | None, backend: str
) -> torch.Tensor:
    if backend == "torch":
        return torch_received_attention(q, k, scale)
    from pag_fast_kernels import received_attention as kernel

    return kernel(q, k, scale=q.shape[-1] ** -0.5 if scale is None else scale)


define(
    "received_attention(Tensor q, Tensor k, float? scale, str backend) -> Tensor",
    _received_attention,
    lambda q, k, scale, backend: q.new_empty(
        q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)
    ),
)


@register_flop_formula(torch.ops.pag_fast.received_attention)
def _(q, k, *args, out_shape=None, **_):  # type: ignore[no-untyped-def]
    rows, tokens, heads, dim = q
    return 2 * rows * heads * tokens * tokens * dim

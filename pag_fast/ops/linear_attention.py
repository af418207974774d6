"""ReLU linear attention (Sana), identity for the perturbed rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .attention_arguments import check_attention
from .backend import check_backend, define, is_differentiated, resolve_backend, too_wide
from .perturbed_attention import forked_rows_like


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_attend: int,
    num_forked: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """ReLU linear attention (Sana) for rows ``< num_attend``, identity for the rows behind.

    Shapes and meaning of every argument: :func:`pag_fast.ops.reference.linear_attention`. The sums
    over tokens are accumulated in fp32.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    derived = check_attention(q, k, v, num_attend, num_forked=num_forked)
    if derived and is_differentiated(q, k, v):
        check_backend(backend)
        return torch_linear_attention(q, k, v, num_attend, num_forked)
    backend = resolve_backend(backend, v, unfit=lambda v: too_wide(v, 128), default="triton")
    return torch.ops.pag_fast.linear_attention.default(q, k, v, num_attend, num_forked, backend)


def torch_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_attend: int, num_forked: int
) -> torch.Tensor:
    """The PyTorch backend of :func:`linear_attention`: two batched matrix products."""
    out = forked_rows_like(v, num_forked)
    out[num_attend:].copy_(v[reference.identity_rows(num_attend, num_forked)])
    if num_attend == 0:
        return out
    wide = torch.promote_types(v.dtype, torch.float32)
    query = F.relu(q).to(wide).permute(0, 2, 3, 1)
    key = F.relu(k).to(wide).transpose(1, 2)
    # the row of ones makes the same product yield the denominator
    value = F.pad(v[:num_attend].to(wide).permute(0, 2, 3, 1), (0, 0, 0, 1), value=1.0)
    sums = (value @ key) @ query
    attended = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
    out[:num_attend].copy_(attended.permute(0, 3, 1, 2))
    return out


def _linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_forked: int,
    backend: str,
) -> torch.Tensor:
    if backend == "torch":
        return torch_linear_attention(q, k, v, num_attend, num_forked)
    from pag_fast_kernels import linear_attention as kernel

    out = forked_rows_like(v, num_forked)
    return kernel(q, k, v, out, num_attend=num_attend, num_forked=num_forked)


define(
    "linear_attention(Tensor q, Tensor k, Tensor v, SymInt num_attend, SymInt num_forked, "
    "str backend) -> Tensor",
    _linear_attention,
    lambda q, k, v, num_attend, num_forked, backend: forked_rows_like(v, num_forked),
)


@register_flop_formula(torch.ops.pag_fast.linear_attention)
def _(q, k, v, num_attend, num_forked, *args, out_shape=None, **_):  # type: ignore[no-untyped-def]
    _, tokens, heads, dim = v
    return num_attend * heads * tokens * dim * (dim + 1) * 4

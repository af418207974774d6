"""HunyuanDiT's per-head normalisation and rotary embedding of queries and keys, in place."""

from __future__ import annotations

import torch

from . import reference
from .backend import define, resolve_backend

Affine = tuple[torch.Tensor, torch.Tensor] | None


def qk_norm_rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_affine: Affine,
    k_affine: Affine,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norm: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> None:
    """Replace q and k by :func:`pag_fast.ops.reference.qk_norm_rope` of them: one Triton launch.

    ``[rows, N, H, D]`` with D even and any strides but a unit last one; q and k do not share
    memory. The rotary tables are ``[N, D]`` or ``[1, D]`` and may be of another dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    if q.shape != k.shape or q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(
            "qk_norm_rope_ takes q and k of one shape [rows, tokens, heads, head_dim] with an even "
            f"head_dim; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    shapes = ((q.shape[1], q.shape[3]), (1, q.shape[3]))
    if rotary is not None and any(table.shape not in shapes for table in rotary):
        raise ValueError(
            f"The rotary tables must have shape {shapes[0]}, tokens by head_dim; "
            f"got {tuple(rotary[0].shape)} and {tuple(rotary[1].shape)}."
        )
    fits = q.stride(-1) == 1 == k.stride(-1)
    backend = resolve_backend(backend, q, fits=fits, default="triton")
    torch.ops.pag_fast.qk_norm_rope_.default(
        q, k, *(q_affine or (None,) * 2), *(k_affine or (None,) * 2), *(rotary or (None,) * 2),
        norm, eps, backend,
    )  # fmt: skip


def _qk_norm_rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm: bool,
    eps: float,
    backend: str,
) -> None:
    arguments = {
        "q_affine": None if q_weight is None or q_bias is None else (q_weight, q_bias),
        "k_affine": None if k_weight is None or k_bias is None else (k_weight, k_bias),
        "rotary": None if cos is None or sin is None else (cos, sin),
        "norm": norm,
        "eps": eps,
    }
    if backend == "triton":
        from pag_fast_kernels import qk_norm_rope as kernel

        kernel(q, k, **arguments)
        return
    new_q, new_k = reference.qk_norm_rope(q, k, **arguments)  # type: ignore[arg-type]
    q.copy_(new_q)
    k.copy_(new_k)


define(
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
    "Tensor? k_bias, Tensor? cos, Tensor? sin, bool norm, float eps, str backend) -> ()",
    _qk_norm_rope_,
    lambda *arguments: None,
)

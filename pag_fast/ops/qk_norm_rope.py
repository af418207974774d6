"""HunyuanDiT's per-head normalisation and rotary embedding of queries and keys, in place."""

from __future__ import annotations

import torch

from . import reference
from .backend import check_backend, define, is_differentiated, resolve_backend

Affine = tuple[torch.Tensor | None, torch.Tensor | None] | None


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

    ``[rows, N, H, D]`` with D even and any strides; q and k do not share memory. Weights and biases
    are ``[D]``, and any of them may be ``None``. The rotary tables are ``[N, D]`` or ``[1, D]`` and
    may be of another dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    if q.shape != k.shape or q.ndim != 4 or q.shape[-1] % 2:
        raise ValueError(
            "qk_norm_rope_ takes q and k of one shape [rows, tokens, heads, head_dim] with an even "
            f"head_dim; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"qk_norm_rope_ takes q and k of one floating-point dtype; got {q.dtype} and {k.dtype}."
        )
    vectors = (*(q_affine or (None, None)), *(k_affine or (None, None)))
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is not None and tuple(vector.shape) != (q.shape[3],):
            raise ValueError(
                f"{name} must have one number for each of {q.shape[3]} channels; got shape "
                f"{tuple(vector.shape)}."
            )
    shapes = ((q.shape[1], q.shape[3]), (1, q.shape[3]))
    if rotary is not None and any(table.shape not in shapes for table in rotary):
        raise ValueError(
            f"The rotary tables must have shape {shapes[0]}, tokens by head_dim; "
            f"got {tuple(rotary[0].shape)} and {tuple(rotary[1].shape)}."
        )
    cos, sin = rotary or (None, None)
    if is_differentiated(q, k, *vectors, cos, sin):
        check_backend(backend)
        # the way back needs what q and k have been
        _qk_norm_rope_(q, k, *vectors, cos, sin, norm, eps, "torch", keep=True)
        return
    backend = resolve_backend(backend, q, default="triton")
    op = torch.ops.pag_fast.qk_norm_rope_.default
    op(q, k, *vectors, cos, sin, norm, eps, backend)


_VECTORS = ("q's weight", "q's bias", "k's weight", "k's bias")


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
    keep: bool = False,
) -> None:
    arguments = {
        "q_affine": (q_weight, q_bias),
        "k_affine": (k_weight, k_bias),
        "rotary": None if cos is None or sin is None else (cos, sin),
        "norm": norm,
        "eps": eps,
    }
    if backend == "triton":
        from pag_fast_kernels import qk_norm_rope as kernel

        kernel(q, k, **arguments)
        return
    old_q, old_k = (q.clone(), k.clone()) if keep else (q, k)
    new_q, new_k = reference.qk_norm_rope(old_q, old_k, **arguments)  # type: ignore[arg-type]
    q.copy_(new_q)
    k.copy_(new_k)


define(
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, "
    "Tensor? k_bias, Tensor? cos, Tensor? sin, bool norm, float eps, str backend) -> ()",
    _qk_norm_rope_,
    lambda *arguments: None,
)

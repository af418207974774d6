"""Softmax attention with noise on its scores."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .attention_arguments import check_mask
from .backend import (
    check_backend,
    define,
    is_differentiated,
    is_unwatched,
    resolve_backend,
    too_wide,
)

# scores that are materialised at a time: each takes some 64-bit integers on the way
_MAX_SCORES = 1 << 22


def noisy_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    clock: torch.Tensor,
    layer: int = 0,
    seed: int = 0,
    sigma: float = 1.0,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    first_head: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """``softmax(scale·q·kᵀ + σ·ε)·v`` for every row; shapes, and what ε is:
    :func:`pag_fast.ops.reference.noisy_attention`.

    ``first_head`` says which of the layer's heads the first is.
    ``clock`` is a tensor so that another step is neither another graph nor a wait for the device.

    Raises:
        ValueError: shapes that do not fit together, or a backend that is not available.
    """
    _check(q, k, v, clock, seed, first_head)
    if attn_mask is not None:
        attn_mask = check_mask(attn_mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    derived = q.requires_grad or k.requires_grad or v.requires_grad
    derived = derived or (attn_mask is not None and attn_mask.requires_grad)
    derived = derived or forward_ad._current_level >= 0
    if derived and is_differentiated(q, k, v, attn_mask):
        check_backend(backend)
        return _noisy_attention(
            q, k, v, clock, layer, seed, sigma, attn_mask, scale, first_head, "torch"
        )

    def unfit(v: torch.Tensor) -> str | None:
        if attn_mask is not None:
            return "the kernel takes no mask"
        # registers: in fp32 a wider head would spill
        return too_wide(v, 64 if v.dtype == torch.float32 else 256)

    default = "torch" if v.dtype == torch.float32 else "triton"
    backend = resolve_backend(backend, v, unfit=unfit, default=default)
    op = torch.ops.pag_fast.noisy_attention.default
    run = _noisy_attention if is_unwatched(v) else op
    return run(q, k, v, clock, layer, seed, sigma, attn_mask, scale, first_head, backend)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    clock: torch.Tensor,
    seed: int,
    first_head: int,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            "noisy_attention takes q as [rows, M, heads, head_dim], k and v as [rows, N, heads, "
            f"head_dim]; got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share heads, head_dim and dtype; got {tuple(q.shape[2:])} and "
            f"{tuple(k.shape[2:])}, {q.dtype}, {k.dtype} and {v.dtype}."
        )
    if not v.dtype.is_floating_point or 0 in (q.shape[1], k.shape[1], q.shape[3]):
        raise ValueError(
            "noisy_attention takes floating-point tensors of at least one token and one channel; "
            f"got {tuple(q.shape)} and {tuple(k.shape)} in {v.dtype}."
        )
    if not isinstance(clock, torch.Tensor):
        raise ValueError(f"clock must be a tensor of one int64 number; got {clock!r}.")
    if clock.dtype != torch.int64 or clock.numel() != 1:
        raise ValueError(f"clock must be one int64 number; got {clock.dtype} {tuple(clock.shape)}.")
    for name, number, stop in (("seed", seed, 2**63), ("first_head", first_head, 2**31)):
        if not isinstance(number, int) or not 0 <= number < stop:
            raise ValueError(f"{name} must be an integer from 0 to {stop - 1}; got {number!r}.")


def _noisy_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    clock: torch.Tensor,
    layer: int,
    seed: int,
    sigma: float,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    first_head: int,
    backend: str,
) -> torch.Tensor:
    out = q.new_empty(q.shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton":
        from pag_fast_kernels import noisy_attention as kernel

        numbers = {"layer": layer, "seed": seed, "first_head": first_head}
        return kernel(q, k, v, out, clock=clock, **numbers, sigma=sigma, scale=scale)
    rows, queries, heads, _ = q.shape
    step = max(1, _MAX_SCORES // max(1, rows * heads * k.shape[1]))
    for start in range(0, queries, step):
        some = slice(start, start + step)
        mask = attn_mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., some, :]
        out[:, some] = reference.noisy_attention(
            q[:, some],
            k,
            v,
            clock=clock,
            layer=layer,
            seed=seed,
            sigma=sigma,
            attn_mask=mask,
            scale=scale,
            first_query=start,
            first_head=first_head,
        )
    return out


define(
    "noisy_attention(Tensor q, Tensor k, Tensor v, Tensor clock, int layer, int seed, float sigma, "
    "Tensor? attn_mask, float? scale, int first_head, str backend) -> Tensor",
    _noisy_attention,
    lambda q, *_: q.new_empty(q.shape),
)


@register_flop_formula(torch.ops.pag_fast.noisy_attention)
def _(q, k, *_, **__):  # type: ignore[no-untyped-def]
    rows, queries, heads, dim = q
    return 4 * rows * queries * k[1] * heads * dim

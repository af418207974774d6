"""Which arguments of an attention op fit together."""

from __future__ import annotations

import torch

from . import reference


def is_key_bias(attn_mask: torch.Tensor) -> bool:
    """Whether a mask says the same for every query: [rows, heads or 1, 1, N], and is additive."""
    return attn_mask.ndim == 4 and attn_mask.shape[2] == 1 and attn_mask.is_floating_point()


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_attend: int,
    num_context: int = 0,
    attn_mask: torch.Tensor | None = None,
    num_forked: int = 0,
    perturbation: str = "identity",
    strength: torch.Tensor | None = None,
) -> None:
    """Raises ValueError where the arguments of an attention op do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "perturbed_attention takes q, k and v as [rows, tokens, heads, head_dim]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    rows, tokens = v.shape[:2]
    if not 0 <= num_attend <= rows:
        raise ValueError(f"num_attend must be in 0..{rows} (the rows of v); got {num_attend}.")
    if not 0 <= num_context < tokens:
        raise ValueError(f"num_context must be in 0..{tokens - 1}; got {num_context}.")
    if num_forked and (rows != num_attend or not 0 < num_forked <= rows):
        raise ValueError(
            f"num_forked={num_forked} needs every row of v to attend and at most that many forks; "
            f"v has {rows} rows and num_attend is {num_attend}."
        )
    if perturbation not in reference.PERTURBATIONS:
        raise ValueError(
            f"Unknown perturbation {perturbation!r}: choose one of "
            f"{', '.join(reference.PERTURBATIONS)}."
        )
    if (strength is not None) != (perturbation == "soft"):
        raise ValueError("strength belongs to perturbation='soft', which cannot do without it.")
    if strength is not None and tuple(strength.shape) != (v.shape[2],):
        raise ValueError(
            f"strength must hold one number for each of {v.shape[2]} heads; got shape "
            f"{tuple(strength.shape)}."
        )
    expected = (rows if num_context or perturbation != "identity" else num_attend, *v.shape[1:])
    if q.shape != expected or k.shape != expected:
        raise ValueError(
            f"q and k must have shape {expected} for v {tuple(v.shape)}, num_attend={num_attend} "
            f"and num_context={num_context}; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if attn_mask is not None and num_context and (attn_mask.ndim != 4 or attn_mask.shape[2] != 1):
        raise ValueError(
            "With text tokens, attn_mask says which keys are seen and has shape [rows, heads or 1, "
            f"1, tokens]; got {tuple(attn_mask.shape)}."
        )

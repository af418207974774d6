"""Which arguments of an attention op fit together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

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
) -> bool:
    """Whether derivatives may go through the call, as far as attributes tell.

    Reading them here costs no call; :func:`pag_fast.ops.backend.is_differentiated` has the rest.

    Raises:
        ValueError: arguments of an attention op that do not fit together.
    """
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            "perturbed_attention takes q, k and v as [rows, tokens, heads, head_dim]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    rows, tokens, heads, channels = v.shape
    if not v.dtype.is_floating_point or tokens * channels == 0:
        raise ValueError(
            "Attention takes floating-point q, k and v of at least one token and one channel; got "
            f"{tuple(v.shape)} in {v.dtype}."
        )
    # what is right makes no further call: attention runs often
    if not (0 <= num_attend <= rows and 0 <= num_context < tokens) or num_forked:
        _check_counts(rows, tokens, num_attend, num_context, num_forked)
    derived = q.requires_grad or k.requires_grad or v.requires_grad
    if perturbation != "identity" or strength is not None:
        derived |= _check_perturbation(perturbation, strength, heads)
    expected = (rows if num_context or perturbation != "identity" else num_attend, *v.shape[1:])
    if not q.shape == k.shape == expected:
        raise ValueError(
            f"q and k must have shape {expected} for v {tuple(v.shape)}, num_attend={num_attend} "
            f"and num_context={num_context}; got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if attn_mask is not None:
        one_for_all = num_context or (perturbation == "blur" and rows + num_forked > num_attend)
        scores = (rows, heads, tokens, tokens)
        derived |= _check_mask_of(attn_mask, scores, q.shape[0], one_for_all=bool(one_for_all))
    return derived or forward_ad._current_level >= 0


def _check_counts(
    rows: int, tokens: int, num_attend: int, num_context: int, num_forked: int
) -> None:
    if not 0 <= num_attend <= rows:
        raise ValueError(f"num_attend must be in 0..{rows} (the rows of v); got {num_attend}.")
    if not 0 <= num_context < tokens:
        raise ValueError(f"num_context must be in 0..{tokens - 1}; got {num_context}.")
    if num_forked and (rows != num_attend or not 0 < num_forked <= rows):
        raise ValueError(
            f"num_forked={num_forked} needs every row of v to attend and at most that many forks; "
            f"v has {rows} rows and num_attend is {num_attend}."
        )


def _check_perturbation(perturbation: str, strength: torch.Tensor | None, heads: int) -> bool:
    """Whether the strength of a perturbation wants a derivative."""
    if perturbation not in reference.PERTURBATIONS:
        raise ValueError(
            f"Unknown perturbation {perturbation!r}: choose one of "
            f"{', '.join(reference.PERTURBATIONS)}."
        )
    if (strength is not None) != (perturbation == "soft"):
        raise ValueError("strength belongs to perturbation='soft', which cannot do without it.")
    if strength is None:
        return False
    _check_strength(strength, heads)
    return strength.requires_grad


def _check_mask_of(
    attn_mask: torch.Tensor, scores: Sequence[int], query_rows: int, *, one_for_all: bool
) -> bool:
    """Whether a mask wants a derivative; ``one_for_all``: it has to be the same for all queries."""
    mask = check_mask(attn_mask, scores, query_rows)
    if one_for_all and (mask.ndim != 4 or mask.shape[2] != 1):
        raise ValueError(
            "With text tokens, and for perturbation='blur', attn_mask says which keys are seen "
            f"and has shape [rows, heads or 1, 1, tokens]; got {tuple(attn_mask.shape)}."
        )
    return mask.requires_grad


def _check_strength(strength: torch.Tensor, heads: int) -> None:
    if not isinstance(strength, torch.Tensor):
        raise ValueError(
            f"strength must be a tensor of one number for each of {heads} heads; got {strength!r}."
        )
    if tuple(strength.shape) != (heads,):
        raise ValueError(
            f"strength must hold one number for each of {heads} heads; got shape "
            f"{tuple(strength.shape)}."
        )


def check_mask(
    attn_mask: torch.Tensor, scores: Sequence[int], query_rows: int | None = None
) -> torch.Tensor:
    """The mask with the two dimensions, queries and keys, that PyTorch's attention wants.

    ``scores`` is the shape [rows, heads, queries, keys] that it broadcasts to; ``query_rows`` other
    rows that it may have.

    Raises:
        ValueError: no tensor, of integers, or of a shape that does not broadcast.
    """
    if not isinstance(attn_mask, torch.Tensor):
        raise ValueError(f"attn_mask must be a tensor; got {type(attn_mask).__name__}.")
    dtype = attn_mask.dtype
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"attn_mask must be boolean or floating-point numbers; got {dtype}.")
    fits = attn_mask.ndim <= 4
    if fits:
        rows, heads, queries, keys = (1, 1, 1, 1)[attn_mask.ndim :] + attn_mask.shape
        known = rows in (1, scores[0], query_rows) and heads in (1, scores[1])
        fits = known and queries in (1, scores[2]) and keys in (1, scores[3])
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to [rows, heads, queries, keys], {tuple(scores)}; got "
            f"{tuple(attn_mask.shape)}."
        )
    return attn_mask if attn_mask.ndim > 1 else attn_mask.reshape(1, -1)

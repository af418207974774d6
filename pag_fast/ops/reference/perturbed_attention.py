"""Attention of attending and perturbed rows, and what the reference ops share about rows."""

from __future__ import annotations

import torch


def perturbed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_attend: int,
    num_context: int = 0,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    num_forked: int = 0,
    perturbation: str = "identity",
    strength: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention for the first rows of a batch, perturbed attention for the rows behind.

    Args:
        query, key: ``[rows, N, H, D]``; ``[num_attend, N, H, D]`` for the identity without text
            tokens, whose perturbed rows need none.
        value: ``[rows, N, H, D]``.
        num_attend: rows ``< num_attend`` attend normally; the others are perturbed.
        num_context: how many of the N tokens, the last ones, are text. Text queries are never
            perturbed.
        attn_mask: additive or boolean mask, broadcastable to ``[rows of query, H, N, N]``; for
            ``"blur"`` and with text tokens it says the same for every query, ``[rows, H or 1, 1,
            N]``, and masks text alone.
        scale: score scale, ``D ** -0.5`` when omitted.
        num_forked: how many perturbed rows to append that share q, k and v with the *last*
            attending rows (the layer where the perturbed branch begins). Requires
            ``rows == num_attend``.
        perturbation: ``"identity"``: the map of image tokens is the identity (PAG, arXiv
            2403.17377); an image query sees itself and the text keys (diffusers'
            ``PAGJointAttnProcessor2_0``). ``"soft"``: ``(1 − λ)·attention + λ·value`` (SoftPAG,
            arXiv 2506.10978). ``"blur"``: every image query is their mean (SEG with σ → ∞, arXiv
            2408.00760).
        strength: λ of ``"soft"``, ``[H]``.

    Returns:
        ``[rows + num_forked, N, H, D]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = slice(0, num_attend)
    attending = _softmax_attention(
        query[rows], key[rows], value[rows], scale, rows_of(attn_mask, rows)
    )
    source = identity_rows(num_attend, num_forked)
    if perturbation == "identity" and num_context == 0:
        return torch.cat([attending, value[source]])
    q, k, v, mask = query[source], key[source], value[source], rows_of(attn_mask, source)
    num_image = value.shape[1] - num_context
    if perturbation == "blur":
        mean = q[:, :num_image].mean(1, keepdim=True).expand_as(q[:, :num_image])
        q = torch.cat([mean, q[:, num_image:]], dim=1)
    elif perturbation == "identity":
        image = torch.arange(value.shape[1], device=value.device) < num_image
        hidden = image[:, None] & image & ~torch.eye(len(image), dtype=torch.bool).to(image.device)
        hidden = torch.where(hidden, float("-inf"), 0.0).to(q.dtype)
        mask = hidden if mask is None else additive(mask, q.dtype) + hidden
    perturbed = _softmax_attention(q, k, v, scale, mask)
    if perturbation == "soft":
        assert strength is not None
        weight = strength.to(v.dtype)[:, None]
        image = torch.lerp(perturbed[:, :num_image], v[:, :num_image], weight)
        perturbed = torch.cat([image, perturbed[:, num_image:]], dim=1)
    return torch.cat([attending, perturbed])


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to scores; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, float("-inf")
    )


def rows_of(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The rows of a mask ``[rows or 1, …]`` that broadcasts over the batch or does not."""
    return mask if mask is None or mask.ndim < 4 or mask.shape[0] == 1 else mask[rows]


def identity_rows(num_attend: int, num_forked: int) -> slice:
    """The rows that the perturbed rows are made of: the last attending ones at a fork."""
    if num_forked:
        return slice(num_attend - num_forked, num_attend)
    return slice(num_attend, None)


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), value)

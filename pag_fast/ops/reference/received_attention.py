"""How much attention each token receives."""

from __future__ import annotations

import torch


def received_attention(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """How much attention every token receives: softmax(QKᵀ) summed over queries, mean over heads.

    What Self-Attention Guidance (arXiv 2210.00939) compares with 1, the share of a token if all got
    the same.

    Args:
        query, key: ``[rows, N, H, D]``.
        scale: score scale, ``D ** -0.5`` when omitted.

    Returns:
        ``[rows, N]``, fp32 or wider.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(scores, -1, dtype=wide).mean(1).sum(1)

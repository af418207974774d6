"""Norm of the heads and rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_affine: tuple[torch.Tensor | None, torch.Tensor | None] | None,
    k_affine: tuple[torch.Tensor | None, torch.Tensor | None] | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norm: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over each head's channels, then rotary embedding (HunyuanDiT, arXiv 2405.08748).

    Args:
        q, k: ``[rows, N, H, D]``.
        q_affine, k_affine: weight and bias ``[D]`` of the norms; any may be left out.
        rotary: cos and sin ``[N, D]``, or ``[1, D]`` for all tokens; channels 2i and 2i + 1 make a
            pair.
        norm: leave the norm out where False.
    """
    out = []
    for x, affine in ((q, q_affine), (k, k_affine)):
        if norm:
            weight, bias = affine or (None, None)
            x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        if rotary is not None:
            cos, sin = (table[:, None].to(x.device) for table in rotary)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            even, odd = wide[..., ::2], wide[..., 1::2]
            turned = torch.stack([-odd, even], dim=-1).flatten(-2)
            x = (wide * cos + turned * sin).to(x.dtype)
        out.append(x)
    return out[0], out[1]

"""Attention with noise on its scores, and that noise: Philox and Box–Muller in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def noisy_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    clock: torch.Tensor,
    layer: int = 0,
    seed: int = 0,
    sigma: float = 1.0,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    first_query: int = 0,
    first_head: int = 0,
) -> torch.Tensor:
    """Softmax attention with normal noise on its scores: ``softmax(scale·QKᵀ + σ·ε)·V``.

    Args:
        query: ``[rows, M, H, D]``.
        key, value: ``[rows, N, H, D]``.
        clock: number of the step, one int64.
        layer: number of the layer, below 4096.
        seed: from 0 to 2⁶³ − 1.
        attn_mask: additive or boolean, broadcastable to ``[rows, H, M, N]``.
        first_query: where in the layer the first of the M queries is.
        first_head: which of the layer's heads the first of the H is.

    Returns:
        ``[rows, M, H, D]``. ε are the fp32 numbers of :func:`score_noise`, the same in every row.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key).to(wide) * scale
    noise = score_noise(scores.shape, clock, layer, seed, first_query, first_head)
    scores = scores + sigma * noise.to(wide)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def score_noise(
    shape: Sequence[int],
    clock: torch.Tensor,
    layer: int,
    seed: int,
    first_query: int = 0,
    first_head: int = 0,
) -> torch.Tensor:
    """Standard normal fp32 numbers ``[rows, H, M, N]``, a function of head, query and key.

    All rows have the same, so that a picture does not depend on its neighbours in a batch. Four
    keys share a call of Philox4x32-10 with the counter (key div 4, query, head, 4096·clock + layer)
    and the halves of ``seed`` as its key; Box–Muller makes two pairs of it. The arithmetic is that
    of Triton's ``tl.randn4x``. The rows are views of one.
    """
    rows, heads, queries, keys = shape
    device = clock.device
    block = torch.arange((keys + 3) // 4, device=device)
    query = torch.arange(first_query, first_query + queries, device=device)
    head = torch.arange(first_head, first_head + heads, device=device)
    time = (clock.reshape(()) * 4096 + layer) & 0xFFFFFFFF
    counter = torch.broadcast_tensors(block, query[:, None], head[:, None, None], time)
    u = [_uniform(x) for x in philox(counter, seed)]
    pairs = [_box_muller(u[0], u[1]), _box_muller(u[2], u[3])]
    normal = torch.stack([x for pair in pairs for x in pair], dim=-1)
    return normal.flatten(-2)[..., :keys].expand(rows, -1, -1, -1)


def philox(counter: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) of four words each, as int64 from 0 to 2³² − 1."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        # products of 64 bits wrap around; their bits are right
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((second >> 32) & low) ^ c1 ^ k0
        c2 = ((first >> 32) & low) ^ c3 ^ k1
        c1, c3 = second & low, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def _uniform(x: torch.Tensor) -> torch.Tensor:
    """32 random bits as an fp32 number in [0, 1)."""
    signed = torch.where(x >= 1 << 31, x - (1 << 32), x)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * 4.6566127342e-10


def _box_muller(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(u.clamp(min=1.0e-7)))
    angle = 6.283185307179586 * v
    return radius * torch.cos(angle), radius * torch.sin(angle)

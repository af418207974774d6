"""Linear attention of attending rows, the identity of perturbed ones."""

from __future__ import annotations

import torch

from .perturbed_attention import identity_rows


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_attend: int,
    num_forked: int = 0,
    eps: float = 1e-15,
) -> torch.Tensor:
    """ReLU linear attention (Sana, arXiv 2410.10629) for the first rows, identity for the others.

    ``out_i = relu(q_i) Σ_j relu(k_j) v_jᵀ / (relu(q_i) · Σ_j relu(k_j) + eps)``, accumulated in
    fp32 or wider. Shapes, ``num_attend`` and ``num_forked`` are those of
    :func:`perturbed_attention`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q = torch.relu(query[:num_attend]).to(wide)
    k = torch.relu(key[:num_attend]).to(wide)
    v = value[:num_attend].to(wide)
    state = torch.einsum("bnhk,bnhv->bhkv", k, v)
    numerator = torch.einsum("bnhk,bhkv->bnhv", q, state)
    denominator = torch.einsum("bnhk,bhk->bnh", q, k.sum(1))
    attending = (numerator / (denominator.unsqueeze(-1) + eps)).to(value.dtype)
    source = identity_rows(num_attend, num_forked)
    return torch.cat([attending, value[source]])

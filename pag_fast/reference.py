"""Every op of :mod:`pag_fast.ops` in plain PyTorch: any dtype, any device, no fused kernel.

These functions are the truth the tests compare against. They favour being obviously right over
being fast, and they are themselves checked against diffusers' own processors in fp64.
"""

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
) -> torch.Tensor:
    """Softmax attention for the first rows of a batch, identity attention for the rows behind them.

    Args:
        query, key: ``[num_attend, N, H, D]``, or ``[rows, N, H, D]`` when ``num_context > 0``.
        value: ``[rows, N, H, D]``.
        num_attend: rows ``< num_attend`` attend normally; the others are perturbed (PAG,
            arXiv 2403.17377: the attention map of image tokens is replaced by the identity).
        num_context: how many of the N tokens, the last ones, are text. A perturbed image query then
            sees itself and the text keys, a text query sees every key (diffusers'
            ``PAGJointAttnProcessor2_0`` without its dense mask).
        attn_mask: additive or boolean mask for the attending rows, broadcastable to
            ``[num_attend, H, N, N]``.
        scale: score scale, ``D ** -0.5`` when omitted.
        num_forked: how many perturbed rows to append that share q, k and v with the *last*
            attending rows (the layer where the perturbed branch begins). Requires
            ``rows == num_attend``.

    Returns:
        ``[rows + num_forked, N, H, D]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attending = _softmax_attention(
        query[:num_attend], key[:num_attend], value[:num_attend], scale, attn_mask
    )
    source = identity_rows(num_attend, num_forked)
    if num_context == 0:
        return torch.cat([attending, value[source]])
    perturbed = joint_identity_attention(
        query[source], key[source], value[source], num_context=num_context, scale=scale
    )
    return torch.cat([attending, perturbed])


def identity_rows(num_attend: int, num_forked: int) -> slice:
    """The rows that the perturbed rows are made of: the last attending ones at a fork."""
    if num_forked:
        return slice(num_attend - num_forked, num_attend)
    return slice(num_attend, None)


def joint_identity_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_context: int,
    scale: float,
) -> torch.Tensor:
    """The perturbed rows of joint attention: ``[B, N, H, D]`` in, ``[B, N, H, D]`` out.

    An image query sees itself and the ``num_context`` text keys; a text query sees all N keys.
    """
    num_image = query.shape[1] - num_context
    image_query, text_query = query.split([num_image, num_context], dim=1)
    image_key, text_key = key.split([num_image, num_context], dim=1)
    image_value, text_value = value.split([num_image, num_context], dim=1)
    own = (image_query * image_key).sum(-1).transpose(1, 2).unsqueeze(-1)
    cross = torch.einsum("bqhd,bkhd->bhqk", image_query, text_key)
    weights = torch.softmax(torch.cat([own, cross], dim=-1) * scale, dim=-1)
    image = weights[..., :1].transpose(1, 2) * image_value
    image = image + torch.einsum("bhqk,bkhd->bqhd", weights[..., 1:], text_value)
    return torch.cat([image, _softmax_attention(text_query, key, value, scale)], dim=1)


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


def combine_guidance(
    uncond: torch.Tensor | None,
    cond: torch.Tensor,
    perturbed: torch.Tensor | None,
    guidance_scale: float,
    pag_scale: float,
    rescale: float = 0.0,
) -> torch.Tensor:
    """``uncond + g·(cond − uncond) + s·(cond − perturbed)``, optionally with CFG rescale.

    Without ``uncond`` (CFG off) the base is ``cond``; without ``perturbed`` (the perturbed branch
    was not run) that term is absent. ``rescale`` is φ of arXiv 2305.08891 section 3.4: the result
    is mixed with itself scaled to the standard deviation of ``cond``, per sample.

    All tensors are ``[B, ...]`` of one dtype; the arithmetic is done in fp32 (fp64 stays fp64) and
    the result has the dtype of ``cond``. Written as one chain of pointwise steps so that Inductor
    fuses it.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    out = c
    if uncond is not None:
        u = uncond.to(wide)
        out = u + guidance_scale * (c - u)
    if perturbed is not None:
        out = out + pag_scale * (c - perturbed.to(wide))
    if rescale:
        out = rescale_to(out, c, rescale)
    return out.to(cond.dtype)


def rescale_to(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """``guided`` mixed with itself at the per-sample standard deviation of ``cond``."""
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (rescale * ratio + (1.0 - rescale))

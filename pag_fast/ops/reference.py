"""Every op of :mod:`pag_fast.ops` in plain PyTorch: any dtype, any device, no fused kernel.

These functions are the truth the tests compare against. They favour being obviously right over
being fast, and they are themselves checked against diffusers' own processors in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

PERTURBATIONS = ("identity", "soft", "blur")
RESCALE_MODES = ("cfg", "full", "partial", "snf")


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
    rescale_mode: str = "cfg",
) -> torch.Tensor:
    """``uncond + g·(cond − uncond) + s·(cond − perturbed)``, optionally rescaled.

    Without ``uncond`` (CFG off) the base is ``cond``; without ``perturbed`` (the perturbed branch
    was not run) that term is absent. With ``C`` for the prediction without PAG and ``G`` for its
    term, ``rescale_mode`` is

    - ``"cfg"``: φ = ``rescale`` of arXiv 2305.08891 section 3.4: ``C + G`` is mixed with itself
      scaled to the standard deviation of ``cond``, per sample;
    - ``"full"``: ``C + f·G``, with ``f = φ·std(cond) / std(C + G) + (1 − φ)`` per sample;
    - ``"partial"``: likewise, with ``std(cond + G)``;
    - ``"snf"``: saliency-adaptive noise fusion (arXiv 2311.10329): :func:`saliency_fusion` of
      ``C − uncond`` and ``G``, added to ``uncond``. It has no strength, and without ``uncond`` it
      is ``C + G``.

    The last three are those of ``pamparamm/sd-perturbed-attention``, which applies them to denoised
    pictures; here they apply to what the model predicts (noise, velocity). ``G`` is the same up to
    a factor, but ``std(cond)`` is another picture's, and the softmax sees that factor: the same
    strength does not look the same.

    All tensors are ``[B, ...]`` of one dtype, for ``"snf"`` ``[B, ..., H, W]``; the arithmetic is
    done in fp32 (fp64 stays fp64) and the result has the dtype of ``cond``. Written as one chain of
    pointwise steps so that Inductor fuses it.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    out = c
    if uncond is not None:
        u = uncond.to(wide)
        out = u + guidance_scale * (c - u)
    if perturbed is None:
        if rescale and rescale_mode == "cfg":
            out = rescale_to(out, c, rescale)
        return out.to(cond.dtype)
    term = pag_scale * (c - perturbed.to(wide))
    if rescale_mode == "snf" and uncond is not None:
        out = u + saliency_fusion(guidance_scale * (c - u), term)
    elif rescale and rescale_mode in ("full", "partial"):
        reached = term + (out if rescale_mode == "full" else c)
        out = out + rescale_factor(reached, c, rescale) * term
    else:
        out = out + term
        if rescale and rescale_mode == "cfg":
            out = rescale_to(out, c, rescale)
    return out.to(cond.dtype)


def rescale_to(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """``guided`` mixed with itself at the per-sample standard deviation of ``cond``."""
    return guided * rescale_factor(guided, cond, rescale)


def rescale_factor(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """``φ·std(cond) / std(guided) + (1 − φ)`` of each sample, ``[B, 1, ...]``."""
    dims = list(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return rescale * ratio + (1.0 - rescale)


def saliency_fusion(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """For each pixel and channel whichever of two guidances is the more salient there.

    Saliency is the softmax over a plane ``[H, W]`` of the absolute value, blurred by a Gaussian of
    3 × 3 pixels and σ = 1 with reflected edges (arXiv 2311.10329). Where both are
    equal it is the first. Softmaxes are compared by their logarithms, which do not underflow.
    """
    return torch.where(_log_saliency(first) >= _log_saliency(second), first, second)


def _log_saliency(x: torch.Tensor) -> torch.Tensor:
    beside = math.exp(-0.5) / (1.0 + 2.0 * math.exp(-0.5))
    middle = 1.0 - 2.0 * beside
    planes = x.abs().reshape(-1, *x.shape[-2:])
    planes = torch.nn.functional.pad(planes, (1, 1, 1, 1), mode="reflect")
    rows = middle * planes[:, 1:-1] + beside * (planes[:, :-2] + planes[:, 2:])
    blurred = middle * rows[..., 1:-1] + beside * (rows[..., :-2] + rows[..., 2:])
    return blurred.flatten(1).log_softmax(1).reshape(x.shape)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_affine: tuple[torch.Tensor, torch.Tensor] | None,
    k_affine: tuple[torch.Tensor, torch.Tensor] | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norm: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over each head's channels, then rotary embedding (HunyuanDiT, arXiv 2405.08748).

    Args:
        q, k: ``[rows, N, H, D]``.
        q_affine, k_affine: weight and bias ``[D]`` of the norms.
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


def degrade_latents(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    received: torch.Tensor,
    blur: torch.Tensor,
    *,
    map_size: tuple[int, int],
    clean: tuple[float, float],
    noise: tuple[float, float],
) -> torch.Tensor:
    """Latents whose salient parts are blurred, at the noise level they had (arXiv 2210.00939).

    ``blur(x₀)`` where a token receives more than 1, ``x₀`` elsewhere, plus the noise again. Both
    are sums of the latents and the model's output, with the weights that the prediction type and
    the scheduler say: ``clean`` gives x₀ as it is when noise is added to it, ``noise`` the noise.

    Args:
        sample, model_output: ``[B, C, height, width]``.
        received: ``[B, map height · map width]``, see :func:`received_attention`. The map is
            enlarged by nearest neighbour.
        blur: ``[C, 1, K, K]`` with K odd, see :func:`gaussian_kernel`; borders are reflected.
        map_size: ``(map height, map width)``.
        clean, noise: weights of ``(sample, model_output)``.

    Returns:
        ``[B, C, height, width]`` in the dtype of ``sample``; the arithmetic is done in fp32 (fp64
        stays fp64).
    """
    wide = torch.promote_types(sample.dtype, torch.float32)
    x, output = sample.to(wide), model_output.to(wide)
    original = clean[0] * x + clean[1] * output
    border = blur.shape[-1] // 2
    padded = F.pad(original, (border,) * 4, mode="reflect")
    blurred = F.conv2d(padded, blur.to(wide), groups=x.shape[1])
    salient = (received > 1.0).to(wide).unflatten(1, (1, *map_size))
    mask = F.interpolate(salient, x.shape[-2:])
    degraded = blurred * mask + original * (1.0 - mask)
    return (degraded + noise[0] * x + noise[1] * output).to(sample.dtype)


def gaussian_kernel(
    channels: int,
    size: int = 9,
    sigma: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The depthwise Gaussian ``[channels, 1, size, size]`` of :func:`degrade_latents`, sum 1.

    Size and deviation are those of Self-Attention Guidance (arXiv 2210.00939).
    """
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.softmax(-0.5 * (x / sigma) ** 2, 0)
    kernel = torch.outer(weights, weights).expand(channels, 1, size, size)
    return kernel.to(device, dtype).contiguous()

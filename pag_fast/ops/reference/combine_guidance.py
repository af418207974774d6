"""The sum of CFG's and PAG's terms, and the ways to rescale it."""

from __future__ import annotations

import math

import torch


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

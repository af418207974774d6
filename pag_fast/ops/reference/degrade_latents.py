"""Latents whose salient parts are blurred."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    # expanded, so that nobody has to compare channels to know that all have the same
    return torch.outer(weights, weights).to(device, dtype).expand(channels, 1, size, size)

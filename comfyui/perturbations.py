"""What perturbed attention computes instead of attention.

Identity is Perturbed-Attention Guidance (Ahn et al., arXiv 2403.17377): every token attends to
itself alone, so attention returns v. Blurred queries are Smoothed Energy Guidance (Hong,
arXiv 2408.00760). These replace ``attn1`` in UNets; ``dit`` has those of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


class Identity:
    """The attention map is the identity: returns v."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: Any,
        mask: Any = None,
    ) -> torch.Tensor:
        """v [B, N, heads × dim_head], untouched."""
        return v


class BlurredQueries:
    """Queries are blurred over the picture before they attend.

    Args:
        sigma: of the Gaussian, in tokens; below 0 every query becomes the mean of all.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: Any,
        mask: Any = None,
    ) -> torch.Tensor:
        """Attention [B, N, heads × dim_head] of the blurred queries."""
        from comfy.ldm.modules.attention import optimized_attention

        if self.sigma < 0:
            blurred = q.mean(dim=1, keepdim=True).expand_as(q).contiguous()
        elif self.sigma == 0:
            blurred = q
        else:
            height, width = _grid(q.shape[1], extra_options["original_shape"])
            image = q.transpose(1, 2).reshape(q.shape[0], q.shape[2], height, width)
            size = math.ceil(6 * self.sigma)
            blurred = gaussian_blur(image, size + 1 - size % 2, self.sigma).flatten(2)
            blurred = blurred.transpose(1, 2).contiguous()
        return optimized_attention(blurred, k, v, heads=extra_options["n_heads"])


def _grid(tokens: int, latents: list[int]) -> tuple[int, int]:
    """Height and width in tokens of a feature map of latents [B, C, H, W].

    Levels halve sides by rounding up, so the side is rounded first where it is the shorter.
    """
    height, width = latents[2:4]
    if width >= height:
        rows = round((tokens * height / width) ** 0.5)
        return rows, tokens // rows
    columns = round((tokens * width / height) ** 0.5)
    return tokens // columns, columns


def gaussian_blur(image: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Blur [B, C, H, W] with a Gaussian of ``size`` taps (odd), mirrored at the edges.

    The kernel is cut to the width, and to what can be mirrored, where the image is smaller than it.
    """
    height, width = image.shape[-2:]
    # by the width, as sd-perturbed-attention cuts it; mirroring needs more pixels than it adds
    size = min(size, width - (width % 2 - 1), 2 * min(height, width) - 1)
    taps = torch.linspace(-(size - 1) / 2, (size - 1) / 2, steps=size)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    weights = (weights / weights.sum()).to(image.device, image.dtype)
    channels = image.shape[1]
    square = torch.outer(weights, weights).expand(channels, 1, size, size)
    padded = F.pad(image, [size // 2] * 4, mode="reflect")
    return F.conv2d(padded, square, groups=channels)

"""How the perturbed prediction is combined: scale, window, rescaling.

    guided = cfg + scale · (cond − perturbed)

as in ComfyUI's own node. Predictions are denoised latents [B, C, ...].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .perturbations import gaussian_blur

RESCALE_MODES = ("full", "partial", "snf")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """When guidance acts, and how strongly.

    Args:
        scale: of (cond − perturbed).
        adaptive_scale: 0 to 1. The scale falls by its fourth power for each of a thousand steps
            of training that the noise level is away from pure noise, and ends at 0.
        sigma_start: guidance acts at noise levels up to this one; below 0 at all of them.
        sigma_end: guidance acts at noise levels above this one.
        rescale: 0 to 1, how much of the standard deviation of cond is restored (Lin et al.,
            arXiv 2305.08891).
        rescale_mode: "full" measures cfg + guidance, "partial" cond + guidance; "snf" takes in
            each place the one of CFG's and PAG's guidance that stands out more (Wang et al.,
            arXiv 2311.10329) and leaves ``rescale`` unused.
    """

    scale: float = 3.0
    adaptive_scale: float = 0.0
    sigma_start: float = -1.0
    sigma_end: float = -1.0
    rescale: float = 0.0
    rescale_mode: str = "full"

    def active(self, sigma: torch.Tensor) -> bool:
        """Whether the window holds ``sigma`` [B] and the scale is not 0.

        Without a window nothing is read from the GPU.
        """
        if self.scale == 0:
            return False
        if self.sigma_start < 0 and self.sigma_end < 0:
            return True
        start = math.inf if self.sigma_start < 0 else self.sigma_start
        return self.sigma_end < float(sigma[0]) <= start

    def scale_at(self, sampling: Any, sigma: torch.Tensor) -> float:
        """The scale at ``sigma`` [B], for a model's ``model_sampling``."""
        if self.adaptive_scale <= 0:
            return self.scale
        away = 1000.0 - float(_timestep(sampling, sigma))
        return max(0.0, self.scale * (1.0 - self.adaptive_scale**4 * away))

    def combine(self, args: dict[str, Any], perturbed: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction, from what ComfyUI hands to a post-CFG function."""
        cond, cfg = args["cond_denoised"], args["denoised"]
        guidance = (cond - perturbed) * scale
        if self.rescale_mode == "snf":
            uncond = args["uncond_denoised"]
            if uncond is None or not uncond.any():
                return cfg + guidance
            return uncond + fuse_by_saliency(cfg - uncond, guidance)
        if self.rescale == 0:
            return cfg + guidance
        measured = (cfg if self.rescale_mode == "full" else cond) + guidance
        dims = tuple(range(1, cond.ndim))
        ratio = cond.std(dim=dims, keepdim=True) / measured.std(dim=dims, keepdim=True)
        return cfg + guidance * (self.rescale * ratio + (1 - self.rescale))


def _timestep(sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """The step of training, 0 to 1000, of ``sigma``: flow models count in units of their own."""
    now, most = sampling.timestep(sigma)[0], sampling.timestep(sampling.sigma_max)
    if hasattr(sampling, "sigmas") and float(most) == 999.0:
        return now
    return 1000.0 * now / most


def fuse_by_saliency(text: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """In each place the guidance [B, C, H, W] that stands out more among its channel's.

    What stands out is the softmax over the channel of the blurred absolute guidance
    (Saliency-adaptive Noise Fusion, arXiv 2311.10329).
    """
    salience = [
        gaussian_blur(guidance.abs(), 3, 1.0).flatten(2).softmax(dim=2).view_as(guidance)
        for guidance in (text, perturbed)
    ]
    return torch.where(salience[1] > salience[0], perturbed, text)

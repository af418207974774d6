"""Every op of :mod:`pag_fast.ops` in plain PyTorch: any dtype, any device, no fused kernel.

These functions are the truth the tests compare against. They favour being obviously right over
being fast, and they are themselves checked against diffusers' own processors in fp64. A file has
the name of its op.
"""

from __future__ import annotations

from .combine_guidance import combine_guidance, rescale_factor, rescale_to, saliency_fusion
from .degrade_latents import degrade_latents, gaussian_kernel
from .linear_attention import linear_attention
from .noisy_attention import noisy_attention, philox, score_noise
from .perturbed_attention import additive, identity_rows, perturbed_attention, rows_of
from .qk_norm_rope import qk_norm_rope
from .received_attention import received_attention

__all__ = [
    "PERTURBATIONS",
    "RESCALE_MODES",
    "additive",
    "combine_guidance",
    "degrade_latents",
    "gaussian_kernel",
    "identity_rows",
    "linear_attention",
    "noisy_attention",
    "perturbed_attention",
    "philox",
    "qk_norm_rope",
    "received_attention",
    "rescale_factor",
    "rescale_to",
    "rows_of",
    "saliency_fusion",
    "score_noise",
]

PERTURBATIONS = ("identity", "soft", "blur")
RESCALE_MODES = ("cfg", "full", "partial", "snf")

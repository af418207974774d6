"""Triton kernels of pag_fast. They need torch and triton, and nothing else."""

from __future__ import annotations

from .combine_guidance import combine_guidance
from .degrade_latents import degrade_latents
from .linear_attention import linear_attention
from .noisy_attention import noisy_attention
from .perturbed_attention import perturbed_attention
from .qk_norm_rope import qk_norm_rope
from .received_attention import received_attention

__all__ = [
    "combine_guidance",
    "degrade_latents",
    "linear_attention",
    "noisy_attention",
    "perturbed_attention",
    "qk_norm_rope",
    "received_attention",
]

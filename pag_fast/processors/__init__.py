"""Diffusers attention processors, one file per attention family.

A perturbed layer carries one of these while a forward of its owner runs. All of them project each
weight once, compute scores only for the rows that attend, and never concatenate branches.
"""

from __future__ import annotations

from .hidream import PerturbedHiDreamAttention
from .joint import (
    PerturbedCogVideoXAttention,
    PerturbedFluxAttention,
    PerturbedHunyuanVideo15Attention,
    PerturbedHunyuanVideoAttention,
    PerturbedJointAttention,
    PerturbedQwenAttention,
)
from .linear import PerturbedLinearAttention
from .lumina import PerturbedLuminaAttention
from .rotary import PerturbedRotaryAttention
from .self_attention import PerturbedSelfAttention
from .video import PerturbedLTXAttention, PerturbedVideoAttention

__all__ = [
    "PerturbedCogVideoXAttention",
    "PerturbedFluxAttention",
    "PerturbedHiDreamAttention",
    "PerturbedHunyuanVideo15Attention",
    "PerturbedHunyuanVideoAttention",
    "PerturbedJointAttention",
    "PerturbedLTXAttention",
    "PerturbedLinearAttention",
    "PerturbedLuminaAttention",
    "PerturbedQwenAttention",
    "PerturbedRotaryAttention",
    "PerturbedSelfAttention",
    "PerturbedVideoAttention",
]

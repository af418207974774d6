"""What can be done to the perturbed branch: small immutable objects, one per method.

``pag_fast.patch(pipe, layers, perturbation=SoftIdentity(0.5))``, or by name,
``perturbation="identity"``. Several at once:
``pag_fast.patch(pipe, branches=[Branch(layers, perturbation, scale), …])``.
"""

from __future__ import annotations

from .base import AttentionPerturbation, BlockPerturbation, Layer, Perturbation, Rows
from .blocks import ShuffledTokens, SkippedBlock
from .blur import BlurredMap, BlurredQueries
from .branch import Branch, by_name
from .identity import Identity, SoftIdentity
from .noise import NoisyScores

__all__ = [
    "AttentionPerturbation",
    "BlockPerturbation",
    "BlurredMap",
    "BlurredQueries",
    "Branch",
    "Identity",
    "Layer",
    "NoisyScores",
    "Perturbation",
    "Rows",
    "ShuffledTokens",
    "SkippedBlock",
    "SoftIdentity",
    "by_name",
]

"""Noise on the scores of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import ops
from .base import AttentionPerturbation, Layer, Rows, store_number, store_seed


@dataclass(frozen=True)
class NoisyScores(AttentionPerturbation):
    """``O' = softmax(S + σ·ε)·V`` with ``S = QKᵀ/√D`` and standard normal noise ε.

    The alternative to the identity that perturbs the map at random, as in the comparison of PAG's
    authors (arXiv 2403.17377), with the noise in front of the softmax: rows of the map still
    add up to one. Every score of an image query gets its own number from Philox4x32-10 (Salmon et
    al., 2011), counted by key, query, head, layer and step: the same on every device and backend,
    without a tensor of noise, and the same for every picture of a batch, which so comes out as it
    does alone. Layers that see frames of a video, or its pixels, as rows give all of them the same.

    Args:
        sigma: standard deviation, in units of scores.
        seed: another seed is other noise.

    Raises:
        ValueError: a negative σ, or a seed that is no integer.
    """

    sigma: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "noise"
    formula: ClassVar[str] = "O' = softmax(S + σ·ε)·V"
    source: ClassVar[str] = "PAG's comparison of perturbations, arXiv 2403.17377"
    cost: ClassVar[str] = "scores of one more branch, and their noise"
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        store_number(self, "sigma", least=0.0, most=1e4)
        store_seed(self)

    def check(self, layer: Layer) -> None:
        if layer.linear:
            raise ValueError(
                f"NoisyScores adds noise in front of a softmax, and {layer.name} has linear "
                "attention, which has no scores: Identity, SoftIdentity, BlurredQueries and "
                "BlurredMap work there."
            )

    def attend(self, rows: Rows) -> torch.Tensor:
        state = rows.layer.state
        # ranks that share heads have the numbers of one process
        first_head = state.head_rank * rows.value.shape[2]

        def image(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
            return ops.noisy_attention(
                q[:, : rows.num_image],
                k,
                v,
                clock=state.clock_on(q),
                layer=rows.layer.index,
                seed=self.seed,
                sigma=self.sigma,
                attn_mask=mask,
                scale=rows.scale,
                first_head=first_head,
                backend=rows.backend,
            )

        return rows.compose(image)

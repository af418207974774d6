"""Processors and hooks of one denoiser, made once and put on for every call."""

from __future__ import annotations

from typing import Any

from .branches.invariant import invariants
from .branches.plan import BranchPlan
from .branches.rows import SPLIT, BranchState
from .config import PatchConfig
from .families import family_of, has_compiled
from .layers import resolve
from .processors.rows import PerturbedProcessor


def caches(config: PatchConfig, wrapped: Any, model: Any) -> bool:
    """Whether what depends on the conditioning alone is kept for ``model``.

    ``wrapped`` is how the pipeline has it: itself, compiled, or one of a ``MultiControlNetModel``.
    """
    # dropout is new in every step
    return config.cache_conditioning and not model.training and not has_compiled(wrapped)


class Installation:
    """Processors and hooks of one denoiser for one choice of layers.

    Args:
        cache: keep what depends on the conditioning alone from step to step.
    """

    def __init__(
        self, denoiser: Any, layers: Any, config: PatchConfig, *, cache: bool = False
    ) -> None:
        family = family_of(denoiser)
        self.denoiser = denoiser
        self.text = family.text
        # PixArt predicts sigma along with the noise, in a second half of the channels
        self.learned_sigma = (
            type(denoiser).__name__ == "PixArtTransformer2DModel"
            and denoiser.config.out_channels == 2 * denoiser.config.in_channels
        )
        self.state = BranchState()
        self.attentions: dict[str, Any] = resolve(denoiser, layers, exact=config.exact_layers)
        self.plan: BranchPlan = family.plan(
            denoiser, set(self.attentions), merge=config.share_branches
        )
        self.processors: dict[str, PerturbedProcessor] = {
            name: family.processor(self.state, self.plan.levels[name], config.backend)
            for name in self.attentions
        }
        if not config.share_branches:
            self.plan = BranchPlan(order=self.plan.order, reason="share_branches is off")
            for processor in self.processors.values():
                processor.level = SPLIT
        self.invariants = invariants(denoiser, self.plan, self.state) if cache else {}
        self.hooks = self.plan.hooks(self.state, without=self.invariants)

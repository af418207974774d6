"""Processors and hooks of one denoiser, made once and put on for every call."""

from __future__ import annotations

from typing import Any

from .branches.plan import BranchPlan
from .branches.rows import SPLIT, BranchState
from .config import PatchConfig
from .families import family_of
from .layers import resolve
from .processors.rows import PerturbedProcessor


class Installation:
    """Processors and hooks of one denoiser for one choice of layers."""

    def __init__(self, denoiser: Any, layers: Any, config: PatchConfig) -> None:
        family = family_of(denoiser)
        self.denoiser = denoiser
        self.text = family.text
        self.state = BranchState()
        self.attentions: dict[str, Any] = resolve(denoiser, layers, exact=config.exact_layers)
        self.plan: BranchPlan = family.plan(
            denoiser, set(self.attentions), merge=config.share_branches
        )
        self.processors: dict[str, PerturbedProcessor] = {
            name: family.processor(self.state, self.plan.levels[name], config.backend)
            for name in self.attentions
        }
        self.hooks = self.plan.hooks(self.state) if config.share_branches else []
        if not config.share_branches:
            self.plan = BranchPlan(order=self.plan.order, reason="share_branches is off")
            for processor in self.processors.values():
                processor.level = SPLIT

"""Processors and hooks of one denoiser, made once and put on for every call."""

from __future__ import annotations

from typing import Any, cast

from .branches.invariant import invariants
from .branches.plan import BranchPlan, is_compiled
from .branches.rows import SPLIT, BranchState
from .config import PatchConfig
from .families import family_of, has_compiled
from .layers import resolve
from .lean import Lean
from .processors.rows import PerturbedProcessor, with_signature


def is_eager(wrapped: Any, model: Any) -> bool:
    """Whether ``model`` runs as it is written, so that its modules' forwards can be replaced.

    ``wrapped`` is how the pipeline has it: itself, compiled, or one of a ``MultiControlNetModel``.
    """
    # dropout is new in every step
    return not (model.training or has_compiled(wrapped))


class Installation:
    """Processors and hooks of one denoiser for one choice of layers.

    Args:
        eager: the denoiser is not compiled (:func:`is_eager`): what depends on the conditioning
            alone can be kept from step to step, and launches that change nothing left out.
    """

    def __init__(
        self, denoiser: Any, layers: Any, config: PatchConfig, *, eager: bool = False
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
        check_processors(self.attentions, family.replaces)
        self.plan: BranchPlan = family.plan(
            denoiser, set(self.attentions), merge=config.share_branches
        )
        traced = not eager or any(map(is_compiled, denoiser.modules()))
        made = family.processor if traced else with_signature(cast(Any, family.processor))
        self.processors: dict[str, PerturbedProcessor] = {
            name: made(self.state, self.plan.levels[name], config.backend)
            for name in self.attentions
        }
        if not config.share_branches:
            self.plan = BranchPlan(order=self.plan.order, reason="share_branches is off")
            for processor in self.processors.values():
                processor.level = SPLIT
        keeps = eager and config.cache_conditioning
        self.invariants = invariants(denoiser, self.plan, self.state) if keeps else {}
        self.lean = None
        if eager and config.fewer_launches:
            self.lean = Lean(denoiser, self.attentions, traced=config.traces)
        self.hooks = self.plan.hooks(self.state, without=self.invariants)


def check_processors(attentions: dict[str, Any], known: frozenset[str]) -> None:
    """Raises ValueError for attentions whose processors do what ours would not (``known``)."""
    for name, attention in attentions.items():
        own = type(attention.processor).__name__
        if known and own not in known and not isinstance(attention.processor, PerturbedProcessor):
            raise ValueError(
                f"{name} runs {own}, whose arithmetic pag_fast does not know: choose layers with "
                f"{' or '.join(sorted(known))}, or unload the adapter that has put it there."
            )

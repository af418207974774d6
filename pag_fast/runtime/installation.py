"""Processors and forwards of one denoiser: made once, put on for every forward of a call."""

from __future__ import annotations

from itertools import repeat
from typing import Any, cast

import torch

from ..config import PatchConfig
from ..fusion import Fusion
from ..models.description import ModelDescription
from ..models.layer_names import self_attentions, transformer_blocks
from ..models.registry import (
    COND,
    family_of,
    fusable_processors,
    has_compiled,
    stock_pag_processors,
)
from ..perturbations import AttentionPerturbation, BlockPerturbation
from ..processors.displaced import check_processors
from ..processors.fused_projections import check_fused
from ..processors.rows import PerturbedProcessor, with_signature
from ..processors.stock import in_place_of
from ..sharing.arguments import latents_of
from ..sharing.block_hooks import perturbed_blocks
from ..sharing.conditioning_cache import invariants
from ..sharing.plan import BranchPlan, compiled_call, is_compiled
from ..sharing.replacement import MISSING
from ..sharing.rows import SPLIT, BranchState
from .access.hooked_forward import forward_entries
from .access.instance_patch import Entry, InstancePatch, came_back
from .perturbed_branches import PerturbedBranch, layers_of, perturbed_branches


def is_eager(wrapped: Any, model: Any) -> bool:
    """Whether ``model`` runs as it is written, so that its modules' forwards can be replaced.

    ``wrapped`` is how the pipeline has it: itself, compiled, or one of a ``MultiControlNetModel``.
    """
    # dropout is new in every step
    return not (model.training or has_compiled(wrapped))


class Installation:
    """Processors and forwards of one denoiser for one choice of layers.

    Args:
        eager: the denoiser is not compiled (:func:`is_eager`): what depends on the conditioning
            alone can be kept from step to step, and launches that change nothing left out.

    Attributes:
        hooks_show: hooks on the denoiser itself run outside of its graph, if it has one.
    """

    def __init__(
        self, denoiser: Any, layers: Any, config: PatchConfig, *, eager: bool = False
    ) -> None:
        family = family_of(denoiser)
        self.denoiser = denoiser
        self.runs_stock = family.runs_stock
        self.runs = family.tokens
        self.rows_second = family.rows_second
        self.hooks_show = eager and compiled_call(denoiser) is None
        self.text = family.text
        self.learned_sigma = family.predicts_variance(denoiser)
        self.state = BranchState()
        self.branches = perturbed_branches(denoiser, layers, config)
        names = {name for branch in self.branches for name in branch.layers}
        self.attentions, self._others = _parted(self_attentions(denoiser), names)
        self._other_owns: list[Any] = list(map(vars, self._others.values()))
        # where diffusers' PAG would put its own, it does not matter whose place ours takes
        self._checked = {} if family.stock_processors else self.attentions
        self.known = family.known_processors
        check_processors(self._checked, self.known, strict=not self.runs_stock)
        blocks = self._block_actions(names)
        self.plan: BranchPlan = family.plan(
            denoiser, set(self.attentions), merge=config.share_branches, blocks=blocks
        )
        if not config.share_branches:
            order = self.plan.order
            self.plan = BranchPlan(order=order, reason="share_branches is off")
        known = layers_of(denoiser, self.state)
        traced = not eager or any(map(is_compiled, denoiser.modules()))
        self.processors: dict[str, PerturbedProcessor] = {
            name: processor_class(family, attention, compiled=traced)(
                self.state,
                self.plan.levels.get(name, SPLIT),
                config.backend,
                [self._action(branch, name, AttentionPerturbation) for branch in self.branches],
                known[name],
            )
            for name, attention in self.attentions.items()
        }
        self._note_displaced()
        self.blocks = perturbed_blocks(
            denoiser,
            self.plan,
            self.state,
            blocks,
            order=transformer_blocks(denoiser),
            streams=family.blocks,
        )
        # which modules see the conditioning alone is known by name, and so for written descriptions
        keeps = eager and config.cache_conditioning and not family.is_derived
        self.invariants = invariants(denoiser, self.plan, self.state) if keeps else {}
        fuses = eager and config.fewer_launches and not family.is_derived
        self.fusion = self._fused(config) if fuses else None
        self._own = self._entries()
        self._patches: dict[bool, InstancePatch] = {}
        self._placed = self._with_constants()
        self._random = any(branch.perturbation.random for branch in self.branches)
        self.states = (self.state,)
        # layers inside of a graph cannot be counted, nor can those of blocks that branches skip
        self.counts = not traced and not blocks

    def _fused(self, config: PatchConfig) -> Fusion:
        return Fusion(
            self.denoiser,
            self.same_input(),
            traced=config.traces,
            state=self.state,
            fusable=fusable_processors(self.denoiser),
        )

    def _block_actions(self, names: set[str]) -> dict[str, list[Any]]:
        """What happens to each branch in each block that is perturbed as a whole."""
        return {
            name: [self._action(branch, name, BlockPerturbation) for branch in self.branches]
            for name in transformer_blocks(self.denoiser)
            if name in names
        }

    def _note_displaced(self) -> None:
        """Tell each processor what it takes the place of."""
        for name, attention in self.attentions.items():
            own = attention.processor
            found = own.displaced if isinstance(own, PerturbedProcessor) else own
            self.processors[name].takes_place_of(found)

    def _follow_processors(self) -> None:
        """Call the processors that perturbed layers have now, which may have been exchanged.

        Raises:
            ValueError: one of another class, whose arguments may be others.
        """
        for name, attention in self.attentions.items():
            own, ours = attention.processor, self.processors[name]
            if own is ours.displaced or isinstance(own, PerturbedProcessor):
                continue
            if type(own) is not type(ours.displaced):
                raise ValueError(
                    f"{name} was given a {type(own).__name__} in the middle of a call: do that "
                    "between two calls."
                )
            ours.takes_place_of(own)

    def _with_constants(self) -> list[PerturbedProcessor]:
        """The processors whose perturbations have numbers that must be on the device."""
        made = self.processors.values()
        return [p for p in made if any(c is not None for c in p.constants)]

    def _entries(self) -> list[Entry]:
        """Processors and forwards, ready for an instance patch."""
        hooks = [(module, block.enter, block.leave) for module, block in self.blocks]
        hooks += self.plan.hooks(self.state, without=self.invariants)
        return [
            *[
                (vars(attention), "processor", self.processors[name])
                for name, attention in self.attentions.items()
            ],
            *forward_entries(self.state, hooks),
            *[(vars(x.module), "forward", x) for x in self.invariants.values()],
        ]

    def patch(self, *, fused: bool) -> InstancePatch:
        """What is put on the denoiser for a forward; ``fused``: with joined weights.

        Raises:
            ValueError: an attention whose processor does what ours would not.
        """
        check_processors(self._checked, self.known, strict=not self.runs_stock)
        if self.runs_stock:
            self._follow_processors()
        fusion = self.fusion if fused else None
        if fusion is not None and fusion.refresh():
            self._patches.pop(True, None)
        found = self._patches.get(fused)
        if found is None:
            entries = [] if fusion is None else fusion.entries
            found = self._patches[fused] = InstancePatch([*self._own, *entries])
        return found

    def be_strict(self) -> None:
        """Raise ValueError for what ours does not repeat: no PAG of diffusers' would be there."""
        if not self.runs_stock:
            self._checked = self.attentions
            check_processors(self.attentions, self.known, strict=True)
            check_fused(self.attentions)

    def check_others(self) -> None:
        """Raises ValueError where a PAG pipeline of diffusers perturbs layers that we do not.

        It has put its processors on the model for all of its call.
        """
        # no module is asked in Python, as this runs behind every forward
        kinds = map(type, map(dict.get, self._other_owns, repeat("processor")))
        if stock_pag_processors().isdisjoint(kinds):
            return
        name, kind = next(
            (name, type(attention.processor))
            for name, attention in self._others.items()
            if type(attention.processor) in stock_pag_processors()
        )
        raise ValueError(
            f"{name} runs {kind.__name__}, which a PAG pipeline that shares this model has put "
            "there: it is running, in another thread or around this call, or an error has ended "
            "it. Patch that pipeline too, run one after the other, or give the model its own "
            "processors back with set_attn_processor() if it is over."
        )

    def refuse_taken(self, error: Exception) -> None:
        """Raises ValueError if what has raised ``error`` are processors of diffusers' PAG.

        A pipeline has put them on layers that are perturbed, in the middle of a forward.
        """
        own = map(vars, self.attentions.values())
        if not stock_pag_processors().isdisjoint(type(x.get("processor")) for x in own):
            raise ValueError(
                "A PAG pipeline that shares this model has begun in the middle of a forward, in "
                "another thread, and has put its processors there: patch that pipeline too, or "
                "run one after the other."
            ) from error

    def same_input(self) -> dict[str, int]:
        """How many projections of each perturbed attention (of q, k, v) see the same rows."""
        return {
            name: self.processors[name].same_input(module)
            for name, module in self.attentions.items()
        }

    def mark_tokens(self, call: dict[str, Any], layout: tuple[str, ...]) -> None:
        """Write down where the image's tokens are, of a model whose description says so."""
        assert self.runs is not None
        runs = self.runs(self.denoiser, call)
        if len(runs) > 1:  # cond's
            unit, at = len(runs) // len(layout), layout.index(COND)
            runs = runs[at * unit : (at + 1) * unit]
        self.state.mark_runs(self.attentions, runs, latents_of(call).device)

    def prepare(self, latents: torch.Tensor, step: int) -> None:
        """Before a forward: what perturbations have to know, without waiting for the device."""
        state = self.state
        # packed latents, and those of a video that is one sequence, do not show where a token is
        shows = latents.ndim == 4 or hasattr(self.denoiser, "down_blocks")
        state.size = (latents.shape[-2], latents.shape[-1]) if shows else None
        for processor in self._placed:
            processor.place(latents.device)
        if self._random:
            state.clock = torch.full((1,), step, dtype=torch.int64, device=latents.device)

    def left(self) -> None:
        """After a forward: what is on the model then does nothing."""
        self.state.thread = None
        self.state.slabs = None
        self.state.added = {}
        self.state.ranks, self.state.head_rank = None, 0
        try:
            if self.fusion is not None:
                self.fusion.forget()
        finally:
            for _, block in self.blocks:
                block.forget()

    def forget(self) -> None:
        """After a call: nothing of it is kept."""
        self.left()
        self.state.clock = None

    def release(self) -> None:
        """Give joined weights memory of their own again; nothing of ours stays on the model."""
        for own, name, value in self._own:
            # somebody has put back what he had captured in the middle of a forward
            if own.get(name) is value:
                before = came_back(value)
                if before is MISSING:
                    del own[name]
                else:
                    own[name] = before
        if self.fusion is not None:
            self.fusion.release()

    @staticmethod
    def _action(branch: PerturbedBranch, name: str, kind: type) -> Any:
        """What happens to a branch in a layer, if anything."""
        perturbed = name in branch.layers and isinstance(branch.perturbation, kind)
        return branch.perturbation if perturbed else None


def _parted(attentions: dict[str, Any], names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that have one of these names, and all others."""
    rest = dict(attentions)
    return {name: rest.pop(name) for name in attentions if name in names}, rest


def processor_class(family: ModelDescription, attention: Any, *, compiled: bool = True) -> Any:
    """What is put on an attention; compilers read signatures from code alone."""
    if family.runs_stock:
        own = attention.processor
        stock: Any = type(own.displaced if isinstance(own, PerturbedProcessor) else own)
        return in_place_of(stock)
    return family.processor if compiled else with_signature(cast(Any, family.processor))

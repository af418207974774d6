"""Processors and hooks of one denoiser, made once and put on for every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..config import PatchConfig
from ..fusion import Lean
from ..models.layer_names import resolve, self_attentions, transformer_blocks
from ..models.registry import family_of, has_compiled, uncompiled
from ..perturbations import AttentionPerturbation, BlockPerturbation, Layer, Perturbation
from ..processors.rows import PerturbedProcessor, with_signature
from ..sharing.block_hooks import perturbed_blocks
from ..sharing.conditioning_cache import invariants
from ..sharing.plan import BranchPlan, argument_names, is_compiled
from ..sharing.rows import SPLIT, BranchState


def is_eager(wrapped: Any, model: Any) -> bool:
    """Whether ``model`` runs as it is written, so that its modules' forwards can be replaced.

    ``wrapped`` is how the pipeline has it: itself, compiled, or one of a ``MultiControlNetModel``.
    """
    # dropout is new in every step
    return not (model.training or has_compiled(wrapped))


@dataclass(frozen=True)
class PerturbedBranch:
    """One perturbed branch of a model.

    Attributes:
        perturbation: what sets it apart.
        layers: names of the attentions, or blocks, where it does.
        scale: its guidance scale; ``None`` is the call's.
    """

    perturbation: Perturbation
    layers: tuple[str, ...]
    scale: float | None = None


def perturbed_branches(
    denoiser: Any, layers: Any, config: PatchConfig
) -> tuple[PerturbedBranch, ...]:
    """The perturbed branches of a denoiser, ``layers`` being those of the pipeline.

    Raises:
        ValueError: a layer that does not exist, or that cannot be perturbed like this.
    """
    found = []
    known = layers_of(denoiser)
    for branch in config.branches_on(layers):
        perturbation = branch.perturbation
        assert isinstance(perturbation, Perturbation)
        names = tuple(resolve(denoiser, branch.layers, exact=config.exact_layers))
        if isinstance(perturbation, AttentionPerturbation):
            for name in names:
                perturbation.check(known[name])
        else:
            names = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
            for name in names:
                kind = type(denoiser.get_submodule(name)).__name__
                if kind not in family_of(denoiser).skippable_blocks:
                    raise ValueError(
                        f"{type(perturbation).__name__} perturbs transformer blocks, and {name} "
                        f"is a {kind}."
                    )
        found.append(PerturbedBranch(perturbation, names, branch.scale))
    return tuple(found)


def layers_of(denoiser: Any, state: BranchState | None = None) -> dict[str, Layer]:
    """Every layer that can be perturbed, as a perturbation sees it."""
    linear = family_of(denoiser).processor.linear
    state = state or BranchState()
    modules: dict[str, Any] = dict(self_attentions(denoiser))
    return {
        name: Layer(name, index, module.heads, linear, "motion_modules" in name, state)
        for index, (name, module) in enumerate(modules.items())
    }


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
        self.learned_sigma = family.predicts_variance(denoiser)
        self.state = BranchState()
        self.branches = perturbed_branches(denoiser, layers, config)
        names = {name for branch in self.branches for name in branch.layers}
        self.attentions: dict[str, Any] = {
            name: module for name, module in self_attentions(denoiser).items() if name in names
        }
        check_processors(self.attentions, family.replaces)
        blocks = {
            name: [self._action(branch, name, BlockPerturbation) for branch in self.branches]
            for name in transformer_blocks(denoiser)
            if name in names
        }
        self.plan: BranchPlan = family.plan(
            denoiser, set(self.attentions), merge=config.share_branches, blocks=blocks
        )
        if not config.share_branches:
            order = self.plan.order
            self.plan = BranchPlan(order=order, reason="share_branches is off")
        known = layers_of(denoiser, self.state)
        traced = not eager or any(map(is_compiled, denoiser.modules()))
        made = family.processor if traced else with_signature(cast(Any, family.processor))
        self.processors: dict[str, PerturbedProcessor] = {
            name: made(
                self.state,
                self.plan.levels.get(name, SPLIT),
                config.backend,
                [self._action(branch, name, AttentionPerturbation) for branch in self.branches],
                known[name],
            )
            for name in self.attentions
        }
        self.blocks = perturbed_blocks(
            denoiser,
            self.plan,
            self.state,
            blocks,
            order=transformer_blocks(denoiser),
            streams=family.blocks,
        )
        keeps = eager and config.cache_conditioning
        self.invariants = invariants(denoiser, self.plan, self.state) if keeps else {}
        self.lean = None
        if eager and config.fewer_launches:
            self.lean = Lean(denoiser, self.same_input(), traced=config.traces)
        self.hooks = [(module, block.enter, block.leave) for module, block in self.blocks]
        self.hooks += self.plan.hooks(self.state, without=self.invariants)
        self._placed = [
            p for p in self.processors.values() if any(c is not None for c in p.constants)
        ]
        self._random = any(branch.perturbation.random for branch in self.branches)

    def same_input(self) -> dict[str, int]:
        """How many projections of each perturbed attention (of q, k, v) see the same rows."""
        return {
            name: self.processors[name].same_input(module)
            for name, module in self.attentions.items()
        }

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

    def forget(self) -> None:
        """After a call: nothing of it is kept."""
        self.state.slabs = self.state.clock = None
        for _, block in self.blocks:
            block.forget()

    @staticmethod
    def _action(branch: PerturbedBranch, name: str, kind: type) -> Any:
        """What happens to a branch in a layer, if anything."""
        perturbed = name in branch.layers and isinstance(branch.perturbation, kind)
        return branch.perturbation if perturbed else None


def check_processors(attentions: dict[str, Any], known: frozenset[str]) -> None:
    """Raises ValueError for attentions whose processors do what ours would not (``known``)."""
    for name, attention in attentions.items():
        own = type(attention.processor).__name__
        if known and own not in known and not isinstance(attention.processor, PerturbedProcessor):
            raise ValueError(
                f"{name} runs {own}, whose arithmetic pag_fast does not know: choose layers with "
                f"{' or '.join(sorted(known))}, or unload the adapter that has put it there."
            )


def enter_with(
    module: Any,
    enter: Callable[[dict[str, Any]], dict[str, Any]],
    leave: Callable[[Any], Any] | None = None,
) -> list[Callable[[], None]]:
    """Have ``enter`` rewrite a module's arguments, and ``leave`` its output, in eager mode.

    Returns what takes both off again.
    """
    names = argument_names(uncompiled(module))

    def entered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return enter({**dict(zip(names, args, strict=False)), **kwargs})

    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: ((), entered(args, kwargs)),
                with_kwargs=True,
                prepend=True,
            )
        ]
        if leave is not None:
            handles.append(module.register_forward_hook(lambda _, args, out: leave(out)))
        return [handle.remove for handle in handles]
    # module.compile() compiles the hooks along; the values looked at here need eager mode

    def call(*args: Any, **kwargs: Any) -> Any:
        out = compiled(**entered(args, kwargs))
        return out if leave is None else leave(out)

    module._compiled_call_impl = call
    return [lambda: setattr(module, "_compiled_call_impl", compiled)]


def restore_processor(attention: Any, original: Any, ours: Any) -> Callable[[], None]:
    """What puts ``original`` back in place of ``ours``."""

    def restore() -> None:
        # somebody may have set another processor meanwhile: then it stays
        if attention.processor is ours:
            attention.set_processor(original)

    return restore

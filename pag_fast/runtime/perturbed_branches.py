"""The perturbed branches of a denoiser: layers by name, as perturbations see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import PatchConfig
from ..models.layer_names import resolve, self_attentions
from ..models.registry import family_of
from ..perturbations import AttentionPerturbation, Layer, Perturbation
from ..sharing.plan import class_name
from ..sharing.rows import BranchState


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
                kind = class_name(denoiser.get_submodule(name))
                if kind not in family_of(denoiser).skippable_blocks:
                    raise ValueError(
                        f"{type(perturbation).__name__} perturbs transformer blocks, and {name} "
                        f"is a {kind}."
                    )
        found.append(PerturbedBranch(perturbation, names, branch.scale))
    return tuple(found)


def layers_of(denoiser: Any, state: BranchState | None = None) -> dict[str, Layer]:
    """Every layer that can be perturbed, as a perturbation sees it."""
    family = family_of(denoiser)
    linear = family.processor.linear
    state = state or BranchState()
    modules: dict[str, Any] = dict(self_attentions(denoiser))
    traced = family.traced.trace if family.is_derived else None
    seen = {} if traced is None else {a.name: a.heads for a in traced.attentions}
    return {
        name: Layer(
            name,
            index,
            seen[name] if name in seen else _heads(getattr(module, family.heads, None)),
            linear,
            "motion_modules" in name,
            state,
        )
        for index, (name, module) in enumerate(modules.items())
    }


def _heads(said: Any) -> int:
    """How many heads an attention says that it has; of a class of one's own it may be anything."""
    return said if type(said) is int else 0

"""The FLOP ledger: every supported pipeline at its published size, stock against patched.

Integers from shapes alone, so a change of one FLOP is a change of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .flops import Cost, Inputs, controlnet_cost, denoiser_cost
from .zoo import CARDS, ModelCard, forward_kwargs, meta_model


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a pipeline, its perturbed layers, CFG on or off."""

    pipeline: str
    layers: tuple[str, ...]
    cfg: bool
    cost: Cost

    @property
    def label(self) -> str:
        guidance = "" if self.cfg else ", CFG off"
        return f"{self.pipeline} {','.join(self.layers)}{guidance}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline,
            "layers": list(self.layers),
            "cfg": self.cfg,
            "stock": self.cost.stock,
            "patched": self.cost.patched,
            "bound": self.cost.bound,
        }


def find_card(pipeline: str) -> ModelCard:
    """The model card of a pipeline.

    Raises:
        ValueError: no such pipeline.
    """
    if pipeline not in CARDS:
        raise ValueError(f"Unknown pipeline {pipeline!r}: choose from {', '.join(CARDS)}.")
    return CARDS[pipeline]


def card_inputs(card: ModelCard, model: Any) -> Inputs:
    """Forward arguments for a model of ``card`` at the card's size."""
    return lambda rows: forward_kwargs(
        model,
        rows=rows,
        height=card.height,
        width=card.width,
        vae_scale_factor=card.vae_scale_factor,
    )


def entry(pipeline: str, layers: Sequence[str] | None = None, *, cfg: bool = True) -> Entry:
    """One line of the ledger; without ``layers``, those that the documentation names."""
    card = find_card(pipeline)
    chosen = tuple(layers or card.documented_layers)
    model = meta_model(card, "denoiser")
    cost = denoiser_cost(model, list(chosen), card_inputs(card, model), cfg=cfg)
    if card.controlnet is not None:
        net = meta_model(card, "controlnet")
        cost = cost + controlnet_cost(net, card_inputs(card, net), cfg=cfg)
    return Entry(pipeline, chosen, cfg, cost)


def ledger(pipelines: Sequence[str] | None = None) -> Iterator[Entry]:
    """The ledger's lines, one at a time: documented layers, CFG on and off."""
    for pipeline in pipelines or CARDS:
        for cfg in (True, False):
            yield entry(pipeline, cfg=cfg)

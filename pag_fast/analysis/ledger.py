"""The FLOP ledger: every supported pipeline at its published size, stock against patched.

Integers from shapes alone, so a change of one FLOP is a change of the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .flops import Cost, controlnet_cost, step_costs
from .published import CARDS, find_card, meta_model


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


def entries(
    pipeline: str, layers: Sequence[str] | None = None, *, cfg: Sequence[bool] | None = None
) -> list[Entry]:
    """The ledger's lines of one pipeline, one for each value of ``cfg``.

    Without ``layers``, those that the documentation names; without ``cfg``, with CFG, where the
    pipeline has it, and without.

    Raises:
        ValueError: no such pipeline, or no such layer.
    """
    card = find_card(pipeline)
    chosen = tuple(layers or card.documented_layers)
    cfg = card.guidance if cfg is None else cfg
    model = meta_model(card, "denoiser")
    inputs = card.size.inputs(model)
    costs = step_costs(model, list(chosen), inputs, cfg=cfg, sequential=card.sequential)
    if card.controlnet is not None:
        net = meta_model(card, "controlnet")
        nets = [controlnet_cost(net, card.size.inputs(net), cfg=both) for both in cfg]
        costs = [cost + more for cost, more in zip(costs, nets, strict=True)]
    return [Entry(card.name, chosen, both, cost) for both, cost in zip(cfg, costs, strict=True)]


def entry(pipeline: str, layers: Sequence[str] | None = None, *, cfg: bool = True) -> Entry:
    """One line of the ledger: see :func:`entries`."""
    return entries(pipeline, layers, cfg=[cfg])[0]


def ledger(pipelines: Sequence[str] | None = None) -> Iterator[Entry]:
    """The ledger's lines, one at a time: documented layers, CFG on and off."""
    for pipeline in pipelines or CARDS:
        yield from entries(pipeline)

"""What each rank runs in a step, and its FLOPs: the slowest one is what a picture waits for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import PatchConfig
from ..models.inputs import Inputs
from ..models.registry import COND, PERTURBED
from ..parallel.placement import spans
from ..runtime.perturbed_branches import perturbed_branches
from .flops import controlnet_step, count, patched_flops


@dataclass(frozen=True)
class RankCost:
    """One rank's part of a step.

    Attributes:
        branches: what it runs, in order; empty: none that anybody looks at.
        flops: of one sample, ControlNets included; ``None`` where they are not predicted.
    """

    cfg: bool
    rank: int
    branches: tuple[str, ...]
    flops: int | None = None


def placed(size: int, others: Sequence[str], perturbed: int, *, cfg: bool) -> Iterator[RankCost]:
    """The branches of each of ``size`` ranks; ``others`` are those of CFG besides cond."""
    layout = (*(others if cfg else ()), COND, *[PERTURBED] * perturbed)
    for rank, (start, stop) in enumerate(spans(layout, size)):
        yield RankCost(cfg, rank, layout[start:stop])


def rank_costs(
    model: Any,
    layers: Any,
    inputs: Inputs,
    *,
    size: int,
    cfg: bool,
    config: PatchConfig | None = None,
    nets: Sequence[tuple[Any, Inputs]] = (),
) -> list[RankCost]:
    """The FLOPs of every rank in a step with PAG on ``layers``, from the second step on.

    Args:
        nets: ControlNets, and what makes arguments for each.
    """
    config = config or PatchConfig()
    found = []
    perturbed = len(perturbed_branches(model, layers, config))
    known: dict[Any, int] = {}
    for part in placed(size, ("uncond",), perturbed, cfg=cfg):
        mine = part.branches
        # without perturbed rows uncond and cond cost the same
        key = mine if PERTURBED in mine else len(mine)
        if mine and key not in known:
            flops = patched_flops(model, layers, inputs, cfg=cfg, config=config, mine=mine)
            known[key] = flops + sum(_net_flops(net, its) for net, its in nets)
        found.append(RankCost(cfg, part.rank, mine, known.get(key, 0)))
    return found


def _net_flops(net: Any, inputs: Inputs) -> int:
    """A ControlNet's, of the rows of uncond or of cond, whichever branches a rank has."""
    with controlnet_step(net, cfg=False) as (_, rows):
        return count(net, inputs(rows))


def slowest(costs: Sequence[RankCost]) -> int:
    """FLOPs of the rank that others wait for."""
    return max(cost.flops or 0 for cost in costs)

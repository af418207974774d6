"""Where a model that was traced can change rows: at its blocks, in the order in which they ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...sharing.block_hooks import Actions
from ...sharing.plan import BranchPlan, Site, argument_names, unshared
from ...sharing.rows import SHARED, SPLIT
from .trace import Trace


def plan_traced(
    model: Any,
    perturbed: set[str],
    *,
    trace: Trace | None,
    merge: bool,
    blocks: Mapping[str, Actions] | None = None,
) -> BranchPlan:
    """The plan for attentions named in ``perturbed``, without uncond and cond as one.

    Code of the model between two lists of blocks may do anything with rows: it gets all of them.
    So the first block of a list is cut to the shared rows, and the last hands on all.
    """
    if trace is None:
        return unshared(tuple(sorted(perturbed)), "the model has not been traced")
    order = tuple(name for name in trace.names if name in perturbed)
    fork = order[0] if order else ""
    home = next((b for b in trace.blocks if f"{fork}.".startswith(f"{b}.")), None)
    if home is None:
        return unshared(tuple(sorted(perturbed)), "the first perturbed layer is in no block")
    plan = BranchPlan(fork=fork, order=order, levels=dict.fromkeys(order, SPLIT))
    at = trace.blocks.index(home)
    plan.sites += _shared_blocks(model, trace, trace.blocks[:at])
    front = list(plan.sites)
    # long skips stored before the fork meet the stream behind it
    plan.sites += [
        Site(name, model.get_submodule(name), SPLIT, SPLIT, streams=trace.skips[name])
        for name in trace.blocks[at:]
        if name in trace.skips
    ]
    inside = [a.name for a in trace.attentions if a.name.startswith(f"{home}.")]
    for name in inside[: inside.index(fork)]:
        module = model.get_submodule(name)
        front.append(Site(name, module, SPLIT, SHARED, SPLIT, names=argument_names(module)))
        plan.sites.append(front[-1])
    places = [(site.name, site.arrives == SPLIT, site.leaves == SPLIT) for site in front]
    plan.sequence = (*places, *((name, True, True) for name in order))
    if next(a.grows for a in trace.attentions if a.name == fork):
        module = model.get_submodule(fork)
        plan.levels[fork] = SHARED
        plan.sites.append(Site(fork, module, SPLIT, SHARED, names=argument_names(module)))
    return plan


def _shared_blocks(model: Any, trace: Trace, names: tuple[str, ...]) -> Iterator[Site]:
    """Sites of the blocks in front of the fork's."""
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        follows = index > 0 and _follows(name, names[index - 1])
        leads = index + 1 < len(names) and _follows(names[index + 1], name)
        yield Site(
            name,
            module,
            SHARED if follows else SPLIT,
            SHARED,
            None if leads else SPLIT,
            trace.skips.get(name, ()),
            names=argument_names(module),
        )


def _follows(name: str, before: str) -> bool:
    """Whether a block is the next one of the same list."""
    (part, _, index), (other, _, last) = name.rpartition("."), before.rpartition(".")
    return part == other and int(index) == int(last) + 1

"""Where diffusion transformers can change rows: at their blocks.

Embeddings and the final layers run on all branches: they are cheap, and the tail of some models
relies on the batch size seen at entry. What is not cheap in front of the blocks (refiners of text
or image tokens) runs on the shared rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..models.layouts import Layout, layout_of, walk
from .block_hooks import Actions, begins_behind, is_shuffled, runs_without
from .plan import (
    BranchPlan,
    Site,
    argument_names,
    block_sites,
    text_key_sites,
    text_projection_sites,
    unshared,
)
from .rows import MERGED, SHARED, SPLIT


def _execution_order(blocks: list[tuple[str, Any]], layout: Layout, names: set[str]) -> list[str]:
    """``names`` of attentions and blocks, those that are known, as the model runs them."""
    ordered = []
    for name, _ in blocks:
        ordered += [name, *[f"{name}.{attn}" for attn in layout.attentions]]
    return [name for name in ordered if name in names]


def plan_dit(
    model: Any,
    perturbed: set[str],
    *,
    merge: bool,
    blocks: Mapping[str, Actions] | None = None,
) -> BranchPlan:
    """The plan of a diffusion transformer whose attentions named in ``perturbed`` are perturbed.

    ``blocks`` says what happens to each branch in blocks that are perturbed as a whole.
    """
    blocks = blocks or {}
    names, layout = perturbed | set(blocks), layout_of(model)
    walked = [] if layout is None else walk(model, layout)
    order = () if layout is None else tuple(_execution_order(walked, layout, names))
    if layout is None or len(order) < len(names):
        return unshared(tuple(sorted(names)), "a perturbed layer is in no known block")
    fork = order[0]
    fork_index = next(i for i, (name, _) in enumerate(walked) if f"{fork}.".startswith(f"{name}."))
    inside = any(name.startswith(f"{walked[fork_index][0]}.") for name in perturbed)
    shuffled = fork in blocks and layout.equivariant and is_shuffled(blocks[fork])
    # where nothing in the fork's block needs the rows of the perturbed branches
    behind = shuffled or (fork in blocks and begins_behind(blocks[fork], inside))
    merge = merge and layout.merge and (fork_index > 0 or behind or fork not in blocks)

    plan = BranchPlan(fork=fork, order=order, levels=dict.fromkeys(order, SPLIT), merged=merge)
    plan.sites += text_projection_sites(model)
    plan.sites += [
        Site(name, module, SPLIT, SHARED, leaves=SPLIT, names=argument_names(module))
        for name, module in _before(model, layout)
    ]
    if shuffled:
        plan.shuffled = tuple(name for name, _ in walked[fork_index:])
    for index, (name, block) in enumerate(walked):
        arrives = SPLIT if index == 0 or (index > fork_index and not shuffled) else SHARED
        attentions = [
            (attn, getattr(block, attn))
            for attn in layout.attentions
            if getattr(block, attn, None) is not None
        ]
        streams = ("skip",) if getattr(block, "skip_linear", None) is not None else ()
        alone = index > fork_index and runs_without(blocks.get(name))
        if index < fork_index or (behind and index == fork_index) or alone or shuffled:
            last = index == fork_index - 1 and not behind
            leaves, arguments = SPLIT if last else None, argument_names(block)
            plan.sites.append(Site(name, block, arrives, SHARED, leaves, streams, arguments))
            if index >= fork_index:
                plan.blocks[name] = arrives, SHARED
                plan.extend(name)
            if merge and index == 0:
                attn_name, attn = attentions[0]
                site = Site(
                    f"{name}.{attn_name}", attn, SHARED, MERGED, SHARED, names=argument_names(attn)
                )
                plan.sites.append(site)
                plan.merged_until = f"{name}.attn2"
            continue
        plan.sites += text_key_sites(block, name)
        if index == fork_index and fork not in blocks:
            level = MERGED if merge and index == 0 else SHARED
            plan.levels[fork] = level
            plan.sites += block_sites(name, attentions, fork, level)
            if getattr(block, "proj_mlp", None) is not None:
                # it sees what the attention beside it sees, where cond and perturbed are one
                plan.sites += [
                    Site(f"{name}.proj_mlp", block.proj_mlp, SPLIT, SHARED),
                    Site(f"{name}.act_mlp", block.act_mlp, SHARED, SHARED, leaves=SPLIT),
                ]
            if level == MERGED:
                plan.merged_until = fork
        if streams:
            # long skips stored before the fork meet the stream behind it
            plan.sites.append(Site(name, block, SPLIT, SPLIT, streams=streams))
    return plan


def _before(model: Any, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    for name in layout.before:
        module = getattr(model, name)
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(module))
        else:
            yield name, module

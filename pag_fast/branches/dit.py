"""Where diffusion transformers (SD3, HunyuanDiT, PixArt, Sana) can change rows: at their blocks.

Embeddings and the final layers run on all branches: they are cheap, and the tail of PixArt and Sana
relies on the batch size seen at entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .blocks import Actions, begins_behind, is_shuffled, runs_without
from .plan import (
    BranchPlan,
    Site,
    block_sites,
    text_key_sites,
    text_projection_sites,
    unshared,
)
from .rows import MERGED, SHARED, SPLIT


@dataclass(frozen=True)
class _Layout:
    blocks: str  # attribute that holds the blocks
    attentions: tuple[str, ...]  # self-attentions of a block in execution order
    merge: bool = False  # whether only the text, behind block 0's self-attention, sets uncond apart
    equivariant: bool = False  # whether blocks treat an image token alike wherever it is


_LAYOUTS = {
    "SD3Transformer2DModel": _Layout("transformer_blocks", ("attn", "attn2"), equivariant=True),
    "HunyuanDiT2DModel": _Layout("blocks", ("attn1",)),
    "PixArtTransformer2DModel": _Layout(
        "transformer_blocks", ("attn1",), merge=True, equivariant=True
    ),
    "SanaTransformer2DModel": _Layout("transformer_blocks", ("attn1",), merge=True),
}


def execution_order(model: Any, names: set[str]) -> tuple[str, ...] | None:
    """``names`` of attentions and blocks sorted as the model runs them; ``None`` if unknown."""
    layout = _LAYOUTS[type(model).__name__]
    ordered = []
    for index, _ in enumerate(getattr(model, layout.blocks)):
        block = f"{layout.blocks}.{index}"
        ordered += [block, *[f"{block}.{attn}" for attn in layout.attentions]]
    ordered = [name for name in ordered if name in names]
    return tuple(ordered) if len(ordered) == len(names) else None


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
    names = perturbed | set(blocks)
    order = execution_order(model, names)
    if order is None:
        return unshared(tuple(sorted(names)), "a perturbed layer is in no known block")
    layout = _LAYOUTS[type(model).__name__]
    fork = order[0]
    match = re.fullmatch(rf"{layout.blocks}\.(\d+)(\..*)?", fork)
    assert match is not None
    fork_index = int(match[1])
    inside = any(name.startswith(f"{layout.blocks}.{fork_index}.") for name in perturbed)
    shuffled = fork in blocks and layout.equivariant and is_shuffled(blocks[fork])
    # where nothing in the fork's block needs the rows of the perturbed branches
    behind = shuffled or (fork in blocks and begins_behind(blocks[fork], inside))
    merge = merge and layout.merge and (fork_index > 0 or behind or fork not in blocks)

    plan = BranchPlan(fork=fork, order=order, levels=dict.fromkeys(order, SPLIT), merged=merge)
    plan.sites += text_projection_sites(model)
    count = len(getattr(model, layout.blocks))
    if shuffled:
        plan.shuffled = tuple(f"{layout.blocks}.{i}" for i in range(fork_index, count))
    for index, block in enumerate(getattr(model, layout.blocks)):
        name = f"{layout.blocks}.{index}"
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
            plan.sites.append(Site(name, block, arrives, SHARED, SPLIT if last else None, streams))
            if index >= fork_index:
                plan.blocks[name] = arrives, SHARED
                plan.extend(name)
            if merge and index == 0:
                attn_name, attn = attentions[0]
                plan.sites.append(Site(f"{name}.{attn_name}", attn, SHARED, MERGED, SHARED))
                plan.merged_until = f"{name}.attn2"
            continue
        plan.sites += text_key_sites(block, name)
        if index == fork_index and fork not in blocks:
            level = MERGED if merge and index == 0 else SHARED
            plan.levels[fork] = level
            plan.sites += block_sites(name, attentions, fork, level)
            if level == MERGED:
                plan.merged_until = fork
        if streams:
            # long skips stored before the fork meet the stream behind it
            plan.sites.append(Site(name, block, SPLIT, SPLIT, streams=streams))
    return plan

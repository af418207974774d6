"""Where diffusion transformers (SD3, HunyuanDiT, PixArt, Sana) can change rows: at their blocks.

Embeddings and the final layers run on all branches: they are cheap, and the tail of PixArt and Sana
relies on the batch size seen at entry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

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


_LAYOUTS = {
    "SD3Transformer2DModel": _Layout("transformer_blocks", ("attn", "attn2")),
    "HunyuanDiT2DModel": _Layout("blocks", ("attn1",)),
    "PixArtTransformer2DModel": _Layout("transformer_blocks", ("attn1",), merge=True),
    "SanaTransformer2DModel": _Layout("transformer_blocks", ("attn1",), merge=True),
}


def execution_order(model: Any, names: set[str]) -> tuple[str, ...] | None:
    """``names`` of attention modules sorted as the model runs them; ``None`` if that is unknown."""
    layout = _LAYOUTS[type(model).__name__]
    ordered = [
        f"{layout.blocks}.{index}.{attn}"
        for index, _ in enumerate(getattr(model, layout.blocks))
        for attn in layout.attentions
    ]
    ordered = [name for name in ordered if name in names]
    return tuple(ordered) if len(ordered) == len(names) else None


def plan_dit(model: Any, perturbed: set[str], *, merge: bool) -> BranchPlan:
    """The plan of a diffusion transformer whose attentions named in ``perturbed`` are perturbed."""
    order = execution_order(model, perturbed)
    if order is None:
        return unshared(tuple(sorted(perturbed)), "a perturbed layer is in no known block")
    layout = _LAYOUTS[type(model).__name__]
    fork = order[0]
    match = re.fullmatch(rf"{layout.blocks}\.(\d+)\..*", fork)
    assert match is not None
    fork_index = int(match[1])
    merge = merge and layout.merge

    plan = BranchPlan(fork=fork, order=order, levels=dict.fromkeys(order, SPLIT), merged=merge)
    plan.sites += text_projection_sites(model)
    for index, block in enumerate(getattr(model, layout.blocks)):
        name = f"{layout.blocks}.{index}"
        if index >= fork_index:
            plan.sites += text_key_sites(block, name)
        arrives = SPLIT if index == 0 else SHARED
        attentions = [
            (attn, getattr(block, attn))
            for attn in layout.attentions
            if getattr(block, attn, None) is not None
        ]
        if index < fork_index:
            leaves = SPLIT if index == fork_index - 1 else None
            plan.sites.append(Site(name, block, arrives, SHARED, leaves))
            if merge and index == 0:
                attn_name, attn = attentions[0]
                plan.sites.append(Site(f"{name}.{attn_name}", attn, SHARED, MERGED, SHARED))
                plan.merged_until = f"{name}.attn2"
        elif index == fork_index:
            level = MERGED if merge and index == 0 else SHARED
            plan.levels[fork] = level
            plan.sites += block_sites(name, attentions, fork, level)
            if level == MERGED:
                plan.merged_until = fork
        if index >= fork_index and getattr(block, "skip_linear", None) is not None:
            # long skips stored before the fork meet the stream behind it
            plan.sites.append(Site(name, block, SPLIT, SPLIT, streams=("skip",)))
    return plan

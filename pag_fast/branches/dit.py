"""Where diffusion transformers can change rows: at their blocks.

Embeddings and the final layers run on all branches: they are cheap, and the tail of some models
relies on the batch size seen at entry. What is not cheap in front of the blocks (refiners of text
or image tokens) runs on the shared rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

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


@dataclass(frozen=True)
class _Layout:
    blocks: tuple[str, ...]  # attributes that hold blocks, in execution order
    attentions: tuple[str, ...]  # self-attentions of a block in execution order
    merge: bool = False  # whether only the text, behind block 0's self-attention, sets uncond apart
    # in front of the blocks: modules, or lists of them, that take more than a block's share
    before: tuple[str, ...] = ()


_JOINT = ("transformer_blocks", "single_transformer_blocks")

_LAYOUTS = {
    "SD3Transformer2DModel": _Layout(("transformer_blocks",), ("attn", "attn2")),
    "HunyuanDiT2DModel": _Layout(("blocks",), ("attn1",)),
    "PixArtTransformer2DModel": _Layout(("transformer_blocks",), ("attn1",), merge=True),
    "SanaTransformer2DModel": _Layout(("transformer_blocks",), ("attn1",), merge=True),
    "FluxTransformer2DModel": _Layout(_JOINT, ("attn",)),
    "QwenImageTransformer2DModel": _Layout(("transformer_blocks",), ("attn",)),
    "CogVideoXTransformer3DModel": _Layout(("transformer_blocks",), ("attn1",)),
    "HunyuanVideoTransformer3DModel": _Layout(_JOINT, ("attn",), before=("context_embedder",)),
    "WanTransformer3DModel": _Layout(("blocks",), ("attn1",), merge=True),
    "LTXVideoTransformer3DModel": _Layout(("transformer_blocks",), ("attn1",), merge=True),
    "Lumina2Transformer2DModel": _Layout(
        ("layers",), ("attn",), before=("context_refiner", "noise_refiner")
    ),
}


def perturbable(model: Any) -> tuple[str, ...] | None:
    """Names of a transformer's attentions over image tokens, in the order it runs them.

    ``None`` for a class that is not known.
    """
    layout = _layout(model)
    if layout is None:
        return None
    return tuple(
        f"{name}.{attn}"
        for name, block in _blocks(model, layout)
        for attn in layout.attentions
        if getattr(block, attn, None) is not None
    )


def _layout(model: Any) -> _Layout | None:
    classes = (cls.__name__ for cls in type(model).__mro__)
    return next((_LAYOUTS[name] for name in classes if name in _LAYOUTS), None)


def _blocks(model: Any, layout: _Layout) -> list[tuple[str, Any]]:
    return [
        (f"{part}.{index}", block)
        for part in layout.blocks
        for index, block in enumerate(getattr(model, part))
    ]


def plan_dit(model: Any, perturbed: set[str], *, merge: bool) -> BranchPlan:
    """The plan of a diffusion transformer whose attentions named in ``perturbed`` are perturbed."""
    layout = _layout(model)
    order = tuple(name for name in perturbable(model) or () if name in perturbed)
    if layout is None or len(order) < len(perturbed):
        return unshared(tuple(sorted(perturbed)), "a perturbed layer is in no known block")
    fork = order[0]
    blocks = _blocks(model, layout)
    fork_index = next(i for i, (name, _) in enumerate(blocks) if fork.startswith(f"{name}."))
    merge = merge and layout.merge

    plan = BranchPlan(fork=fork, order=order, levels=dict.fromkeys(order, SPLIT), merged=merge)
    plan.sites += text_projection_sites(model)
    plan.sites += [
        Site(name, module, SPLIT, SHARED, leaves=SPLIT, names=argument_names(module))
        for name, module in _before(model, layout)
    ]
    for index, (name, block) in enumerate(blocks):
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
            plan.sites.append(
                Site(name, block, arrives, SHARED, leaves, names=argument_names(block))
            )
            if merge and index == 0:
                attn_name, attn = attentions[0]
                site = Site(
                    f"{name}.{attn_name}", attn, SHARED, MERGED, SHARED, names=argument_names(attn)
                )
                plan.sites.append(site)
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


def _before(model: Any, layout: _Layout) -> Iterator[tuple[str, nn.Module]]:
    for name in layout.before:
        module = getattr(model, name)
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(module))
        else:
            yield name, module

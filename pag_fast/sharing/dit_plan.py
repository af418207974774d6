"""Where diffusion transformers can change rows: at their blocks.

Embeddings and the final layers run on all branches: they are cheap, and the tail of some models
relies on the batch size seen at entry. What is not cheap in front of the blocks (refiners of text
or image tokens) runs on the shared rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .block_hooks import Actions, begins_behind, is_shuffled, runs_without
from .layout import Layout, attentions_of, walk
from .plan import (
    BranchPlan,
    Site,
    argument_names,
    block_sites,
    in_two_places,
    text_key_sites,
    text_projection_sites,
    unshared,
)
from .rows import MERGED, SHARED, SPLIT

Blocks = list[tuple[str, Any]]

# of an attention, what is put together with its product: FLUX.2's single blocks, Krea 2's gate
_BESIDE_THE_PRODUCT = ("mlp_act_fn", "to_gate")


@dataclass(frozen=True)
class _Fork:
    """Where the perturbed branches begin.

    Attributes:
        name: of the attention or block.
        index: of the block, among all.
        is_block: the fork is a whole block.
        shuffled: from the fork on perturbed rows are a permutation of cond's.
        behind: nothing in the fork's block needs the rows of the perturbed branches.
        merge: block 0's self-attention runs once for uncond and cond.
    """

    name: str
    index: int
    is_block: bool
    shuffled: bool
    behind: bool
    merge: bool


def plan_dit(
    model: Any,
    perturbed: set[str],
    *,
    layout: Layout,
    merge: bool,
    blocks: Mapping[str, Actions] | None = None,
) -> BranchPlan:
    """The plan of a diffusion transformer whose attentions named in ``perturbed`` are perturbed.

    ``layout`` is that of the model's class. ``blocks`` says what happens to each branch in blocks
    that are perturbed as a whole.
    """
    blocks = blocks or {}
    names, walked = perturbed | set(blocks), walk(model, layout)
    order = tuple(_execution_order(walked, layout, names))
    if len(order) < len(names):
        return unshared(tuple(sorted(names)), "a perturbed layer is in no known block")
    reason = in_two_places(model)
    if reason:
        return unshared(order, reason)
    fork = _find_fork(walked, order[0], perturbed, blocks, layout, merge)
    plan = BranchPlan(
        fork=fork.name, order=order, levels=dict.fromkeys(order, SPLIT), merged=fork.merge
    )
    plan.sites += text_projection_sites(model)
    plan.sites += [
        Site(name, module, SPLIT, SHARED, leaves=SPLIT, names=argument_names(module))
        for name, module in _before(model, layout)
    ]
    if fork.shuffled:
        plan.shuffled = tuple(name for name, _ in walked[fork.index :])
    last = fork.index - (not fork.behind)  # behind it rows are apart
    for residuals in layout.residuals:
        places = [i for i, (x, _) in enumerate(walked) if x.startswith(f"{residuals.blocks}.")]
        levels = tuple(SHARED if place < last else SPLIT for place in places)
        plan.block_residuals += ((residuals, levels),)
    for index, (name, block) in enumerate(walked):
        is_alone = index > fork.index and runs_without(blocks.get(name))
        is_before = index < fork.index or (fork.behind and index == fork.index)
        if is_before or is_alone or fork.shuffled:
            _plan_shared_block(plan, fork, layout, index, walked)
        else:
            _plan_split_block(plan, fork, layout, index, name, block)
    return plan


def _execution_order(blocks: Blocks, layout: Layout, names: set[str]) -> list[str]:
    """``names`` of attentions and blocks, those that are known, as the model runs them."""
    ordered = []
    for name, _ in blocks:
        ordered += [name, *[f"{name}.{attn}" for attn in layout.attentions]]
    return [name for name in ordered if name in names]


def _find_fork(
    walked: Blocks,
    name: str,
    perturbed: set[str],
    blocks: Mapping[str, Actions],
    layout: Layout,
    merge: bool,
) -> _Fork:
    index = next(i for i, (block, _) in enumerate(walked) if f"{name}.".startswith(f"{block}."))
    is_block = name in blocks
    inside = any(layer.startswith(f"{walked[index][0]}.") for layer in perturbed)
    shuffled = is_block and layout.equivariant and is_shuffled(blocks[name])
    behind = shuffled or (is_block and begins_behind(blocks[name], inside))
    merge = merge and layout.merge and (index > 0 or behind or not is_block)
    return _Fork(name, index, is_block, shuffled, behind, merge)


def _streams(block: Any) -> tuple[str, ...]:
    """Arguments of a block that have rows, besides its first: HunyuanDiT's long skips."""
    return ("skip",) if getattr(block, "skip_linear", None) is not None else ()


def _plan_shared_block(
    plan: BranchPlan, fork: _Fork, layout: Layout, index: int, walked: Blocks
) -> None:
    """A block that runs without the perturbed rows."""
    name, block = walked[index]
    is_behind = index > fork.index and not fork.shuffled
    whole = layout.whole_between
    arrives = SPLIT if index == 0 or is_behind or whole else SHARED
    # behind the fork, what appends the rows of branches that skip the block hands on all
    is_last = index == fork.index - 1 and not fork.behind
    leaves = SPLIT if is_last or (whole and index < fork.index) else None
    plan.sites.append(
        Site(
            name,
            block,
            arrives,
            SHARED,
            leaves,
            _streams(block),
            argument_names(block),
            layout.twice,
        )
    )
    if index >= fork.index:
        plan.blocks[name] = arrives, SHARED
        plan.extend(name, walked[index - 1][0] if index else "")
    if fork.merge and index == 0:
        attribute, attn = attentions_of(block, layout)[0]
        plan.sites.append(
            Site(f"{name}.{attribute}", attn, SHARED, MERGED, SHARED, names=argument_names(attn))
        )
        plan.merged_until = f"{name}.attn2"


def _plan_split_block(
    plan: BranchPlan, fork: _Fork, layout: Layout, index: int, name: str, block: Any
) -> None:
    """A block that runs on all rows: the fork's, or one behind it."""
    plan.sites += text_key_sites(block, name)
    if index == fork.index and not fork.is_block:
        level = MERGED if fork.merge and index == 0 else SHARED
        plan.levels[fork.name] = level
        plan.sites += block_sites(name, attentions_of(block, layout), fork.name, level)
        plan.sites += _parallel_sites(name, block, layout)
        if level == MERGED:
            plan.merged_until = fork.name
    if _streams(block):
        # long skips stored before the fork meet the stream behind it
        plan.sites.append(Site(name, block, SPLIT, SPLIT, streams=_streams(block)))


def _parallel_sites(name: str, block: Any, layout: Layout) -> Iterator[Site]:
    """Of what runs beside the fork, and sees what it sees, where cond and perturbed are one."""
    if getattr(block, "proj_mlp", None) is not None:
        yield Site(f"{name}.proj_mlp", block.proj_mlp, SPLIT, SHARED)
        yield Site(f"{name}.act_mlp", block.act_mlp, SHARED, SHARED, leaves=SPLIT)
    for attribute, attention in attentions_of(block, layout):
        for part in _BESIDE_THE_PRODUCT:
            if getattr(attention, part, None) is not None:
                full, module = f"{name}.{attribute}.{part}", getattr(attention, part)
                yield Site(full, module, SHARED, SHARED, leaves=SPLIT)


def _before(model: Any, layout: Layout) -> Iterator[tuple[str, nn.Module]]:
    for name in layout.before:
        module = getattr(model, name)
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(module))
        else:
            yield name, module

"""Where UNets (``UNet2DConditionModel``, ``UNetMotionModel``) and ControlNets can change rows.

Safe places are the modules that take their residual themselves: ``ResnetBlock2D``,
``Transformer2DModel``, ``AnimateDiffTransformer3D``. Inside the transformer that holds the fork,
the residual and the batch size are taken at entry, so it is entered with all branches and its
blocks before the fork are cut back to the shared rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .arguments import ADAPTER
from .block_hooks import Actions, begins_behind, is_shuffled, runs_without
from .plan import (
    BranchPlan,
    Site,
    SkipSite,
    argument_names,
    block_sites,
    class_name,
    in_two_places,
    text_key_sites,
    text_projection_sites,
    unshared,
)
from .rows import MERGED, SHARED, SPLIT

# blocks whose forward runs resnets[i], attentions[i], motion_modules[i] in turn
_KNOWN = (
    ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlockMotion", "CrossAttnDownBlockMotion"),
    ("UNetMidBlock2DCrossAttn", "UNetMidBlockCrossAttnMotion"),
    ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlockMotion", "CrossAttnUpBlockMotion"),
)
_DOWN, _MID, _UP = range(3)


@dataclass(frozen=True)
class _Unit:
    name: str
    module: Any
    block: tuple[int, int]  # (_DOWN, _MID or _UP; index): sorts in execution order
    step: int  # position of the resnet/attention/motion group within its block


def _groups(block: Any, name: str, own: tuple[int, int]) -> list[_Unit]:
    lists = [(n, list(getattr(block, n, None) or [])) for n in ("attentions", "motion_modules")]
    units = []
    for step, resnet in enumerate(block.resnets):
        # a mid block runs resnets[0] first, then attention i before resnet i + 1
        others = [
            _Unit(f"{name}.{kind}.{i}", modules[i], own, step)
            for kind, modules in lists
            for i in [step - 1 if own[0] == _MID else step]
            if 0 <= i < len(modules)
        ]
        unit = _Unit(f"{name}.resnets.{step}", resnet, own, step)
        units += [*others, unit] if own[0] == _MID else [unit, *others]
    return units


def _walk(model: Any) -> tuple[list[_Unit], str]:
    """The units of a UNet or ControlNet in execution order, or a reason why they are unknown."""
    blocks = [(f"down_blocks.{i}", b, (_DOWN, i)) for i, b in enumerate(model.down_blocks)]
    if model.mid_block is not None:
        blocks.append(("mid_block", model.mid_block, (_MID, 0)))
    blocks += [
        (f"up_blocks.{i}", b, (_UP, i)) for i, b in enumerate(getattr(model, "up_blocks", ()))
    ]
    units: list[_Unit] = []
    for name, block, own in blocks:
        if class_name(block) not in _KNOWN[own[0]]:
            return [], f"{name} has the unknown structure {class_name(block)}"
        units += _groups(block, name, own)
    return units, ""


def _blocks(unit: _Unit) -> list[Any]:
    return list(getattr(unit.module, "transformer_blocks", []))


def execution_order(model: Any, names: set[str]) -> tuple[str, ...] | None:
    """``names`` of attentions and blocks sorted as the model runs them; ``None`` if unknown."""
    units, _ = _walk(model)
    ordered = []
    for unit in units:
        for index, _ in enumerate(_blocks(unit)):
            block = f"{unit.name}.transformer_blocks.{index}"
            ordered += [n for n in (block, f"{block}.attn1", f"{block}.attn2") if n in names]
    return tuple(ordered) if len(ordered) == len(names) else None


def _text_first(units: list[_Unit], model: Any) -> bool:
    """Whether nothing but the text, in the second unit's cross-attention, sets uncond apart."""
    config = model.config
    if config.get("addition_embed_type") is not None or len(units) < 2:
        return False
    first, second = units[0], units[1]
    blocks = _blocks(second)
    return (
        first.name == "down_blocks.0.resnets.0"
        and second.name == "down_blocks.0.attentions.0"
        and bool(blocks)
        and all(getattr(blocks[0], attn, None) is not None for attn in ("attn1", "attn2"))
        and not blocks[0].only_cross_attention
    )


def _is_equivariant(unit: _Unit) -> bool:
    """Whether a transformer treats an image token alike wherever it is."""
    return class_name(unit.module) == "Transformer2DModel" and all(
        class_name(block) == "BasicTransformerBlock"
        and block.pos_embed is None
        and block.norm_type == "layer_norm"
        and not hasattr(block, "fuser")  # GLIGEN's boxes
        for block in _blocks(unit)
    )


def plan_unet(
    model: Any,
    perturbed: set[str],
    *,
    merge: bool,
    blocks: Mapping[str, Actions] | None = None,
) -> BranchPlan:
    """The plan of a UNet whose attention modules named in ``perturbed`` are perturbed.

    ``merge`` asks for uncond and cond to run as one until the first cross-attention, where the
    model allows it. ``blocks`` says what happens to each branch in blocks that are perturbed as a
    whole.
    """
    blocks = blocks or {}
    names = perturbed | set(blocks)
    order = execution_order(model, names)
    units, reason = _walk(model)
    if order is None:
        # outside any known unit (attention in an unknown block): run everything apart
        return unshared(tuple(sorted(names)), reason or "a perturbed layer is in no known block")
    reason = in_two_places(model)
    if reason:
        return unshared(order, reason)
    # CLIP's 77 tokens are not worth two small copies per layer, an LLM's 256 are
    long_text = model.config.get("encoder_hid_dim_type") == "text_proj"
    begin = _begin(units, order[0], perturbed, blocks, long_text=long_text)
    merge = merge and _text_first(units, model)
    plan = BranchPlan(fork=order[0], order=order, levels=dict.fromkeys(order, SPLIT), merged=merge)
    if long_text:
        plan.sites += text_projection_sites(model)
    levels = _plan_units(plan, model, units, begin)
    _plan_skips(model, plan, levels)
    return plan


@dataclass(frozen=True)
class _Begin:
    """How the perturbed branches begin, in the transformer that holds the fork, and go on."""

    fork: str
    unit: int  # index of the transformer among the units
    block: int  # index of the fork's block in the transformer
    is_block: bool  # the fork is a whole block
    behind: bool  # nothing in the fork's block needs the perturbed rows
    shuffled: bool  # nor does anything up to the transformer's end
    blocks: Mapping[str, Actions]  # that are perturbed as a whole
    long_text: bool  # its keys and values are worth sharing


def _begin(
    units: list[_Unit],
    fork: str,
    perturbed: set[str],
    blocks: Mapping[str, Actions],
    *,
    long_text: bool,
) -> _Begin:
    name, _, rest = fork.partition(".transformer_blocks.")
    index = next(i for i, unit in enumerate(units) if unit.name == name)
    is_block = fork in blocks
    shuffled = behind = False
    if is_block:
        inside = any(layer.startswith(f"{fork}.") for layer in perturbed)
        shuffled = is_shuffled(blocks[fork]) and _is_equivariant(units[index])
        behind = shuffled or begins_behind(blocks[fork], inside)
    block = int(rest.split(".")[0])
    return _Begin(fork, index, block, is_block, behind, shuffled, blocks, long_text)


_Levels = dict[tuple[tuple[int, int], int], tuple[int, int]]
"""Of each group of units, by block and step: the level it is entered at and the one it leaves."""


def _plan_units(plan: BranchPlan, model: Any, units: list[_Unit], begin: _Begin) -> _Levels:
    """Sites of the units from ``conv_in`` on, and those of the fork's transformer."""
    stream, entered = _plan_entry(plan, model, units, begin), None
    levels: _Levels = {}
    for index, unit in enumerate(units):
        is_before_fork = unit.block < units[begin.unit].block
        if is_before_fork and unit.block != entered:
            # a block that lies before the fork as a whole is entered with the shared rows
            plan.sites.append(_block_site(model, unit.block, stream))
            stream, entered = SHARED, unit.block
        runs, climbs = _unit_levels(plan, index, begin)
        key = (unit.block, unit.step)
        levels[key] = (levels.get(key, (stream, 0))[0], runs)
        changes = stream != runs or climbs is not None
        if changes or (runs != SPLIT and not is_before_fork):
            plan.sites.append(Site(unit.name, unit.module, stream, runs, climbs))
        if index == begin.unit:
            merged = plan.merged and index == 1 and begin.block == 0
            plan.levels[begin.fork] = MERGED if merged else SHARED
            _fork_sites(plan, unit, begin)
        if plan.merged and index == 1:
            plan.merged_until = _merged_attention(plan, unit, begin)
        if index >= begin.unit:
            _plan_blocks(plan, unit, begin, is_behind=index > begin.unit)
        stream = runs if climbs is None else climbs
    return levels


def _plan_entry(plan: BranchPlan, model: Any, units: list[_Unit], begin: _Begin) -> int:
    """The site of ``conv_in``, where it has one; returns the level that the first unit sees."""
    # conv_in is 0.05 % of a row: where its skip is needed on all rows, so it is computed
    if max(i for i, unit in enumerate(units) if ".resnets." in unit.name) >= begin.unit:
        return SPLIT
    plan.sites.append(Site("conv_in", model.conv_in, SPLIT, SHARED))
    return SHARED


def _unit_levels(plan: BranchPlan, index: int, begin: _Begin) -> tuple[int, int | None]:
    """The level that a unit runs at, and the one that its output is brought to."""
    runs = SHARED if index < begin.unit else SPLIT
    if plan.merged and index == 0:
        runs = MERGED
    # attention and motion modules directly follow the unit before them, so that what they need
    # more can be added behind it
    if index + 1 == begin.unit:
        return runs, SPLIT
    return runs, SHARED if runs == MERGED else None


def _plan_blocks(plan: BranchPlan, unit: _Unit, begin: _Begin, *, is_behind: bool) -> None:
    """Sites inside a transformer from the fork on: skipped blocks, and keys of a long text."""
    before = ""
    for index, block in enumerate(_blocks(unit)):
        name = f"{unit.name}.transformer_blocks.{index}"
        behind = is_behind or index > begin.block
        if behind and name not in plan.blocks and runs_without(begin.blocks.get(name)):
            plan.sites.append(Site(name, block, SPLIT, SHARED))
            plan.blocks[name] = SPLIT, SHARED
            if not is_behind:
                plan.extend(name, before)
        before = name
        is_split = behind or name == begin.fork or begin.fork.startswith(f"{name}.")
        if begin.long_text and is_split and name not in plan.blocks:
            plan.sites += text_key_sites(block, name)


def _block_site(model: Any, block: tuple[int, int], stream: int) -> Site:
    name = ("down_blocks", "mid_block", "up_blocks")[block[0]]
    if block[0] != _MID:
        name += f".{block[1]}"
    return Site(name, model.get_submodule(name), stream, SHARED)


def _merged_attention(plan: BranchPlan, unit: _Unit, begin: _Begin) -> str:
    """Let the first transformer's self-attention run on one slab; returns where uncond parts."""
    name = f"{unit.name}.transformer_blocks.0"
    if begin.fork == f"{name}.attn1" or (begin.fork == name and not begin.behind):
        return begin.fork
    plan.sites.append(Site(f"{name}.attn1", _blocks(unit)[0].attn1, SHARED, MERGED, SHARED))
    return f"{name}.attn2"


def _fork_sites(plan: BranchPlan, unit: _Unit, begin: _Begin) -> None:
    blocks = _blocks(unit)
    last = begin.block + begin.behind
    if begin.shuffled:
        last = len(blocks)
        names = [f"{unit.name}.transformer_blocks.{i}" for i in range(begin.block, last)]
        plan.shuffled = tuple(names)
    for index, block in enumerate(blocks[:last]):
        name = f"{unit.name}.transformer_blocks.{index}"
        arrives = SPLIT if index == 0 else SHARED
        leaves = SPLIT if index == begin.block - 1 and not begin.behind else None
        plan.sites.append(Site(name, block, arrives, SHARED, leaves))
        if index >= begin.block:
            plan.blocks[name] = arrives, SHARED
            plan.extend(name, f"{unit.name}.transformer_blocks.{index - 1}")
    if not begin.is_block:
        block, name = blocks[begin.block], f"{unit.name}.transformer_blocks.{begin.block}"
        found = [(attn, getattr(block, attn, None)) for attn in ("attn1", "attn2")]
        attentions = [(attn, module) for attn, module in found if module is not None]
        plan.sites += block_sites(name, attentions, begin.fork, plan.levels[begin.fork])


def _plan_skips(
    model: Any,
    plan: BranchPlan,
    levels: _Levels,
) -> None:
    """Levels of the skip tensors: made along the way down, consumed along the way up."""
    made: list[list[int]] = []
    for index, block in enumerate(model.down_blocks):
        own = [levels[((_DOWN, index), step)][1] for step in range(len(block.resnets))]
        made.append(own + own[-1:] * (getattr(block, "downsamplers", None) is not None))
    mid = model.mid_block
    plan.mid_level = made[-1][-1] if mid is None else levels[((_MID, 0), len(mid.resnets) - 1)][1]
    # the up path takes the skips in reverse, resnet by resnet
    consumed = [
        levels[((_UP, index), step)][0]
        for index, block in enumerate(model.up_blocks)
        for step in range(len(block.resnets))
    ][::-1]
    plan.residual_levels = tuple(consumed)
    plan.adapter_levels = tuple(own[-1] for own in made)
    plan.takes_adapters = ADAPTER in argument_names(model)
    start = 1  # behind conv_in's, which is made at the level it is consumed at
    for index, own in enumerate(made):
        stored = tuple(consumed[start : start + len(own)])
        start += len(own)
        if stored != tuple(own):
            block = model.down_blocks[index]
            plan.skip_sites.append(SkipSite(f"down_blocks.{index}", block, tuple(own), stored))


def plan_controlnet(model: Any) -> BranchPlan:
    """The plan of a ControlNet, which is never perturbed: only uncond and cond can run as one.

    Its input holds no perturbed rows any more, so its SHARED and SPLIT are the same.
    """
    if not hasattr(model, "down_blocks"):
        return BranchPlan(reason=f"{type(model).__name__} is no ControlNet of a UNet")
    units, reason = _walk(model)
    embedding = getattr(model, "controlnet_cond_embedding", None)
    plan = BranchPlan(reason=reason)
    if embedding is not None:
        plan.sites.append(Site("controlnet_cond_embedding", embedding, SPLIT, MERGED, leaves=SPLIT))
        plan.merged_until = "controlnet_cond_embedding"
    if units and _text_first(units, model):
        attn1 = _blocks(units[1])[0].attn1
        plan.merged = True
        plan.merged_until = f"{units[1].name}.transformer_blocks.0.attn2"
        plan.sites += [
            Site(units[0].name, units[0].module, SPLIT, MERGED, SPLIT),
            Site(f"{units[1].name}.transformer_blocks.0.attn1", attn1, SPLIT, MERGED, SPLIT),
        ]
    return plan

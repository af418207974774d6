"""Layers of a guider: diffusers' indices and configurations, and the defaults of each model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from diffusers.hooks import LayerSkipConfig
from torch import nn

from ..models.layer_names import resolve, self_attentions

# where transformers keep their blocks
_STACKS = (
    "transformer_blocks",
    "blocks",
    "layers",
    "visual_transformer_blocks",
    "single_transformer_blocks",
    "temporal_transformer_blocks",
)


def as_configs(given: Any, argument: str) -> list[LayerSkipConfig]:
    """``LayerSkipConfig`` in any form that diffusers accepts, as copies: ours change nothing.

    Raises:
        ValueError: anything else.
    """
    items = list(given) if isinstance(given, list | tuple) else [given]
    made = []
    for item in items:
        if isinstance(item, dict):
            item = LayerSkipConfig.from_dict(item)
        if not isinstance(item, LayerSkipConfig):
            raise ValueError(
                f"{argument} must be a LayerSkipConfig, a dictionary of its fields or a list of "
                f"these; got {item!r}."
            )
        indices = [item.indices] if isinstance(item.indices, int) else list(item.indices)
        if not indices:
            raise ValueError(f"{argument} names no layer: its indices are empty.")
        if item.dropout != 1.0:
            raise ValueError(
                f"{argument} asks for a dropout of {item.dropout}: layers are perturbed as a "
                "whole here (dropout=1.0). Diffusers' own guider can do it."
            )
        if item.skip_attention and item.skip_attention_scores:
            raise ValueError(
                f"{argument} sets both skip_attention and skip_attention_scores: choose one."
            )
        made.append(replace(item, indices=indices))
    return made


def saved(configs: Any) -> Any:
    """``configs`` in a form that can be written to JSON."""
    if isinstance(configs, list | tuple):
        return [saved(item) for item in configs]
    return asdict(configs) if isinstance(configs, LayerSkipConfig) else configs


def is_unet(model: Any) -> bool:
    """Whether blocks lie on a way down and a way up."""
    return hasattr(model, "down_blocks")


def stack_of(model: nn.Module, fqn: str = "auto") -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks that ``fqn`` names, and its name.

    ``"auto"``: the first one that the model defines, which is the one it runs first.

    Raises:
        ValueError: no such list; the message names those that there are.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if fqn != "auto":
        found = lists.get(fqn)
        if found is None:
            names = [name for name in lists if name.endswith(_STACKS)]
            raise ValueError(
                f"fqn={fqn!r} is no list of blocks of {type(model).__name__}. "
                f"Its lists are: {', '.join(names)}."
            )
        return fqn, found
    for name, module in model.named_children():
        if name in _STACKS and isinstance(module, nn.ModuleList):
            return name, module
    names = [name for name in lists if name.endswith("transformer_blocks")]
    raise ValueError(
        f"The blocks of {type(model).__name__} have no common numbering: name a list of them by "
        f"fqn, one of {', '.join(names)}, or layers such as 'mid'."
    )


def blocks_of(model: nn.Module, config: LayerSkipConfig) -> dict[str, nn.Module]:
    """The blocks that a configuration names, by module name.

    Raises:
        ValueError: no such list, or an index outside of it.
    """
    name, stack = stack_of(model, config.fqn)
    for index in config.indices:
        if not isinstance(index, int) or not 0 <= index < len(stack):
            raise ValueError(
                f"{name} of {type(model).__name__} has blocks 0 to {len(stack) - 1}; got {index!r}."
            )
    return {f"{name}.{index}": stack[index] for index in sorted(set(config.indices))}


def attentions_in(model: nn.Module, blocks: Iterable[str]) -> dict[str, nn.Module]:
    """The self-attentions in blocks, by module name; empty for models without any we know."""
    prefixes = tuple(f"{name}." for name in blocks)
    return {n: m for n, m in self_attentions(model).items() if n.startswith(prefixes)}


def perturbed_attentions(
    model: nn.Module, layers: Any, configs: list[LayerSkipConfig], *, exact: bool
) -> dict[str, nn.Module]:
    """The attentions that a guider for PAG perturbs, by module name.

    Without layers and configurations: the mid block of a UNet; the block in the middle of a
    transformer, where the papers and ports that name one take it.

    Raises:
        ValueError: layers that the model does not have.
    """
    if layers is not None:
        return resolve(model, layers, exact=exact)
    if configs:
        blocks = [name for config in configs for name in blocks_of(model, config)]
        found = attentions_in(model, blocks)
        if not found:
            raise ValueError(f"There is no self-attention to perturb in {', '.join(blocks)}.")
        return found
    if is_unet(model):
        return resolve(model, "mid")
    found = self_attentions(model)
    # of Flux and HunyuanVideo over both kinds of blocks
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    return attentions_in(model, [blocks[len(blocks) // 2]])


def skipped_blocks(model: nn.Module) -> LayerSkipConfig:
    """The blocks that skip-layer guidance skips by default: 7 to 9 of 24, and so on.

    Those are Stability AI's for Stable Diffusion 3.5 medium.

    Raises:
        ValueError: a UNet, for which nobody has published any.
    """
    if is_unet(model):
        raise ValueError(
            "There are no default layers of skip-layer guidance for UNets: name them by "
            "skip_layer_config=LayerSkipConfig([0], "
            "fqn='mid_block.attentions.0.transformer_blocks')."
        )
    _, stack = stack_of(model)
    first = round(len(stack) * 7 / 24)
    return LayerSkipConfig(list(range(first, min(first + 3, len(stack)))))

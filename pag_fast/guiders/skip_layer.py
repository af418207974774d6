"""Skip-Layer Guidance as a guider of modular pipelines."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders import SkipLayerGuidance as _Stock
from diffusers.hooks import LayerSkipConfig
from torch import nn

from ..models.registry import family_of
from ..sharing.resume import Known, known_modules
from ..sharing.rows import BranchState
from .base import ResumedGuidance
from .changes import Perturbed, skipped_attention, skipped_block, skipped_feed_forward
from .resumption import Change, Resumption
from .selection import as_configs, attentions_in, blocks_of, saved, skipped_blocks


class SkipLayerGuidance(ResumedGuidance, _Stock):
    """A drop-in for ``diffusers.SkipLayerGuidance`` (Stability AI's SLG; STG, arXiv 2411.18664).

    The pass ``pred_cond_skip`` begins behind the first skipped block, from what the pass
    ``pred_cond`` had in front of it.

    Arguments that diffusers' class takes in another way:

    Args:
        skip_layer_guidance_start: as in :class:`PerturbedAttentionGuidance`.
        skip_layer_guidance_stop: likewise.
        skip_layer_guidance_layers: indices of blocks. By default 7 to 9 of 24, and the like.
        skip_layer_config: ``LayerSkipConfig`` or dictionaries, instead of layers, with a dropout
            of 1. They can skip blocks, their attention, its scores, or their feed-forward.

    Raises:
        ValueError: arguments that do not fit together; in a pass, layers that the denoiser does
            not have.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_start: float = 0.01,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_layers: int | list[int] | None = None,
        skip_layer_config: LayerSkipConfig | list[LayerSkipConfig] | dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        if skip_layer_guidance_layers is not None:
            if skip_layer_config is not None:
                raise ValueError(
                    "skip_layer_guidance_layers and skip_layer_config both name layers: choose one."
                )
            layers = skip_layer_guidance_layers
            layers = [layers] if isinstance(layers, int) else list(layers)
            if not layers or not all(isinstance(index, int) for index in layers):
                raise ValueError(
                    "skip_layer_guidance_layers must be an index of a block or a list of them; "
                    f"got {skip_layer_guidance_layers!r}. skip_layer_config can name other lists "
                    "of blocks."
                )
            configs = [LayerSkipConfig(layers)]
        else:
            given = [] if skip_layer_config is None else skip_layer_config
            configs = as_configs(given, "skip_layer_config")
        BaseGuidance.__init__(self, start, stop, enabled)
        self._begin(
            guidance_scale,
            skip_layer_guidance_scale,
            skip_layer_guidance_start,
            skip_layer_guidance_stop,
            guidance_rescale,
            use_original_formulation,
        )
        self.skip_layer_config = configs
        if skip_layer_config is not None:
            self.register_to_config(skip_layer_config=saved(configs))

    def _make(self, model: nn.Module) -> Resumption:
        configs = self.skip_layer_config or [skipped_blocks(model)]
        changes: list[Change] = []
        state = BranchState()
        modules: dict[str, nn.Module] = {}
        scores: dict[str, nn.Module] = {}
        for config in configs:
            for name, block in blocks_of(model, config).items():
                modules[name] = block
                attentions = attentions_in(model, [name])
                found = _changes(state, config, model, block, attentions)
                if config.skip_attention_scores:
                    scores.update(attentions)
                if not found and not (config.skip_attention_scores and attentions):
                    raise ValueError(f"The configuration of {name} skips nothing that it has.")
                changes += found
        prepare = None
        if scores:
            perturbed = Perturbed(state, model, scores)
            changes += perturbed.changes
            prepare = perturbed.prepare
        known = _known(model, modules)
        modules.update({item.name: item.module for item in known})
        return Resumption(state, known, changes, modules, prepare)


def _changes(
    state: BranchState,
    config: LayerSkipConfig,
    model: nn.Module,
    block: nn.Module,
    attentions: dict[str, nn.Module],
) -> list[Change]:
    """What a configuration asks to be left out of one block."""
    from diffusers.hooks._common import _FEEDFORWARD_CLASSES

    if config.skip_attention and config.skip_ff:
        return [skipped_block(state, model, block)]
    changes: list[Change] = []
    if config.skip_attention:
        for name, module in attentions.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            changes += [skipped_attention(state, model, parent, module)]
    if config.skip_ff:
        found = [m for m in block.modules() if isinstance(m, _FEEDFORWARD_CLASSES)]
        changes += [skipped_feed_forward(state, module) for module in found]
    return changes


def _known(model: nn.Module, blocks: dict[str, nn.Module]) -> list[Known]:
    """What lies in front of the first changed block; nothing for models whose order is unknown."""
    try:
        family = family_of(model)
    except ValueError:
        return []
    if family.is_derived or family.is_traced:
        return []
    # the blocks' attentions stand for the blocks
    attentions = set(attentions_in(model, blocks))
    return known_modules(model, family.plan(model, attentions, merge=False)) if attentions else []

"""``FluxTransformer2DModel`` and ``FluxControlNetModel``: FLUX.1."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedFluxAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import TEXT_THEN_IMAGE, Layout, Residuals, by_intervals
from .description import Checkpoint, ControlNetDescription, ModelDescription
from .tensors import Latent, NewTensors, packed, text_and_image

RESIDUALS = (
    Residuals("controlnet_block_samples", "transformer_blocks", spread=by_intervals),
    Residuals("controlnet_single_block_samples", "single_transformer_blocks", spread=by_intervals),
)
"""What a ControlNet of FLUX.1 adds between blocks."""

_LAYOUT = Layout(
    ("transformer_blocks", "single_transformer_blocks"), ("attn",), residuals=RESIDUALS
)
_TEXT_TOKENS = 512  # as long as the pipeline pads prompts


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, tokens = model.config, packed(latent)
    return {
        "hidden_states": new(rows, tokens, config.in_channels),
        "timestep": new(rows),
        "guidance": new(rows, dtype=torch.float32) if config.guidance_embeds else None,
        "pooled_projections": new(rows, config.pooled_projection_dim),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.joint_attention_dim),
        "txt_ids": new(_TEXT_TOKENS, 3),
        "img_ids": new(tokens, 3),
    }


def _controlled(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, kwargs = model.config, _inputs(model, new, rows, latent)
    if config.conditioning_embedding_channels is None:  # else it is given pixels
        kwargs["controlnet_cond"] = new(rows, packed(latent), config.in_channels)
    if config.num_mode is not None:
        kwargs["controlnet_mode"] = new(rows, 1, dtype=torch.int64)
    return kwargs


_BLOCKS = {
    "FluxTransformerBlock": TEXT_THEN_IMAGE,
    "FluxSingleTransformerBlock": TEXT_THEN_IMAGE,
}
_FUSABLE = frozenset({"FluxAttnProcessor"})

DESCRIPTION = ModelDescription(
    "FluxTransformer2DModel",
    PerturbedFluxAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks=_BLOCKS,
    layout=_LAYOUT,
    replaces=frozenset({"FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"}),
    fusable_processors=_FUSABLE,
    sequence=text_and_image,
    cut=text_and_image,
    shares_heads=True,
    checkpoints=(Checkpoint("FluxPipeline", "FLUX.1-dev", {"guidance_embeds": True}),),
)
CONTROLNET = ControlNetDescription(
    "FluxControlNetModel",
    inputs=_controlled,
    blocks=tuple(_BLOCKS),
    fusable_processors=_FUSABLE,
)

"""``SanaTransformer2DModel`` and ``SanaControlNetModel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedLinearAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout, Residuals
from .description import Checkpoint, ControlNetDescription, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(
    ("transformer_blocks",),
    ("attn1",),
    merge=True,
    residuals=(Residuals("controlnet_block_samples", "transformer_blocks", first=1),),
)
_1600M = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "attention_head_dim": 32,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, 300, config.caption_channels),
        "encoder_attention_mask": new(rows, 300, dtype=torch.int64),
    }


def _controlled(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    kwargs = _inputs(model, new, rows, latent)
    return {**kwargs, "controlnet_cond": new(rows, model.config.in_channels, *latent[1:])}


_FUSABLE = frozenset({"SanaLinearAttnProcessor2_0"})

DESCRIPTION = ModelDescription(
    "SanaTransformer2DModel",
    PerturbedLinearAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"SanaTransformerBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    text=frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
    stock_processors=(
        "PAGCFGSanaLinearAttnProcessor2_0",
        "PAGIdentitySanaLinearAttnProcessor2_0",
    ),
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    checkpoints=(Checkpoint("SanaPAGPipeline", "Sana 1.6B 1024", _1600M, vae_scale_factor=32),),
)
CONTROLNET = ControlNetDescription(
    "SanaControlNetModel",
    inputs=_controlled,
    blocks=("SanaTransformerBlock",),
    fusable_processors=_FUSABLE,
)

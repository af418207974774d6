"""``HunyuanDiT2DModel`` and ``HunyuanDiT2DControlNetModel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedRotaryAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout, Residuals
from .description import Checkpoint, ControlNetDescription, ModelDescription
from .tensors import Latent, NewTensors, patches

_LAYOUT = Layout(
    ("blocks",),
    ("attn1",),
    # added to the long skips, which are outputs of the first blocks
    residuals=(Residuals("controlnet_block_samples", "blocks"),),
)
_V1_2 = {
    "sample_size": 128,
    "num_layers": 40,
    "patch_size": 2,
    "attention_head_dim": 88,
    "num_attention_heads": 16,
    "in_channels": 4,
    "hidden_size": 1408,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "mlp_ratio": 4.3637,
    "text_len": 77,
    "text_len_t5": 256,
    "activation_fn": "gelu-approximate",
    "use_style_cond_and_image_meta_size": False,
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    head_dim = model.inner_dim // config.num_attention_heads
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": new(rows, config.text_len, dtype=torch.int64),
        "encoder_hidden_states_t5": new(rows, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": new(rows, config.text_len_t5, dtype=torch.int64),
        "image_rotary_emb": new.table(patches(model, latent), head_dim),
    }
    if config.use_style_cond_and_image_meta_size:
        kwargs["image_meta_size"] = new(rows, 6)
        kwargs["style"] = new(rows, dtype=torch.int64)
    return kwargs


def _controlled(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    kwargs = _inputs(model, new, rows, latent)
    return {**kwargs, "controlnet_cond": new(rows, model.config.in_channels, *latent[1:])}


_FUSABLE = frozenset({"HunyuanAttnProcessor2_0"})

DESCRIPTION = ModelDescription(
    "HunyuanDiT2DModel",
    PerturbedRotaryAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"HunyuanDiTBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    stock_processors=("PAGCFGHunyuanAttnProcessor2_0", "PAGHunyuanAttnProcessor2_0"),
    replaces=_FUSABLE | {"FusedHunyuanAttnProcessor2_0"},
    fusable_processors=_FUSABLE,
    checkpoints=(Checkpoint("HunyuanDiTPAGPipeline", "HunyuanDiT v1.2", _V1_2),),
)
CONTROLNET = ControlNetDescription(
    "HunyuanDiT2DControlNetModel",
    inputs=_controlled,
    blocks=("HunyuanDiTBlock",),
    fusable_processors=_FUSABLE,
)

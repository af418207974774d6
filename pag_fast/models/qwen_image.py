"""``QwenImageTransformer2DModel`` and ``QwenImageControlNetModel``."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from ..processors import PerturbedQwenAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import TEXT_THEN_IMAGE, Layout, Residuals, by_intervals
from .description import Checkpoint, ControlNetDescription, ModelDescription
from .tensors import Latent, NewTensors, packed, text_and_image

# with zero_cond_t tokens of pictures that are edited are modulated as at timestep 0
_LAYOUT = Layout(
    ("transformer_blocks",),
    ("attn",),
    twice=("temb",),
    residuals=(Residuals("controlnet_block_samples", "transformer_blocks", spread=by_intervals),),
)
_TEXT_TOKENS = 128  # the pipeline pads prompts to the longest of a batch


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, packed(latent), config.in_channels),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.joint_attention_dim),
        "encoder_hidden_states_mask": new(rows, _TEXT_TOKENS, dtype=torch.int64),
        "img_shapes": [[(1, latent[1] // 2, latent[2] // 2)]] * rows,
    }
    # older diffusers asks the caller for the lengths
    if "txt_seq_lens" in inspect.signature(inspect.unwrap(type(model).forward)).parameters:
        kwargs["txt_seq_lens"] = [_TEXT_TOKENS] * rows
    return kwargs


def _controlled(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, kwargs = model.config, _inputs(model, new, rows, latent)
    channels = config.in_channels + config.extra_condition_channels
    return {**kwargs, "controlnet_cond": new(rows, packed(latent), channels)}


_FUSABLE = frozenset({"QwenDoubleStreamAttnProcessor2_0"})

DESCRIPTION = ModelDescription(
    "QwenImageTransformer2DModel",
    PerturbedQwenAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"QwenImageTransformerBlock": TEXT_THEN_IMAGE},
    layout=_LAYOUT,
    replaces=_FUSABLE,
    cut=text_and_image,
    shares_heads=True,
    fusable_processors=_FUSABLE,
    # the size that its README names for squares
    checkpoints=(Checkpoint("QwenImagePipeline", "Qwen-Image", height=1328, width=1328),),
)
CONTROLNET = ControlNetDescription(
    "QwenImageControlNetModel",
    inputs=_controlled,
    blocks=("QwenImageTransformerBlock",),
    fusable_processors=_FUSABLE,
)

"""``LTXVideoTransformer3DModel``: LTX-Video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedLTXAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(("transformer_blocks",), ("attn1",), merge=True)
_TEXT_TOKENS = 128  # as long as the pipeline pads prompts


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, (frames, height, width) = model.config, latent
    return {
        "hidden_states": new(rows, frames * height * width, config.in_channels),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.caption_channels),
        "encoder_attention_mask": new(rows, _TEXT_TOKENS, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


DESCRIPTION = ModelDescription(
    "LTXVideoTransformer3DModel",
    PerturbedLTXAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"LTXVideoTransformerBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    text=frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
    replaces=frozenset({"LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0"}),
    fusable_processors=frozenset({"LTXVideoAttnProcessor"}),
    checkpoints=(
        Checkpoint(
            "LTXPipeline",
            "LTX-Video 2B 0.9",
            height=512,
            width=704,
            frames=161,
            frame_factor=8,
            vae_scale_factor=32,
        ),
    ),
)

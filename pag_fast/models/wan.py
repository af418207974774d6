"""``WanTransformer3DModel``: Wan 2.1 and 2.2."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..processors import PerturbedVideoAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(("blocks",), ("attn1",), merge=True)
_TEXT_TOKENS = 512  # as long as the pipeline pads prompts
SIZE: dict[str, Any] = {"height": 480, "width": 832, "frames": 81, "frame_factor": 4}
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
"""Of the model with 1.3 billion parameters."""


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.text_dim),
    }


def _cut(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    sizes = zip(call["hidden_states"].shape[2:], model.config.patch_size, strict=True)
    return (0,), math.prod(size // patch for size, patch in sizes)


DESCRIPTION = ModelDescription(
    "WanTransformer3DModel",
    PerturbedVideoAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"WanTransformerBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    text=frozenset({"encoder_hidden_states"}),
    cut=_cut,
    replaces=frozenset({"WanAttnProcessor", "WanAttnProcessor2_0"}),
    fusable_processors=frozenset({"WanAttnProcessor"}),
    checkpoints=(
        Checkpoint("WanPipeline", "Wan 2.1 T2V 14B", **SIZE),
        Checkpoint("WanPipeline", "Wan 2.1 T2V 1.3B", SMALL, **SIZE, variant="1.3B"),
    ),
)

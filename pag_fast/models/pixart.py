"""``PixArtTransformer2DModel``: PixArt-α and PixArt-Σ."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedSelfAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_ALONE, Layout
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors
from .unets import IDENTITY, PLAIN

_LAYOUT = Layout(("transformer_blocks",), ("attn1",), merge=True, equivariant=True)
_XL_2 = {
    "sample_size": 128,
    "num_layers": 28,
    "patch_size": 2,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if config.get("use_additional_conditions"):
        sizes = {"resolution": new(rows, 2), "aspect_ratio": new(rows, 1)}
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, 300, config.caption_channels),
        "encoder_attention_mask": new(rows, 300, dtype=torch.int64),
        "added_cond_kwargs": sizes,
    }


DESCRIPTION = ModelDescription(
    "PixArtTransformer2DModel",
    PerturbedSelfAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"BasicTransformerBlock": IMAGE_ALONE},
    layout=_LAYOUT,
    text=frozenset({"encoder_hidden_states", "encoder_attention_mask"}),
    stock_processors=IDENTITY,
    replaces=PLAIN,
    fusable_processors=frozenset({"AttnProcessor", "AttnProcessor2_0"}),
    learned_sigma=True,
    checkpoints=(Checkpoint("PixArtSigmaPAGPipeline", "PixArt-Σ XL 2 1024", _XL_2),),
)

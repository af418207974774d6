"""``Krea2Transformer2DModel``: Krea 2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors.stock import PerturbedStockAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, TEXT, Layout, Stream
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors, packed, text_in_front

_LAYOUT = Layout(("transformer_blocks",), ("attn",), before=("text_fusion",))
_TEXT_TOKENS = 512  # as long as the pipeline pads prompts


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, tokens = model.config, packed(latent)
    return {
        "hidden_states": new(rows, tokens, config.in_channels),
        "encoder_hidden_states": new(
            rows, _TEXT_TOKENS, config.num_text_layers, config.text_hidden_dim
        ),
        "timestep": new(rows),
        "position_ids": new(_TEXT_TOKENS + tokens, 3),
        "encoder_attention_mask": new(rows, _TEXT_TOKENS, dtype=torch.bool),
    }


_FUSABLE = frozenset({"Krea2AttnProcessor"})

DESCRIPTION = ModelDescription(
    "Krea2Transformer2DModel",
    PerturbedStockAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"Krea2TransformerBlock": (Stream("hidden_states", (TEXT, IMAGE)),)},
    layout=_LAYOUT,
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    heads="num_heads",
    tokens=text_in_front,
    checkpoints=(Checkpoint("Krea2Pipeline", "Krea 2"),),
)

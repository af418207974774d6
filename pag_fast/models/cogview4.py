"""``CogView4Transformer2DModel``: CogView4."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors.stock import PerturbedStockAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_THEN_TEXT, Layout
from ..sharing.tokens import Run
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(("transformer_blocks",), ("attn1",))
_TEXT_TOKENS = 128  # the pipeline pads prompts to a multiple of 16
_6B = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.text_embed_dim),
        "timestep": new(rows),
        "original_size": new(rows, 2),
        "target_size": new(rows, 2),
        "crop_coords": new(rows, 2),
    }


def _tokens(model: Any, call: dict[str, Any]) -> tuple[Run, ...]:
    patch = model.config.patch_size
    height, width = call["hidden_states"].shape[-2:]
    return ((call["encoder_hidden_states"].shape[1], (height // patch) * (width // patch), 0),)


_FUSABLE = frozenset({"CogView4AttnProcessor"})

DESCRIPTION = ModelDescription(
    "CogView4Transformer2DModel",
    PerturbedStockAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"CogView4TransformerBlock": IMAGE_THEN_TEXT},
    layout=_LAYOUT,
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    tokens=_tokens,
    checkpoints=(Checkpoint("CogView4Pipeline", "CogView4-6B", _6B),),
)

"""``ChromaTransformer2DModel``: Chroma."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors.stock import PerturbedStockAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, TEXT, TEXT_THEN_IMAGE, Layout, Stream
from .description import Checkpoint, ModelDescription
from .flux import RESIDUALS
from .tensors import Latent, NewTensors, packed, text_in_front

_LAYOUT = Layout(
    ("transformer_blocks", "single_transformer_blocks"),
    ("attn",),
    # it makes what every block is modulated by, of a sequence of its own
    before=("distilled_guidance_layer",),
    residuals=RESIDUALS,
)
_TEXT_TOKENS = 512  # as long as the pipeline pads prompts


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, tokens = model.config, packed(latent)
    return {
        "hidden_states": new(rows, tokens, config.in_channels),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.joint_attention_dim),
        "txt_ids": new(_TEXT_TOKENS, 3),
        "img_ids": new(tokens, 3),
        # its blocks make a mask over all pairs of tokens of it: perturbed rows score them all
        "attention_mask": new(rows, _TEXT_TOKENS + tokens),
    }


_FUSABLE = frozenset({"FluxAttnProcessor"})

DESCRIPTION = ModelDescription(
    "ChromaTransformer2DModel",
    PerturbedStockAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={
        "ChromaTransformerBlock": TEXT_THEN_IMAGE,
        "ChromaSingleTransformerBlock": (Stream("hidden_states", (TEXT, IMAGE)),),
    },
    layout=_LAYOUT,
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    tokens=text_in_front,
    checkpoints=(Checkpoint("ChromaPipeline", "Chroma1-HD"),),
)

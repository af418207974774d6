"""``HunyuanVideo15Transformer3DModel``: HunyuanVideo 1.5."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors import PerturbedHunyuanVideo15Attention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, PADDING, TEXT, Layout, Stream
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(
    ("transformer_blocks",),
    ("attn",),
    before=("context_embedder", "context_embedder_2", "image_embedder"),
)
# as long as the pipeline pads prompts, those for its second encoder, and pictures
_TEXT_TOKENS, _GLYPH_TOKENS, _PICTURE_TOKENS = 1000, 256, 729
_PROCESSORS = frozenset({"HunyuanVideo15AttnProcessor2_0"})


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": new.told_mask(rows, _TEXT_TOKENS),
        "encoder_hidden_states_2": new(rows, _GLYPH_TOKENS, config.text_embed_2_dim),
        "encoder_attention_mask_2": new.told_mask(rows, _GLYPH_TOKENS),
        "image_embeds": new.told_zeros(rows, _PICTURE_TOKENS, config.image_embed_dim),
    }


DESCRIPTION = ModelDescription(
    "HunyuanVideo15Transformer3DModel",
    PerturbedHunyuanVideo15Attention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={
        "HunyuanVideo15TransformerBlock": (
            Stream("hidden_states", (IMAGE,)),
            Stream("encoder_hidden_states", (TEXT, PADDING)),
        )
    },
    layout=_LAYOUT,
    replaces=_PROCESSORS,
    # the second is that of the layers that refine its text
    fusable_processors=_PROCESSORS | {"AttnProcessor2_0"},
    checkpoints=(
        Checkpoint(
            "HunyuanVideo15Pipeline",
            "HunyuanVideo 1.5",
            {"task_type": "t2v"},
            height=480,
            width=848,
            frames=121,
            frame_factor=4,
            vae_scale_factor=16,
        ),
    ),
)

"""``HunyuanVideoTransformer3DModel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedHunyuanVideoAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, PADDING, TEXT, Layout, Stream
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors

_LAYOUT = Layout(
    ("transformer_blocks", "single_transformer_blocks"), ("attn",), before=("context_embedder",)
)
_TEXT_TOKENS = 256  # as long as the pipeline pads prompts
_STREAMS = (Stream("hidden_states", (IMAGE,)), Stream("encoder_hidden_states", (TEXT, PADDING)))


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, _TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": new(rows, _TEXT_TOKENS, dtype=torch.int64),
        "pooled_projections": new(rows, config.pooled_projection_dim),
        "guidance": new(rows) if config.guidance_embeds else None,
    }


DESCRIPTION = ModelDescription(
    "HunyuanVideoTransformer3DModel",
    PerturbedHunyuanVideoAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={
        "HunyuanVideoTransformerBlock": _STREAMS,
        "HunyuanVideoSingleTransformerBlock": _STREAMS,
        # those of image_condition_type="token_replace"
        "HunyuanVideoTokenReplaceTransformerBlock": _STREAMS,
        "HunyuanVideoTokenReplaceSingleTransformerBlock": _STREAMS,
    },
    layout=_LAYOUT,
    replaces=frozenset({"HunyuanVideoAttnProcessor2_0"}),
    # the second is that of the layers that refine its text
    fusable_processors=frozenset({"HunyuanVideoAttnProcessor2_0", "AttnProcessor2_0"}),
    checkpoints=(
        Checkpoint(
            "HunyuanVideoPipeline",
            "HunyuanVideo",
            height=720,
            width=1280,
            frames=129,
            frame_factor=4,
        ),
    ),
)

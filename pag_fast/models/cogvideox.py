"""``CogVideoXTransformer3DModel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedCogVideoXAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE_THEN_TEXT, Layout
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors, patches

_LAYOUT = Layout(("transformer_blocks",), ("attn1",))
_SIZE: dict[str, Any] = {"height": 480, "width": 720, "frames": 49, "frame_factor": 4}
_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config, (frames, height, width) = model.config, latent
    step = config.patch_size_t or 1
    frames = -(-frames // step) * step  # the pipeline makes up for what is missing
    kwargs: dict[str, Any] = {
        "hidden_states": new(rows, frames, config.in_channels, height, width),
        "timestep": new(rows, dtype=torch.int64),
        "encoder_hidden_states": new(rows, config.max_text_seq_length, config.text_embed_dim),
    }
    if config.use_rotary_positional_embeddings:
        tokens = frames // step * patches(model, latent)
        kwargs["image_rotary_emb"] = new.table(tokens, config.attention_head_dim)
    return kwargs


DESCRIPTION = ModelDescription(
    "CogVideoXTransformer3DModel",
    PerturbedCogVideoXAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"CogVideoXBlock": IMAGE_THEN_TEXT},
    layout=_LAYOUT,
    replaces=frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"}),
    fusable_processors=frozenset({"CogVideoXAttnProcessor2_0"}),
    checkpoints=(
        Checkpoint("CogVideoXPipeline", "CogVideoX 5b", _5B, **_SIZE),
        Checkpoint("CogVideoXPipeline", "CogVideoX 2b", **_SIZE, variant="2b"),
    ),
)

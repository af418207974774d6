"""``SD3Transformer2DModel``: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors import PerturbedJointAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import TEXT_THEN_IMAGE, Layout
from .description import Checkpoint, ModelDescription
from .tensors import CLIP_TOKENS, T5_TOKENS, Latent, NewTensors

_LAYOUT = Layout(("transformer_blocks",), ("attn", "attn2"), equivariant=True)
_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "encoder_hidden_states": new(rows, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": new(rows, config.pooled_projection_dim),
    }


DESCRIPTION = ModelDescription(
    "SD3Transformer2DModel",
    PerturbedJointAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"JointTransformerBlock": TEXT_THEN_IMAGE},
    layout=_LAYOUT,
    stock_processors=("PAGCFGJointAttnProcessor2_0", "PAGJointAttnProcessor2_0"),
    fusable_processors=frozenset({"JointAttnProcessor2_0"}),
    checkpoints=(
        Checkpoint("StableDiffusion3PAGPipeline", "Stable Diffusion 3 medium", _MEDIUM),
        Checkpoint("StableDiffusion3PAGImg2ImgPipeline", "Stable Diffusion 3 medium", _MEDIUM),
    ),
)

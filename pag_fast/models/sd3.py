"""``SD3Transformer2DModel`` and ``SD3ControlNetModel``: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..processors import PerturbedJointAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import TEXT_THEN_IMAGE, Layout, Residuals, by_proportion
from .description import Checkpoint, ControlNetDescription, ModelDescription
from .tensors import CLIP_TOKENS, T5_TOKENS, Latent, NewTensors, patches

_LAYOUT = Layout(
    ("transformer_blocks",),
    ("attn", "attn2"),
    residuals=(
        Residuals("block_controlnet_hidden_states", "transformer_blocks", spread=by_proportion),
    ),
    equivariant=True,
)
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


def _controlled(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    kwargs = {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timestep": new(rows),
        "pooled_projections": new(rows, config.pooled_projection_dim),
        "controlnet_cond": new(
            rows, config.in_channels + config.extra_conditioning_channels, *latent[1:]
        ),
    }
    if config.joint_attention_dim is not None:  # some have blocks without text
        kwargs["encoder_hidden_states"] = new(
            rows, CLIP_TOKENS + T5_TOKENS, config.joint_attention_dim
        )
    if not config.use_pos_embed:  # they are given what the denoiser's embedding makes
        kwargs["hidden_states"] = new(rows, patches(model, latent), model.inner_dim)
    return kwargs


DESCRIPTION = ModelDescription(
    "SD3Transformer2DModel",
    PerturbedJointAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={"JointTransformerBlock": TEXT_THEN_IMAGE},
    layout=_LAYOUT,
    stock_processors=("PAGCFGJointAttnProcessor2_0", "PAGJointAttnProcessor2_0"),
    replaces=frozenset(
        {"JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "XFormersJointAttnProcessor"}
    ),
    fusable_processors=frozenset({"JointAttnProcessor2_0"}),
    checkpoints=(
        Checkpoint("StableDiffusion3PAGPipeline", "Stable Diffusion 3 medium", _MEDIUM),
        Checkpoint("StableDiffusion3PAGImg2ImgPipeline", "Stable Diffusion 3 medium", _MEDIUM),
    ),
)
CONTROLNET = ControlNetDescription(
    "SD3ControlNetModel",
    inputs=_controlled,
    blocks=("JointTransformerBlock", "SD3SingleTransformerBlock"),
    fusable_processors=frozenset({"JointAttnProcessor2_0"}),
)

"""What the UNets and their ControlNets have in common."""

from __future__ import annotations

from typing import Any

from .tensors import CLIP_TOKENS, Latent, NewTensors

TEXT = frozenset({"encoder_hidden_states", "image_embeds"})
IDENTITY = ("PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0")
"""Diffusers' PAG processors for self-attention over an image alone."""
PLAIN = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)
"""Diffusers' processors that are plain attention, however they compute it."""

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def controlnet_of(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a published ControlNet for a UNet, up to the way up."""
    return {key: value for key, value in config.items() if key != "sample_size"}


def unet_inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    """Forward arguments of a UNet; frames are cut to what motion modules can see at once."""
    config = model.config
    frames = min(latent[0], config.get("motion_max_seq_length") or 0)
    shape = (rows, config.in_channels, *([frames] if frames else []), *latent[1:])
    text_dim = config.get("encoder_hid_dim") or config.cross_attention_dim
    tokens = 256 if config.get("encoder_hid_dim_type") == "text_proj" else CLIP_TOKENS
    kwargs: dict[str, Any] = {
        "sample": new(*shape),
        "timestep": 500,
        "encoder_hidden_states": new(rows * max(frames, 1), tokens, text_dim),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {"text_embeds": new(rows, pooled), "time_ids": new(rows, 6)}
    if config.get("time_cond_proj_dim"):
        kwargs["timestep_cond"] = new(rows, config.time_cond_proj_dim)
    return kwargs

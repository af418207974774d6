"""The models of ``tiny.py``: denoisers, ControlNets and autoencoders, built from configurations."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

SIZE = 16  # pixels; latents are 8 × 8
_GROUPS = {"norm_num_groups": 4}


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter that starts as zero a small random value."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()


def unet(**overrides: Any) -> Any:
    """SD 1.5 in miniature: cross-attention from the first block on, text conditioning alone."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        **_GROUPS,
    }
    return diffusers.UNet2DConditionModel(**{**config, **overrides})


XL_CONFIG = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
XL_UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}


def controlnet(xl: bool, **overrides: Any) -> Any:
    config = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (8, 16),
        **_GROUPS,
    }
    if xl:
        config.update(XL_CONFIG)
    return diffusers.ControlNetModel(**{**config, **overrides})


def motion_unet(**overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": (
            "CrossAttnDownBlockMotion",
            "CrossAttnDownBlockMotion",
            "DownBlockMotion",
        ),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
        "cross_attention_dim": 12,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
        "use_motion_mid_block": True,
        **_GROUPS,
    }
    return diffusers.UNetMotionModel(**{**config, **overrides})


def sd3(sd35: bool = False, **overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 6,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    if sd35:
        config.update(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2, 3))
    return diffusers.SD3Transformer2DModel(**{**config, **overrides})


def hunyuan(meta_size: bool = False, **overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "num_layers": 6,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "in_channels": 4,
        "hidden_size": 16,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": 5,
        "text_len_t5": 7,
        "activation_fn": "gelu-approximate",
        "use_style_cond_and_image_meta_size": meta_size,
    }
    return diffusers.HunyuanDiT2DModel(**{**config, **overrides})


def pixart(**overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "num_layers": 6,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "use_additional_conditions": False,
    }
    return diffusers.PixArtTransformer2DModel(**{**config, **overrides})


def sana(**overrides: Any) -> Any:
    config = {
        "sample_size": 8,
        "num_layers": 6,
        "patch_size": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "caption_channels": 12,
    }
    return diffusers.SanaTransformer2DModel(**{**config, **overrides})


def vae(latent_channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        sample_size=SIZE,
        norm_num_groups=2,
        shift_factor=0.1,
    )


def deep_compression_vae() -> Any:
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )

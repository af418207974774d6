"""Configurations of tiny models: the depths of the real ones or their proportions, narrow."""

from __future__ import annotations

from typing import Any

import torch

CONTEXT = 64  # width of the conditioning
POOLED = 1280  # width of the pooled conditioning

UNET: dict[str, Any] = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float32,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "context_dim": CONTEXT,
}
SDXL: dict[str, Any] = {
    **UNET,
    "adm_in_channels": 2816,  # pooled and six embedded numbers
    "num_classes": "sequential",
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 16,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
SD15: dict[str, Any] = {
    **UNET,
    "adm_in_channels": None,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "num_heads": 4,
    "num_head_channels": -1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
SD3: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 8,  # its width is 64 times that
    "input_size": None,
    "adm_in_channels": POOLED,
    "context_size": CONTEXT,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT, "out_features": 512},
    },
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "axes_dim": [8, 12, 12],
    "num_heads": 2,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "in_channels": 16,
    "out_channels": 16,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "patch_size": 2,
    "context_in_dim": CONTEXT,
    "vec_in_dim": POOLED,
    "depth": 4,
    "depth_single_blocks": 8,
    "guidance_embed": True,
    "yak_mlp": False,
    "txt_norm": False,
}
CHROMA: dict[str, Any] = {
    **{k: v for k, v in FLUX.items() if k not in ("guidance_embed", "yak_mlp", "txt_norm")},
    "image_model": "chroma",
    "vec_in_dim": None,
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 64,
    "n_layers": 2,
}
HUNYUAN_VIDEO: dict[str, Any] = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": POOLED,
    "axes_dim": [8, 12, 12],
    "meanflow": False,
    "context_in_dim": CONTEXT,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 4,
    "depth_single_blocks": 8,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 256,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 2,
    "num_layers": 8,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "text_dim": CONTEXT,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
LTX: dict[str, Any] = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": CONTEXT,
    "num_layers": 8,
}
QWEN_IMAGE: dict[str, Any] = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": CONTEXT,
    "axes_dims_rope": (8, 12, 12),
}
LUMINA2: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": CONTEXT,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
Z_IMAGE: dict[str, Any] = {
    **LUMINA2,
    "dim": 256,  # that of the timestep's embedding, which is fixed
    "n_heads": 8,
    "n_kv_heads": 8,
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}

LTX_AUDIO: dict[str, Any] = {
    "image_model": "ltxav",
    "in_channels": 128,
    "audio_in_channels": 128,
    "cross_attention_dim": 64,
    "audio_cross_attention_dim": 64,
    "attention_head_dim": 32,
    "audio_attention_head_dim": 32,
    "num_attention_heads": 2,
    "audio_num_attention_heads": 2,
    "caption_channels": 3840,
    "num_layers": 6,
}

"""Hosts whose denoiser is a transformer, of films."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tiny_hosts.spec import SIZE, TEXT, HostSpec, blocks, film, picture, pictures, variants

_FILM = {"height": 64, "width": 64}
_VIDEO = {"height": 64, "width": 64, "num_frames": 5}
_WAN = HostSpec("WanPipeline", blocks([r"blocks\.1\.", r"blocks\.2\."]), call=_VIDEO, apart=True)
_LTX = HostSpec(
    "LTXPipeline", blocks([r"blocks\.1\.", r"blocks\.2\."]), call={**_VIDEO, "num_frames": 9}
)
_COG = HostSpec(
    "CogVideoXPipeline", blocks([r"blocks\.1\.", r"blocks\.2\."]), text="first", call=_VIDEO
)
_HUNYUAN_VIDEO = HostSpec(
    "HunyuanVideoPipeline",
    blocks([r"^transformer_blocks\.1\.", r"single_transformer_blocks\.1\."], "attn"),
    text="last",
    cfg="true_cfg_scale",
    call=_VIDEO,
    apart=True,
)


SPECS = [
    _WAN,
    *variants(
        _WAN,
        WanVideoToVideoPipeline={
            "call": {**SIZE, "video": film, "strength": 1.0},
        },
        WanImageToVideoPipeline={
            # beside the latents the mask and those of the picture
            "call": {**SIZE, "num_frames": 5, "image": picture()},
            "model": {"in_channels": 12, "image_dim": 8},
        },
    ),
    _LTX,
    *variants(
        _LTX,
        LTXImageToVideoPipeline={"call": {**_FILM, "num_frames": 9, "image": pictures}},
        LTXConditionPipeline={"call": {**_FILM, "num_frames": 9, "image": picture()}},
    ),
    _COG,
    *variants(
        _COG,
        CogVideoXImageToVideoPipeline={
            "call": {**_VIDEO, "image": pictures},
            "model": {"in_channels": 8, "ofs_embed_dim": 4},
        },
        CogVideoXVideoToVideoPipeline={
            "call": {"height": 64, "width": 64, "video": film, "strength": 1.0},
        },
        CogVideoXFunControlPipeline={
            "call": {"height": 64, "width": 64, "control_video": film},
            "model": {"in_channels": 8},
        },
    ),
    _HUNYUAN_VIDEO,
    *variants(
        _HUNYUAN_VIDEO,
        HunyuanVideoImageToVideoPipeline={
            "call": {**_VIDEO, "image": pictures},
            "model": {"image_condition_type": "token_replace"},
        },
        HunyuanSkyreelsImageToVideoPipeline={
            "call": {**_VIDEO, "image": pictures},
            "model": {"in_channels": 8},
        },
    ),
]


def wan(**overrides: Any) -> Any:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 4,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**{**config, **overrides})


def ltx(**overrides: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 4,
        "caption_channels": 12,
    }
    return diffusers.LTXVideoTransformer3DModel(**{**config, **overrides})


def cogvideox(**overrides: Any) -> Any:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": 12,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    return diffusers.CogVideoXTransformer3DModel(**{**config, **overrides})


def hunyuan_video(**overrides: Any) -> Any:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 12,
        "pooled_projection_dim": 10,
        "rope_axes_dim": (2, 2, 4),
    }
    return diffusers.HunyuanVideoTransformer3DModel(**{**config, **overrides})


def _clip() -> dict[str, Any]:
    """An image encoder and its processor."""
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    size = {"height": 8, "width": 8}
    return {
        "image_encoder": transformers.CLIPVisionModel(config).eval(),
        "image_processor": transformers.CLIPImageProcessor(size=size, crop_size=size),
    }


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
    )


def ltx_vae() -> Any:
    four = (8, 8, 8, 8)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )


def cogvideox_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def hunyuan_video_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


# the class of the pipeline's own VAE, where its loop needs one
VAES = {
    "WanVideoToVideoPipeline": wan_vae,
    "WanImageToVideoPipeline": wan_vae,
    "LTXImageToVideoPipeline": ltx_vae,
    "LTXConditionPipeline": ltx_vae,
    "CogVideoXImageToVideoPipeline": cogvideox_vae,
    "CogVideoXVideoToVideoPipeline": cogvideox_vae,
    "CogVideoXFunControlPipeline": cogvideox_vae,
    "HunyuanVideoImageToVideoPipeline": hunyuan_video_vae,
    "HunyuanSkyreelsImageToVideoPipeline": hunyuan_video_vae,
}
# other components than the denoiser and the VAE
PARTS: dict[str, Any] = {"WanImageToVideoPipeline": _clip}
MODELS = {
    "WanPipeline": wan,
    "LTXPipeline": ltx,
    "CogVideoXPipeline": cogvideox,
    "HunyuanVideoPipeline": hunyuan_video,
}

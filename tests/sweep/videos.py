"""Pipelines of films."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from tiny_hosts.videos import _clip as clip
from tiny_hosts.videos import wan, wan_vae

from sweep.spec import (
    DIM,
    POOLED,
    TOKENS,
    Spec,
    also,
    film,
    flow,
    model,
    normal,
    photo,
    picture,
    variants,
)


def _clip_part(name: str) -> Any:
    return clip()[name]


_BLOCKS = [r"^blocks\.1\.attn1"]
_MIDDLE = [r"^transformer_blocks\.1\.attn1"]
_JOINT = [r"^transformer_blocks\.1\."]
_TWO_STACKS = [r"^transformer_blocks\.1\.", r"^single_transformer_blocks\.1\."]
_APART: dict[str, Any] = {"apart": True, "rows": ("cond", "uncond")}
_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": DIM,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_SKY = model("SkyReelsV2Transformer3DModel", **_WAN)
_UNIPC: dict[str, Any] = {
    "scheduler": lambda: diffusers.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
}
_CLIP: dict[str, Any] = {
    name: partial(_clip_part, name) for name in ("image_encoder", "image_processor")
}
_DDIM: dict[str, Any] = {"scheduler": lambda: diffusers.DDIMScheduler(clip_sample=False)}
_SKYREELS = Spec(
    "SkyReelsV2Pipeline",
    _SKY,
    _BLOCKS,
    **_APART,
)
_COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "mlp_ratio": 2,
    "concat_padding_mask": False,
    "text_embed_dim": DIM,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "extra_pos_embed_type": "learnable",
}


def _edm() -> Any:
    return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)


class _Checker:
    """Nothing is unsafe."""

    def to(self, *_: Any) -> _Checker:
        return self

    def check_text_safety(self, *_: Any) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _kandinsky(**config: Any) -> Any:
    own = {
        "in_visual_dim": 4,
        "in_text_dim": DIM,
        "in_text_dim2": POOLED,
        "time_dim": 16,
        "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 3,
        "axes_dims": (2, 2, 4),
        "visual_cond": False,
        "attention_type": "regular",
    }
    return model("Kandinsky5Transformer3DModel", **{**own, **config})


def _two_embeds(prefix: str, batch: int) -> dict[str, Any]:
    seed = 2 if prefix else 1
    return {
        f"{prefix}prompt_embeds_qwen": normal(seed, batch, TOKENS, DIM),
        f"{prefix}prompt_embeds_clip": normal(seed + 10, batch, POOLED),
        f"{prefix}prompt_cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * TOKENS,
    }


def _small_kandinsky(pipe: Any) -> None:
    """Its pictures have one of a few sizes."""
    pipe.resolutions = [(64, 64)]


def _magvit() -> Any:
    """Of factor eight, and four in time."""
    time = "SpatialTemporal{}Block3D"
    return diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *(time.format("Down"),) * 3),
        up_block_types=("SpatialUpBlock3D", *(time.format("Up"),) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )


SPECS = [
    Spec(
        "AllegroPipeline",
        also(
            model(
                "AllegroTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                cross_attention_dim=24,
                sample_width=8,
                sample_height=8,
                sample_frames=5,
                caption_channels=DIM,
            ),
            **_DDIM,
        ),
        _MIDDLE,
    ),
    Spec("AnyFlowPipeline", model("AnyFlowTransformer3DModel", **_WAN), _BLOCKS),
    _SKYREELS,
    *variants(
        _SKYREELS,
        SkyReelsV2ImageToVideoPipeline={
            "parts": also(
                model(
                    "SkyReelsV2Transformer3DModel", **{**_WAN, "in_channels": 12, "image_dim": 8}
                ),
                vae=wan_vae,
                **_CLIP,
            ),
            "call": {"image": photo()},
        },
        SkyReelsV2DiffusionForcingPipeline={"parts": also(_SKY, **_UNIPC)},
        SkyReelsV2DiffusionForcingImageToVideoPipeline={
            "parts": also(_SKY, vae=wan_vae, **_UNIPC),
            "call": {"image": picture()},
        },
        SkyReelsV2DiffusionForcingVideoToVideoPipeline={
            "parts": also(_SKY, vae=wan_vae, **_UNIPC),
            "call": {"video": film(), "overlap_history": 3, "num_frames": 17, "base_num_frames": 5},
        },
    ),
    Spec(
        "MochiPipeline",
        model(
            "MochiTransformer3DModel",
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=4,
            activation_fn="swiglu",
            max_sequence_length=TOKENS,
        ),
        _MIDDLE,
        dim=16,
        text="last",
        image=16,
        copies=1,
        batches=(2, 1),
        refused="attends more than once",
        refuses=lambda cfg, batch: cfg,
    ),
    Spec(
        "CosmosTextToWorldPipeline",
        lambda: {
            **model("CosmosTransformer3DModel", **_COSMOS)(),
            "scheduler": _edm(),
            "safety_checker": _Checker(),
        },
        _MIDDLE,
        **_APART,
        weight=lambda scale: 1.0 + scale,
    ),
    Spec(
        "Kandinsky5T2VPipeline",
        _kandinsky(),
        [r"^visual_transformer_blocks\.1\.self"],
        prompts=_two_embeds,
        **_APART,
    ),
    Spec(
        "Kandinsky5T2IPipeline",
        _kandinsky(),
        [r"^visual_transformer_blocks\.1\.self"],
        setup=_small_kandinsky,
        prompts=_two_embeds,
        **_APART,
    ),
    Spec(
        "LattePipeline",
        also(
            model(
                "LatteTransformer3DModel",
                sample_size=8,
                num_layers=3,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_channels=DIM,
                in_channels=4,
                cross_attention_dim=16,
                out_channels=8,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                activation_fn="gelu-approximate",
            ),
            **_DDIM,
        ),
        [r"transformer_blocks\.1\.attn1"],
        call={"video_length": 16, "mask_feature": False},
    ),
    Spec(
        "EasyAnimatePipeline",
        also(
            model(
                "EasyAnimateTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=4,
                text_embed_dim=DIM,
                num_layers=3,
                sample_width=16,
                sample_height=16,
                patch_size=2,
            ),
            vae=_magvit,
        ),
        _JOINT,
        text="first",
        image=32,
    ),
    Spec(
        "SanaVideoPipeline",
        model(
            "SanaVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=DIM,
            sample_size=8,
            patch_size=(1, 2, 2),
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        _MIDDLE,
        refused="none was seen that mixes tokens of the image",  # linear attention
        call={"frames": 5, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    Spec(
        "WanVACEPipeline",
        also(
            model(
                "WanVACETransformer3DModel",
                **{**_WAN, "vace_layers": [0, 2], "vace_in_channels": 24},
            ),
            vae=wan_vae,
        ),
        [r"^blocks\.2\.attn1"],  # a block of the control goes in front of it
        **_APART,
        batches=(1, 1),
        copies=1,
    ),
    Spec(
        "LucyEditPipeline",
        also(lambda: {"transformer": wan(in_channels=8), "scheduler": flow()}, vae=wan_vae),
        [r"blocks\.1\.attn1"],
        call={"video": film()},
        batches=(1, 1),
        copies=1,
        **_APART,
    ),
]

"""Pipelines with conditions besides prompts, and some that have none."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny_hosts.videos import wan_vae

from sweep.more_images import _guider, _two_encoders
from sweep.spec import (
    DIM,
    TOKENS,
    Spec,
    also,
    flow,
    model,
    normal,
    photo,
    picture,
    vae,
)
from sweep.unets import _SMALL, _vae8
from sweep.videos import (
    _APART,
    _BLOCKS,
    _CLIP,
    _COSMOS,
    _MIDDLE,
    _WAN,
    _Checker,
    _edm,
    _kandinsky,
    _magvit,
    _small_kandinsky,
    _two_embeds,
)

_TWO_STACKS = [r"^transformer_blocks\.1\.", r"^single_transformer_blocks\.1\."]


def _few_semantic_tokens(pipe: Any) -> None:
    pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 3, 12


def _karras() -> Any:
    return flow(use_karras_sigmas=True)


def _cosmos_vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def _hunyuan15_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def _cosmos(scheduler: Any = _karras, made: Any = wan_vae, **config: Any) -> Any:
    return also(
        model("CosmosTransformer3DModel", **{**_COSMOS, **config}),
        scheduler=scheduler,
        safety_checker=_Checker,
        vae=made,
    )


_WEIGHED: dict[str, Any] = {
    **_APART,
    "weight": lambda scale: 1.0 + scale,
    "warned": "does more to the predictions|cannot be seen",
}


def _no_labels(prefix: str, batch: int) -> dict[str, Any]:
    return {"class_labels": [1, 2][:batch]}


def _spoken(pipe: Any) -> None:
    def encode(prompt: Any, device: Any) -> Any:
        return normal(1, len(prompt), TOKENS, DIM), torch.full((len(prompt),), TOKENS)

    pipe.encode_prompt = encode


def _no_index(pipe: Any) -> None:
    """It gives its own method an argument that this has not."""
    own = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index=0, **given: own(**given)


SPECS = [
    Spec(
        "HunyuanVideo15Pipeline",
        also(
            model(
                "HunyuanVideo15Transformer3DModel",
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=3,
                num_refiner_layers=1,
                mlp_ratio=2.0,
                patch_size=1,
                patch_size_t=1,
                text_embed_dim=DIM,
                text_embed_2_dim=DIM,
                image_embed_dim=12,
                rope_axes_dim=(2, 2, 4),
                target_size=16,
                task_type="t2v",
            ),
            vae=_hunyuan15_vae,
        ),
        [r"^transformer_blocks\.1\."],
        text="last",
        image=48,
        cfg="guider",
        call=_SMALL,
        louder=2.0,
        before=_guider,
        prompts=_two_encoders,
        setup=_few_semantic_tokens,
        copies=1,
        **_APART,
    ),
    Spec(
        "ChronoEditPipeline",
        also(
            model(
                "ChronoEditTransformer3DModel",
                **{**_WAN, "in_channels": 12, "image_dim": 8},
            ),
            vae=wan_vae,
            **_CLIP,
        ),
        _BLOCKS,
        **_APART,
        call={"image": photo()},
    ),
    Spec("Cosmos2TextToImagePipeline", _cosmos(), _MIDDLE, **{**_WEIGHED, "warned": ""}),
    Spec(
        "Cosmos2VideoToWorldPipeline",
        _cosmos(in_channels=5),
        _MIDDLE,
        **_WEIGHED,
        call={"image": photo()},
    ),
    Spec(
        "CosmosVideoToWorldPipeline",
        _cosmos(_edm, _cosmos_vae, in_channels=5),
        _MIDDLE,
        **_WEIGHED,
        call={"image": photo()},
    ),
    Spec(
        "Cosmos2_5_PredictBasePipeline",
        _cosmos(diffusers.UniPCMultistepScheduler, in_channels=5),
        _MIDDLE,
        **{**_WEIGHED, "warned": ""},
    ),
    Spec(
        "Kandinsky5I2IPipeline",
        also(_kandinsky(visual_cond=True), vae=_vae8),
        [r"^visual_transformer_blocks\.1\.self"],
        prompts=_two_embeds,
        setup=_small_kandinsky,
        **_APART,
        batches=(1, 1),
        copies=1,
        call={"image": photo()},
    ),
    Spec(
        "DiTPipeline",
        lambda: {
            "transformer": diffusers.DiTTransformer2DModel(
                sample_size=8,
                num_layers=3,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                in_channels=4,
                out_channels=8,
            ),
            "scheduler": diffusers.DDIMScheduler(),
            "vae": vae(),
        },
        [r"^transformer_blocks\.1\.attn1"],
        prompts=_no_labels,
        call={"output_type": "np"},
        # its latents are twice as many as its pictures
        refused="its loop shows neither",
        refuses=lambda cfg, batch: cfg,
    ),
    Spec(
        "LongCatAudioDiTPipeline",
        also(
            model(
                "LongCatAudioDiTTransformer",
                dit_dim=32,
                dit_depth=3,
                dit_heads=2,
                dit_text_dim=DIM,
                latent_dim=4,
                text_conv=False,
            ),
            vae=lambda: diffusers.LongCatAudioDiTVae(
                in_channels=1,
                channels=16,
                c_mults=[1, 2],
                strides=[2],
                latent_dim=4,
                encoder_latent_dim=8,
                downsampling_ratio=2,
            ),
        ),
        [r"^blocks\.1\.self_attn"],
        setup=_spoken,
        call={"prompt": lambda batch: ["a"] * batch, "audio_duration_s": 0.001},
        **_APART,
    ),
    Spec(
        "EasyAnimateControlPipeline",
        also(
            model(
                "EasyAnimateTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=12,
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
        [r"^transformer_blocks\.1\."],
        text="first",
        image=32,
        setup=_no_index,
        batches=(1, 1),
        copies=1,
        call={"control_video": picture()[:, :, None].expand(-1, -1, 5, -1, -1)},
    ),
]

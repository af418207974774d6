"""UNets of pipelines without prompts, and of some with other networks around them."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch

from sweep.spec import DIM, TOKENS, Spec, normal, picture, vae, variants
from sweep.unets import _MID, _SMALL, _movq, _with_masks


def _unet2d() -> dict[str, Any]:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return {"unet": unet, "scheduler": diffusers.DDIMScheduler()}


_PLAIN = Spec(
    "DDIMPipeline",
    _unet2d,
    [r"^down_blocks\.1\.attentions\.0$"],
    cfg="",
    batches=(1, 1),
    call={"batch_size": 2, "output_type": "np"},
)


def _marigold(channels: int, out: int) -> Any:
    def make() -> dict[str, Any]:
        unet = tiny.unet(in_channels=channels, out_channels=out)
        return {"unet": unet, "scheduler": diffusers.DDIMScheduler(), "vae": vae()}

    return make


def _no_text(pipe: Any) -> None:
    pipe.empty_text_embedding = normal(1, 1, TOKENS, DIM)


_MARIGOLD = Spec(
    "MarigoldDepthPipeline",
    _marigold(8, 4),
    _MID,
    cfg="",
    batches=(1, 1),
    setup=_no_text,
    call={"image": picture(16), "processing_resolution": 0, "output_type": "np"},
)


def _seen(image: Any, device: Any, copies: int, cfg: bool) -> torch.Tensor:
    made = normal(1, copies, 1, 8)
    return torch.cat([torch.zeros_like(made), made]) if cfg else made


SPECS = [
    _PLAIN,
    *variants(
        _PLAIN,
        DDPMPipeline={
            "parts": lambda: {**_unet2d(), "scheduler": diffusers.DDPMScheduler()},
        },
        PNDMPipeline={
            "parts": lambda: {
                **_unet2d(),
                "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True),
            }
        },
    ),
    _MARIGOLD,
    *variants(
        _MARIGOLD,
        MarigoldNormalsPipeline={},
        MarigoldIntrinsicsPipeline={"parts": _marigold(12, 8)},
    ),
    Spec(
        "Kandinsky3Img2ImgPipeline",
        lambda: {
            "unet": diffusers.Kandinsky3UNet(
                in_channels=4,
                time_embedding_dim=8,
                groups=2,
                attention_head_dim=4,
                layers_per_block=2,
                block_out_channels=(32, 64),
                cross_attention_dim=8,
                encoder_hid_dim=DIM,
            ),
            "scheduler": diffusers.DDPMScheduler(),
            "movq": _movq(),
        },
        [r"^down_blocks\.1\.attentions\.0\.attention"],
        prompts=_with_masks,
        weight=lambda scale: 1.0 + scale,
        call={"image": picture(16), "strength": 1.0},
    ),
    Spec(
        "StableVideoDiffusionPipeline",
        lambda: {
            "unet": diffusers.UNetSpatioTemporalConditionModel(
                block_out_channels=(32, 64),
                layers_per_block=1,
                sample_size=8,
                in_channels=8,
                out_channels=4,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                cross_attention_dim=8,
                num_attention_heads=4,
                projection_class_embeddings_input_dim=96,
                addition_time_embed_dim=32,
            ),
            "scheduler": diffusers.EulerDiscreteScheduler(
                prediction_type="v_prediction", use_karras_sigmas=True
            ),
            "vae": vae(),
        },
        [r"^mid_block.*attentions\.0\.transformer_blocks\.0\.attn1"],
        cfg="max_guidance_scale",
        call={**_SMALL, "num_frames": 3, "image": picture(16), "min_guidance_scale": 1.0},
        batches=(1, 1),
        # a scale for each frame
        everywhere=True,
        warned="does more to the predictions|sharing branches of this model is not exact",
        shared=False,
        copies=1,
        setup=lambda pipe: setattr(pipe, "_encode_image", _seen),
    ),
]

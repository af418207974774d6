"""Hosts whose denoiser is a UNet."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import tiny

from tiny_hosts.spec import (
    FROM_PICTURE,
    SIZE,
    like,
    mask,
    photo,
    photos,
    picture,
    pictures,
    pooled,
    variants,
)

_UNION = {"control_image": [picture()], "control_mode": [0]}
_PIX2PIX: dict[str, Any] = {
    "model": {"in_channels": 8},
    "rows": ("cond", "image", "uncond"),
    "without": ("strength",),
}


SPECS = [
    like("StableDiffusionPipeline"),
    like("StableDiffusionImg2ImgPipeline"),
    like("StableDiffusionInpaintPipeline"),
    like("StableDiffusionControlNetPipeline"),
    like("StableDiffusionControlNetInpaintPipeline"),
    like(
        "StableDiffusionControlNetImg2ImgPipeline",
        pag="StableDiffusionControlNetPAGInpaintPipeline",
        without=("mask_image",),
    ),
    like("StableDiffusionXLPipeline"),
    like("StableDiffusionXLImg2ImgPipeline"),
    like("StableDiffusionXLInpaintPipeline"),
    like("StableDiffusionXLControlNetPipeline"),
    like("StableDiffusionXLControlNetImg2ImgPipeline"),
    like(
        "StableDiffusionXLControlNetInpaintPipeline",
        pag="StableDiffusionXLControlNetPAGImg2ImgPipeline",
        call={"mask_image": mask()},
    ),
    *variants(
        like("StableDiffusionXLControlNetPipeline"),
        StableDiffusionXLControlNetUnionPipeline={
            "call": _UNION,
            "without": ("image",),
        },
    ),
    *variants(
        like("StableDiffusionXLControlNetImg2ImgPipeline"),
        StableDiffusionXLControlNetUnionImg2ImgPipeline={"call": _UNION},
        StableDiffusionXLControlNetUnionInpaintPipeline={
            "call": {**_UNION, "mask_image": mask()},
        },
    ),
    *variants(
        like("StableDiffusionPipeline"),
        StableDiffusionAdapterPipeline={"call": {"image": pictures}},
        LatentConsistencyModelPipeline={
            "cfg": "",
            "model": {"time_cond_proj_dim": 8},
            "without": ("negative_prompt_embeds",),
        },
    ),
    *variants(
        like("StableDiffusionImg2ImgPipeline"),
        LatentConsistencyModelImg2ImgPipeline={
            "cfg": "",
            "model": {"time_cond_proj_dim": 8},
            "without": ("negative_prompt_embeds",),
        },
        StableDiffusionInstructPix2PixPipeline=_PIX2PIX,
    ),
    *variants(
        like("StableDiffusionXLPipeline"),
        StableDiffusionXLAdapterPipeline={"call": {"image": pictures}},
    ),
    *variants(
        like("StableDiffusionXLImg2ImgPipeline"),
        StableDiffusionXLInstructPix2PixPipeline={**_PIX2PIX, "call": SIZE},
    ),
    like("KolorsPipeline"),
    *variants(like("KolorsPipeline"), KolorsImg2ImgPipeline={"call": FROM_PICTURE}),
    like("AnimateDiffPipeline"),
    *variants(
        like("AnimateDiffPipeline"),
        AnimateDiffVideoToVideoPipeline={
            "call": {"video": photos, "strength": 1.0},
            "without": ("num_frames",),
        },
        AnimateDiffControlNetPipeline={
            "call": {"conditioning_frames": [photo(3), photo(4)]},
            "batches": (1,),
        },
        AnimateDiffVideoToVideoControlNetPipeline={
            "call": {
                "video": photos,
                "conditioning_frames": [photo(3), photo(4)],
                "strength": 1.0,
            },
            "batches": (1,),
            "without": ("num_frames",),
        },
        AnimateDiffSDXLPipeline={
            "call": {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled},
            "model": {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 10,
            },
        },
        PIAPipeline={"call": {"image": picture()}, "model": {"in_channels": 9}},
    ),
]


def _union() -> dict[str, Any]:
    config = {**tiny.controlnet(xl=True).config, "num_trans_channel": 8, "num_trans_head": 2}
    names = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {k: v for k, v in config.items() if k in names}
    net = diffusers.ControlNetUnionModel(**{**config, "num_proj_channel": 8})
    return {"controlnet": tiny.randomise(net)}


def _controlnet() -> dict[str, Any]:
    return {"controlnet": tiny.randomise(tiny.controlnet(xl=False))}


def _adapter() -> dict[str, Any]:
    return {"adapter": diffusers.T2IAdapter(3, [8, 16, 16], 1, 2, "full_adapter")}


def _adapter_xl() -> dict[str, Any]:
    # the last of its four is for the mid block
    return {"adapter": diffusers.T2IAdapter(3, [8, 16, 16, 16], 1, 4, "full_adapter_xl")}


# components that the PAG pipeline has not, or has others of
PARTS: dict[str, Any] = {
    "StableDiffusionXLControlNetUnionPipeline": _union,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _union,
    "StableDiffusionXLControlNetUnionInpaintPipeline": _union,
    "StableDiffusionAdapterPipeline": _adapter,
    "StableDiffusionXLAdapterPipeline": _adapter_xl,
    "LatentConsistencyModelPipeline": lambda: {"scheduler": diffusers.LCMScheduler()},
    "LatentConsistencyModelImg2ImgPipeline": lambda: {"scheduler": diffusers.LCMScheduler()},
    "AnimateDiffControlNetPipeline": _controlnet,
    "AnimateDiffVideoToVideoControlNetPipeline": _controlnet,
}

"""``UNet2DConditionModel``: Stable Diffusion 1 to XL, Kolors."""

from __future__ import annotations

from typing import Any

from ..processors import PerturbedSelfAttention
from ..sharing.layout import IMAGE_ALONE
from ..sharing.unet_plan import plan_unet
from .description import Checkpoint, ModelDescription
from .unets import IDENTITY, PLAIN, SD15, SDXL, TEXT, controlnet_of, unet_inputs

_SDXL_UNET = {**SDXL, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
_KOLORS = {
    **_SDXL_UNET,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}


def _sd(pipeline: str, name: str = "Stable Diffusion 1.5", **config: Any) -> Checkpoint:
    return Checkpoint(
        pipeline,
        name,
        {**SD15, **config},
        height=512,
        width=512,
        controlnet=controlnet_of(SD15) if "ControlNet" in pipeline else None,
    )


def _sdxl(pipeline: str, name: str = "SDXL base 1.0", **config: Any) -> Checkpoint:
    net = controlnet_of(SDXL) if "ControlNet" in pipeline else None
    return Checkpoint(pipeline, name, {**_SDXL_UNET, **config}, controlnet=net)


DESCRIPTION = ModelDescription(
    "UNet2DConditionModel",
    PerturbedSelfAttention,
    plan_unet,
    unet_inputs,
    blocks={"BasicTransformerBlock": IMAGE_ALONE},
    text=TEXT,
    stock_processors=IDENTITY,
    replaces=PLAIN,
    fusable_processors=frozenset({"AttnProcessor", "AttnProcessor2_0"}),
    checkpoints=(
        _sd("StableDiffusionPAGPipeline"),
        _sd("StableDiffusionPAGImg2ImgPipeline"),
        _sd("StableDiffusionPAGInpaintPipeline", "Stable Diffusion 1.5 inpainting", in_channels=9),
        _sd("StableDiffusionControlNetPAGPipeline"),
        _sd("StableDiffusionControlNetPAGInpaintPipeline"),
        _sdxl("StableDiffusionXLPAGPipeline"),
        _sdxl("StableDiffusionXLPAGImg2ImgPipeline"),
        _sdxl("StableDiffusionXLPAGInpaintPipeline", "SDXL 1.0 inpainting 0.1", in_channels=9),
        _sdxl("StableDiffusionXLControlNetPAGPipeline"),
        _sdxl("StableDiffusionXLControlNetPAGImg2ImgPipeline"),
        Checkpoint("KolorsPAGPipeline", "Kolors", _KOLORS),
    ),
)

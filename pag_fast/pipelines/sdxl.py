"""Stable Diffusion XL."""

from __future__ import annotations

from functools import partial
from typing import Any

from .description import Arguments, PipelineDescription, argument_scale

_UNET = partial(
    PipelineDescription, layers=("mid",), source="PAG, arXiv 2403.17377", denoisers=("unet",)
)
_PAG, _INJECTED = partial(_UNET, kind="pag"), partial(_UNET, kind="injected")
_RESCALED = partial(_INJECTED, guidance="normalised", normalised_by="guidance_rescale")
_CONTROLLED = "StableDiffusionXLControlNetPipeline"


def _two_scales(pipe: Any, arguments: Arguments) -> bool:
    return arguments["guidance_scale"] > 1.0 and arguments["image_guidance_scale"] >= 1.0


PIPELINES = (
    _PAG("StableDiffusionXLPAGPipeline", rescales_again=True),
    _PAG("StableDiffusionXLPAGImg2ImgPipeline", rescales_again=True),
    _PAG("StableDiffusionXLPAGInpaintPipeline", rescales_again=True, mask_of_image_latents=True),
    _PAG("StableDiffusionXLControlNetPAGPipeline"),
    _PAG("StableDiffusionXLControlNetPAGImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLPipeline"),
    _RESCALED("StableDiffusionXLImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLInpaintPipeline"),
    _INJECTED(_CONTROLLED),
    _INJECTED("StableDiffusionXLControlNetImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLControlNetInpaintPipeline"),
    _INJECTED("StableDiffusionXLControlNetUnionPipeline", base=_CONTROLLED),
    _INJECTED("StableDiffusionXLControlNetUnionImg2ImgPipeline", base=_CONTROLLED),
    _RESCALED("StableDiffusionXLControlNetUnionInpaintPipeline", base=_CONTROLLED),
    _RESCALED("StableDiffusionXLAdapterPipeline", base="StableDiffusionXLPipeline"),
    _RESCALED(
        "StableDiffusionXLInstructPix2PixPipeline",
        base="StableDiffusionXLPipeline",
        rows=("cond", "image", "uncond"),
        cfg=_two_scales,
        scale=argument_scale,
    ),
)

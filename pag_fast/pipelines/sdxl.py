"""Stable Diffusion XL."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_UNET = partial(
    PipelineDescription, layers=("mid",), source="PAG, arXiv 2403.17377", denoisers=("unet",)
)
_PAG, _INJECTED = partial(_UNET, kind="pag"), partial(_UNET, kind="injected")
_RESCALED = partial(_INJECTED, guidance="normalised", normalised_by="guidance_rescale")

PIPELINES = (
    _PAG("StableDiffusionXLPAGPipeline", rescales_again=True),
    _PAG("StableDiffusionXLPAGImg2ImgPipeline", rescales_again=True),
    _PAG("StableDiffusionXLPAGInpaintPipeline", rescales_again=True, mask_of_image_latents=True),
    _PAG("StableDiffusionXLControlNetPAGPipeline"),
    _PAG("StableDiffusionXLControlNetPAGImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLPipeline"),
    _RESCALED("StableDiffusionXLImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLInpaintPipeline"),
    _INJECTED("StableDiffusionXLControlNetPipeline"),
    _INJECTED("StableDiffusionXLControlNetImg2ImgPipeline"),
    _RESCALED("StableDiffusionXLControlNetInpaintPipeline"),
)

"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_UNET = partial(
    PipelineDescription, layers=("mid",), source="PAG, arXiv 2403.17377", denoisers=("unet",)
)
_PAG, _INJECTED = partial(_UNET, kind="pag"), partial(_UNET, kind="injected")
_DISTILLED = partial(_INJECTED, passes="alone", base="StableDiffusionPipeline")

PIPELINES = (
    _PAG("StableDiffusionPAGPipeline", rescales_again=True),
    _PAG("StableDiffusionPAGImg2ImgPipeline"),
    _PAG("StableDiffusionPAGInpaintPipeline", rescales_again=True),
    _PAG("StableDiffusionControlNetPAGPipeline", guess_mode_images=True),
    _PAG("StableDiffusionControlNetPAGInpaintPipeline"),
    _INJECTED("StableDiffusionPipeline", guidance="normalised", normalised_by="guidance_rescale"),
    _INJECTED("StableDiffusionImg2ImgPipeline"),
    _INJECTED("StableDiffusionInpaintPipeline"),
    _INJECTED("StableDiffusionControlNetPipeline"),
    _INJECTED("StableDiffusionControlNetImg2ImgPipeline"),
    _INJECTED("StableDiffusionControlNetInpaintPipeline"),
    _INJECTED("StableDiffusionAdapterPipeline", base="StableDiffusionPipeline"),
    _INJECTED(
        "StableDiffusionInstructPix2PixPipeline",
        base="StableDiffusionPipeline",
        rows=("cond", "image", "uncond"),
    ),
    _DISTILLED("LatentConsistencyModelPipeline"),
    _DISTILLED("LatentConsistencyModelImg2ImgPipeline"),
    PipelineDescription(
        "StableDiffusionSAGPipeline", "sag", source="SAG, arXiv 2210.00939", denoisers=("unet",)
    ),
)

"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_SD3 = partial(PipelineDescription, layers=("blocks.13",), source="diffusers #8861")
_CONTROLLED = partial(_SD3, kind="injected", base="StableDiffusion3Pipeline")

PIPELINES = (
    _SD3("StableDiffusion3PAGPipeline", kind="pag"),
    _SD3("StableDiffusion3PAGImg2ImgPipeline", kind="pag"),
    _SD3("StableDiffusion3Pipeline", kind="injected"),
    _SD3("StableDiffusion3Img2ImgPipeline", kind="injected"),
    _SD3("StableDiffusion3InpaintPipeline", kind="injected"),
    _CONTROLLED("StableDiffusion3ControlNetPipeline"),
    _CONTROLLED("StableDiffusion3ControlNetInpaintingPipeline"),
)

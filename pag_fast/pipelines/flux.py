"""FLUX.1."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription, true_cfg, true_scale

_FLUX = partial(
    PipelineDescription,
    kind="injected",
    layers=("single_transformer_blocks.0",),
    source="ComfyUI-Fluxtapoz, PAGAttention",
)
_TRUE_CFG = partial(_FLUX, passes="apart", cfg=true_cfg, scale=true_scale)
_VARIANT = partial(_TRUE_CFG, base="FluxPipeline")
_DISTILLED = partial(_FLUX, passes="alone", base="FluxPipeline")

PIPELINES = (
    _TRUE_CFG("FluxPipeline"),
    _VARIANT("FluxImg2ImgPipeline"),
    _VARIANT("FluxInpaintPipeline"),
    _VARIANT("FluxKontextPipeline"),
    _VARIANT("FluxKontextInpaintPipeline"),
    _DISTILLED("FluxFillPipeline"),
    _DISTILLED("FluxControlPipeline"),
    _DISTILLED("FluxControlImg2ImgPipeline"),
    _DISTILLED("FluxControlInpaintPipeline"),
    _VARIANT("FluxControlNetPipeline"),
    _DISTILLED("FluxControlNetImg2ImgPipeline"),
    _DISTILLED("FluxControlNetInpaintPipeline"),
)

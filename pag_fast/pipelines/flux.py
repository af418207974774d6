"""FLUX.1."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription, true_cfg, true_scale

_FLUX = partial(
    PipelineDescription,
    kind="injected",
    layers=("single_transformer_blocks.0",),
    source="ComfyUI-Fluxtapoz, PAGAttention",
    passes="apart",
    cfg=true_cfg,
    scale=true_scale,
)

PIPELINES = (_FLUX("FluxPipeline"), _FLUX("FluxImg2ImgPipeline"), _FLUX("FluxInpaintPipeline"))

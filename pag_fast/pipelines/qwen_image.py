"""Qwen-Image."""

from __future__ import annotations

from functools import partial

from .description import UNTESTED, PipelineDescription, true_cfg, true_scale

_QWEN = partial(
    PipelineDescription,
    kind="injected",
    layers=("blocks.40",),
    source=UNTESTED,
    passes="apart",
    # what CFG returns gets the norm of cond
    guidance="normalised",
    cfg=true_cfg,
    scale=true_scale,
)

_VARIANT = partial(_QWEN, base="QwenImagePipeline")

PIPELINES = (
    _QWEN("QwenImagePipeline"),
    _VARIANT("QwenImageImg2ImgPipeline"),
    _VARIANT("QwenImageInpaintPipeline"),
    _VARIANT("QwenImageEditPipeline"),
    _VARIANT("QwenImageEditPlusPipeline"),
    _VARIANT("QwenImageEditInpaintPipeline"),
    _VARIANT("QwenImageLayeredPipeline", normalised_by="cfg_normalize"),
    _VARIANT("QwenImageControlNetPipeline"),
    _VARIANT("QwenImageControlNetInpaintPipeline"),
)

"""AnimateDiff."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_UNET = partial(
    PipelineDescription,
    layers=("mid_block.*attn1",),
    source="PAG, arXiv 2403.17377",
    denoisers=("unet",),
)
_VARIANT = partial(_UNET, kind="injected", base="AnimateDiffPipeline")

PIPELINES = (
    _UNET("AnimateDiffPAGPipeline", kind="pag"),
    _UNET("AnimateDiffPipeline", kind="injected"),
    _VARIANT("AnimateDiffControlNetPipeline"),
    _VARIANT("AnimateDiffSDXLPipeline", guidance="normalised", normalised_by="guidance_rescale"),
    _VARIANT("AnimateDiffVideoToVideoPipeline"),
    _VARIANT("AnimateDiffVideoToVideoControlNetPipeline"),
    _VARIANT("PIAPipeline"),
)

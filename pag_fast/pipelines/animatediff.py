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

PIPELINES = (
    _UNET("AnimateDiffPAGPipeline", kind="pag"),
    _UNET("AnimateDiffPipeline", kind="injected"),
)

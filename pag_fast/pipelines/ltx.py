"""LTX-Video."""

from __future__ import annotations

from functools import partial

from .description import PipelineDescription

_LTX = partial(
    PipelineDescription,
    kind="injected",
    layers=("blocks.19",),
    source="LTX-Video 2B's own configuration of STG",
    guidance="normalised",
    normalised_by="guidance_rescale",
)

PIPELINES = (
    _LTX("LTXPipeline"),
    _LTX("LTXImageToVideoPipeline", base="LTXPipeline"),
    _LTX("LTXConditionPipeline", base="LTXPipeline"),
)
